import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from shared.metrics import VerifierMetrics, serve_metrics


def test_what_is_counted_can_be_scraped() -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    metrics.sessions.set(2)
    metrics.steps.inc()
    metrics.prefill_rows.inc(7)
    metrics.draft_rows.inc(4)
    metrics.self_decode_rows.inc()
    metrics.drafted_tokens.inc(4)
    metrics.accepted_tokens.inc(3)
    metrics.committed_tokens.inc(5)
    metrics.stale_draft_tokens.inc(6)
    metrics.step_duration_s.observe(0.04)
    with (
        serve_metrics(registry, "127.0.0.1", 0) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response,
    ):
        lines = set(response.read().decode().splitlines())
    assert {
        "outrider_sessions 2.0",
        "outrider_steps_total 1.0",
        'outrider_rows_total{kind="prefill"} 7.0',
        'outrider_rows_total{kind="draft"} 4.0',
        'outrider_rows_total{kind="self_decode"} 1.0',
        "outrider_drafted_tokens_total 4.0",
        "outrider_accepted_tokens_total 3.0",
        "outrider_committed_tokens_total 5.0",
        "outrider_stale_draft_tokens_total 6.0",
        'outrider_step_duration_seconds_bucket{le="0.05"} 1.0',
        'outrider_step_duration_seconds_bucket{le="0.03"} 0.0',
    } <= lines


def test_a_taken_port_is_named() -> None:
    registry = CollectorRegistry()
    with (
        serve_metrics(registry, "127.0.0.1", 0) as port,
        pytest.raises(OSError, match=rf"^metrics: cannot listen on 127\.0\.0\.1:{port}: Address already in use"),
        serve_metrics(registry, "127.0.0.1", port),
    ):
        pytest.fail("two servers on one port")
    with serve_metrics(registry, "127.0.0.1", port) as again:  # the port is free once the context is left
        assert again == port
