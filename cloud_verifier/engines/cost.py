"""How long a target forward takes by its number of rows: measured at load or profiled before, interpolated after.

`measure_cost` takes seconds and runs at every start. `profile_cost` takes a minute, runs when an operator asks for it,
and looks at several sessions in one step too: rows that are spread over sessions need more attention calls. Its curve
is stored for exactly this setting (`CostKey`) and `load_or_measure_cost` prefers it.
"""

import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Protocol, runtime_checkable

import structlog

from cloud_verifier.config import TargetConfig
from shared.core.effects import Rows
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Sampling
from shared.engine import TargetEngine
from shared.runtimes.hub import default_cache_dir, resolve_model

_log = structlog.get_logger(__name__)

MEASURED, PROFILED = "measured at start", "profiled"
_LIBRARIES = {"torch": "torch", "llama_cpp": "llama-cpp-python"}
_CPU_INFO = Path("/proc/cpuinfo")

_CACHED_TOKENS = 64  # whole blocks, so that sessions can share them
_ALWAYS_ROWS = (1, 2, 4, 8, 16)
_MORE_ROWS = (6, 32, 64)  # oneDNN has a knee at 6: the fifth and sixth row cost 1 ms, the next two 5
_CHUNK_ROWS = (128, 256)
_RUNS = 3
_PROFILE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PROFILE_RUNS = 7
_SESSION_ROWS = 8  # of a typical session in a step with many: its next_token's row and some drafts


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Duration of a forward in ms by its number of rows: straight between the points.

    Beyond them it goes on along the last two, or along the first and the last where that is steeper: noise that makes
    the end flat must not make rows free. `points` are (rows, ms), at least one, rows strictly ascending from 1 or more,
    ms positive and never falling. `origin` says for people where they are from. Raises `ValueError` where they are not.
    """

    points: tuple[tuple[int, float], ...]
    origin: str = "given"

    def __post_init__(self) -> None:
        rows = [point[0] for point in self.points]
        costs = [point[1] for point in self.points]
        if not rows or rows[0] < 1 or rows != sorted(set(rows)):
            raise ValueError(f"cost curve needs ascending numbers of rows from 1 on, not {rows}")
        if not all(map(math.isfinite, costs)) or costs[0] <= 0 or costs != sorted(costs):
            raise ValueError(f"cost curve needs positive costs that never fall, not {costs}")

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[int, float]], origin: str = "given") -> "CostCurve":
        """A curve through measured (rows, ms), a cost that falls being taken for noise and raised to the one before."""
        rows, costs = zip(*sorted(samples), strict=True)
        return cls(tuple(zip(rows, accumulate(costs, max), strict=True)), origin)

    def __call__(self, rows: int) -> float:
        """Expected ms of a forward of `rows` rows. No rows cost nothing; fewer than the first point cost as much."""
        if rows <= 0:
            return 0.0
        (first, first_ms), (last, last_ms) = self.points[0], self.points[-1]
        if rows <= first or first == last:
            return first_ms
        if rows > last:
            before, before_ms = self.points[-2]
            slope = max((last_ms - before_ms) / (last - before), (last_ms - first_ms) / (last - first))
            return last_ms + slope * (rows - last)
        right = bisect_left(self.points, (rows, 0.0))
        (low, low_ms), (high, high_ms) = self.points[right - 1], self.points[right]
        return high_ms + (high_ms - low_ms) * (rows - high) / (high - low)  # exact at every point


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in ms, ascending, of forwards of `rows` rows spread evenly over `sessions` sessions."""

    rows: int
    sessions: int
    runs_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median of the runs."""
        return median(self.runs_ms)


@runtime_checkable
class HasCost(Protocol):
    """An engine that tells where its cost curve is from."""

    @property
    def cost(self) -> CostCurve | None:
        """The curve behind `cost_ms`; None before it was measured."""
        ...


@dataclass(frozen=True, slots=True)
class CostKey:
    """Everything that the cost of a forward is known to depend on; a profile holds for an equal key only."""

    model: str
    engine: str
    dtype: str
    device: str
    threads: int
    cpu: str
    library: str

    @classmethod
    def of(cls, config: TargetConfig) -> "CostKey":
        """The key of a target on this machine. Raises `EngineError` for a model that is not there."""
        library = _LIBRARIES[config.engine]
        return cls(
            model=_file_identity(resolve_model(config.model, "target model")),
            engine=config.engine,
            dtype=config.dtype,
            device=config.device,
            threads=config.threads or num_cpus(),
            cpu=_cpu_name(),
            library=f"{library} {metadata.version(library)}",
        )

    def file(self, cache_dir: Path | None) -> Path:
        """Where its profile is kept: in `cache_dir`, None being the user's cache folder."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return (cache_dir or default_cache_dir()) / f"cost-{digest}.json"


