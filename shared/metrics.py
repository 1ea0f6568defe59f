"""What the verifier counts, for Prometheus. Counters only ever grow; rates are the reader's to compute.

What is counted with every step is kept in plain numbers, which a scrape reads: prometheus_client's own counters take a
lock for each addition, 18 microseconds a step on a slow core instead of 2.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

# From a GPU's step to that of a large model on a busy CPU, s.
_STEP_BOUNDS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
# Waits for a step: a step that one has just missed, or several under load, s.
_QUEUE_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)
# What Python takes between two forwards, s.
_PYTHON_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_COUNT_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


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


class _Total(Collector):
    """A counter that one thread adds to, by label where it has one."""

    def __init__(self, name: str, text: str, label: str = "", values: Sequence[str] = ("",)) -> None:
        self._described = name, text
        self._labels = [label] if label else []
        self.counts = dict.fromkeys(values, 0)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See `Collector`."""
        family = CounterMetricFamily(*self._described, labels=self._labels)
        for value, count in self.counts.items():
            family.add_metric([value] if self._labels else [], count)
        yield family


class _Distribution(Collector):
    """A histogram that one thread adds to; `bounds` ascend, and what is beyond the last one counts, too."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._described = name, text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count it with the least bound that it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See `Collector`."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(*self._described, buckets=buckets, sum_value=self._sum)


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

        def total(name: str, text: str, label: str = "", values: Sequence[str] = ("",)) -> dict[str, int]:
            made = _Total(f"outrider_{name}", text, label, values)
            registry.register(made)
            return made.counts

        def distribution(name: str, text: str, bounds: tuple[float, ...]) -> _Distribution:
            made = _Distribution(f"outrider_{name}", text, bounds)
            registry.register(made)
            return made

        self.sessions = gauge("sessions", "Sessions open now")
        self.parked_sessions = gauge("parked_sessions", "Sessions without a stream, kept for their return")
        self.kv_blocks = gauge("kv_blocks", "Blocks of the key/value cache")
        self.kv_blocks_used = gauge("kv_blocks_used", "Blocks that hold tokens")
        self.evictions = counter("evictions", "Sessions whose cache made room for another")
        self.refusals = Counter("outrider_refusals", "Sessions given up, by reason", ["code"], registry=registry)
        self.stale_draft_tokens = counter("stale_draft_tokens", "Draft tokens dropped as stale")
        kinds = ("prefill", "draft", "self_decode")
        self._rows = total("rows", "Rows evaluated by the target, by kind", "kind", kinds)
        self._steps = total("steps", "Target forwards")
        self._drafted = total("drafted_tokens", "Draft tokens evaluated")
        self._accepted = total("accepted_tokens", "Draft tokens accepted")
        self._recycled = total("recycled_tokens", "Tokens guessed by the verifier itself")
        self._committed = total("committed_tokens", "Tokens committed")
        self._step_rows = distribution("step_rows", "Rows of a step, of every kind", _COUNT_BOUNDS)
        self._step_sessions = distribution("step_sessions", "Sessions served by a step", _COUNT_BOUNDS)
        self._step_duration_s = distribution("step_duration_seconds", "Duration of a target forward", _STEP_BOUNDS_S)
        self._queue_s = distribution("queue_seconds", "Wait of a step's sessions, on average", _QUEUE_BOUNDS_S)
        self._schedule_s = distribution("schedule_seconds", "Time to plan a step", _PYTHON_BOUNDS_S)
        self._outside_s = distribution("outside_seconds", "Time between two forwards with work to do", _PYTHON_BOUNDS_S)

    def stepped(self, report: StepReport) -> None:
        """Count a step and observe how long its parts took."""
        self._steps[""] += 1
        self._rows["prefill"] += report.prefill_rows
        self._rows["draft"] += report.draft_rows
        self._rows["self_decode"] += report.self_decode_rows
        self._drafted[""] += report.num_drafted
        self._accepted[""] += report.num_accepted
        self._recycled[""] += report.num_recycled
        self._committed[""] += report.num_committed
        self._step_rows.observe(report.prefill_rows + report.draft_rows + report.self_decode_rows)
        self._step_sessions.observe(report.sessions)
        self._step_duration_s.observe(report.verify_ms / 1000)
        self._queue_s.observe(report.queue_ms / 1000)
        self._schedule_s.observe(report.schedule_ms / 1000)
        if report.outside_ms is not None:
            self._outside_s.observe(report.outside_ms / 1000)


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
