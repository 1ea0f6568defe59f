"""Two checkouts in turn: what a change did to the time of a token. Or two drafts of one: what the choice does.

Machines drift, and an answer varies by more than most changes bring: by a quarter in bfloat16, where near-ties fall
either way. So each version keeps an edge and a verifier of its own, each prompt is answered by one and at once by the
other (who begins changes from pair to pair), and what counts is the ratio of each such pair. In float32 both give the
same text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.latency import Plan, bench
from benchmarks.processes import ROOT, BenchError, machine
from benchmarks.prompts import load_prompts
from edge_agent.texts import FEWEST_TOKENS

_Answer = dict[str, Any]
_WARM_UP_TOKENS = 8
_FIGURES = ("tpot_ms", "num_steps", "num_draft_tokens", "num_accepted_tokens", "num_recycled_tokens",
            "wasted_draft_tokens", "draft_ms", "mean_verify_ms")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One prompt's answers: this version's, and the one's that it is held against."""

    category: str
    ours: _Answer
    theirs: _Answer

    @property
    def is_long_enough(self) -> bool:
        """Whether both have a time per token."""
        return min(len(self.ours["tokens"]), len(self.theirs["tokens"])) >= FEWEST_TOKENS

    @property
    def ratio(self) -> float:
        """This version's time per token over the other's."""
        return float(self.ours["statistics"]["tpot_ms"] / self.theirs["statistics"]["tpot_ms"])


async def versions(plan: Plan, against: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `bench versions`; the first of the plan's drafts is this version's, the last the other's.

    Raises `BenchError` where `against` is no checkout of this project.
    """
    if not (against / "scripts" / "benchmarks" / "edge_process.py").is_file():
        raise BenchError(f"{against} is no checkout of this project; make one with git worktree add {against} REVISION")
    prompts = load_prompts(plan.prompts, plan.num_prompts, plan.categories)
    (spec,), (draft, against_draft), pairs = plan.links, (plan.drafts[0], plan.drafts[-1]), list[Pair]()
    plans = [replace(plan, drafts=[one]) for one in (draft, against_draft)]
    async with bench(plans[0], ROOT) as ours, bench(plans[1], against) as theirs:
        sides = {True: (ours, draft), False: (theirs, against_draft)}
        for version, drafts in sides.values():
            version.change(spec)
            await version.answer(drafts, "outrider", prompts[0], _WARM_UP_TOKENS)
        for number, prompt in enumerate(prompts * plan.rounds):
            given = dict[bool, _Answer]()
            for is_ours in (True, False) if number % 2 else (False, True):
                version, drafts = sides[is_ours]
                given[is_ours] = await version.answer(drafts, "outrider", prompt, plan.max_new_tokens)
            pair = Pair(prompt.category, given[True], given[False])
            if pair.is_long_enough:
                pairs.append(pair)
            progress(f"{prompt.category}: {f'{pair.ratio:.3f}' if pair.is_long_enough else 'a short answer'}")
    return {
        "against": str(against),
        **compare(pairs),
        "link": spec.name,
        "draft": draft,
        "against_draft": against_draft,
        "dtype": plan.dtype,
        **machine(plan.seed, "torch"),
    }


def compare(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The geometric mean of the pairs' ratios with its standard error; the mean of each figure, ours and theirs.

    In bfloat16 one answer may take three times as long as its twin, which moves the mean; hence the median, and the
    number of pairs in which ours was the faster one. What the other version does not report is left out.

    Raises `BenchError` for less than two pairs: then nothing is known of how far they vary.
    """
    if len(pairs) < 2:
        raise BenchError(f"{len(pairs)} pair(s) of answers with {FEWEST_TOKENS} tokens and more; give more prompts")
    ratios = [pair.ratio for pair in pairs]
    logs = list(map(log, ratios))
    ratio = exp(mean(logs))
    means = {
        name: [
            round(mean(float(answer["statistics"][name]) for answer in answers), 3)
            for answers in ([pair.ours for pair in pairs], [pair.theirs for pair in pairs])
        ]
        for name in _FIGURES
        if name in pairs[0].theirs["statistics"]  # an older version may not know it
    }
    return {
        "ratio": round(ratio, 4),
        "ratio_standard_error": round(ratio * stdev(logs) / sqrt(len(pairs)), 4),
        "median_ratio": round(median(ratios), 4),
        "pairs": len(pairs),
        "faster_pairs": sum(one < 1 for one in ratios),
        "identical_pairs": sum(pair.ours["tokens"] == pair.theirs["tokens"] for pair in pairs),
        **means,
    }
