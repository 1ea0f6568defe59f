"""The link to the verifier as measured from here, with one clock: round trip, jitter, and the rate each way.

A probe sends so many bytes and waits for so many (`rpc Probe`). Small ones give the round trip; what a large one takes
longer is its bytes' time on the way. The first large one of a direction opens TCP's window and is not counted.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median

from edge_agent.channel import Channel

_PINGS = 15
_LARGE_BYTES = (6_000, 48_000)  # below HTTP/2's first window of 64 KiB, which would cost a round trip more
_LARGE_ROUNDS = 3
_LEAST_EXTRA_MS = 2.0  # what a probe must take longer than a small one to say anything about the rate
_ENOUGH_EXTRA_MS = 50.0  # no need for a larger one
_TIMEOUT_S = 10.0

Probe = Callable[[int, int], Awaitable[float]]
"""Sends and receives so many bytes; the milliseconds that it took."""


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """`jitter_ms` is from the shortest to the longest round trip but one in ten; a rate of None is too fast to tell."""

    rtt_ms: float
    jitter_ms: float
    up_kbps: float | None
    down_kbps: float | None


async def measure_link(channel: Channel) -> LinkMeasured:
    """Takes some thirty round trips. Raises `grpc.aio.AioRpcError`, `ConnectionError`."""

    async def probe(up_bytes: int, down_bytes: int) -> float:
        began = time.perf_counter()
        await channel.probe(up_bytes, down_bytes, _TIMEOUT_S)
        return (time.perf_counter() - began) * 1000

    return await measure(probe)


async def measure(probe: Probe) -> LinkMeasured:
    """The link that these probes cross."""
    await probe(0, 0)  # dials
    pings = []
    for _ in range(_PINGS):
        pings.append(await probe(0, 0))
        await asyncio.sleep(0)
    pings.sort()
    rtt_ms, jitter_ms = median(pings), pings[len(pings) * 9 // 10] - pings[0]
    rates = [await _rate_kbps(probe, direction, pings[0], jitter_ms) for direction in ("up", "down")]
    return LinkMeasured(rtt_ms, jitter_ms, *rates)


async def _rate_kbps(probe: Probe, direction: str, rtt_ms: float, jitter_ms: float) -> float | None:
    rate_kbps = None
    for size in _LARGE_BYTES:
        sizes = (size, 0) if direction == "up" else (0, size)
        took = [await probe(*sizes) for _ in range(1 + _LARGE_ROUNDS)]
        extra_ms = min(took[1:]) - rtt_ms
        if extra_ms > max(_LEAST_EXTRA_MS, jitter_ms):
            rate_kbps = size * 8 / extra_ms
        if extra_ms > _ENOUGH_EXTRA_MS:
            break
    return rate_kbps
