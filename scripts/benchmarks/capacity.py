"""How many edges one verifier carries: a server process on the first core, a fleet of edges on the last one."""

import asyncio
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any, Literal

from benchmarks import emulated
from benchmarks.fleet import FleetEdge
from benchmarks.processes import BenchError, Child, machine, pin, verifier
from edge_agent.config import EdgeConfig, load_edge_config
from edge_agent.setup import make_policy, make_settings
from shared.core.messages import Fingerprint, Sampling, Want
from shared.core.settings import Request
from shared.testing.recorded import RecordedDraft, Recording

Engine = Literal["recorded", "torch", "llama_cpp"]

PROMPT_TOKENS = 64
NEW_TOKENS = 128
FEWEST_TOKENS = 32  # that an answer must have shown within a run to have a TPOT
STAGGER_S = 0.025  # from one session's beginning to the next one's, about: prompts take their time
SHARE_IN_TIME = 0.95  # of the answers must keep the TPOT limit for a number of sessions to count as served


@dataclass(frozen=True)
class Load:
    """One measured run of a fleet."""

    window_s: float
    tpots: list[float]  # of each answer, over what it showed within the window; ms, ascending
    tokens_by_session: list[int]  # verified ones shown within the window
    wrong_tokens: int
    local_tokens: int
    refused: int
    fleet_cpu: float
    server: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Verified tokens of all sessions."""
        return sum(self.tokens_by_session) / self.window_s


class Fleet:
    """How the edges of a run are made: from a recording, or plain streams of a real target."""

    def __init__(self, config: EdgeConfig, draft: str, draft_ms: float, vocabulary: Fingerprint, seed: int) -> None:
        self._config = config
        self._draft = draft
        self._draft_ms = draft_ms
        self._vocabulary = vocabulary
        self._seed = seed
        self.recording = Recording.load()

    async def load(self, running: Child, sessions: int, seconds: float, warmup_s: float, want: Want) -> Load:
        """Run `sessions` edges for `warmup_s` and then `seconds`; what they saw in the latter."""
        policy, settings = make_policy(self._config), make_settings(self._config)
        random = Random(self._seed)

        def request(index: int, answered: int) -> Request:
            number = index + answered * 1_000_000 // self.recording.num_streams * self.recording.num_streams
            prompt = self.recording.prompt(number, PROMPT_TOKENS)
            name = f"s{index}-{answered}"
            return Request(name, prompt, NEW_TOKENS, self._vocabulary, Sampling(), want=want)

        edges = [
            FleetEdge(
                index,
                self._config.model_copy(
                    update={"verifier": self._config.verifier.model_copy(update={"address": running.hello["address"]})}
                ),
                settings,
                policy,
                RecordedDraft(self.recording, self._draft),
                self._draft_ms,
                request,
            )
            for index in range(sessions)
        ]
        tasks = []
        gc.collect()
        gc.disable()  # the edges' own devices would have processors of their own
        for edge in edges:
            tasks.append(asyncio.create_task(edge.run()))
            await asyncio.sleep(random.uniform(0.5, 1.5) * STAGGER_S)
        await asyncio.sleep(warmup_s)
        await running.ask({"do": "begin"})
        began, began_cpu_s = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        ended, cpu_s = time.monotonic(), time.process_time() - began_cpu_s
        report = await running.ask({"do": "report"})
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        gc.enable()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        require_steps(report, sessions, cpu_s / (ended - began))
        return self._judge(edges, began, ended, cpu_s, report)

    def _judge(self, edges: list[FleetEdge], began: float, ended: float, cpu_s: float, report: dict[str, Any]) -> Load:
        answers = [answer for edge in edges for answer in edge.answers]
        wrong = 0
        if self._vocabulary == self.recording.fingerprint:
            for answer in answers:
                said = self.recording.text(answer.request.prompt, len(answer.tokens))
                wrong += sum(ours != theirs for ours, theirs in zip(answer.tokens, said, strict=True))
        return Load(
            window_s=ended - began,
            tpots=sorted(one.tpot_ms(began, ended) for one in answers if one.shown_in(began, ended) >= FEWEST_TOKENS),
            tokens_by_session=[sum(one.shown_in(began, ended) for one in edge.answers) for edge in edges],
            wrong_tokens=wrong,
            local_tokens=sum(answer.local_tokens for answer in answers),
            refused=sum(edge.refusal is not None for edge in edges),
            fleet_cpu=cpu_s / (ended - began),
            server=report,
        )


def require_steps(report: dict[str, Any], sessions: int, fleet_cpu: float) -> None:
    """Raise `BenchError` where the verifier made no step: mostly because the edges, which share a core, all lost it."""
    if not report["steps"]:
        raise BenchError(
            f"the verifier made no step for {sessions} edges, whose one core was {fleet_cpu:.0%} busy; "
            "give fewer --sessions or more --seconds"
        )


def jain(values: list[float]) -> float:
    """Jain's fairness index: 1 where all are equal, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def percentile(ascending: list[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed. Raises `BenchError` where there is none."""
    if not ascending:
        raise BenchError("no answer was completed in time; give more --seconds or fewer --sessions")
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


