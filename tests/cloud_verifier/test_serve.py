"""A whole verifier over gRPC under more sessions, and more messages, than it can hold at once."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest
from grpc import aio

from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import Target
from cloud_verifier.serve import RunningVerifier, serving
from shared.core.effects import Rows
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import (
    Commit,
    Draft,
    Failure,
    FailureCode,
    Finish,
    Heartbeat,
    Open,
    Want,
)
from shared.core.tokens import TokenLog
from shared.testing.engines import TOY_VOCABULARY, ToyTarget
from shared.transport import CLIENT_OPTIONS
from shared.vocabulary import Vocabulary
from tests.cloud_verifier.lab import MODEL, PROMPT, WAIT_S, opening, target_stream
from tests.cloud_verifier.raw_edge import RawEdge

VOCABULARY = Vocabulary(tuple(b"%d" % token for token in range(1000)))


class WatchedTarget(ToyTarget):
    """Notes the most blocks that were ever in use; a forward waits for `gate`."""

    def __init__(self, cache_tokens: int) -> None:
        super().__init__(MODEL, base_ms=1.0, row_ms=0.1, cache_tokens=cache_tokens)
        self.most_blocks = 0
        self.gate = threading.Event()
        self.gate.set()
        self.in_forward = threading.Event()

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        self.in_forward.set()
        assert self.gate.wait(WAIT_S)
        selected = super().forward(batch)
        self.most_blocks = max(self.most_blocks, self.blocks.num_blocks - self.blocks.num_free)
        return selected


class Lab:
    """A verifier on loopback and a connection to it."""

    def __init__(self, running: RunningVerifier, target: WatchedTarget, channel: aio.Channel) -> None:
        self.worker = running.worker
        self.target = target
        self.channel = channel

    def edge(self, opened: Open) -> RawEdge:
        return RawEdge(self.channel, opened)


def in_lab(test: Callable[[Lab], Awaitable[None]], cache_blocks: int, **overrides: object) -> None:
    settings = {"server.address": "127.0.0.1:0", "limits.idle_timeout_s": 600}
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}

    async def main() -> None:
        config = load_cloud_config(environ={}, overrides=settings)
        target = WatchedTarget(cache_blocks * BLOCK_TOKENS)
        async with (
            serving(config, Target(target, VOCABULARY, "toy", "float32", "toys")) as running,
            aio.insecure_channel(running.address, options=CLIENT_OPTIONS) as channel,
        ):
            await test(Lab(running, target, channel))

    asyncio.run(main())


def test_a_thousand_idle_sessions_stay_inside_the_cache_and_each_goes_on() -> None:
    """Each fills its window and falls idle; together they would take 4,000 blocks, and there are 200."""
    num_sessions, window, cache_blocks = 1_000, 8, 200

    async def test(lab: Lab) -> None:
        places = asyncio.Semaphore(cache_blocks // 4)  # more at a time would be told to come back later

        async def begin(index: int) -> RawEdge:
            prompt = (1 + index // 900, 1 + index % 900, *range(500, 548))
            opened = Open(f"s{index}", prompt, len(prompt), 2 * window - 1, TOY_VOCABULARY, want=Want.STREAM)
            async with places:
                # Not before: gRPC's server cancels calls that wait for it for 30 s, as many at once do on a busy core.
                edge = lab.edge(opened)
                await edge.send(opened)
                await edge.read(window)
            return edge

        async def go_on(edge: RawEdge) -> None:
            await edge.acknowledge()
            await edge.read(2 * window - 1)

        edges = await asyncio.gather(*map(begin, range(num_sessions)))
        statuses = lab.worker.session_statuses()
        assert len(statuses) == num_sessions
        assert sum(status.cached_len > 0 for status in statuses) <= cache_blocks // 4
        used, in_all, _ = lab.worker.cache_usage()
        assert used <= in_all == cache_blocks
        refused = lab.edge(opening("one too many"))
        await refused.send(refused.opened)
        assert await refused.next() == Failure(
            FailureCode.RESOURCE_EXHAUSTED, f"all {num_sessions} sessions are in use", 1000
        )
        await asyncio.gather(*map(go_on, edges))
        for edge in edges:
            assert edge.text == target_stream(edge.opened.tokens, 2 * window - 1)
            assert edge.finish is Finish.LENGTH
        assert cache_blocks - 8 < lab.target.most_blocks <= cache_blocks

    in_lab(test, cache_blocks, limits__max_sessions=num_sessions, speculation__window_tokens=window)


def test_who_does_not_fit_is_told_when_to_come_back_and_then_does() -> None:
    async def test(lab: Lab) -> None:
        lab.target.gate.clear()
        first, second = (
            lab.edge(Open(name, tuple(range(length)), length, 4, TOY_VOCABULARY, want=Want.STREAM))
            for name, length in (("first", 230), ("second", 100))
        )
        await first.send(first.opened, Heartbeat(1, 0))
        assert await first.next() == Heartbeat(1, 230)
        await second.send(second.opened)
        failure = await second.next()
        assert failure == Failure(FailureCode.RESOURCE_EXHAUSTED, "the cache of 320 tokens is in use", 1000)
        assert await second.next() is None
        lab.target.gate.set()
        await first.read(4)
        again = lab.edge(second.opened)
        await again.send(again.opened)
        await again.read(4)
        for edge in (first, again):
            assert edge.text == target_stream(edge.opened.tokens, 4)

    in_lab(test, cache_blocks=20)


def test_heartbeats_never_wait_for_a_forward() -> None:
    async def test(lab: Lab) -> None:
        lab.target.gate.clear()
        edges = [lab.edge(opening(f"s{index}")) for index in range(10)]
        for edge in edges:
            await edge.send(edge.opened, Heartbeat(7, 3))
        assert await asyncio.to_thread(lab.target.in_forward.wait, WAIT_S)
        assert [await edge.next() for edge in edges] == [Heartbeat(7, 3)] * 10
        lab.target.gate.set()
        for edge in edges:
            await edge.read(8)
            assert edge.text == target_stream(PROMPT, 8)

    in_lab(test, cache_blocks=64)


def test_a_flood_of_drafts_is_held_up_to_a_limit_and_changes_no_text() -> None:
    async def test(lab: Lab) -> None:
        lab.target.gate.clear()
        flooding, good = lab.edge(opening("flooding", n=40, want=Want.SPECULATE)), lab.edge(opening("good", n=40))
        await flooding.send(flooding.opened)
        await good.send(good.opened, Heartbeat(1, 3))
        assert await good.next() == Heartbeat(1, 3)
        parent = TokenLog(PROMPT).hash_at(3)
        await flooding.send(*[Draft(3, parent, (number, *range(99))) for number in range(1, 900)], Heartbeat(2, 3))
        assert await flooding.next() == Heartbeat(2, 3)  # all of it has been taken in
        pending = {status.session: status.pending_tokens for status in lab.worker.session_statuses()}
        assert pending == {"/flooding": 256, "/good": 0}
        lab.target.gate.set()
        for edge in (flooding, good):
            await edge.read(40)
            assert edge.text == target_stream(PROMPT, 40)

    in_lab(test, cache_blocks=64)


@pytest.mark.parametrize("num_sessions", [1, 4, 40])
def test_each_commit_tells_how_much_may_be_pending(num_sessions: int) -> None:
    async def test(lab: Lab) -> None:
        edges = [lab.edge(opening(f"s{index}", n=1)) for index in range(num_sessions)]
        for edge in edges[:-1]:
            await edge.send(edge.opened)
            await edge.read(1)
        await edges[-1].send(edges[-1].opened)
        commit = await edges[-1].next()
        assert isinstance(commit, Commit)
        assert commit.max_ahead == {1: 64, 4: 30, 40: 8}[num_sessions]

    in_lab(test, cache_blocks=64, speculation__max_pending_tokens=64, speculation__max_pending_in_all=120)
