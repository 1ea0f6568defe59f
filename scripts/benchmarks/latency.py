"""Time per token of four ways to answer, over links: cloud-only, local, stop-and-wait at its best, and Outrider.

An edge process for each draft and two verifier processes stay alive throughout. Each prompt is answered cloud-only once
and then in the other ways with one draft after the other, so a ratio is of two answers that the machine gave within a
minute or two; figures are medians over the prompts and rounds. Stop-and-wait has a verifier that waits for it
(`self_decode: off`), and the number of drafts that a pilot found best.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.link import LinkSpec
from benchmarks.processes import ROOT, BenchError, Child, edge, machine, verifier
from benchmarks.prompts import Prompt, load_prompts
from edge_agent.texts import FEWEST_TOKENS
from shared.policy.limit import Measured, best_tpot_ms
from shared.testing.link_proxy import LinkProxy

PILOT_ROUNDS = (2, 4, 6, 8, 12, 16, 24, 32)  # drafts a round that stop-and-wait tries
PILOT_PROMPTS, PILOT_TOKENS = 2, 48
PILOT_SLOWER = 1.2
_TRIES = 3  # to get an answer during which the cloud is not lost
_LEAST_MS = 0.01  # what a draft's time is rounded to; none takes no time
WAITING = {"speculation.self_decode": "off", "speculation.max_draft_rows": PILOT_ROUNDS[-1]}
WAYS = ("cloud_only", "outrider", "stop_and_wait", "local")  # machines drift: what is compared most stands together


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    links: Sequence[LinkSpec]
    drafts: Sequence[str]
    engine: str
    dtype: str
    prompts: Path | None
    categories: Sequence[str]
    num_prompts: int
    max_new_tokens: int
    rounds: int
    temperature: float
    seed: int
    ways: Sequence[str] = WAYS


@dataclass(frozen=True)
class Run:
    """One prompt answered in every way that one draft can."""

    prompt: Prompt
    answers: dict[str, dict[str, Any]]
    right: list[bool]  # of the draft model at each position of the cloud's text
    draft_ms: float
    prompt_ms: float  # the edge's, for reading the prompt

    def tpot_ms(self, way: str) -> float:
        """Of one way, at the user."""
        return float(self.answers[way]["statistics"]["tpot_ms"])

    @property
    def is_long_enough(self) -> bool:
        """Whether it counts."""
        return all(len(answer["tokens"]) >= FEWEST_TOKENS for answer in self.answers.values())

    @property
    def is_identical(self) -> bool:
        """Whether every way with a cloud gave the same tokens."""
        texts = {tuple(answer["tokens"]) for way, answer in self.answers.items() if way != "local"}
        return len(texts) == 1


class Bench:
    """The processes and the link between them."""

    def __init__(
        self, edges: Mapping[str, Child], link: LinkProxy, waiting_link: LinkProxy, costs: Sequence[float]
    ) -> None:
        self._edges = edges  # by draft
        self._links = {way: waiting_link if way == "stop_and_wait" else link for way in WAYS}
        self._costs = costs
        self.num_repeated = 0  # answers during which the cloud was lost: they were given again

    def change(self, spec: LinkSpec) -> None:
        """From now on the link is like this."""
        for link in self._links.values():
            link.change(*spec.conditions())

    def ways(self, draft: str, plan: Plan) -> list[str]:
        """Those of the plan that this draft can."""
        return [way for way in plan.ways if way != "local" or self._edges[draft].hello["can_write"]]

    async def answer(
        self, draft: str, way: str, prompt: Prompt, max_new_tokens: int, k: int = 0, **more: object
    ) -> dict[str, Any]:
        """One answer, asked for again where the cloud was lost on the way: a busy machine's hiccup passes for a stall.

        Raises `BenchError` where it was refused, or lost each time.
        """
        address = f"127.0.0.1:{self._links[way].port}"
        question = {"way": way, "k": k, "address": address, "question": prompt.text, "max_new_tokens": max_new_tokens}
        for _ in range(_TRIES):
            answer = await self._edges[draft].ask({"do": "answer", **question, **more})
            if answer["error"]:
                raise BenchError(f"{way}: {answer['error']}")
            if way == "local" or "local" not in answer["provenance"]:
                return answer
            self.num_repeated += 1
        raise BenchError(f"{way}: the cloud was lost during each of {_TRIES} answers; is the machine busy?")

    async def run(self, draft: str, prompt: Prompt, cloud_only: dict[str, Any], plan: Plan, k: int) -> Run:
        """Every way but cloud-only, one after the other."""
        ways = self.ways(draft, plan)[1:]
        answers = {way: await self.answer(draft, way, prompt, plan.max_new_tokens, k) for way in ways}
        question = {"do": "pattern", "question": prompt.text, "tokens": cloud_only["tokens"]}
        pattern = await self._edges[draft].ask(question)
        return Run(
            prompt, {"cloud_only": cloud_only, **answers}, pattern["right"], pattern["draft_ms"], pattern["prompt_ms"]
        )

    async def best_round(self, draft: str, prompts: Sequence[Prompt]) -> tuple[int, dict[int, float]]:
        """Drafts a round with which stop-and-wait is fastest, and the TPOT of each that was tried.

        Longer rounds are not tried once two in a row were clearly slower than the best.
        """
        tried: dict[int, float] = {}
        slower = 0
        for k in PILOT_ROUNDS:
            answers = [await self.answer(draft, "stop_and_wait", prompt, PILOT_TOKENS, k) for prompt in prompts]
            tried[k] = round(sum(answer["statistics"]["tpot_ms"] for answer in answers) / len(answers), 2)
            slower = slower + 1 if tried[k] > PILOT_SLOWER * min(tried.values()) else 0
            if slower == 2:
                break
        return min(tried, key=lambda k: tried[k]), tried

    def measured(self, run: Run, spec: LinkSpec, *, beside: bool = False) -> Measured:
        """What the limit of this run follows from.

        The target's cost curve is that of its start, scaled to what a step of this prompt took while it streamed, and
        the draft's time is that without a target. `beside`: both as they were while draft and target ran together. How
        long they read the prompt is measured apart in any case.
        """
        last = len(self._costs)
        draft_ms, step_ms, rows = run.draft_ms, run.answers["cloud_only"]["statistics"]["mean_verify_ms"], 1.0
        if beside:
            statistics = run.answers["outrider"]["statistics"]
            draft_ms, step_ms = max(statistics["draft_ms"], _LEAST_MS), statistics["mean_verify_ms"]
            rows += statistics["num_draft_tokens"] / statistics["num_steps"]
        scale = step_ms / float(np.interp(rows, range(1, last + 1), self._costs))
        one_way_ms = (spec.rtt_ms + spec.jitter_ms) / 2
        ahead_ms = run.answers["cloud_only"]["statistics"]["ttft_ms"] - 2 * one_way_ms - run.prompt_ms
        return Measured(
            run.right, draft_ms, lambda rows: scale * self._costs[min(rows, last) - 1], one_way_ms, one_way_ms, ahead_ms
        )


@contextlib.asynccontextmanager
async def bench(plan: Plan, root: Path = ROOT) -> AsyncIterator[Bench]:
    """Everything up and warm while the context lasts, of the checkout `root`."""
    target = {"target.dtype": plan.dtype}
    device = {"sampling.temperature": plan.temperature, "sampling.seed": plan.seed}
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(verifier(plan.engine, target, root))
        waiting = running
        if "stop_and_wait" in plan.ways:
            waiting = await stack.enter_async_context(verifier(plan.engine, target | WAITING, root))
        links = [
            await stack.enter_async_context(LinkProxy("127.0.0.1", _port(child), seed=plan.seed))
            for child in (running, waiting)
        ]
        edges = {draft: await stack.enter_async_context(edge(draft, device, root)) for draft in plan.drafts}
        yield Bench(edges, links[0], links[1], running.hello["cost_ms"])


async def latency(plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `bench latency`: of the only case, or of each under `cases`."""
    prompts = load_prompts(plan.prompts, plan.num_prompts, plan.categories)
    cases = []
    async with bench(plan) as running:
        for spec in plan.links:
            running.change(spec)
            cases += await _cases(running, prompts, spec, plan, progress)
    packages = [
        "torch",
        "llama-cpp-python",
        *(["onnxruntime"] if any("onnx" in draft for draft in plan.drafts) else []),
    ]
    common = {
        "engine": plan.engine,
        "dtype": plan.dtype,
        "max_new_tokens": plan.max_new_tokens,
        "rounds": plan.rounds,
        "temperature": plan.temperature,
        "repeated_answers": running.num_repeated,
        "prompts": "built in" if plan.prompts is None else plan.prompts.name,
        **machine(plan.seed, *packages),
    }
    return {**cases[0], **common} if len(cases) == 1 else {**common, "cases": cases}


