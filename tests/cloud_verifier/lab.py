"""A running worker over a toy target whose every call is seen, and which can be held, slowed and broken."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import count
from typing import Any

from prometheus_client import CollectorRegistry

from cloud_verifier.worker import Worker
from shared.core.effects import Rows
from shared.core.messages import (
    CloudMessage,
    Commit,
    EdgeMessage,
    Finish,
    Open,
    Sampling,
    Want,
)
from shared.core.policies import Allotment, Offer
from shared.core.settings import CloudSettings, TableSettings
from shared.core.tokens import TokenLog
from shared.metrics import StepReport, VerifierMetrics
from shared.policy.scheduler import BestRate
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget

MODEL = HashModel(salt=5)
PROMPT = (11, 12, 13)
LONG_PROMPT = tuple(range(100, 140))  # two whole blocks, and a half
WAIT_S = 10.0  # for what must come; never for what must not


def target_stream(tokens: Sequence[int], n: int) -> tuple[int, ...]:
    log = TokenLog(tokens)
    for _ in range(n):
        log.extend((MODEL.token(log.hash_at(len(log)), log[len(log) - 1], len(log), Sampling()),))
    return log.tokens(len(tokens))


def opening(session_id: str = "s", n: int = 8, want: Want = Want.STREAM, tokens: tuple[int, ...] = PROMPT) -> Open:
    return Open(session_id, tokens, len(PROMPT), n, TOY_VOCABULARY, want=want)


def long_opening(session_id: str, n: int = 8) -> Open:
    return Open(session_id, LONG_PROMPT, len(LONG_PROMPT), n, TOY_VOCABULARY, want=Want.STREAM)


class Clock:
    """The real one, read by read; or one that moves only when it is told to."""

    def __init__(self) -> None:
        self.num_reads = 0
        self._set_s: float | None = None

    def __call__(self) -> float:
        self.num_reads += 1
        return time.monotonic() if self._set_s is None else self._set_s

    def move(self, ms: float) -> None:
        """From the first move on it stands still between the moves."""
        self._set_s = (self._set_s or 0.0) + ms / 1000


class RecordingTarget(ToyTarget):
    """Notes each call and its thread.

    A forward waits for `gate`. What stands in `faults` ("share", or "keep 15": the one from there) raises, once; a
    forward with a session that stands in `poison` raises when that session's tokens would be so many, or more.
    Forwards and other calls move the clock as told.
    """

    def __init__(self, clock: Clock, cache_tokens: int) -> None:
        super().__init__(MODEL, base_ms=1.0, row_ms=0.1, cache_tokens=cache_tokens)
        self.calls: list[tuple[str, str]] = []
        self.batches: list[list[Rows]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.in_forward = threading.Event()
        self.faults: list[str] = []
        self.poison: dict[str, int] = {}
        self.forward_ms = self.other_ms = 0.0
        self._clock = clock

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        self.batches.append(list(batch))
        for rows in batch:
            self._note("forward", rows.session_id)
        self.in_forward.set()
        assert self.gate.wait(WAIT_S)
        self.in_forward.clear()
        if self.forward_ms:
            self._clock.move(self.forward_ms)
        for rows in batch:
            if rows.start + len(rows.tokens) >= self.poison.get(rows.session_id, 1 << 20):
                raise RuntimeError(f"{rows.session_id} is poison")
        return super().forward(batch)

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        self._note("keep", session_id, start)
        super().keep(session_id, start, rows)

    def truncate(self, session_id: str, length: int) -> None:
        self._note("truncate", session_id)
        super().truncate(session_id, length)

    def share(self, session_id: str, source_id: str, length: int) -> None:
        self._note("share", session_id)
        super().share(session_id, source_id, length)

    def release(self, session_id: str) -> None:
        self._note("release", session_id)
        super().release(session_id)

    def _note(self, call: str, session_id: str, start: int = 0) -> None:
        self.calls.append((call, session_id))
        self.threads.add(threading.get_ident())
        if call != "forward" and self.other_ms:
            self._clock.move(self.other_ms)
        for fault in (call, f"{call} {start}"):
            if fault in self.faults:
                self.faults.remove(fault)
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

    def post(self, *messages: EdgeMessage) -> None:
        for message in messages:
            self.worker.receive(self.number, message)

    async def next(self) -> CloudMessage | None:
        return await asyncio.wait_for(self.messages.get(), WAIT_S)

    async def rest(self) -> list[CloudMessage]:
        """Every message up to the end of the stream."""
        messages: list[CloudMessage] = []
        while (message := await self.next()) is not None:
            messages.append(message)
        return messages

    async def commits(self) -> list[Commit]:
        """Every commit up to the last of the text."""
        commits: list[Commit] = []
        while not commits or commits[-1].finish is Finish.NONE:
            message = await self.next()
            assert isinstance(message, Commit), message
            commits.append(message)
        return commits


class Everything:
    """A step policy that serves everybody with all they offer; planning moves the clock by `plan_ms`."""

    def __init__(self, clock: Clock) -> None:
        self.plan_ms = 0.0
        self._clock = clock

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        if self.plan_ms:
            self._clock.move(self.plan_ms)
        return Allotment([offer.prefill_rows + 1 + len(offer.worth) for offer in offers])


class RecordingMetrics(VerifierMetrics):
    """Keeps the reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.reports: list[StepReport] = []

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)
        super().stepped(report)


class Lab:
    """A running worker over a recording target."""

    def __init__(self, settings: TableSettings, everything: bool) -> None:
        self.clock = Clock()
        self.target = RecordingTarget(self.clock, settings.cache_blocks * 16)
        self.registry = CollectorRegistry()
        self.metrics = RecordingMetrics(self.registry)
        self.everything = Everything(self.clock)
        policy = self.everything if everything else BestRate(self.target.cost_ms, self.target.limits.max_rows)
        self.worker = Worker(self.target, settings, policy, self.metrics, self.clock)
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
        assert await asyncio.to_thread(self.target.in_forward.wait, WAIT_S)

    async def until_asleep(self) -> None:
        """Return when the worker has nothing to do: it does not even look at the clock any more."""
        reads = -1
        while reads != self.clock.num_reads:
            reads = self.clock.num_reads
            await asyncio.sleep(0.05)


Test = Callable[[Lab], Coroutine[Any, Any, None]]
_OF_TABLE = ("cache_blocks", "max_sessions", "idle_timeout_ms", "residency_ms", "max_pending_in_all")


def in_lab(test: Test, *, everything: bool = False, **options: Any) -> Lab:
    """Run a test beside a worker; options are fields of `TableSettings` and `CloudSettings`."""
    table = {"cache_blocks": 4096, "max_sessions": 64, "idle_timeout_ms": 60_000.0}
    table |= {name: options.pop(name) for name in _OF_TABLE if name in options}
    settings = TableSettings(CloudSettings(4096, **options), TOY_VOCABULARY, **table)  # type: ignore[arg-type]  # any

    @contextlib.asynccontextmanager
    async def running() -> AsyncIterator[Lab]:
        lab = Lab(settings, everything)
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
