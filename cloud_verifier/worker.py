"""The verifier's one loop over its one model: schedule, forward, update.

The session table and the engine have one owner, the worker. `run` is one task; it plans a step, runs the forward on a
thread of its own and commits. Streams hand their messages in from the same event loop, also during a forward; most of
the work of taking in drafts and of sending commits is done then. Nothing polls: `run` sleeps until a message, the
engine or a timer wakes it. Engine effects (Keep, Truncate, Share, Release) wait for the next forward and run before it,
on the engine's thread and in order, so that the engine is never called from two threads or out of turn.

When a forward fails, the sessions of that step lose their caches and are tried again one by one (see `SessionTable`).
When anything else of the engine fails, nobody knows what its caches hold. Then the verifier starts over in place: every
stream ends with a Failure that asks to come back, every cache is released, and an empty table takes the next sessions.
The edges hold their whole text, so they lose time and nothing else.
"""

import asyncio
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, EndStream, Keep, Release, Rows, Send, Share, Truncate
from shared.core.messages import CloudMessage, Commit, EdgeMessage, Failure, FailureCode, SessionStatus
from shared.core.policies import StepPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import TableSettings
from shared.engine import TargetEngine
from shared.engine_thread import EngineThread
from shared.metrics import StepReport, VerifierMetrics

_SHORTEST_SLEEP_S = 0.001  # event loops fire up to a clock tick early; then it is not due yet

_YOUNG_OBJECTS = 700  # more than before a collection is worth its time, as Python has it
_FULL_COLLECTION_EVERY = 100
_SWITCH_INTERVAL_S = 0.0005
_COUNT_EVERY_S = 0.01  # a few fast steps at a time: one by one, each amid everything else, takes four times as long

_log = structlog.get_logger(__name__)
_EngineEffect = Keep | Truncate | Share | Release
_Delivered = Send | EndStream


class Outbox(Protocol):
    """The way back to one stream. Neither call blocks or raises, also after the stream has ended."""

    def send(self, message: CloudMessage) -> None:
        """Queue a message."""
        ...

    def end(self) -> None:
        """End the stream after what was queued."""
        ...


@dataclass(slots=True)
class _Forwarded:
    """What came of a forward: the selected tokens, or why it failed; and when it ran, in the worker's clock."""

    results: list[tuple[int, ...]]
    error: Exception | None
    began: float
    ended: float


