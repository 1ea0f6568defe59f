"""Time per token of four ways to answer, over links: cloud-only, local, stop-and-wait at its best, and Outrider.

One edge process and two verifier processes stay alive throughout. For each prompt the ways run one after the other, so
a ratio is of two answers that the machine gave within a minute; figures are medians over the prompts and rounds.
Stop-and-wait has a verifier that waits for it (`self_decode: off`), and the number of drafts that a pilot found best.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import methodcaller
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.link import LinkSpec
from benchmarks.processes import BenchError, Child, edge, machine, verifier
from benchmarks.prompts import Prompt, load_prompts
from shared.policy.forecast import Measured, best_tpot_ms
from shared.testing.link_proxy import LinkProxy

FEWEST_TOKENS = 16  # of an answer that counts: a shorter one has hardly a time per token
PILOT_ROUNDS = (2, 4, 6, 8, 12, 16, 24, 32)  # drafts a round that stop-and-wait tries
PILOT_PROMPTS, PILOT_TOKENS = 2, 48
PILOT_SLOWER = 1.2
WAITING = {"speculation.self_decode": "off", "speculation.max_draft_rows": PILOT_ROUNDS[-1]}
WAYS = ("cloud_only", "stop_and_wait", "outrider", "local")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    links: Sequence[LinkSpec]
    drafts: Sequence[str]
    engine: str
    dtype: str
    prompts: Path | None
    num_prompts: int
    max_new_tokens: int
    rounds: int
    temperature: float
    seed: int
    ways: Sequence[str] = WAYS


@dataclass(frozen=True)
class Run:
    """One prompt answered in every way."""

    prompt: Prompt
    answers: dict[str, dict[str, Any]]
    right: list[bool]  # of the draft model at each position of the cloud's text
    draft_ms: float

    def tpot_ms(self, way: str) -> float:
        """Of one way, at the user."""
        return float(self.answers[way]["statistics"]["tpot_ms"])

    def ttft_ms(self, way: str) -> float:
        """Of one way, at the user."""
        return float(self.answers[way]["statistics"]["ttft_ms"])

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

    def __init__(self, edge_process: Child, link: LinkProxy, waiting_link: LinkProxy, costs: list[float]) -> None:
        self._edge = edge_process
        self._links = {way: waiting_link if way == "stop_and_wait" else link for way in WAYS}
        self._costs = costs

    def change(self, spec: LinkSpec) -> None:
        """From now on the link is like this."""
        for link in self._links.values():
            link.change(*spec.conditions())

    async def answer(self, way: str, prompt: Prompt, max_new_tokens: int, k: int = 0, **more: object) -> dict[str, Any]:
        """One answer. Raises `BenchError` where it was refused or the cloud was lost on the way."""
        address = f"127.0.0.1:{self._links[way].port}"
        question = {"way": way, "k": k, "address": address, "question": prompt.text, "max_new_tokens": max_new_tokens}
        answer = await self._edge.ask({"do": "answer", **question, **more})
        if answer["error"] or (way != "local" and "local" in answer["provenance"]):
            raise BenchError(f"{way}: {answer['error'] or 'the cloud was lost during an answer; is the machine busy?'}")
        return answer

    async def run(self, prompt: Prompt, plan: Plan, k: int) -> Run:
        """Every way, one after the other."""
        answers = {way: await self.answer(way, prompt, plan.max_new_tokens, k) for way in plan.ways}
        text = answers["cloud_only"]["tokens"]
        pattern = await self._edge.ask({"do": "pattern", "question": prompt.text, "tokens": text})
        return Run(prompt, answers, pattern["right"], pattern["draft_ms"])

    async def best_round(self, prompts: Sequence[Prompt]) -> tuple[int, dict[int, float]]:
        """Drafts a round with which stop-and-wait is fastest, and the TPOT of each that was tried.

        Longer rounds are not tried once two in a row were clearly slower than the best.
        """
        tried: dict[int, float] = {}
        slower = 0
        for k in PILOT_ROUNDS:
            answers = [await self.answer("stop_and_wait", prompt, PILOT_TOKENS, k) for prompt in prompts]
            tried[k] = round(sum(answer["statistics"]["tpot_ms"] for answer in answers) / len(answers), 2)
            slower = slower + 1 if tried[k] > PILOT_SLOWER * min(tried.values()) else 0
            if slower == 2:
                break
        return min(tried, key=lambda k: tried[k]), tried

    def measured(self, run: Run, spec: LinkSpec) -> Measured:
        """What the limit of this run follows from.

        The target's cost curve is that of its start, scaled to what a step of this prompt took while it streamed.
        """
        streamed_ms = run.answers["cloud_only"]["statistics"]["mean_verify_ms"]
        scale = streamed_ms / self._costs[0]
        last = len(self._costs)
        one_way_ms = (spec.rtt_ms + spec.jitter_ms) / 2
        return Measured(
            run.right, run.draft_ms, lambda rows: scale * self._costs[min(rows, last) - 1], one_way_ms, one_way_ms
        )


@contextlib.asynccontextmanager
async def bench(draft: str, plan: Plan) -> AsyncIterator[Bench]:
    """Everything up and warm while the context lasts."""
    target = {"target.dtype": plan.dtype}
    sampling = {"sampling.temperature": plan.temperature, "sampling.seed": plan.seed}
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(verifier(plan.engine, target))
        waiting = running
        if "stop_and_wait" in plan.ways:
            waiting = await stack.enter_async_context(
                verifier(plan.engine, target | {"speculation.self_decode": "off"})
            )
        links = [
            await stack.enter_async_context(LinkProxy("127.0.0.1", _port(child), seed=plan.seed))
            for child in (running, waiting)
        ]
        edge_process = await stack.enter_async_context(edge(draft, sampling))
        yield Bench(edge_process, links[0], links[1], running.hello["cost_ms"])


async def latency(plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `bench latency`: of the only case, or of each under `cases`."""
    prompts = load_prompts(plan.prompts, plan.num_prompts)
    cases = []
    for draft in plan.drafts:
        async with bench(draft, plan) as running:
            for spec in plan.links:
                running.change(spec)
                cases.append(
                    {
                        "link": spec.name,
                        "rtt_ms": spec.rtt_ms,
                        "draft": draft,
                        **await _case(running, prompts, spec, plan, progress),
                    }
                )
    common = {
        "engine": plan.engine,
        "dtype": plan.dtype,
        "max_new_tokens": plan.max_new_tokens,
        "rounds": plan.rounds,
        "temperature": plan.temperature,
        "prompts": "built in" if plan.prompts is None else plan.prompts.name,
        **machine(plan.seed, "torch", "llama-cpp-python"),
    }
    return {**cases[0], **common} if len(cases) == 1 else {**common, "cases": cases}


