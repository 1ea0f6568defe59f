"""The two controllers against every fixed setting, over a grid of situations.

In each cell the shipped policies drive the real machines (`speed.TimedPair`), and are compared with the best fixed
setting chosen with hindsight for that cell (`limit.best_reachable`) on the same luck: which drafts are right is fixed
by position and seed, the same in both. The first tokens, in which the controllers learn, are not measured.

The comparison is uneven in one way, against the controllers: they keep to a budget of messages (four to three steps,
or 24 a second where steps are longer), while a fixed setting may send every token at once where messages cost nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from shared.policy.run_ahead import RunAhead
from shared.policy.scheduler import BestRate
from shared.testing.limit import Limit, best_reachable
from shared.testing.speed import MARGIN, Script, Situation, Speed, TimedPair

DRAFTS_MS = (0.05, 1.0, 5.0, 20.0)
RTTS_MS = (5.0, 20.0, 50.0, 150.0)
ACCEPTANCES = (0.3, 0.6, 0.8, 0.9, 0.97)
SLOW_RATE = 8.0  # bytes/ms, 64 kbit/s: tokens take half a millisecond, and each message's frames ten
_MAX_ROWS = 64


def interpolated(points: Sequence[tuple[int, float]]) -> tuple[float, ...]:
    """A cost curve through these (rows, ms), up to `_MAX_ROWS` rows."""
    costs = [0.0]
    for rows in range(1, _MAX_ROWS + 1):
        right = next((index for index, (at, _) in enumerate(points) if at >= rows), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[max(right - 1, 0)], points[max(right, 1)]
        costs.append(low_ms + (high_ms - low_ms) * (rows - low) / (high - low))
    return tuple(costs)


CURVES = {
    "flat": interpolated([(1, 30.0), (2, 30.9)]),  # a GPU
    "steep": interpolated([(1, 14.0), (2, 29.0), (4, 37.0), (8, 45.0), (16, 61.0)]),  # llama.cpp on a CPU
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation, and how often drafts are right in it."""

    curve: str
    draft_ms: float
    rtt_ms: float
    rate: float
    acceptance: float

    @property
    def situation(self) -> Situation:
        """Its durations."""
        return Situation(self.draft_ms, self.rtt_ms, CURVES[self.curve], self.rate)


@dataclass(frozen=True, slots=True)
class Compared:
    """What the controllers came to in a cell, and the limit there."""

    cell: Cell
    ours: Speed
    limit: Limit

    @property
    def vs_best_fixed(self) -> float:
        """Time per token, ours by that of the best fixed setting: 1.05 is 5 % slower."""
        return self.ours.tpot_ms / self.limit.tpot_ms

    @property
    def vs_cloud_only(self) -> float:
        """Speed, ours by that of cloud-only: 0.97 is 3 % slower."""
        return self.limit.cloud_only_ms / self.ours.tpot_ms


def cells() -> Iterator[Cell]:
    """The grid."""
    for curve in CURVES:
        for acceptance in ACCEPTANCES:
            for draft_ms in DRAFTS_MS:
                for rtt_ms in RTTS_MS:
                    yield Cell(curve, draft_ms, rtt_ms, inf, acceptance)
            for draft_ms in (0.05, 5.0):
                yield Cell(curve, draft_ms, 50.0, SLOW_RATE, acceptance)


def compare(
    cell: Cell, seed: int, tokens: int = 400, warm_up_tokens: int = 100, policy: RunAhead | None = None
) -> Compared:
    """Measure `tokens` tokens in a cell."""
    situation = cell.situation
    script = Script.of_acceptance(cell.acceptance, warm_up_tokens + tokens + MARGIN, seed)
    step_policy = BestRate(lambda rows: situation.cost_ms[rows], _MAX_ROWS)
    ours = TimedPair(situation, script, policy or RunAhead(), step_policy).run(warm_up_tokens)
    return Compared(cell, ours, best_reachable(situation, script.is_right, warm_up_tokens))
