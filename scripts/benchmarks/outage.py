"""Outages seen from the user's chair: how long the text stands still, what is lost, how soon it is verified again.

A recorded pair (see `shared.testing.recorded`), so that an answer of any length costs no processor: a verifier process
and an edge process with a link of 50 ms between them, which is cut in the middle of one answer after another.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Any, Literal

from benchmarks.drafts import PROMPT_TOKENS
from benchmarks.processes import BenchError, Child, edge, machine, verifier
from shared.testing.link_proxy import LinkProxy
from shared.testing.recorded import Recording

Kind = Literal["blackhole", "reset", "half_open"]
KINDS: tuple[Kind, ...] = ("blackhole", "reset", "half_open")
SHORTEST_S, LONGEST_S = 0.3, 20.0
RTT_MS = 50.0
LIMITS = {"limits.max_new_tokens": 65_536, "target.context_tokens": 65_536}
_SETTLE_S = 0.8  # of verified text before the cut
_WATCH_S = 2.5  # after the link is back; longer than it may take to rejoin


@dataclass(frozen=True)
class Outage:
    """One cut and what the user saw. Durations in ms but for `for_s`; `rejoin_ms` is None where it did not happen."""

    kind: Kind
    for_s: float
    stall_ms: float
    rejoin_ms: float | None
    local_tokens: int
    lost_tokens: int
    doubled_tokens: int
    wrong_tokens: int


def plan(count: int, seed: int) -> list[tuple[Kind, float]]:
    """Kinds in turn; durations spread evenly on a logarithmic scale from the shortest to the longest, in any order."""
    steps = max(count - 1, 1)
    durations = [SHORTEST_S * (LONGEST_S / SHORTEST_S) ** (index / steps) for index in range(count)]
    Random(seed).shuffle(durations)
    return list(zip(cycle(KINDS), durations, strict=False))


async def outage(count: int, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `bench outage`."""
    recording = Recording.load()
    outages: list[Outage] = []
    async with verifier("recorded", LIMITS) as cloud, edge("recorded", {}) as device:
        port = int(cloud.hello["address"].rpartition(":")[2])
        async with LinkProxy("127.0.0.1", port, RTT_MS / 2, seed=seed) as link:
            for number, (kind, for_s) in enumerate(plan(count, seed)):
                seen = await one_answer(device, link, number, kind, for_s)
                outages.append(one := judge(seen[0], recording, number, (kind, for_s), *seen[1:]))
                rejoin = "never" if one.rejoin_ms is None else f"{one.rejoin_ms:.0f} ms"
                progress(f"{kind} of {for_s:.1f} s: stood still for {one.stall_ms:.0f} ms, rejoined after {rejoin}")
        max_stall_ms = device.hello["max_stall_ms"]
    rejoins = [one.rejoin_ms for one in outages if one.rejoin_ms is not None]
    return {
        "outages": count,
        "rtt_ms": RTT_MS,
        "max_stall_ms": max_stall_ms,
        "stall_ms_p50": round(percentile([one.stall_ms for one in outages], 0.5), 1),
        "stall_ms_p95": round(percentile([one.stall_ms for one in outages], 0.95), 1),
        "stall_ms_max": round(max(one.stall_ms for one in outages), 1),
        "rejoin_ms_p50": round(percentile(rejoins, 0.5), 1) if rejoins else None,
        "rejoin_ms_p95": round(percentile(rejoins, 0.95), 1) if rejoins else None,
        "never_rejoined": count - len(rejoins),
        "lost_tokens": sum(one.lost_tokens for one in outages),
        "doubled_tokens": sum(one.doubled_tokens for one in outages),
        "wrong_tokens": sum(one.wrong_tokens for one in outages),
        "local_tokens": sum(one.local_tokens for one in outages),
        "each": [
            {"kind": one.kind, "for_s": round(one.for_s, 2), "stall_ms": round(one.stall_ms, 1)}
            | {"rejoin_ms": None if one.rejoin_ms is None else round(one.rejoin_ms, 1), "local": one.local_tokens}
            for one in outages
        ],
        **machine(seed),
    }


async def one_answer(
    device: Child, link: LinkProxy, number: int, kind: Kind, for_s: float
) -> tuple[dict[str, Any], float, float]:
    """An answer with the link cut in its middle; when it was cut and when it was back, s of the monotonic clock."""
    question = {"do": "answer", "way": "outrider", "address": f"127.0.0.1:{link.port}", "question": number}
    device.tell(question | {"max_new_tokens": 60_000})
    await asyncio.sleep(_SETTLE_S)
    cut_at = time.monotonic()
    link.cut("reset" if kind == "reset" else "blackhole")
    await asyncio.sleep(for_s)
    await link.restore(half_open=kind == "half_open")
    back_at = time.monotonic()
    await asyncio.sleep(_WATCH_S)
    answer = await device.ask({"do": "stop"})
    if answer["error"]:
        raise BenchError(answer["error"])
    return answer, cut_at, back_at


def judge(
    answer: Mapping[str, Any],
    recording: Recording,
    number: int,
    cut: tuple[Kind, float],
    cut_at: float,
    back_at: float,
) -> Outage:
    """What the user saw of a cut. The pause that counts is the longest one up to the first verified token after it."""
    shown_at, provenance = answer["shown_at"], answer["provenance"]
    said = recording.text(recording.prompt(number, PROMPT_TOKENS), len(shown_at))
    verified = [index for index, at in enumerate(shown_at) if at > back_at and provenance[index] != "local"]
    rejoined = verified[0] if verified else None
    watched = shown_at if rejoined is None else shown_at[: rejoined + 1]
    first = next((index for index, at in enumerate(watched) if at > cut_at), len(watched))
    gaps = [later - earlier for earlier, later in zip(watched[max(first - 1, 0) :], watched[first:], strict=False)]
    return Outage(
        kind=cut[0],
        for_s=cut[1],
        stall_ms=max(gaps, default=0.0) * 1000,
        rejoin_ms=None if rejoined is None else (shown_at[rejoined] - back_at) * 1000,
        local_tokens=provenance.count("local"),
        lost_tokens=answer["lost_tokens"],
        doubled_tokens=answer["doubled_tokens"],
        wrong_tokens=sum(
            ours != theirs and source != "local"
            for ours, theirs, source in zip(answer["tokens"], said, provenance, strict=True)
        ),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