class Worker:
    """Drives a `SessionTable` and a `TargetEngine`; `run` must be running for anything to happen."""

    def __init__(
        self,
        engine: TargetEngine,
        settings: TableSettings,
        policy: StepPolicy,
        metrics: VerifierMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._policy = policy
        self._metrics = metrics
        metrics.kv_blocks.set(settings.cache_blocks)
        self._clock = clock
        self._table = SessionTable(settings, policy)
        self._outboxes: dict[int, Outbox] = {}
        self._stale_tokens: dict[CloudSession, int] = {}  # of each open session, as far as counted
        self._engine_effects: list[_EngineEffect] = []
        self._undelivered: list[_Delivered] = []  # while the next forward is not running yet
        self._cached: set[str] = set()  # sessions that the engine may hold a cache of
        self._wake = asyncio.Event()
        self._num_collections = 0
        self._num_evicted = 0  # as far as counted
        self._idle_since: float | None = None  # when the last forward ended; None once the worker has slept
        # Counting waits until the next forward runs, and for some company.
        self._uncounted: list[Callable[[], StepReport]] = []
        self._counted_at = -math.inf
        self._thread = EngineThread("engine")
        self._log = _log.bind()  # or each event would bind it anew

    def __repr__(self) -> str:
        return f"<Worker {self._table!r}>"

    # -- what streams call ------------------------------------------------------------------------------------------

    def opened(self, stream: int, identity: str, outbox: Outbox) -> None:
        """A new stream, by a number that was never used before."""
        self._outboxes[stream] = outbox
        self._table.opened(stream, identity, self._clock())
        self._wake.set()

    def receive(self, stream: int, message: EdgeMessage) -> None:
        """A message arrived on this stream; one that ended from our side is ignored."""
        if stream in self._outboxes:
            self._enact(self._table.receive(stream, message, self._clock()))
            self._wake.set()

    def lost(self, stream: int) -> None:
        """The stream is gone; what is still sent to it goes nowhere."""
        if self._outboxes.pop(stream, None) is not None:
            self._enact(self._table.lost(stream, self._clock()))
            self._wake.set()

    # -- what operators ask -----------------------------------------------------------------------------------------

    def session_statuses(self) -> list[SessionStatus]:
        """The live sessions."""
        return self._table.statuses(self._clock())

    def cache_usage(self) -> tuple[int, int, int]:
        """Blocks of the cache in use, blocks in all, parked sessions."""
        ledger = self._table.ledger
        return ledger.used_blocks, self._settings.cache_blocks, ledger.num_parked

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled.

        Garbage is collected while a forward runs, never while the engine waits for us: with 256 sessions that took a
        quarter of the time between two forwards. The engine's thread need not wait long for the interpreter either.
        """
        switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.freeze()
        gc.disable()
        try:
            while True:
                await self._serve_once()
        finally:
            gc.enable()
            gc.unfreeze()
            sys.setswitchinterval(switch_interval)

    async def close(self) -> None:
        """End every stream and free the thread; `run` must have been cancelled."""
        for outbox in self._outboxes.values():
            outbox.end()
        await asyncio.to_thread(self._thread.close)

    async def _serve_once(self) -> None:
        """One step, or one sleep if there is nothing to do."""
        try:
            self._wake.clear()
            now = self._clock()
            self._collect(self._table.tick(now))
            plan = self._table.plan(now)
            schedule_ms = (self._clock() - now) * 1000
            self._collect(plan.effects)
            if plan.batch or self._engine_effects:
                await self._step(plan.batch, schedule_ms)
            else:
                self._deliver()
                self._count()
                gc.collect()
                self._idle_since = None
                await self._sleep()
        except Exception as error:  # noqa: BLE001  # runtimes raise what they like; one fault must not end the service
            _log.exception("the target engine failed; every session starts over", reason=str(error))
            await self._start_over(type(error).__name__)

    async def _step(self, batch: Sequence[Rows], schedule_ms: float) -> None:
        effects, self._engine_effects = self._engine_effects, []
        used = {rows.session_id for rows in batch} | {
            effect.session_id for effect in effects if isinstance(effect, Share)
        }
        self._cached |= used
        running = self._thread.start(partial(self._forward, effects, batch))
        self._deliver()
        self._table.read_along()
        came_or_went = self._stale_tokens.keys() ^ self._table.sessions
        if came_or_went or self._clock() >= self._counted_at + _COUNT_EVERY_S:
            self._count()
        if gc.get_count()[0] >= _YOUNG_OBJECTS:
            self._num_collections += 1
            gc.collect(1 if self._num_collections % _FULL_COLLECTION_EVERY else 2)
        forwarded = await running
        self._cached -= {effect.session_id for effect in effects if isinstance(effect, Release)} - used
        if not batch:
            return
        if forwarded.error is not None:
            self._idle_since = forwarded.ended
            _log.error("a forward failed; its sessions are tried one by one", reason=str(forwarded.error))
            self._collect(self._table.failed(self._clock()))
            return
        verify_ms = (forwarded.ended - forwarded.began) * 1000
        committed = self._table.stepped(forwarded.results, verify_ms, self._clock())
        self._collect(committed)
        outside_ms = None if self._idle_since is None else (forwarded.began - self._idle_since) * 1000
        self._idle_since = forwarded.ended
        self._uncounted.append(partial(_report, batch, committed, schedule_ms, verify_ms, outside_ms))

    def _forward(self, effects: Sequence[_EngineEffect], batch: Sequence[Rows]) -> _Forwarded:
        """On the engine's thread: what the last step left to do, then the forward."""
        for effect in effects:
            match effect:
                case Keep(session_id=key, start=start, rows=rows):
                    self._engine.keep(key, start, rows)
                case Truncate(session_id=key, length=length):
                    self._engine.truncate(key, length)
                case Share(session_id=key, source_id=source, length=length):
                    self._engine.share(key, source, length)
                case Release(session_id=key):
                    self._engine.release(key)
        began, results, failed = self._clock(), list[tuple[int, ...]](), None
        try:
            results = self._engine.forward(batch) if batch else []
        except Exception as error:  # noqa: BLE001  # runtimes raise what they like; the table knows what to do
            failed = error
        return _Forwarded(results, failed, began, self._clock())

    async def _sleep(self) -> None:
        wake_at = self._table.wake_at()
        timer = None
        if wake_at is not None:
            delay_s = max(wake_at - self._clock(), _SHORTEST_SLEEP_S)
            timer = asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def _start_over(self, reason: str) -> None:
        """Drop every session and every cache: none of them can be trusted."""
        failure = Failure(
            FailureCode.INTERNAL, f"the verifier's engine failed ({reason}); open again", self._settings.retry_after_ms
        )
        self._deliver()
        for outbox in self._outboxes.values():
            outbox.send(failure)
            outbox.end()
        self._outboxes.clear()
        self._table = SessionTable(self._settings, self._policy)
        self._num_evicted = 0
        self._count()
        self._engine_effects.clear()
        cached, self._cached = self._cached, set()
        # Shielded: whoever stops the verifier now must not leave half of them in an engine that is used again.
        await asyncio.shield(self._thread.start(partial(self._release_all, cached)))

    def _release_all(self, keys: set[str]) -> None:
        """On the engine's thread: release the caches of an engine that has failed before."""
        for key in keys:
            self._release(key)

    def _release(self, key: str) -> None:
        try:
            self._engine.release(key)
        except Exception:  # noqa: BLE001  # as above; the other caches are still to be released
            _log.exception("a cache cannot be released", session=key)

    def _enact(self, effects: Sequence[CloudEffect]) -> None:
        self._collect(effects)
        self._deliver()

    def _collect(self, effects: Sequence[CloudEffect]) -> None:
        """Sort effects by who carries them out. The engine must not wait for messages: they leave once it runs."""
        for effect in effects:
            if isinstance(effect, _Delivered):
                self._undelivered.append(effect)
            else:
                self._engine_effects.append(effect)

    def _deliver(self) -> None:
        effects, self._undelivered = self._undelivered, []
        for effect in effects:
            match effect:
                case Send(stream=stream, message=message):
                    if isinstance(message, Failure):
                        self._metrics.refusals.labels(message.code.name.lower()).inc()
                    if (outbox := self._outboxes.get(stream)) is not None:
                        outbox.send(message)  # type: ignore[arg-type]  # a table sends what clouds send
                case EndStream(stream=stream):
                    if (outbox := self._outboxes.pop(stream, None)) is not None:
                        outbox.end()

    # -- what is counted --------------------------------------------------------------------------------------------

    def _count(self) -> None:
        self._counted_at = self._clock()
        for make_report in self._uncounted:
            report = make_report()
            self._metrics.stepped(report)
            verify_ms = round(report.verify_ms, 1)
            self._log.debug("step", sessions=report.sessions, committed=report.num_committed, verify_ms=verify_ms)
        self._uncounted.clear()
        metrics, ledger, live = self._metrics, self._table.ledger, self._table.sessions
        metrics.sessions.set(len(live))
        metrics.parked_sessions.set(ledger.num_parked)
        metrics.kv_blocks_used.set(ledger.used_blocks)
        if ledger.num_evicted > self._num_evicted:
            metrics.evictions.inc(ledger.num_evicted - self._num_evicted)
            self._num_evicted = ledger.num_evicted
        for session in self._stale_tokens.keys() | live:
            if session not in self._stale_tokens:
                _log.debug("session opened", session=session.key, tokens=len(session.log), cached=session.cached_len)
            stale = session.stale_tokens - self._stale_tokens.setdefault(session, 0)
            if stale:
                metrics.stale_draft_tokens.inc(stale)
                self._stale_tokens[session] = session.stale_tokens
        for session in self._stale_tokens.keys() - live:
            finish, acceptance = session.finish.name, session.acceptance.report()
            _log.info("session closed", session=session.key, tokens=len(session.log), finish=finish, **acceptance)
            del self._stale_tokens[session]


def _report(
    batch: Sequence[Rows],
    effects: Sequence[CloudEffect],
    schedule_ms: float,
    verify_ms: float,
    outside_ms: float | None,
) -> StepReport:
    # With hundreds of sessions in a step: one pass over each, not one for each sum.
    prefill_rows = draft_rows = self_decode_rows = 0
    for rows in batch:
        prefill_rows += rows.first_selected
        # The last committed token's row counts with what it is evaluated for.
        num_selected = len(rows.tokens) - rows.first_selected
        if num_selected > 1:
            draft_rows += num_selected
        else:
            self_decode_rows += num_selected
    num_drafted = num_accepted = num_recycled = num_committed = num_commits = 0
    queue_ms = 0.0
    for effect in effects:
        if isinstance(effect, Send) and isinstance(effect.message, Commit):
            commit = effect.message
            num_drafted += commit.num_drafted
            num_accepted += commit.num_accepted
            num_recycled += commit.num_recycled
            num_committed += len(commit.tokens)
            queue_ms += commit.queue_ms
            num_commits += 1
    return StepReport(
        sessions=len(batch),
        prefill_rows=prefill_rows,
        draft_rows=draft_rows,
        self_decode_rows=self_decode_rows,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        num_recycled=num_recycled,
        num_committed=num_committed,
        queue_ms=queue_ms / max(num_commits, 1),
        schedule_ms=schedule_ms,
        verify_ms=verify_ms,
        outside_ms=outside_ms,
    )
