import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import count
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from cloud_verifier.worker import Worker
from shared.core.effects import Rows
from shared.core.messages import (
    Close,
    CloudMessage,
    Commit,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
    Sampling,
    Want,
)
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.core.tokens import TokenLog
from shared.metrics import VerifierMetrics
from shared.policy.step_rule import BestRate
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget

MODEL = HashModel(salt=5)
PROMPT = (11, 12, 13)
WAIT_S = 10.0  # for what must come; never for what must not


def target_stream(tokens: Sequence[int], n: int) -> tuple[int, ...]:
    log = TokenLog(tokens)
    for _ in range(n):
        log.extend((MODEL.token(log.hash_at(len(log)), log[len(log) - 1], len(log), Sampling()),))
    return log.tokens(len(tokens))


def opening(session_id: str = "s", n: int = 8, want: Want = Want.STREAM, tokens: tuple[int, ...] = PROMPT) -> Open:
    return Open(session_id, tokens, len(PROMPT), n, TOY_VOCABULARY, want=want)


class RecordingTarget(ToyTarget):
    """Notes each call and its thread; a forward waits for `gate`, and what stands in `faults` raises, once."""

    def __init__(self) -> None:
        super().__init__(MODEL, base_ms=1.0, row_ms=0.1)
        self.calls: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.in_forward = threading.Event()
        self.faults: list[str] = []

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        for rows in batch:
            self._note("forward", rows.session_id)
        self.in_forward.set()
        assert self.gate.wait(WAIT_S)
        self.in_forward.clear()
        return super().forward(batch)

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        self._note("keep", session_id)
        super().keep(session_id, start, rows)

    def truncate(self, session_id: str, length: int) -> None:
        self._note("truncate", session_id)
        super().truncate(session_id, length)

    def release(self, session_id: str) -> None:
        self._note("release", session_id)
        super().release(session_id)

    def _note(self, call: str, session_id: str) -> None:
        self.calls.append((call, session_id))
        self.threads.add(threading.get_ident())
        if call in self.faults:
            self.faults.remove(call)
            raise RuntimeError(f"{call} is broken\nbadly")


class Inbox:
    """A stream as its edge sees it."""

    def __init__(self, worker: Worker, number: int) -> None:
        self.worker = worker
        self.number = number
        self.messages: asyncio.Queue[CloudMessage | None] = asyncio.Queue()

    def send(self, message: CloudMessage) -> None:
        self.messages.put_nowait(message)

    def end(self) -> None:
        self.messages.put_nowait(None)

    async def post(self, *messages: EdgeMessage) -> None:
        for message in messages:
            await self.worker.receive(self.number, message)

    async def next(self) -> CloudMessage | None:
        return await asyncio.wait_for(self.messages.get(), WAIT_S)

    async def commits(self) -> list[Commit]:
        """Every commit up to the last of the text."""
        commits: list[Commit] = []
        while not commits or commits[-1].finish is Finish.NONE:
            message = await self.next()
            assert isinstance(message, Commit), message
            commits.append(message)
        return commits


class Lab:
    """A running worker over a recording target."""

    def __init__(self, settings: TableSettings) -> None:
        self.target = RecordingTarget()
        self.registry = CollectorRegistry()
        self.num_clock_reads = 0
        policy = BestRate(self.target.cost_ms)
        self.worker = Worker(self.target, settings, policy, VerifierMetrics(self.registry), self._clock)
        self._numbers = count(1)

    def stream(self, identity: str = "") -> Inbox:
        number = next(self._numbers)
        inbox = Inbox(self.worker, number)
        self.worker.opened(number, identity, inbox)
        return inbox

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def stop_in_forward(self) -> None:
        """Return when a forward is running, which then waits for the gate."""
        await asyncio.to_thread(self.target.in_forward.wait, WAIT_S)

    def _clock(self) -> float:
        self.num_clock_reads += 1
        with contextlib.suppress(RuntimeError):  # on the engine's thread there is no loop
            return asyncio.get_running_loop().time()
        return 0.0


Test = Callable[[Lab], Coroutine[Any, Any, None]]


