"""The verifier's one loop over its one model: schedule, forward, update.

The session table and the engine have one owner, the worker. `run` is one task; it plans a step, runs the forward on a
thread of its own and commits. Streams hand their messages in from the same event loop, also during a forward: the table
answers heartbeats at once and keeps the rest until the step is over. Nothing polls: `run` sleeps until a message, the
engine or a timer wakes it. Engine effects (Keep, Truncate, Release) wait for the next forward and run before it, on the
engine's thread and in order, so that the engine is never called from two threads or out of turn.

When the engine raises, nobody knows what its caches hold. Then the verifier starts over in place: every stream ends
with a Failure that asks to come back, every cache is released, and an empty table takes the next sessions. The edges
hold their whole text, so they lose time and nothing else.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, EndStream, Keep, Release, Rows, Send, Truncate
from shared.core.messages import CloudMessage, Commit, EdgeMessage, Failure, FailureCode, Heartbeat
from shared.core.policies import StepPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import TableSettings
from shared.engine import TargetEngine
from shared.metrics import VerifierMetrics

_SHORTEST_SLEEP_S = 0.001  # event loops fire up to a clock tick early; then it is not due yet
# How much one stream may leave waiting during one forward; then it is not read until the step is over.
_MAX_DEFERRED = 256

_log = structlog.get_logger(__name__)
_EngineEffect = Keep | Truncate | Release


class Outbox(Protocol):
    """The way back to one stream. Neither call blocks or raises, also after the stream has ended."""

    def send(self, message: CloudMessage) -> None:
        """Queue a message."""
        ...

    def end(self) -> None:
        """End the stream after what was queued."""
        ...


@dataclass(slots=True)
class _Stream:
    outbox: Outbox
    num_deferred: int = 0


@dataclass(frozen=True, slots=True)
class _Forwarded:
    results: list[tuple[int, ...]]
    verify_ms: float


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
        self._clock = clock
        self._table = SessionTable(settings, policy)
        self._streams: dict[int, _Stream] = {}
        self._stale_tokens: dict[CloudSession, int] = {}  # of each open session, as far as counted
        self._engine_effects: list[_EngineEffect] = []
        self._cached: set[str] = set()  # sessions that the engine may hold a cache of
        self._wake = asyncio.Event()
        self._stepped = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")

    def __repr__(self) -> str:
        return f"<Worker {self._table!r}>"

    # -- what streams call ------------------------------------------------------------------------------------------

    def opened(self, stream: int, identity: str, outbox: Outbox) -> None:
        """A new stream, by a number that was never used before."""
        self._streams[stream] = _Stream(outbox)
        self._table.opened(stream, identity, self._clock())
        self._wake.set()

    async def receive(self, stream: int, message: EdgeMessage) -> None:
        """A message arrived on this stream. Waits only where the stream sends far more than a step can take."""
        state = self._streams.get(stream)
        if state is None:
            return  # ended from our side
        is_heartbeat = isinstance(message, Heartbeat)
        if not is_heartbeat and state.num_deferred >= _MAX_DEFERRED:
            await self._stepped.wait()
        state.num_deferred += self._table.is_stepping and not is_heartbeat
        self._enact(self._table.receive(stream, message, self._clock()))
        self._wake.set()

    def lost(self, stream: int) -> None:
        """The stream is gone; what is still sent to it goes nowhere."""
        if self._streams.pop(stream, None) is not None:
            self._enact(self._table.lost(stream))
            self._wake.set()

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._serve_once()

    async def close(self) -> None:
        """End every stream and free the thread; `run` must have been cancelled."""
        for state in self._streams.values():
            state.outbox.end()
        await asyncio.to_thread(self._thread.shutdown)

    async def _serve_once(self) -> None:
        """One step, or one sleep if there is nothing to do."""
        try:
            self._wake.clear()
            now = self._clock()
            self._enact(self._table.tick(now))
            self._count_sessions()
            batch = self._table.plan(now)
            if batch or self._engine_effects:
                await self._step(batch)
            else:
                await self._sleep()
        except Exception as error:  # noqa: BLE001  # runtimes raise what they like; one fault must not end the service
            _log.exception("the target engine failed; every session starts over", reason=str(error))
            await self._start_over(type(error).__name__)

    async def _step(self, batch: Sequence[Rows]) -> None:
        self._stepped.clear()
        effects, self._engine_effects = self._engine_effects, []
        self._cached.difference_update(effect.session_id for effect in effects if isinstance(effect, Release))
        self._cached.update(rows.session_id for rows in batch)
        loop = asyncio.get_running_loop()
        forwarded = await loop.run_in_executor(self._thread, self._forward, effects, batch)
        if batch:
            committed = self._table.stepped(forwarded.results, forwarded.verify_ms, self._clock())
            self._count_step(batch, committed, forwarded.verify_ms)
            self._enact(committed)
        for state in self._streams.values():
            state.num_deferred = 0
        self._stepped.set()

    def _forward(self, effects: Sequence[_EngineEffect], batch: Sequence[Rows]) -> _Forwarded:
        """On the engine's thread: what the last step left to do, then the forward."""
        for effect in effects:
            match effect:
                case Keep(session_id=key, start=start, rows=rows):
                    self._engine.keep(key, start, rows)
                case Truncate(session_id=key, length=length):
                    self._engine.truncate(key, length)
                case Release(session_id=key):
                    self._engine.release(key)
        began = self._clock()
        results = self._engine.forward(batch) if batch else []
        return _Forwarded(results, (self._clock() - began) * 1000)

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
        for state in self._streams.values():
            state.outbox.send(failure)
            state.outbox.end()
        self._streams.clear()
        self._table = SessionTable(self._settings, self._policy)
        self._count_sessions()
        self._engine_effects.clear()
        cached, self._cached = self._cached, set()
        for key in cached:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._release, key)
        self._stepped.set()

    def _release(self, key: str) -> None:
        """On the engine's thread: release a cache of an engine that has failed before."""
        try:
            self._engine.release(key)
        except Exception:  # noqa: BLE001  # as above; the other caches are still to be released
            _log.exception("a cache cannot be released", session=key)

    def _enact(self, effects: Sequence[CloudEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(stream=stream, message=message):
                    if (state := self._streams.get(stream)) is not None:
                        state.outbox.send(message)  # type: ignore[arg-type]  # a table sends what clouds send
                case EndStream(stream=stream):
                    if (state := self._streams.pop(stream, None)) is not None:
                        state.outbox.end()
                case _:
                    self._engine_effects.append(effect)

    # -- what is counted --------------------------------------------------------------------------------------------

    def _count_sessions(self) -> None:
        live = self._table.sessions
        self._metrics.sessions.set(len(live))
        for session in self._stale_tokens.keys() | live:
            if session not in self._stale_tokens:
                _log.debug("session opened", session=session.key, tokens=len(session.log), cached=session.cached_len)
            stale = session.stale_tokens - self._stale_tokens.get(session, 0)
            self._metrics.stale_draft_tokens.inc(stale)
            self._stale_tokens[session] = session.stale_tokens
        for session in self._stale_tokens.keys() - live:
            _log.debug("session closed", session=session.key, tokens=len(session.log), finish=session.finish.name)
            del self._stale_tokens[session]

    def _count_step(self, batch: Sequence[Rows], effects: Sequence[CloudEffect], verify_ms: float) -> None:
        metrics = self._metrics
        metrics.steps.inc()
        metrics.step_duration_s.observe(verify_ms / 1000)
        for rows in batch:
            # The last committed token's row counts with what it is evaluated for.
            num_selected = len(rows.tokens) - rows.first_selected
            metrics.prefill_rows.inc(rows.first_selected)
            (metrics.draft_rows if num_selected > 1 else metrics.self_decode_rows).inc(num_selected)
        messages = [effect.message for effect in effects if isinstance(effect, Send)]
        commits = [message for message in messages if isinstance(message, Commit)]
        metrics.drafted_tokens.inc(sum(commit.num_drafted for commit in commits))
        metrics.accepted_tokens.inc(sum(commit.num_accepted for commit in commits))
        num_committed = sum(len(commit.tokens) for commit in commits)
        metrics.committed_tokens.inc(num_committed)
        num_rows = sum(len(rows.tokens) for rows in batch)
        _log.debug("step", sessions=len(batch), rows=num_rows, committed=num_committed, verify_ms=round(verify_ms, 1))