async def _case(
    running: Bench, prompts: Sequence[Prompt], spec: LinkSpec, plan: Plan, progress: Callable[[str], None]
) -> dict[str, Any]:
    for way in plan.ways:  # the first answer dials, and warms caches
        await running.answer(way, prompts[0], 8, 4)
    k, tried = 0, dict[int, float]()
    if "stop_and_wait" in plan.ways:
        k, tried = await running.best_round(prompts[:PILOT_PROMPTS])
        progress(f"{spec.name}: stop-and-wait is fastest with {k} drafts a round: {tried}")
    runs = []
    for _ in range(plan.rounds):
        for prompt in prompts:
            runs.append(run := await running.run(prompt, plan, k))
            progress(f"{spec.name}: {prompt.category}: " + ", ".join(f"{w} {run.tpot_ms(w):.1f}" for w in plan.ways))
    counted = [run for run in runs if run.is_long_enough]
    if not counted:
        raise BenchError(f"every answer was shorter than {FEWEST_TOKENS} tokens; give other --prompts")
    by_category: dict[str, list[Run]] = {}
    for run in counted:
        by_category.setdefault(run.prompt.category, []).append(run)
    return {
        **_figures(running, counted, spec, plan),
        "stop_and_wait_draft_tokens": k,
        "stop_and_wait_pilot_tpot_ms": tried,
        "runs": len(counted),
        "short_answers": len(runs) - len(counted),
        "spread": _spread(counted, plan),
        "by_category": {name: _figures(running, some, spec, plan) for name, some in by_category.items()},
    }