def store_cost(key: CostKey, cache_dir: Path | None, timings: Sequence[Timing]) -> Path:
    """Keep a profile for `load_or_measure_cost`; its file. The file appears whole or not at all. Raises `OSError`."""
    stored = {"key": asdict(key), "points": profiled_curve(timings).points, "timings": [asdict(one) for one in timings]}
    file = key.file(cache_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(stored, indent=1))
    return partial.replace(file)


def load_or_measure_cost(engine: TargetEngine, key: CostKey, cache_dir: Path | None) -> CostCurve:
    """The curve that was profiled for exactly this setting, else one that is measured now.

    A profile that is damaged is not used, which is logged as a warning.
    """
    file = key.file(cache_dir)
    try:
        stored = json.loads(file.read_text())
        if stored["key"] != asdict(key):
            raise ValueError("it is of another setting")  # noqa: TRY301  # one of many ways to be damaged
        return CostCurve(tuple((int(rows), float(ms)) for rows, ms in stored["points"]), PROFILED)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:  # what text of another shape makes its reader raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _log.warning("a stored cost profile cannot be used; run cloud-verifier profile", file=str(file), reason=reason)
    return measure_cost(engine)


def measure_cost(
    engine: TargetEngine, budget_s: float = 3.0, clock: Callable[[], float] = time.perf_counter
) -> CostCurve:
    """Time chains of 1 to 256 rows, every row selected, on a scratch session of 64 cached tokens (fewer where few fit).

    Up to 64 rows each point is the best of 3 runs after one to warm up, of 1 run once `budget_s` is spent; a prompt's
    chunk of 128 or 256 rows runs once. More than 16 rows are left to the curve's end where they would not fit into the
    budget. The scratch session is released.
    """
    deadline = clock() + budget_s
    samples: list[tuple[int, float]] = []
    with _scratch(engine, clock) as scratch:
        for rows in scratch.fitting((*_ALWAYS_ROWS, *_MORE_ROWS, *_CHUNK_ROWS)):
            is_chunk = rows in _CHUNK_ROWS
            left_ms = (deadline - clock()) * 1000
            if rows not in _ALWAYS_ROWS and CostCurve.from_samples(samples)(rows) * (1 if is_chunk else 2) > left_ms:
                break
            if not is_chunk:
                scratch.time_ms(rows)
            runs_ms = [scratch.time_ms(rows)]
            while not is_chunk and len(runs_ms) < _RUNS and clock() <= deadline:
                runs_ms.append(scratch.time_ms(rows))
            samples.append((rows, min(runs_ms)))
    return CostCurve.from_samples(samples, MEASURED)


