import urllib.request
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from shared.metrics import StepReport, VerifierMetrics, serve_metrics


def test_what_is_counted_can_be_scraped() -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    metrics.sessions.set(2)
    metrics.parked_sessions.set(5)
    metrics.kv_blocks.set(64)
    metrics.kv_blocks_used.set(48)
    metrics.evictions.inc(3)
    metrics.refusals.labels("resource_exhausted").inc()
    report = StepReport(
        sessions=3,
        prefill_rows=7,
        draft_rows=4,
        self_decode_rows=1,
        num_drafted=4,
        num_accepted=3,
        num_recycled=1,
        num_committed=5,
        queue_ms=12.0,
        schedule_ms=0.3,
        verify_ms=40.0,
        outside_ms=1.5,
    )
    metrics.stepped(report)
    metrics.stepped(replace(report, outside_ms=None, prefill_rows=0))
    metrics.stale_draft_tokens.inc(6)
    with (
        serve_metrics(registry, "127.0.0.1", 0) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response,
    ):
        lines = set(response.read().decode().splitlines())
    assert {
        "outrider_sessions 2.0",
        "outrider_parked_sessions 5.0",
        "outrider_kv_blocks 64.0",
        "outrider_kv_blocks_used 48.0",
        "outrider_evictions_total 3.0",
        "outrider_steps_total 2.0",
        'outrider_rows_total{kind="prefill"} 7.0',
        'outrider_rows_total{kind="draft"} 8.0',
        'outrider_rows_total{kind="self_decode"} 2.0',
        "outrider_drafted_tokens_total 8.0",
        "outrider_accepted_tokens_total 6.0",
        "outrider_recycled_tokens_total 2.0",
        "outrider_committed_tokens_total 10.0",
        "outrider_stale_draft_tokens_total 6.0",
        'outrider_refusals_total{code="resource_exhausted"} 1.0',
        "outrider_step_sessions_sum 6.0",
        "outrider_step_rows_sum 17.0",  # 12 and 5
        'outrider_step_rows_bucket{le="8.0"} 1.0',
        'outrider_step_duration_seconds_bucket{le="0.05"} 2.0',
        'outrider_step_duration_seconds_bucket{le="0.03"} 0.0',
        'outrider_queue_seconds_bucket{le="0.02"} 2.0',
        'outrider_queue_seconds_bucket{le="0.01"} 0.0',
        'outrider_schedule_seconds_bucket{le="0.0005"} 2.0',
        'outrider_schedule_seconds_bucket{le="0.0002"} 0.0',
        "outrider_outside_seconds_count 1.0",
        "outrider_outside_seconds_sum 0.0015",
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
