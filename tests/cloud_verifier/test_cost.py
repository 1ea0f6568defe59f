from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.engines.cost import CostCurve, measure_cost
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, Rows, TargetLimits

CURVE = CostCurve(((1, 30.0), (2, 34.0), (4, 34.0), (8, 50.0)))
samples = st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e4), min_size=1).map(lambda found: list(found.items()))


@pytest.mark.parametrize(
    ("rows", "ms"), [(0, 0.0), (1, 30.0), (2, 34.0), (3, 34.0), (4, 34.0), (5, 38.0), (7, 46.0), (8, 50.0)]
)
def test_the_curve_is_straight_between_its_points(rows: int, ms: float) -> None:
    assert CURVE(rows) == ms


def test_beyond_the_last_point_it_goes_on_along_the_last_two() -> None:
    assert CURVE(16) == 82.0


def test_below_the_first_point_and_with_one_point_it_is_flat() -> None:
    assert CostCurve(((4, 20.0), (8, 40.0)))(1) == 20.0
    assert CostCurve(((2, 7.0),))(100) == 7.0


@given(samples)
def test_a_measured_curve_never_falls(measured: list[tuple[int, float]]) -> None:
    curve = CostCurve.from_samples(measured)
    costs = [curve(rows) for rows in range(130)]
    # Interpolation rounds in the last bits.
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(costs))
    assert all(curve(rows) >= ms for rows, ms in measured)


def test_a_cost_that_falls_is_raised_to_the_one_before() -> None:
    assert CostCurve.from_samples([(4, 9.0), (1, 10.0), (2, 12.0)]).points == ((1, 10.0), (2, 12.0), (4, 12.0))


@pytest.mark.parametrize(
    "points", [(), ((0, 1.0),), ((2, 1.0), (1, 2.0)), ((1, 1.0), (1, 2.0)), ((1, 2.0), (2, 1.0)), ((1, 0.0),)]
)
def test_points_that_are_no_curve_are_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="cost curve needs"):
        CostCurve(points)


class Stopwatch:
    """A target engine that does nothing but let time pass, and the clock that shows it."""

    def __init__(self, ms: dict[int, float], warm_up_ms: float = 0.0, max_context: int = 8192) -> None:
        self.now_s = 0.0
        self.capabilities = Capabilities(can_rollback=True, can_tree=True, max_context=max_context)
        self.fingerprint = Fingerprint(size=10, digest=b"")
        self.limits = TargetLimits(max_rows=2048, cache_tokens=max_context, cache_sessions=8)
        self.length = 0
        self.runs: list[int] = []
        self._ms = ms
        self._warm_up_ms = warm_up_ms

    def clock(self) -> float:
        return self.now_s

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        (rows,) = batch
        assert rows.start == self.length
        count = len(rows.tokens)
        self.length += count
        if rows.first_selected == count:  # the prefix
            return [()]
        assert rows.first_selected == 0
        self.now_s += (self._ms[count] + self._warm_up_ms * (count not in self.runs)) / 1000
        self.runs.append(count)
        return [(1,) * count]

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        raise AssertionError("a measurement keeps nothing")

    def truncate(self, session_id: str, length: int) -> None:
        self.length = length

    def share(self, session_id: str, source_id: str, length: int) -> None:
        raise AssertionError("a measurement shares nothing")

    def release(self, session_id: str) -> None:
        self.length = -1

    def cost_ms(self, rows: int) -> float:
        raise AssertionError("asked while it is measured")


MS = {1: 10.0, 2: 12.0, 4: 12.0, 8: 20.0, 16: 30.0, 32: 50.0}


def test_measuring_gives_the_engines_cost_without_its_warm_up() -> None:
    engine = Stopwatch(MS, warm_up_ms=1000)
    curve = measure_cost(engine, budget_s=100, clock=engine.clock)
    assert [rows for rows, _ in curve.points] == list(MS)
    assert [ms for _, ms in curve.points] == pytest.approx(list(MS.values()))
    assert engine.runs.count(8) == 4
    assert engine.length == -1  # released


def test_a_slow_engine_is_measured_once_per_size() -> None:
    engine = Stopwatch({rows: 1000 * ms for rows, ms in MS.items()})
    measure_cost(engine, budget_s=2, clock=engine.clock)
    assert [engine.runs.count(rows) for rows in MS] == [2] * len(MS)


def test_a_short_context_is_not_exceeded() -> None:
    engine = Stopwatch(MS, max_context=20)
    assert [rows for rows, _ in measure_cost(engine, clock=engine.clock).points] == [1, 2, 4, 8]


def test_the_scratch_session_is_released_when_measuring_fails() -> None:
    engine = Stopwatch({1: 1.0})  # no cost for two rows: KeyError
    with pytest.raises(KeyError):
        measure_cost(engine, clock=engine.clock)
    assert engine.length == -1
