"""What the verifier counts, for Prometheus. Counters only ever grow; rates are the reader's to compute."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

# From a GPU's step to that of a large model on a busy CPU, s.
_STEP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class VerifierMetrics:
    """The verifier's metrics on one registry.

    Acceptance rate is accepted / drafted. Stale draft tokens arrived but no longer extended the text; they count
    neither as drafted nor as accepted.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("outrider_sessions", "Sessions open now", registry=registry)
        self.steps = Counter("outrider_steps", "Target forwards", registry=registry)
        rows = Counter("outrider_rows", "Rows evaluated by the target, by kind", ["kind"], registry=registry)
        self.prefill_rows = rows.labels("prefill")
        self.draft_rows = rows.labels("draft")
        self.self_decode_rows = rows.labels("self_decode")
        self.drafted_tokens = Counter("outrider_drafted_tokens", "Draft tokens evaluated", registry=registry)
        self.accepted_tokens = Counter("outrider_accepted_tokens", "Draft tokens accepted", registry=registry)
        self.committed_tokens = Counter("outrider_committed_tokens", "Tokens committed", registry=registry)
        self.stale_draft_tokens = Counter(
            "outrider_stale_draft_tokens", "Draft tokens dropped as stale", registry=registry
        )
        self.step_duration_s = Histogram(
            "outrider_step_duration_seconds", "Duration of a target forward", buckets=_STEP_BUCKETS_S, registry=registry
        )


@contextmanager
def serve_metrics(registry: CollectorRegistry, address: str, port: int) -> Iterator[int]:
    """Serve `registry` at http://address:port/metrics from a thread of its own while the context lasts.

    Yields the port in use: `port`, or a free one where that is 0. Raises OSError, in one line, where it cannot listen.
    """
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise OSError(f"metrics: cannot listen on {address}:{port}: {error.strerror or error}") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
