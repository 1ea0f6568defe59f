"""What the runtime itself costs: engines that take no time, over gRPC on loopback, one session.

An edge process and a verifier process, each on a core of its own. CPU time is that of the whole processes, engines,
event loops and gRPC's threads included.
"""

from statistics import median
from typing import Any

from benchmarks.instant import CONTEXT_TOKENS, PROMPT_LEN, TEXT
from benchmarks.processes import BenchError, edge, machine, verifier

MOST_TOKENS = 60_000  # of an answer; the context holds prompt and drafts, too
# Engines that take no time need no pacing, and would stop at bounds that are meant for real ones. Four drafts a step
# are what a good draft gets from a real target; with more, a commit costs more and a token less.
EDGE = {"speculation.message_interval_ms": 0, "speculation.max_ahead_tokens": 256}
VERIFIER = {
    "speculation.window_tokens": 4096,
    "target.context_tokens": CONTEXT_TOKENS,
    "speculation.max_draft_rows": 4,
    "limits.max_new_tokens": MOST_TOKENS,
}


async def overhead(tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of `bench overhead`: medians over the rounds."""
    costs_ms, speeds, commits, per_token_us = list[float](), list[float](), list[float](), list[float]()
    async with verifier("instant", VERIFIER) as cloud, edge("instant", EDGE) as device:
        question = {"do": "answer", "way": "outrider", "address": cloud.hello["address"], "max_new_tokens": tokens}
        await device.ask(question | {"question": 0, "max_new_tokens": 500})
        for number in range(1, rounds + 1):
            await cloud.ask({"do": "begin"})
            answer = await device.ask(question | {"question": number})
            steps = await cloud.ask({"do": "report"})
            if answer["error"] or "local" in answer["provenance"]:
                raise BenchError(answer["error"] or "the edge lost the verifier on loopback; is the machine busy?")
            if tuple(answer["tokens"]) != TEXT[PROMPT_LEN : PROMPT_LEN + tokens]:
                raise BenchError("the text is not the target's")
            cpu_ms = (answer["cpu_s"] + steps["cpu_s"]) * 1000
            costs_ms.append(cpu_ms / steps["steps"])
            per_token_us.append(cpu_ms * 1000 / tokens)
            speeds.append(1000 / answer["statistics"]["tpot_ms"])
            commits.append(tokens / steps["steps"])
    return {
        "commit_overhead_ms": round(median(costs_ms), 3),
        "tokens_per_s": round(median(speeds), 1),
        "tokens_per_commit": round(median(commits), 2),
        "cpu_us_per_token": round(median(per_token_us), 1),
        "spread": {
            "commit_overhead_ms": [round(min(costs_ms), 3), round(max(costs_ms), 3)],
            "tokens_per_s": [round(min(speeds), 1), round(max(speeds), 1)],
        },
        "tokens": tokens,
        "rounds": rounds,
        **machine(0, "protobuf"),
    }
