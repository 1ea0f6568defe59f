"""The driver of the edge: carries out what an `EdgeSession` asks for, on one event loop and one engine thread.

The session decides, this module does: effects go to the channel, to the draft engine's thread or to the caller, and
what comes back goes into the session with the time it came. Everything but the engine runs on the event loop, so the
session has one owner and needs no lock; engine operations run on one thread in the order in which they were asked for.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

import grpc
import structlog

from edge_agent.channel import Channel, Traffic
from edge_agent.statistics import Statistics
from shared.core.draft_path import Learnt
from shared.core.edge_session import EdgeSession
from shared.core.effects import (
    Confirm,
    Connect,
    Disconnect,
    Draft,
    EdgeEffect,
    Emit,
    Finished,
    Refused,
    Retract,
    Rollback,
    Send,
)
from shared.core.errors import RemoteProtocolError
from shared.core.messages import CloudMessage, Commit, FailureCode, Finish
from shared.core.policies import DraftPolicy
from shared.core.settings import EdgeSettings, OnDisconnect, Request
from shared.engine import MODEL_SOURCE, DraftEngine, EngineError, Proposal
from shared.engine_thread import EngineThread
from shared.vocabulary import Vocabulary, describe_mismatch

log = structlog.get_logger(__name__)

Event = Emit | Confirm | Retract | Refused | Finished
_LATE_S = 0.02  # a timer later than this tells of a busy machine, not of a silent link
_NAMING_S = 2.0  # for the verifier to send its vocabulary; its refusal can be told without
_GOODBYE_S = 0.5  # for the Close to reach the verifier; it would notice without


class EdgeAgent:
    """One draft engine and one way to the verifier; produces one answer at a time.

    The next answer ends one that is still running. After `answer` has ended, `report` describes it.
    """

    def __init__(
        self,
        engine: DraftEngine,
        vocabulary: Vocabulary,
        channel: Channel,
        settings: EdgeSettings,
        policy: DraftPolicy,
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._channel = channel
        self._settings = settings
        self._policy = policy
        self._thread = EngineThread("draft")
        self._run: _Run | None = None

    async def answer(self, request: Request) -> AsyncGenerator[Event, None]:
        """What the user sees, as it comes; the last event is `Finished`. Raises what the engine raises.

        While the cloud can go on alone, an `EngineError` is no more than logged.
        """
        previous = self._run
        learnt = None if previous is None else previous.learnt
        run = self._run = _Run(request, self._engine, self._thread, self._channel, self._settings, self._policy, learnt)
        naming: asyncio.Task[str] | None = None
        try:
            if previous is not None:  # its streams have the same numbers: they go first
                previous.give_up("another answer was asked for")
                await self._channel.finish(_GOODBYE_S)
            run.start()
            while True:
                event = await run.events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Refused) and event.code == FailureCode.VOCABULARY_MISMATCH.name:
                    naming = asyncio.create_task(self._name_mismatch(event.detail))
                    continue  # the local text goes on meanwhile
                if isinstance(event, Finished) and naming is not None:
                    yield Refused(FailureCode.VOCABULARY_MISMATCH.name, await naming)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            run.stop()
            if naming is not None:
                naming.cancel()
            if self._run is run:
                await self._channel.finish(_GOODBYE_S)

    def report(self) -> dict[str, object]:
        """Statistics of the last answer, JSON-ready; empty before the first."""
        return self._run.report() if self._run is not None else {}

    async def settle(self) -> None:
        """Wait until the engine is idle, for others to use it: an answer that has ended may still be drafting."""
        await self._thread.start(lambda: None)

    async def close(self, keep_engine: bool = False) -> None:
        """Free the connection, and the engine unless it is the caller's."""
        if self._run is not None:
            self._run.give_up("the agent was closed")
        await self._channel.close()
        if not keep_engine:
            await self._thread.start(self._engine.close)
        await asyncio.to_thread(self._thread.close)

    async def _name_mismatch(self, detail: str) -> str:
        """The first differing ids, if the verifier still answers; its own words otherwise."""
        try:
            description = await asyncio.wait_for(self._channel.describe(), _NAMING_S)
        except (grpc.aio.AioRpcError, RemoteProtocolError, ConnectionError, asyncio.TimeoutError) as error:
            log.info("cannot ask for the verifier's vocabulary", error=str(error) or type(error).__name__)
            return detail
        named = describe_mismatch(self._vocabulary, Vocabulary(description.vocabulary_tokens))
        return f"{detail}; {named} (verifier model: {description.model})" if named else detail


