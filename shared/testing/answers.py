"""Whole answers from their first token on: how near the controllers come to what can be reached, by a simulated clock.

`sweep` leaves out the tokens in which the controllers learn, and most answers hold hardly more than these. Here the
shipped policies drive the real machines over recorded texts and drafts (`recorded`), one answer after another as in
one process, each beginning with what the ones before it taught. Time per token is compared with the limit that
`bench latency` prints (`shared.policy.limit`), and with cloud-only's, without any of the noise of real runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from shared.core.draft_path import Learnt
from shared.policy.limit import Measured, best_tpot_ms
from shared.policy.run_ahead import RunAhead
from shared.policy.scheduler import BestRate
from shared.testing.recorded import Recording
from shared.testing.speed import MARGIN, Script, Situation, TimedPair
from shared.testing.sweep import interpolated

GARBAGE = "garbage"  # a draft that is never right
RTTS_MS = (20.0, 50.0, 150.0)
_PROMPT_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Machine:
    """A measured pair of cores, ms: a target step by its rows, a drafted token, and what each prompt token adds."""

    cost_ms: tuple[float, ...]
    draft_ms: float
    cloud_read_ms: float
    edge_read_ms: float

    def situation(self, rtt_ms: float) -> Situation:
        """It and a link, for prompts of `_PROMPT_TOKENS`."""
        edge_ms, cloud_ms = self.edge_read_ms * _PROMPT_TOKENS, self.cloud_read_ms * _PROMPT_TOKENS
        return Situation(self.draft_ms, rtt_ms, self.cost_ms, edge_prompt_ms=edge_ms, cloud_prompt_ms=cloud_ms)


# SmolLM2-135M in bfloat16 beside its 4-bit ONNX draft, on cores with AVX-512 and on ones without.
MACHINES = {
    "avx512": Machine(interpolated([(1, 38.0), (8, 47.0), (16, 58.0)]), 9.7, 3.0, 1.35),
    "avx2": Machine(interpolated([(1, 150.0), (8, 185.0), (16, 215.0)]), 18.2, 6.0, 1.9),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation: a machine, a recorded draft or `GARBAGE`, a round trip."""

    machine: str
    draft: str
    rtt_ms: float


@dataclass(frozen=True, slots=True)
class Answers:
    """Mean time per output token in a cell, ms: ours, the limit and cloud-only's."""

    cell: Cell
    tpot_ms: float
    limit_tpot_ms: float
    cloud_only_tpot_ms: float

    @property
    def limit_fraction(self) -> float:
        """Of the speed that can be reached."""
        return self.limit_tpot_ms / self.tpot_ms

    @property
    def ratio_vs_cloud_only(self) -> float:
        """Speed, ours by cloud-only's."""
        return self.cloud_only_tpot_ms / self.tpot_ms


def cells(recording: Recording) -> Iterator[Cell]:
    """All of them."""
    for machine in MACHINES:
        for draft in (*recording.drafts, GARBAGE):
            for rtt_ms in RTTS_MS:
                yield Cell(machine, draft, rtt_ms)


def play(cell: Cell, recording: Recording, tokens: int, num_answers: int | None = None) -> Answers:
    """The recording's first answers, all by default, of `tokens` tokens each."""
    situation = MACHINES[cell.machine].situation(cell.rtt_ms)
    learnt: Learnt | None = None
    tpots_ms, measured = list[float](), list[Measured]()
    for stream in range(recording.num_streams if num_answers is None else num_answers):
        script = _script(recording, cell.draft, stream, tokens + MARGIN)
        policy = BestRate(lambda rows: situation.cost_ms[rows], len(situation.cost_ms) - 1)
        pair = TimedPair(situation, script, RunAhead(), policy, learnt=learnt)
        tpots_ms.append(pair.run(warm_up_tokens=1).tpot_ms)
        learnt = pair.edge.path.learnt
        measured.append(_measured(situation, script))
    cloud_only_ms = situation.cost_ms[1]
    limit_ms = cloud_only_ms if cell.draft == GARBAGE else best_tpot_ms(measured)
    return Answers(cell, fmean(tpots_ms), limit_ms, cloud_only_ms)


def _script(recording: Recording, draft: str, stream: int, length: int) -> Script:
    """As recorded; garbage is as sure of itself as the first draft is."""
    by_whom = next(iter(recording.drafts)) if draft == GARBAGE else draft
    confidences = (recording.confidences[by_whom][stream, :length] / 255).tolist()
    is_right = (recording.drafts[by_whom][stream, :length] == recording.tokens[stream, :length]).tolist()
    return Script.of_drafts([right and draft != GARBAGE for right in is_right], confidences)


def _measured(situation: Situation, script: Script) -> Measured:
    one_way_ms = situation.rtt_ms / 2
    edge_ms = situation.edge_prompt_ms + situation.draft_ms
    cloud_ms = situation.cloud_prompt_ms + situation.cost_ms[1]
    return Measured(
        right=script.is_right[:-MARGIN],
        draft_ms=situation.draft_ms,
        cost_ms=lambda rows: situation.cost_ms[rows],
        up_ms=one_way_ms,
        down_ms=one_way_ms,
        ahead_ms=cloud_ms - edge_ms,
    )