async def recorded(
    sessions: int, seconds: float, draft: str, draft_ms: float, limit_ms: float, seed: int, search_seconds: float
) -> dict[str, Any]:
    """The figures of `bench capacity --engine recorded`."""
    recording = Recording.load()
    config = load_edge_config(environ=os.environ, overrides={})
    fleet = Fleet(config, draft, draft_ms, recording.fingerprint, seed)
    pin(-1)
    async with verifier("recorded", {"limits.max_sessions": 4 * sessions}) as running:
        plain = await fleet.load(running, sessions, seconds, seconds / 2, Want.STREAM)
        plain_p50_ms, plain_p95_ms = percentile(plain.tpots, 0.5), percentile(plain.tpots, 0.95)
        load = await fleet.load(running, sessions, seconds, seconds / 2, Want.SPECULATE)
        p50_ms, p95_ms = percentile(load.tpots, 0.5), percentile(load.tpots, 0.95)

        async def served(want: Want) -> int:
            """The largest number of sessions that keep the limit, by bisection; 0 where not even one does."""
            low, high = 0, sessions + 1
            while high - low > max(1, low // 16):
                middle = (low + high) // 2
                tried = await fleet.load(running, middle, search_seconds, search_seconds / 2, want)
                in_time = sum(tpot <= limit_ms for tpot in tried.tpots)
                low, high = (middle, high) if in_time and in_time >= SHARE_IN_TIME * len(tried.tpots) else (low, middle)
            return low

        speculative, cloud_only = await served(Want.SPECULATE), await served(Want.STREAM)
    by_stream = [load.tokens_by_session[index :: recording.num_streams] for index in range(recording.num_streams)]
    equals = [jain(list(map(float, group))) for group in by_stream if len(group) > 1]
    in_time = sum(tpot <= limit_ms for tpot in load.tpots)
    return {
        "label": emulated.LABEL,
        "emulated": True,
        "sessions": sessions,
        "draft": draft,
        "draft_ms": draft_ms,
        "tpot_limit_ms": limit_ms,
        "tpot_p50_ms": round(p50_ms, 1),
        "tpot_p95_ms": round(p95_ms, 1),
        "tokens_per_s": round(load.tokens_per_s, 1),
        "goodput_tokens_per_s": round(load.tokens_per_s * in_time / len(load.tpots), 1),
        "jain_index": round(min(equals), 4) if equals else None,
        "jain_index_all": round(jain(list(map(float, load.tokens_by_session))), 4),
        **{name: load.server[name] for name in ("scheduler_ms_per_step", "overhead_fraction", "acceptance_rate")},
        **{name: load.server[name] for name in ("steps", "sessions_per_step", "rows_per_step", "verify_ms_per_step")},
        "sessions_in_slo_speculative": speculative,
        "sessions_in_slo_cloud_only": cloud_only,
        "capacity_ratio": round(speculative / cloud_only, 3) if cloud_only else None,
        "cloud_only": {
            "tpot_p50_ms": round(plain_p50_ms, 1),
            "tpot_p95_ms": round(plain_p95_ms, 1),
            "tokens_per_s": round(plain.tokens_per_s, 1),
            "scheduler_ms_per_step": plain.server["scheduler_ms_per_step"],
            "overhead_fraction": plain.server["overhead_fraction"],
            "verify_ms_per_step": plain.server["verify_ms_per_step"],
        },
        "answers": len(load.tpots),
        "wrong_tokens": load.wrong_tokens + plain.wrong_tokens,
        "local_tokens": load.local_tokens + plain.local_tokens,
        "refused": load.refused + plain.refused,
        "server_cpu": load.server["server_cpu"],
        "fleet_cpu": round(load.fleet_cpu, 3),
        **machine(seed),
    }


async def sweep(
    counts: Sequence[int], seconds: float, limit_ms: float, seed: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """TPOT and tokens a second by the number of sessions on the recorded target, with drafts and without."""
    recording = Recording.load()
    fleet = Fleet(load_edge_config(environ=os.environ, overrides={}), "q4_0", 8.0, recording.fingerprint, seed)
    points = []
    pin(-1)
    async with verifier("recorded", {"limits.max_sessions": 4 * max(counts)}) as running:
        for sessions in counts:
            for want in (Want.STREAM, Want.SPECULATE):
                progress(f"{sessions} sessions, {want.name.lower()}")
                load = await fleet.load(running, sessions, seconds, seconds / 2, want)
                in_time = sum(tpot <= limit_ms for tpot in load.tpots) / len(load.tpots) if load.tpots else 0.0
                points.append(
                    {
                        "want": want.name,
                        "sessions": sessions,
                        "tpot_p50_ms": percentile(load.tpots, 0.5),
                        "tpot_p95_ms": percentile(load.tpots, 0.95),
                        "tokens_per_s": load.tokens_per_s,
                        "goodput_tokens_per_s": load.tokens_per_s * in_time,
                    }
                )
    return points


async def real(engine: Engine, dtype: str, sessions: int, seconds: float, rounds: int, seed: int) -> dict[str, Any]:
    """Cloud-only streams of a real target, one alone and `sessions` together; beside torch the same of llama.cpp."""
    pin(-1)
    report = {
        "engine": engine,
        "dtype": dtype,
        "threads": 1,
        "sessions": sessions,
        "rounds": rounds,
        **await _one_and_all(engine, dtype, sessions, seconds, rounds, seed),
    }
    if engine == "torch":
        report["llama_cpp"] = await _one_and_all("llama_cpp", dtype, sessions, seconds, rounds, seed)
    return report | machine(seed)


async def _one_and_all(
    engine: Engine, dtype: str, sessions: int, seconds: float, rounds: int, seed: int
) -> dict[str, float]:
    """One stream and all of them, in turns; medians over the rounds."""
    config = load_edge_config(environ=os.environ, overrides={})
    singles, aggregates = list[float](), list[float]()
    async with verifier(engine, {"limits.max_sessions": 4 * sessions, "target.dtype": dtype}) as running:
        vocabulary = await vocabulary_of(config, running.hello["address"])
        fleet = Fleet(config, next(iter(Recording.load().drafts)), 1.0, vocabulary, seed)
        for _ in range(rounds):
            singles.append((await fleet.load(running, 1, seconds, 1.0, Want.STREAM)).tokens_per_s)
            aggregates.append((await fleet.load(running, sessions, seconds, 2.0, Want.STREAM)).tokens_per_s)
    return {
        "single_tokens_per_s": round(median(singles), 2),
        "aggregate_tokens_per_s": round(median(aggregates), 2),
        "aggregate_ratio": round(median(many / one for one, many in zip(singles, aggregates, strict=True)), 3),
    }


async def vocabulary_of(config: EdgeConfig, address: str) -> Fingerprint:
    """What the verifier at `address` speaks."""
    from edge_agent.channel import Channel

    channel = Channel(config.verifier.model_copy(update={"address": address}), None)
    try:
        return (await channel.describe()).vocabulary
    finally:
        await channel.close()
