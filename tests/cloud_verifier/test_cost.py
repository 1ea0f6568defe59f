import json
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cloud_verifier.config import TargetConfig, load_cloud_config
from cloud_verifier.engines.cost import (
    MEASURED,
    PROFILED,
    CostCurve,
    CostKey,
    HasCost,
    Timing,
    load_or_measure_cost,
    measure_cost,
    profile_cost,
    profiled_curve,
    store_cost,
)
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, EngineError, Rows, TargetLimits

CURVE = CostCurve(((1, 30.0), (2, 34.0), (4, 34.0), (8, 50.0)))
samples = st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e4), min_size=1).map(lambda found: list(found.items()))


@pytest.mark.parametrize(
    ("rows", "ms"), [(0, 0.0), (1, 30.0), (2, 34.0), (3, 34.0), (4, 34.0), (5, 38.0), (7, 46.0), (8, 50.0)]
)
def test_the_curve_is_straight_between_its_points(rows: int, ms: float) -> None:
    assert CURVE(rows) == ms


def test_beyond_the_last_point_it_goes_on_along_the_last_two() -> None:
    assert CURVE(16) == 82.0


def test_an_end_that_noise_made_flat_does_not_make_rows_free() -> None:
    curve = CostCurve(((1, 10.0), (8, 24.0), (16, 40.0), (32, 40.0)))
    assert curve(63) == pytest.approx(40.0 + 31 * 30 / 31)


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
    "points",
    [
        (),
        ((0, 1.0),),
        ((2, 1.0), (1, 2.0)),
        ((1, 1.0), (1, 2.0)),
        ((1, 2.0), (2, 1.0)),
        ((1, 0.0),),
        ((1, float("nan")),),
    ],
)
def test_points_that_are_no_curve_are_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="cost curve needs"):
        CostCurve(points)


ROOMY = TargetLimits(max_rows=2048, cache_tokens=8192, cache_sessions=256)