def profile_cost(
    engine: TargetEngine,
    progress: Callable[[float], object] = lambda _: None,
    budget_s: float = 90.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time 1 to 256 rows in one session, in sessions of 8 rows and in sessions of one row, as far as the engine takes.

    Each is run 7 times after one run to warm up, 3 times at least where `budget_s` does not allow more. `progress` is
    told the part that is done, 0 to 1. The scratch sessions are released.
    """
    timings: list[Timing] = []
    with _scratch(engine, clock) as scratch:
        sizes = scratch.fitting(_PROFILE_ROWS)
        spread = {(rows, math.ceil(rows / each)) for rows in sizes for each in (rows, _SESSION_ROWS, 1)}
        shapes = sorted(shape for shape in spread if scratch.fits(*shape))
        for done, (rows, sessions) in enumerate(shapes):
            progress(done / len(shapes))
            enough_at = clock() + budget_s / len(shapes)
            scratch.time_ms(rows, sessions)
            runs_ms: list[float] = []
            while len(runs_ms) < _RUNS or (len(runs_ms) < _PROFILE_RUNS and clock() < enough_at):
                runs_ms.append(scratch.time_ms(rows, sessions))
            timings.append(Timing(rows, sessions, tuple(sorted(runs_ms))))
    return timings


def profiled_curve(timings: Sequence[Timing]) -> CostCurve:
    """The curve to schedule by: medians of up to 8 rows in one session and of more in sessions of 8.

    One number of rows has many costs. That is the step which pays most with many sessions; with one, of more rows than
    8, it is a little too dear, and with sessions of one row each a little too cheap.
    """
    typical: dict[int, Timing] = {}
    for timing in timings:
        known = typical.get(timing.rows)
        wanted = math.ceil(timing.rows / _SESSION_ROWS)
        if known is None or abs(timing.sessions - wanted) < abs(known.sessions - wanted):
            typical[timing.rows] = timing
    return CostCurve.from_samples([(rows, timing.median_ms) for rows, timing in typical.items()], PROFILED)


class _Scratch:
    """Sessions to time forwards on; each begins with the same cached tokens, which all of them share."""

    def __init__(self, engine: TargetEngine, clock: Callable[[], float]) -> None:
        self.sessions: list[str] = []
        self._engine = engine
        self._clock = clock
        self._longest = min(engine.capabilities.max_context - 1, engine.limits.cache_tokens)
        self._cached = min(_CACHED_TOKENS, self._longest // 2, engine.limits.max_rows)

    def fitting(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of rows that one session can have in a step; 1 at least."""
        return [rows for rows in sizes if self.fits(rows, 1)] or [1]

    def fits(self, rows: int, sessions: int) -> bool:
        """Whether the engine takes these rows, spread over so many sessions."""
        limits, most = self._engine.limits, math.ceil(rows / sessions)
        blocks = math.ceil(self._cached / BLOCK_TOKENS) + sessions * math.ceil(most / BLOCK_TOKENS)
        can_share = self._cached % BLOCK_TOKENS == 0 and sessions <= limits.cache_sessions
        return (
            rows <= limits.max_rows
            and self._cached + most <= self._longest
            and (sessions == 1 or (can_share and blocks * BLOCK_TOKENS <= limits.cache_tokens))
        )

    def time_ms(self, rows: int, sessions: int = 1) -> float:
        """Duration of one forward; the caches are as before."""
        while len(self.sessions) < sessions:
            self._begin(f"cost-measurement-{len(self.sessions)}")
        first, more = divmod(rows, sessions)
        used = self.sessions[:sessions]
        batch = [self._chain(key, self._cached, first + (index < more)) for index, key in enumerate(used)]
        began = self._clock()
        self._engine.forward(batch)
        took_ms = (self._clock() - began) * 1000
        for key in used:
            self._engine.keep(key, self._cached, ())
        return took_ms

    def _begin(self, key: str) -> None:
        self.sessions.append(key)
        if len(self.sessions) > 1:
            self._engine.share(key, self.sessions[0], self._cached)
        elif self._cached:
            self._engine.forward([self._chain(key, 0, self._cached, selected=False)])
            self._engine.keep(key, 0, range(self._cached))

    def _chain(self, key: str, start: int, count: int, selected: bool = True) -> Rows:
        return Rows(
            session_id=key,
            start=start,
            tokens=(0,) * count,
            parents=tuple(range(-1, count - 1)),
            first_selected=0 if selected else count,
            sampling=Sampling(),
            prompt_len=0,
        )


@contextmanager
def _scratch(engine: TargetEngine, clock: Callable[[], float]) -> Iterator[_Scratch]:
    scratch = _Scratch(engine, clock)
    try:
        yield scratch
    finally:
        for key in scratch.sessions:
            engine.release(key)


def _file_identity(path: Path) -> str:
    """A model's files by name, size and time of change: reading gigabytes at every start would take too long."""
    files = [path] if path.is_file() else sorted([path / "config.json", *path.glob("*.safetensors")])
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return " ".join(f"{name}:{status.st_size}:{status.st_mtime_ns}" for name, status in found)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