def in_lab(test: Test, *, max_sessions: int = 64, idle_timeout_ms: float = 60_000.0, **session: Any) -> Lab:
    settings = TableSettings(
        CloudSettings(4096, **session), TOY_VOCABULARY, max_sessions=max_sessions, idle_timeout_ms=idle_timeout_ms
    )

    @contextlib.asynccontextmanager
    async def running() -> AsyncIterator[Lab]:
        lab = Lab(settings)
        task = asyncio.create_task(lab.worker.run())
        try:
            yield lab
        finally:
            lab.target.gate.set()
            task.cancel()
            await asyncio.wait({task})
            await lab.worker.close()

    async def main() -> Lab:
        async with running() as lab:
            await test(lab)
        return lab

    return asyncio.run(main())


def committed(commits: Sequence[Commit]) -> tuple[int, ...]:
    return tuple(token for commit in commits for token in commit.tokens)


def test_a_session_gets_the_targets_stream() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        await inbox.post(opening(n=20))
        commits = await inbox.commits()
        assert committed(commits) == target_stream(PROMPT, 20)
        assert [commit.start for commit in commits] == list(range(3, 23))
        assert commits[-1].finish is Finish.LENGTH

    lab = in_lab(test)
    assert lab.target.threads.isdisjoint({threading.get_ident()})
    assert len(lab.target.threads) == 1


def test_drafts_are_accepted_as_far_as_they_are_right() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        right = target_stream(PROMPT, 4)
        lab.target.gate.clear()
        await inbox.post(opening(n=9, want=Want.SPECULATE))
        await lab.stop_in_forward()  # the prompt with the first next_token
        log = TokenLog(PROMPT)
        await inbox.post(Draft(3, log.hash_at(3), (*right, 999)))
        lab.target.gate.set()
        commits = await inbox.commits()
        assert committed(commits) == target_stream(PROMPT, 9)
        assert (commits[1].num_drafted, commits[1].num_accepted) == (4, 3)
        assert len(commits) < 9

    lab = in_lab(test)
    assert lab.metric("outrider_drafted_tokens_total") == 4
    assert lab.metric("outrider_accepted_tokens_total") == 3
    assert lab.metric("outrider_committed_tokens_total") == 9
    assert lab.metric("outrider_rows_total", kind="prefill") == 2
    assert lab.metric("outrider_rows_total", kind="draft") == 5
    assert lab.metric("outrider_rows_total", kind="self_decode") == 5
    assert lab.metric("outrider_steps_total") == lab.metric("outrider_step_duration_seconds_count") == 6


def test_heartbeats_are_echoed_while_a_forward_runs_and_the_rest_waits() -> None:
    async def test(lab: Lab) -> None:
        inbox, other = lab.stream(), lab.stream()
        lab.target.gate.clear()
        await inbox.post(opening())
        await lab.stop_in_forward()
        await other.post(Open("o", (1,), 1, 1, TOY_VOCABULARY, known_len=1), Heartbeat(5, 0))
        await inbox.post(Heartbeat(7, 3))
        assert await inbox.next() == Heartbeat(7, 3)
        assert await other.next() == Heartbeat(5, 0)
        lab.target.gate.set()
        assert await other.next() == NeedTokens()
        assert committed(await inbox.commits()) == target_stream(PROMPT, 8)

    in_lab(test)


def test_what_a_step_leaves_to_do_comes_before_the_next_forward() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        await inbox.post(opening(n=3))
        await inbox.commits()
        lab.worker.lost(inbox.number)
        again = lab.stream()
        await again.post(opening(n=5, tokens=(*PROMPT, 1)))
        await again.commits()

    calls = in_lab(test).target.calls
    assert calls[:6] == [("forward", "/s"), ("keep", "/s")] * 3
    assert calls[6:8] == [("truncate", "/s"), ("forward", "/s")]


def test_an_evicted_cache_is_released_although_no_forward_follows() -> None:
    async def test(lab: Lab) -> None:
        first, second = lab.stream(), lab.stream()
        await first.post(opening("first"))
        await first.commits()
        lab.worker.lost(first.number)
        await second.post(opening("second"))  # one place: the first one's cache goes
        await second.commits()
        lab.worker.lost(second.number)
        assert ("release", "/first") in lab.target.calls

    assert set(in_lab(test, max_sessions=1).target.caches) == {"/second"}