def _figures(running: Bench, runs: Sequence[Run], spec: LinkSpec, plan: Plan) -> dict[str, Any]:
    def middle(figure: Callable[[Run], float | None]) -> float | None:
        found = [value for run in runs if (value := figure(run)) is not None]
        return round(median(found), 3) if found else None

    def statistic(name: str) -> float | None:
        return middle(lambda run: run.answers["outrider"]["statistics"][name])

    measured = [running.measured(run, spec) for run in runs]
    limits = [best_tpot_ms([one]) for one in measured]
    pairs = list(zip(runs, limits, strict=True))
    with_stop_and_wait = "stop_and_wait" in plan.ways
    return {
        **{f"{way}_tpot_ms": middle(methodcaller("tpot_ms", way)) for way in plan.ways},
        "ratio_vs_cloud_only": middle(lambda run: run.tpot_ms("cloud_only") / run.tpot_ms("outrider")),
        "ratio_vs_stop_and_wait": middle(lambda run: run.tpot_ms("stop_and_wait") / run.tpot_ms("outrider"))
        if with_stop_and_wait
        else None,
        "limit_tpot_ms": round(median(limits), 3),
        "limit_fraction": round(median(limit / run.tpot_ms("outrider") for run, limit in pairs), 3),
        "acceptance_rate": statistic("acceptance_rate"),
        "draft_right_rate": middle(lambda run: sum(run.right) / len(run.right)),
        "draft_ms": middle(lambda run: run.draft_ms),
        "verify_ms": middle(lambda run: run.answers["cloud_only"]["statistics"]["mean_verify_ms"]),
        "outrider_verify_ms": statistic("mean_verify_ms"),
        "mean_acceptance_length": statistic("mean_acceptance_length"),
        "ttft_ms": {way: middle(methodcaller("ttft_ms", way)) for way in plan.ways},
        "bytes_up_per_token": statistic("bytes_up_per_token"),
        "bytes_down_per_token": statistic("bytes_down_per_token"),
        "accepted_per_position": _per_position(runs),
        "identical": all(run.is_identical for run in runs),
        "identical_runs": sum(run.is_identical for run in runs),
    }


def _per_position(runs: Sequence[Run]) -> list[float]:
    """How often a step's first draft was accepted, its first two, ...; of the steps that had drafts."""
    statistics = [run.answers["outrider"]["statistics"] for run in runs]
    steps = sum(one["num_drafts"] for one in statistics)
    counts = zip_longest(*(one["num_accepted_tokens_per_pos"] for one in statistics), fillvalue=0)
    return [round(sum(count) / steps, 4) for count in counts] if steps else []


def _spread(runs: Sequence[Run], plan: Plan) -> dict[str, Any]:
    """Least and largest of the runs."""
    ratios = {
        f"ratio_vs_{way}": [run.tpot_ms(way) / run.tpot_ms("outrider") for run in runs]
        for way in ("cloud_only", "stop_and_wait")
        if way in plan.ways
    }
    tpots = {f"{way}_tpot_ms": [run.tpot_ms(way) for run in runs] for way in plan.ways}
    return {name: [round(min(found), 3), round(max(found), 3)] for name, found in {**tpots, **ratios}.items()}


def _port(child: Child) -> int:
    return int(child.hello["address"].rpartition(":")[2])
