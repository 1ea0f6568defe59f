"""What the verifier counts, for Prometheus. Counters only ever grow; rates are the reader's to compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

# From a GPU's step to that of a large model on a busy CPU, s.
_STEP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
# Waits for a step: a step that one has just missed, or several under load, s.
_QUEUE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)
# What Python takes between two forwards, s.
_PYTHON_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. Durations in ms.

    `queue_ms`: how long its sessions had been ready, on average; `schedule_ms`: planning it; `verify_ms`: the forward;
    `outside_ms`: from the end of the forward before to the start of this one, None where the worker slept between them.
    """

    sessions: int
    prefill_rows: int
    draft_rows: int
    self_decode_rows: int
    num_drafted: int
    num_accepted: int
    num_recycled: int
    num_committed: int
    queue_ms: float
    schedule_ms: float
    verify_ms: float
    outside_ms: float | None


class VerifierMetrics:
    """The verifier's metrics on one registry.

    Acceptance rate is accepted / drafted. Stale draft tokens arrived but no longer extended the text; they count
    neither as drafted nor as accepted.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"outrider_{name}", text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"outrider_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"outrider_{name}", text, buckets=buckets, registry=registry)

        self.sessions = gauge("sessions", "Sessions open now")
        self.parked_sessions = gauge("parked_sessions", "Sessions without a stream, kept for their return")
        self.kv_blocks = gauge("kv_blocks", "Blocks of the key/value cache")
        self.kv_blocks_used = gauge("kv_blocks_used", "Blocks that hold tokens")
        self.evictions = counter("evictions", "Sessions whose cache made room for another")
        self.refusals = Counter("outrider_refusals", "Sessions given up, by reason", ["code"], registry=registry)
        self.stale_draft_tokens = counter("stale_draft_tokens", "Draft tokens dropped as stale")
        self.steps = counter("steps", "Target forwards")
        rows = Counter("outrider_rows", "Rows evaluated by the target, by kind", ["kind"], registry=registry)
        self._prefill_rows, self._draft_rows, self._self_decode_rows = map(
            rows.labels, ("prefill", "draft", "self_decode")
        )
        self.drafted_tokens = counter("drafted_tokens", "Draft tokens evaluated")
        self.accepted_tokens = counter("accepted_tokens", "Draft tokens accepted")
        self.recycled_tokens = counter("recycled_tokens", "Tokens guessed by the verifier itself")
        self.committed_tokens = counter("committed_tokens", "Tokens committed")
        self.step_rows = histogram("step_rows", "Rows of a step, of every kind", _COUNT_BUCKETS)
        self.step_sessions = histogram("step_sessions", "Sessions served by a step", _COUNT_BUCKETS)
        self.step_duration_s = histogram("step_duration_seconds", "Duration of a target forward", _STEP_BUCKETS_S)
        self.queue_s = histogram("queue_seconds", "Wait of a step's sessions, on average", _QUEUE_BUCKETS_S)
        self.schedule_s = histogram("schedule_seconds", "Time to plan a step", _PYTHON_BUCKETS_S)
        self.outside_s = histogram("outside_seconds", "Time between two forwards with work to do", _PYTHON_BUCKETS_S)

    def stepped(self, report: StepReport) -> None:
        """Count a step and observe how long its parts took."""
        self.steps.inc()
        for counter, count in (
            (self._prefill_rows, report.prefill_rows),
            (self._draft_rows, report.draft_rows),
            (self._self_decode_rows, report.self_decode_rows),
            (self.drafted_tokens, report.num_drafted),
            (self.accepted_tokens, report.num_accepted),
            (self.recycled_tokens, report.num_recycled),
            (self.committed_tokens, report.num_committed),
        ):
            if count:  # most steps have some of these only
                counter.inc(count)
        self.step_rows.observe(report.prefill_rows + report.draft_rows + report.self_decode_rows)
        self.step_sessions.observe(report.sessions)
        self.step_duration_s.observe(report.verify_ms / 1000)
        self.queue_s.observe(report.queue_ms / 1000)
        self.schedule_s.observe(report.schedule_ms / 1000)
        if report.outside_ms is not None:
            self.outside_s.observe(report.outside_ms / 1000)


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