def test_a_parked_session_is_opened_again_by_its_known_prefix() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream("me")
        await inbox.post(opening(n=10))
        text = TokenLog((*PROMPT, *committed(await inbox.commits())))
        lab.worker.lost(inbox.number)
        reopen = Open("s", (), 3, 14, TOY_VOCABULARY, want=Want.STREAM, known_len=9, known_hash=text.hash_at(9))
        stranger = lab.stream("not me")
        await stranger.post(reopen)
        assert await stranger.next() == NeedTokens()
        again = lab.stream("me")
        await again.post(reopen)
        assert committed(await again.commits()) == target_stream(PROMPT, 14)[6:]

    in_lab(test)


@pytest.mark.parametrize("broken", ["forward", "keep"])
def test_an_engine_fault_ends_the_sessions_and_the_next_one_works(broken: str) -> None:
    async def test(lab: Lab) -> None:
        inbox, idle = lab.stream(), lab.stream()
        lab.target.faults = [broken, "release"]
        with capture_logs() as logs:
            await inbox.post(opening())
            last = [message async for message in messages(inbox)][-1]
            assert isinstance(last, Failure)
            assert (last.code, last.retry_after_ms) == (FailureCode.INTERNAL, 1000)
            assert last.detail == "the verifier's engine failed (RuntimeError); open again"
            assert await idle.next() == last
            assert await idle.next() is None
            again = lab.stream()
            await again.post(opening())
            assert committed(await again.commits()) == target_stream(PROMPT, 8)
        reasons = [entry["reason"] for entry in logs if entry["log_level"] == "error" and "reason" in entry]
        assert reasons == [f"{broken} is broken\nbadly"]
        assert any(entry["event"] == "a cache cannot be released" for entry in logs)

    async def messages(inbox: Inbox) -> AsyncIterator[CloudMessage]:
        while (message := await inbox.next()) is not None:
            yield message

    lab = in_lab(test)
    assert ("release", "/s") in lab.target.calls
    assert lab.metric("outrider_sessions") == 1


def test_a_silent_stream_is_ended_by_the_timer() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        assert await inbox.next() is None

    in_lab(test, idle_timeout_ms=20.0)


def test_a_session_without_drafts_starves_for_a_while_only() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        await inbox.post(opening(n=4, want=Want.SPECULATE))
        assert committed(await inbox.commits()) == target_stream(PROMPT, 4)

    in_lab(test, self_decode=SelfDecode.OFF, starved_after_ms=20.0)


def test_an_idle_worker_sleeps() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        await inbox.post(opening(n=1))
        await inbox.commits()
        await asyncio.sleep(0.05)  # the step ends a moment after its commit
        reads = lab.num_clock_reads
        await asyncio.sleep(0.1)
        assert lab.num_clock_reads == reads

    in_lab(test)


def test_a_flood_during_a_forward_is_not_read_until_it_is_over() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        lab.target.gate.clear()
        await inbox.post(opening(n=4, want=Want.SPECULATE))
        await lab.stop_in_forward()
        flood = asyncio.create_task(inbox.post(*[Draft(3, 1, (1, 2))] * 1000))
        await asyncio.sleep(0.05)
        assert not flood.done()
        lab.target.gate.set()
        assert committed(await inbox.commits()) == target_stream(PROMPT, 4)
        await asyncio.wait_for(flood, WAIT_S)

    in_lab(test)


def test_stale_drafts_and_sessions_are_counted() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        with capture_logs() as logs:
            await inbox.post(opening(n=2))
            await inbox.commits()
            await inbox.post(Draft(3, 1, (1, 2, 3)), Heartbeat(0, 5))
            await inbox.next()
            assert lab.metric("outrider_sessions") == 1
            await inbox.post(Close())
            assert await inbox.next() is None
            await asyncio.sleep(0.05)
        assert [entry["event"] for entry in logs] == ["session opened", "step", "step", "session closed"]

    lab = in_lab(test)
    assert lab.metric("outrider_stale_draft_tokens_total") == 3
    assert lab.metric("outrider_sessions") == 0
