"""How long a target forward takes by its number of rows: measured at load, interpolated after."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from shared.core.messages import Sampling
from shared.engine import Rows, TargetEngine

_CACHED_TOKENS = 64
_ROWS = (1, 2, 4, 8, 16, 32)
_RUNS = 3
_SESSION = "cost-measurement"


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Duration of a forward in ms by its number of rows: straight between the points, and beyond along the last two.

    `points` are (rows, ms), at least one, rows strictly ascending from 1 or more, ms positive and never falling. Raises
    `ValueError` where they are not.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rows = [point[0] for point in self.points]
        costs = [point[1] for point in self.points]
        if not rows or rows[0] < 1 or rows != sorted(set(rows)):
            raise ValueError(f"cost curve needs ascending numbers of rows from 1 on, not {rows}")
        if costs[0] <= 0 or costs != sorted(costs):
            raise ValueError(f"cost curve needs positive costs that never fall, not {costs}")

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[int, float]]) -> "CostCurve":
        """A curve through measured (rows, ms), a cost that falls being taken for noise and raised to the one before."""
        rows, costs = zip(*sorted(samples), strict=True)
        return cls(tuple(zip(rows, accumulate(costs, max), strict=True)))

    def __call__(self, rows: int) -> float:
        """Expected ms of a forward of `rows` rows. No rows cost nothing; fewer than the first point cost as much."""
        if rows <= 0:
            return 0.0
        if rows <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        right = min(bisect_left(self.points, (rows, 0.0)), len(self.points) - 1)
        (low, low_ms), (high, high_ms) = self.points[right - 1], self.points[right]
        return high_ms + (high_ms - low_ms) * (rows - high) / (high - low)  # exact at every point


def measure_cost(
    engine: TargetEngine, budget_s: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> CostCurve:
    """Time chains of 1 to 32 rows, every row selected, on a scratch session of 64 cached tokens.

    Each point is the best of 3 runs after one to warm up; of 1 run once `budget_s` is spent. The session is released.
    """
    deadline = clock() + budget_s
    longest = engine.capabilities.max_context - 1
    cached = min(_CACHED_TOKENS, longest // 2)
    sizes = [rows for rows in _ROWS if cached + rows <= longest] or [1]
    try:
        engine.forward([_chain(0, cached, selected=False)])
        return CostCurve.from_samples([(rows, _best_ms(engine, cached, rows, deadline, clock)) for rows in sizes])
    finally:
        engine.release(_SESSION)


def _best_ms(engine: TargetEngine, cached: int, rows: int, deadline: float, clock: Callable[[], float]) -> float:
    best_ms = float("inf")
    for run in range(_RUNS + 1):
        began = clock()
        engine.forward([_chain(cached, rows, selected=True)])
        ended = clock()
        engine.truncate(_SESSION, cached)
        if run > 0:
            best_ms = min(best_ms, (ended - began) * 1000)
            if ended > deadline:
                break
    return best_ms


def _chain(start: int, count: int, selected: bool) -> Rows:
    return Rows(
        session_id=_SESSION,
        start=start,
        tokens=(0,) * count,
        parents=tuple(range(-1, count - 1)),
        first_selected=0 if selected else count,
        sampling=Sampling(),
        prompt_len=0,
    )