async def _cases(
    running: Bench, prompts: Sequence[Prompt], spec: LinkSpec, plan: Plan, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The figures of each draft on one link."""
    pilots: dict[str, tuple[int, dict[int, float]]] = {}
    for draft in plan.drafts:
        for way in running.ways(draft, plan):  # the first answer dials, and warms caches
            await running.answer(draft, way, prompts[0], 8, 4)
        pilots[draft] = 0, {}
        if "stop_and_wait" in plan.ways:
            pilots[draft] = k, tried = await running.best_round(draft, prompts[:PILOT_PROMPTS])
            progress(f"{spec.name}: {draft}: stop-and-wait is fastest with {k} drafts a round: {tried}")
    runs: dict[str, list[Run]] = {draft: [] for draft in plan.drafts}
    for _ in range(plan.rounds):
        for prompt in prompts:
            cloud_only = await running.answer(plan.drafts[0], "cloud_only", prompt, plan.max_new_tokens)
            for draft in plan.drafts:
                run = await running.run(draft, prompt, cloud_only, plan, pilots[draft][0])
                runs[draft].append(run)
                took = ", ".join(f"{way} {run.tpot_ms(way):.1f}" for way in run.answers)
                progress(f"{spec.name}: {prompt.category}: {draft}: {took}")
    return [
        {
            "link": spec.name,
            "rtt_ms": spec.rtt_ms,
            "draft": draft,
            **_case(running, runs[draft], running.ways(draft, plan), spec),
            "stop_and_wait_draft_tokens": k,
            "stop_and_wait_pilot_tpot_ms": tried,
        }
        for draft, (k, tried) in pilots.items()
    ]


def _case(running: Bench, runs: Sequence[Run], ways: Sequence[str], spec: LinkSpec) -> dict[str, Any]:
    counted = [run for run in runs if run.is_long_enough]
    if not counted:
        raise BenchError(f"every answer was shorter than {FEWEST_TOKENS} tokens; give other --prompts")
    by_category: dict[str, list[Run]] = {}
    for run in counted:
        by_category.setdefault(run.prompt.category, []).append(run)
    return {
        **_figures(running, counted, ways, spec),
        "runs": len(counted),
        "short_answers": len(runs) - len(counted),
        "spread": _spread(counted, ways),
        "by_category": {name: _figures(running, some, ways, spec) for name, some in by_category.items()},
    }


def _figures(running: Bench, runs: Sequence[Run], ways: Sequence[str], spec: LinkSpec) -> dict[str, Any]:
    def middle(figure: Callable[[Run], float | None]) -> float | None:
        found = [value for run in runs if (value := figure(run)) is not None]
        return round(median(found), 3) if found else None

    def statistic(name: str, way: str = "outrider") -> float | None:
        return middle(lambda run: run.answers[way]["statistics"][name])

    limits = [best_tpot_ms([running.measured(run, spec)]) for run in runs]
    beside = [best_tpot_ms([running.measured(run, spec, beside=True)]) for run in runs]
    with_stop_and_wait = "stop_and_wait" in ways
    return {
        **{f"{way}_tpot_ms": statistic("tpot_ms", way) if way in ways else None for way in WAYS},
        "ratio_vs_cloud_only": middle(lambda run: run.tpot_ms("cloud_only") / run.tpot_ms("outrider")),
        "ratio_vs_stop_and_wait": middle(lambda run: run.tpot_ms("stop_and_wait") / run.tpot_ms("outrider"))
        if with_stop_and_wait
        else None,
        "limit_tpot_ms": round(median(limits), 3),
        "limit_fraction": _fraction(runs, limits),
        # While both run: on one machine they share the way to its memory, and neither is as fast as alone.
        "limit_beside_tpot_ms": round(median(beside), 3),
        "limit_beside_fraction": _fraction(runs, beside),
        "acceptance_rate": statistic("acceptance_rate"),
        "draft_sources": _sources(runs),
        "draft_right_rate": middle(lambda run: sum(run.right) / len(run.right)),
        "draft_ms": middle(lambda run: run.draft_ms),
        "verify_ms": statistic("mean_verify_ms", "cloud_only"),
        "outrider_draft_ms": statistic("draft_ms"),
        "outrider_verify_ms": statistic("mean_verify_ms"),
        "mean_acceptance_length": statistic("mean_acceptance_length"),
        "ttft_ms": {way: statistic("ttft_ms", way) for way in ways},
        "bytes_up_per_token": statistic("bytes_up_per_token"),
        "bytes_down_per_token": statistic("bytes_down_per_token"),
        "accepted_per_position": _per_position(runs),
        "identical": all(run.is_identical for run in runs),
        "identical_runs": sum(run.is_identical for run in runs),
    }


def _fraction(runs: Sequence[Run], limits: Sequence[float]) -> float:
    """The part of the limit that was reached."""
    return round(median(limit / run.tpot_ms("outrider") for run, limit in zip(runs, limits, strict=True)), 3)


def _sources(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Acceptance by what drafted a token, over all runs."""
    reports = [run.answers["outrider"]["statistics"]["draft_sources"] for run in runs]
    found = {}
    for source in sorted(set().union(*reports)):
        counts = [report[source] for report in reports if source in report]
        drafted, accepted = (sum(one[f"num_{what}_tokens"] for one in counts) for what in ("draft", "accepted"))
        found[source] = {"num_draft_tokens": drafted, "acceptance_rate": round(accepted / drafted, 4)}
    return found


def _per_position(runs: Sequence[Run]) -> list[float]:
    """How often a step's first draft was accepted, its first two, ...; of the steps that had drafts."""
    statistics = [run.answers["outrider"]["statistics"] for run in runs]
    steps = sum(one["num_drafts"] for one in statistics)
    counts = zip_longest(*(one["num_accepted_tokens_per_pos"] for one in statistics), fillvalue=0)
    return [round(sum(count) / steps, 4) for count in counts] if steps else []


def _spread(runs: Sequence[Run], ways: Sequence[str]) -> dict[str, Any]:
    """Least and largest of the runs."""
    ratios = {
        f"ratio_vs_{way}": [run.tpot_ms(way) / run.tpot_ms("outrider") for run in runs]
        for way in ("cloud_only", "stop_and_wait")
        if way in ways
    }
    tpots = {f"{way}_tpot_ms": [run.tpot_ms(way) for run in runs] for way in ways}
    return {name: [round(min(found), 3), round(max(found), 3)] for name, found in {**tpots, **ratios}.items()}


def _port(child: Child) -> int:
    return int(child.hello["address"].rpartition(":")[2])