class _Run:
    """One answer: the session, its timer, and what it is waiting for."""

    def __init__(
        self,
        request: Request,
        engine: DraftEngine,
        thread: EngineThread,
        channel: Channel,
        settings: EdgeSettings,
        policy: DraftPolicy,
        learnt: Learnt | None,
    ) -> None:
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._request = request
        self._engine = engine
        self._thread = thread
        self._channel = channel
        self._settings = settings
        self._session = EdgeSession(request, settings, policy, learnt)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_reset = False  # the engine still holds the last answer's tokens
        self._engine_error: EngineError | None = None
        self._is_complete = False  # the verifier said that the text ends
        self._is_paused = False  # nothing goes on until the verifier is back
        self._is_over = False
        self._statistics = Statistics(time.monotonic())

    def start(self) -> None:
        """Begin the session."""
        if not self._is_over:
            self._channel.traffic = Traffic()
            self._do(self._session.start)

    def stop(self) -> None:
        """No more events: the caller has left or the answer is complete."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    def give_up(self, why: str) -> None:
        """End an answer that somebody may still wait for."""
        if not self._is_over:
            self.stop()
            self.events.put_nowait(Finished(Finish.NONE, why))

    @property
    def learnt(self) -> Learnt:
        """What the next answer can begin with."""
        return self._session.path.learnt

    def report(self) -> dict[str, object]:
        """Statistics so far."""
        path, link = self._session.path, self._session.link
        figures = self._statistics.report(self._channel.traffic, path.draft_ms, link.rtt_ms, path.wasted_tokens)
        return {**figures, "sibling_hits": path.siblings.num_hits}

    def connected(self, stream: int) -> None:
        """See `channel.Listener`."""
        self._do(lambda now: self._session.connected(stream, now))

    def received(self, stream: int, message: CloudMessage) -> None:
        """See `channel.Listener`."""
        if isinstance(message, Commit):
            self._statistics.saw_commit(message)
            self._is_complete = message.finish is not Finish.NONE
            self._is_paused = False
        try:
            self._do(lambda now: self._session.receive(stream, message, now))
        except RemoteProtocolError as error:
            log.warning("the verifier broke the protocol", error=str(error))
            self._channel.disconnect(stream)
            self.disconnected(stream)

    def disconnected(self, stream: int) -> None:
        """See `channel.Listener`."""
        self._do(lambda now: self._session.disconnected(stream, now))

    def _do(self, step: Callable[[float], list[EdgeEffect]]) -> None:
        """One input to the session, its effects, and the timer for the next."""
        if self._is_over:
            return
        try:
            for effect in step(time.monotonic()):
                self._enact(effect)
        except RemoteProtocolError:
            raise
        except Exception as error:  # noqa: BLE001 # a bug: whoever waits for the answer must hear of it, or waits for ever
            self._fail(error)
            return
        self._set_timer()

    def _set_timer(self) -> None:
        wake_at = self._session.wake_at()
        if wake_at is None or (self._timer is not None and self._timer.when() <= wake_at):
            return  # a timer that fires early costs less than one that is set anew for each message
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(wake_at, self._tick, wake_at)

    def _tick(self, due_at: float) -> None:
        """The timer fired. If it is late, so is the reading of messages: those that wait come before any judgement."""
        if time.monotonic() - due_at > _LATE_S:
            self._timer = self._loop.call_later(_LATE_S, self._judge)
        else:
            self._judge()

    def _judge(self) -> None:
        self._timer = None
        wake_at = self._session.wake_at()
        if wake_at is not None and wake_at <= time.monotonic():
            self._do(self._session.tick)
        elif not self._is_over:
            self._set_timer()

    def _enact(self, effect: EdgeEffect) -> None:
        match effect:
            case Send(stream=stream, message=message):
                self._channel.send(stream, message)  # type: ignore[arg-type] # an edge session sends edge messages
            case Connect(stream=stream, fresh=fresh):
                # The last answer's connection is as good as any for the first dial: if it is dead, silence will tell.
                self._channel.connect(stream, fresh and stream > 1, self)
            case Disconnect(stream=stream):
                self._statistics.disconnects += 1
                self._channel.disconnect(stream)
                if self._settings.on_disconnect is OnDisconnect.PAUSE and not self._is_paused:
                    self._is_paused = True
                    log.warning("the verifier cannot be reached; the answer waits for it")
            case Draft() | Rollback():
                future = self._thread.start(partial(self._operate, effect))
                future.add_done_callback(partial(self._operated, effect))
            case Emit() | Confirm() | Retract():
                self._statistics.saw(effect, time.monotonic())
                self.events.put_nowait(effect)
            case Finished(finish=Finish.LENGTH) if self._engine_error is not None and self._is_cut_short:
                self._fail(self._engine_error)
            case Refused() | Finished():
                self.events.put_nowait(effect)

    @property
    def _is_cut_short(self) -> bool:
        """Whether the text ends neither by its own rules nor by the verifier's word: there is nothing to go on with."""
        return not self._is_complete and self._request.ending(self._session.path.log) is Finish.NONE

    def _operate(self, effect: Draft | Rollback) -> Proposal:
        """On the engine's thread. An engine that failed is left alone: nobody knows what its cache holds."""
        if self._engine_error is None:
            try:
                if isinstance(effect, Draft):
                    return self._draft(effect)
                self._engine.rollback(effect.length)
            except EngineError as error:
                self._engine_error = error
                log.error("the draft engine failed; only the cloud goes on", error=str(error))  # noqa: TRY400 # said
        return Proposal((), ())

    def _draft(self, effect: Draft) -> Proposal:
        if self._is_reset:
            self._engine.extend(effect.feed)
        else:  # the first draft feeds the whole prompt; what it shares with the last answer stays in the cache
            self._engine.reset(effect.feed, self._request.sampling, len(self._request.prompt))
            self._is_reset = True
        return self._engine.propose(effect.n)

    def _operated(self, effect: Draft | Rollback, future: "asyncio.Future[Proposal]") -> None:
        if error := future.exception():
            self._fail(error)
        elif isinstance(effect, Draft):
            proposal = future.result()
            self._do(lambda now: self._session.drafted(proposal.tokens, proposal.confidence, now, proposal.siblings))
            self._note_sources(effect, proposal)

    def _note_sources(self, draft: Draft, proposal: Proposal) -> None:
        """Remember who drafted what became of the own path; what the verifier has overtaken is not judged."""
        log, sources = self._session.path.log, proposal.sources or (MODEL_SOURCE,) * len(proposal.tokens)
        if log.has_prefix(draft.start, draft.parent_hash):
            end = log.match(draft.start, proposal.tokens)
            known = max(0, self._session.committed_len - draft.start)
            self._statistics.saw_drafts(draft.start + known, proposal.tokens[known:end], sources[known:end])

    def _fail(self, error: BaseException) -> None:
        """End the answer by raising to its caller."""
        if not self._is_over:
            self.stop()
            self.events.put_nowait(error)