class Stopwatch:
    """A target engine that does nothing but let time pass, and the clock that shows it.

    A forward takes `row_ms` a row and `session_ms` for each session after the first, on top of `base_ms`.
    """

    def __init__(
        self,
        base_ms: float = 10.0,
        row_ms: float = 1.0,
        session_ms: float = 0.0,
        warm_up_ms: float = 0.0,
        max_context: int = 8192,
        limits: TargetLimits = ROOMY,
    ) -> None:
        self.now_s = 0.0
        self.capabilities = Capabilities(can_rollback=True, can_tree=True, max_context=max_context)
        self.fingerprint = Fingerprint(size=10, digest=b"")
        self.limits = limits
        self.lengths: dict[str, int] = {}
        self.runs: list[tuple[int, int]] = []  # rows and sessions of each forward but the prefix's
        self.num_shared = 0
        self.broken_at: int | None = None
        self._costs = base_ms, row_ms, session_ms
        self._warm_up_ms = warm_up_ms

    def clock(self) -> float:
        return self.now_s

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        for rows in batch:
            assert rows.start == self.lengths.setdefault(rows.session_id, 0)
            self.lengths[rows.session_id] += len(rows.tokens)
            assert self.lengths[rows.session_id] < self.capabilities.max_context
        assert len(self.lengths) <= self.limits.cache_sessions
        blocks = sum(-(-(length - 64 * (key in self.sharing)) // BLOCK_TOKENS) for key, length in self.lengths.items())
        assert blocks * BLOCK_TOKENS <= self.limits.cache_tokens
        count = sum(len(rows.tokens) for rows in batch)
        assert count <= self.limits.max_rows
        if batch[0].first_selected == count:  # the prefix
            return [()]
        assert all(rows.first_selected == 0 for rows in batch)
        if count == self.broken_at:
            raise RuntimeError("out of memory")
        base_ms, row_ms, session_ms = self._costs
        shape = count, len(batch)
        warm_up_ms = self._warm_up_ms * (shape not in self.runs)
        self.now_s += (base_ms + row_ms * count + session_ms * (len(batch) - 1) + warm_up_ms) / 1000
        self.runs.append(shape)
        return [(1,) * len(rows.tokens) for rows in batch]

    @property
    def sharing(self) -> list[str]:
        return list(self.lengths)[1:]

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        assert tuple(rows) in ((), tuple(range(self.lengths[session_id])))
        self.lengths[session_id] = start + len(rows)

    def truncate(self, session_id: str, length: int) -> None:
        raise AssertionError("each forward is followed by `keep`, as the worker does it")

    def share(self, session_id: str, source_id: str, length: int) -> None:
        assert length % BLOCK_TOKENS == 0
        assert session_id not in self.lengths
        assert self.lengths[source_id] == length
        self.lengths[session_id] = length
        self.num_shared += 1

    def release(self, session_id: str) -> None:
        del self.lengths[session_id]

    def cost_ms(self, rows: int) -> float:
        raise AssertionError("asked while it is measured")


ALWAYS = (1, 2, 4, 8, 16)
SIZES = (1, 2, 4, 6, 8, 16, 32, 64, 128, 256)


def test_measuring_gives_the_engines_cost_without_its_warm_up() -> None:
    engine = Stopwatch(warm_up_ms=100)
    curve = measure_cost(engine, budget_s=100, clock=engine.clock)
    assert [rows for rows, _ in curve.points] == list(SIZES)
    assert [ms for _, ms in curve.points[:8]] == pytest.approx([10.0 + rows for rows in SIZES[:8]])
    assert [engine.runs.count((rows, 1)) for rows in SIZES] == [4] * 8 + [1] * 2
    assert curve.origin == MEASURED
    assert engine.lengths == {}  # released


def test_a_slow_engine_is_measured_once_per_size_and_not_beyond_a_step_of_one_session() -> None:
    engine = Stopwatch(base_ms=10_000, row_ms=1000)
    curve = measure_cost(engine, budget_s=2, clock=engine.clock)
    assert [engine.runs.count((rows, 1)) for rows in SIZES] == [2 * (rows in ALWAYS) for rows in SIZES]
    assert curve(64) == 74_000


@pytest.mark.parametrize(("row_ms", "budget_s", "last"), [(0.5, 3.0, 256), (1.5, 1.5, 128), (5.0, 3.0, 64)])
def test_large_sizes_are_measured_as_far_as_the_budget_goes(row_ms: float, budget_s: float, last: int) -> None:
    engine = Stopwatch(row_ms=row_ms)
    curve = measure_cost(engine, budget_s, engine.clock)
    assert curve.points[-1][0] == last
    assert engine.now_s <= budget_s


@pytest.mark.parametrize(
    ("max_context", "max_rows", "cache_tokens", "sizes", "profiled"),
    [
        (20, 2048, 8192, [1, 2, 4, 6, 8], 8),
        (8192, 14, 8192, [1, 2, 4, 6, 8], 12),
        (8192, 2048, 96, [1, 2, 4, 6, 8, 16, 32], 48),
        (2, 2048, 8192, [1], 1),
    ],
)
def test_no_limit_is_exceeded(
    max_context: int, max_rows: int, cache_tokens: int, sizes: list[int], profiled: int
) -> None:
    limits = TargetLimits(max_rows, cache_tokens, cache_sessions=1)
    engine = Stopwatch(max_context=max_context, limits=limits)
    assert [rows for rows, _ in measure_cost(engine, clock=engine.clock).points] == sizes
    again = Stopwatch(max_context=max_context, limits=limits)
    timings = profile_cost(again, clock=again.clock)
    assert {timing.sessions for timing in timings} == {1}
    assert max(timing.rows for timing in timings) == profiled
    assert again.num_shared == 0


def test_the_scratch_sessions_are_released_when_measuring_fails() -> None:
    engine = Stopwatch()
    engine.broken_at = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_cost(engine, clock=engine.clock)
    assert engine.lengths == {}
    engine.broken_at = 12
    with pytest.raises(RuntimeError, match="out of memory"):
        profile_cost(engine, clock=engine.clock)
    assert engine.num_shared > 0
    assert engine.lengths == {}


def test_a_profile_spreads_rows_over_sessions_and_is_curved_by_sessions_of_eight() -> None:
    engine = Stopwatch(base_ms=1.0, row_ms=0.01, session_ms=0.1, warm_up_ms=50)
    told: list[float] = []
    timings = profile_cost(engine, told.append, clock=engine.clock)
    shapes = [(timing.rows, timing.sessions) for timing in timings]
    assert shapes == sorted(set(shapes))
    assert {(1, 1), (12, 1), (12, 2), (12, 12), (256, 1), (256, 32), (256, 256)} <= set(shapes)
    assert all(len(timing.runs_ms) == 7 for timing in timings)
    assert all(engine.runs.count(shape) == 8 for shape in shapes)
    assert told == sorted(told)
    assert told[0] == 0.0
    for timing in timings:
        expected = 1.0 + 0.01 * timing.rows + 0.1 * (timing.sessions - 1)
        assert timing.runs_ms == pytest.approx((expected,) * 7)
    curve = profiled_curve(timings)
    assert curve.origin == PROFILED
    assert (curve(8), curve(12), curve(256)) == pytest.approx((1.08, 1.22, 6.66))
    assert engine.lengths == {}


def test_a_slow_profile_runs_three_times_each() -> None:
    engine = Stopwatch(base_ms=10_000)
    timings = profile_cost(engine, budget_s=60, clock=engine.clock)
    assert {len(timing.runs_ms) for timing in timings} == {3}


def test_sessions_are_no_more_than_the_cache_takes() -> None:
    few = TargetLimits(max_rows=2048, cache_tokens=8192, cache_sessions=20)
    engine = Stopwatch(limits=few)
    assert max(timing.sessions for timing in profile_cost(engine, clock=engine.clock)) == 16
    small = TargetLimits(max_rows=2048, cache_tokens=(4 + 12) * BLOCK_TOKENS, cache_sessions=256)
    engine = Stopwatch(limits=small)
    timings = profile_cost(engine, clock=engine.clock)  # the engine itself checks that it fits
    assert (12, 12) in [(timing.rows, timing.sessions) for timing in timings]
    assert max(timing.sessions for timing in timings) == 12


def test_a_timings_median_is_not_its_mean() -> None:
    assert Timing(1, 1, (1.0, 2.0, 9.0)).median_ms == 2.0


# -- profiles on disk -------------------------------------------------------------------------------------------------

KEY = CostKey("model.gguf:5:7", "torch", "float32", "cpu", 1, "a processor", "torch 2")
TIMINGS = [Timing(1, 1, (9.0, 10.0, 11.0)), Timing(8, 1, (20.0,)), Timing(16, 1, (1.0,)), Timing(16, 2, (40.0,))]


def target_config(**target: object) -> TargetConfig:
    overrides = {f"target.{name}": value for name, value in target.items()}
    return load_cloud_config(environ={}, overrides=overrides).target


def test_a_stored_profile_is_used_for_exactly_its_setting(tmp_path: Path) -> None:
    file = store_cost(KEY, tmp_path / "new", TIMINGS)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name]
    engine = Stopwatch()
    with capture_logs() as logs:
        curve = load_or_measure_cost(engine, KEY, tmp_path / "new")
    assert curve == CostCurve(((1, 10.0), (8, 20.0), (16, 40.0)), PROFILED)
    assert (engine.runs, logs) == ([], [])
    changes: list[dict[str, Any]] = [
        *({name: "other"} for name in ("model", "engine", "dtype", "device", "cpu", "library")),
        {"threads": 2},
    ]
    for change in changes:
        other = replace(KEY, **change)
        assert other.file(tmp_path) != KEY.file(tmp_path)
        assert load_or_measure_cost(Stopwatch(), other, tmp_path / "new").origin == MEASURED


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'key'"),
        ('{"key": {}, "points": [[1, 2]]}', "ValueError: it is of another setting"),
        ('{"key": KEY}', "KeyError: 'points'"),
        ('{"key": KEY, "points": 3}', "TypeError"),
        ('{"key": KEY, "points": []}', "ValueError: cost curve needs"),
        ('{"key": KEY, "points": [[1, NaN]]}', "ValueError: cost curve needs"),
        ('{"key": KEY, "points": [[1, 2, 3]]}', "ValueError"),
        ('{"key": KEY, "points": [[1, "x"]]}', "ValueError"),
        ("\xff", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_profile_is_warned_of_and_measured_anew(tmp_path: Path, text: str, reason: str) -> None:
    file = store_cost(KEY, tmp_path, TIMINGS)
    key = json.dumps(json.loads(file.read_text())["key"])
    file.write_bytes(text.replace("KEY", key).encode("latin-1"))
    with capture_logs() as logs:
        curve = load_or_measure_cost(Stopwatch(), KEY, tmp_path)
    assert curve.origin == MEASURED
    (entry,) = logs
    assert (entry["log_level"], entry["file"]) == ("warning", str(file))
    assert entry["reason"].startswith(reason)
    store_cost(KEY, tmp_path, TIMINGS)  # profiling again mends it
    assert load_or_measure_cost(Stopwatch(), KEY, tmp_path).origin == PROFILED


def test_a_key_names_the_files_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    key = CostKey.of(target_config(model=str(model), threads=3, dtype="float32"))
    assert (key.engine, key.dtype, key.device, key.threads) == ("torch", "float32", "cpu", 3)
    assert key.library.startswith("torch 2")
    assert key.cpu
    assert CostKey.of(target_config(model=str(model), threads=3, dtype="float32")) == key
    os.utime(model, ns=(5, 5))
    assert CostKey.of(target_config(model=str(model), threads=3, dtype="float32")) != key
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "b.safetensors", "a.safetensors", "readme.md"):
        (folder / name).write_text(name)
        os.utime(folder / name, ns=(7, 7))
    key = CostKey.of(target_config(model=str(folder), threads=0))
    assert key.model == "a.safetensors:13:7 b.safetensors:13:7 config.json:11:7"
    assert 1 <= key.threads <= (os.cpu_count() or 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert key.file(None).parent == tmp_path / "cache" / "outrider"
    with pytest.raises(EngineError, match="no such file or folder"):
        CostKey.of(target_config(model=str(tmp_path / "gone.gguf")))


def test_an_engine_without_a_curve_has_no_origin() -> None:
    assert not isinstance(Stopwatch(), HasCost)
