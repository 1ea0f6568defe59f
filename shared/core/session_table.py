"""All sessions of one verifier: which stream serves which session, what each step does, and who must wait.

A stream is a number chosen by the server; a session has at most one. When a stream ends its session is parked: the
token log and the cache stay for a while, so that the session can be opened again by its known prefix, on any stream.
Opening a session that another stream still serves takes it over (the edge redialled before we noticed): the old stream
ends.

While a target step is in flight, drafts, heartbeats and new sessions are taken in as ever. Only what would take away a
session that is in that step waits until `stepped`, and what comes on the same stream after it waits behind it.

A step whose forward fails says nothing about which session was at fault. So each of them gets its next step alone; who
fails alone is given up, the others have lost time only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from shared.core.cache_ledger import CacheLedger
from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, EndStream, Keep, Rows, Send
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import (
    PROTOCOL_VERSION,
    Close,
    Commit,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Heartbeat,
    NeedTokens,
    Open,
    SessionStatus,
    Want,
)
from shared.core.policies import Allotment, Offer, StepPolicy
from shared.core.settings import TableSettings
from shared.core.tokens import TokenLog

# Behind an Open that waits for its session's step: more than an edge drafts in that time. What is beyond is dropped.
_MAX_WAITING = 64
_LEAST_AHEAD = 8  # draft tokens that every session may have pending, however many sessions there are
_CHECK_EVERY_S = 10.0
_MOST_RECYCLING = 32  # sessions: a guess takes 20 us, in which the engine waits


@dataclass(slots=True)
class _Stream:
    identity: str
    heard_at: float
    session: CloudSession | None = None
    is_told: bool = False  # what steps cost
    draft_ms: float = 0.0  # as its last heartbeats said, before its Open was taken in, too
    rtt_ms: float = 0.0
    waiting: deque[Open | Draft | Close | None] = field(default_factory=deque)  # None: the stream was lost


@dataclass(frozen=True, slots=True)
class Plan:
    """The next step: what the engine must do first, and the rows, one entry a session; empty: nothing to do."""

    effects: list[CloudEffect]
    batch: list[Rows]


class SessionTable:
    """Pure bookkeeping between streams and sessions; the worker's one source of rows and effects."""

    def __init__(self, settings: TableSettings, policy: StepPolicy) -> None:
        self.ledger = CacheLedger(settings)
        self._settings = settings
        self._policy = policy
        self._streams: dict[int, _Stream] = {}
        self._stream_of: dict[str, int] = {}  # of each live session, by its key
        self._planned: list[CloudSession] = []
        self._decided: tuple[CloudSession, Offer, Allotment] | None = None  # at a commit; stands until there is news
        self._room_at = inf  # at the last plan the cache had no room for somebody: when it may have
        self._checked_at = 0.0

    def __repr__(self) -> str:
        live = ", ".join(repr(session) for session in self.sessions)
        return f"<SessionTable {len(self._streams)} streams, {self.ledger.num_parked} parked: {live}>"

    @property
    def sessions(self) -> list[CloudSession]:
        """Sessions that a stream serves, finished ones included; the least recently served first."""
        return self.ledger.live

    @property
    def is_stepping(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._planned)

    def statuses(self, now: float) -> list[SessionStatus]:
        """What an operator is shown of each live session."""
        return [session.status(self._streams[self._stream_of[session.key]].heard_at, now) for session in self.sessions]

    # -- streams ----------------------------------------------------------------------------------------------------

    def opened(self, stream: int, identity: str, now: float) -> None:
        """A new stream from this identity; its Open is still to come."""
        self._streams[stream] = _Stream(identity, now)

    def receive(self, stream: int, message: EdgeMessage, now: float) -> list[CloudEffect]:
        """A message arrived. A peer's mistake ends its stream with a Failure and touches no other session."""
        state = self._streams.get(stream)
        if state is None:
            return []  # already ended from our side
        state.heard_at = now
        if not isinstance(message, Heartbeat) and (state.waiting or self._must_wait(state, message)):
            if len(state.waiting) < _MAX_WAITING:
                state.waiting.append(message)
            return []
        return self._try(stream, message, now)

    def lost(self, stream: int, now: float) -> list[CloudEffect]:
        """The stream is gone: park its session."""
        state = self._streams.get(stream)
        if state is not None and state.session is not None and state.session.is_stepping:
            state.waiting.append(None)
            return []
        return self._drop(stream, now)

    # -- steps ------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next step. If it has rows, `stepped` or `failed` must follow."""
        if self._planned:
            raise LocalProtocolError("planned a step while one is in flight")
        decided, self._decided = self._decided, None
        is_alone = len(self.ledger.live) == 1
        offered = [decided[:2]] if decided and is_alone else self._offers(now)
        plan = Plan([], [])
        self._room_at = inf
        if not offered:
            return plan
        session, offer = offered[0]
        if len(offered) > 1:
            allotment = self._policy.allot([offer for _, offer in offered])
        elif decided is not None and decided[0] is session:
            if not is_alone:  # it was asked for its offer anew
                session.recycle(now)
            allotment = decided[2]
        else:
            allotment = self._allot_alone(session, offer, now, may_ask=False)
        if allotment.hold_ms:
            session.hold(now + allotment.hold_ms / 1000)
        for (session, offer), num_rows in zip(offered, allotment.rows, strict=True):
            if not num_rows:
                continue
            if plan.effects and len(session.log) - 1 - session.cached_len != offer.prefill_rows:
                continue  # it was evicted to make room for another
            if not self.ledger.make_room(session, num_rows, now, plan.effects):
                self._room_at = min(self._room_at, self.ledger.room_at(session))
                continue
            self._planned.append(session)
            plan.batch.append(session.take(num_rows, now))
        return plan

    def stepped(self, results: Sequence[tuple[int, ...]], verify_ms: float, now: float) -> list[CloudEffect]:
        """Selected tokens of the planned rows, in order: commit them, then do what had to wait."""
        planned, self._planned = self._planned, []
        num_live = max(len(self._stream_of), 1)
        most, in_all = self._settings.session.max_pending_tokens, self._settings.max_pending_in_all
        max_ahead = min(most, max(in_all // num_live, _LEAST_AHEAD))
        effects: list[CloudEffect] = []
        for session, selected in zip(planned, results, strict=True):
            stepped = session.stepped(selected, verify_ms, max_ahead, now)
            self.ledger.served(session)
            effects.append(Keep(session.key, stepped.start, stepped.kept_rows))
            if stepped.commit is not None:
                commit = self._asking(session, stepped.commit, now) if len(planned) == 1 else stepped.commit
                session.asked(commit.hold_tokens, now)
                effects.append(self._send(session, commit))
        return effects + self._go_on(now)

    def read_along(self) -> None:
        """A step is in flight: do what would keep the next one waiting. It changes nothing but when that is done."""
        for session in self._planned:
            session.read_along()

    def failed(self, now: float) -> list[CloudEffect]:
        """The forward of the step failed: its sessions' caches are dropped; a session that was alone is given up."""
        planned, self._planned = self._planned, []
        effects: list[CloudEffect] = []
        for session in planned:
            session.failed()
            effects += self.ledger.dropped(session)
        if len(planned) == 1:
            failure = Failure(FailureCode.INTERNAL, "the target failed on this session", self._settings.retry_after_ms)
            effects += self._fail(self._stream_of[planned[0].key], failure, now)
        return effects + self._go_on(now)

    def tick(self, now: float) -> list[CloudEffect]:
        """End streams and forget parked sessions that were silent for too long; look over the books now and then."""
        if self.is_stepping:
            return []
        timeout = self._settings.idle_timeout_ms / 1000
        effects: list[CloudEffect] = []
        for stream in [number for number, state in self._streams.items() if state.heard_at + timeout <= now]:
            effects += [*self._drop(stream, now), EndStream(stream)]
        effects += self.ledger.expire(now)
        if now >= self._checked_at + _CHECK_EVERY_S:
            self._checked_at = now
            self.ledger.check_integrity()
        return effects

    def wake_at(self) -> float | None:
        """When to call `tick` and `plan` though nothing arrived; None: not until something does, or `stepped`."""
        if self.is_stepping:
            return None
        timeout = self._settings.idle_timeout_ms / 1000
        times = [state.heard_at + timeout for state in self._streams.values()]
        times += [wake_at for session in self.ledger.live if (wake_at := session.wake_at()) is not None]
        times += [wake_at for wake_at in (self.ledger.wake_at(),) if wake_at is not None]
        times += [self._room_at] if self._room_at < inf else []
        return min(times, default=None)

    def _offers(self, now: float) -> list[tuple[CloudSession, Offer]]:
        """Of all sessions that have something to do; of a suspect one alone, if there is one."""
        offered: list[tuple[CloudSession, Offer]] = []
        for session in self.ledger.live:
            offer = session.offer(now)
            if offer is not None:
                if session.is_suspect:
                    return [(session, offer)]
                offered.append((session, offer))
        if 1 < len(offered) <= _MOST_RECYCLING:
            for session, offer in offered:
                offer.recycled = () if offer.prefill_rows else session.recycle(now)
        return offered

    def _asking(self, session: CloudSession, commit: Commit, now: float) -> Commit:
        """With what is decided of the next steps: what one waits for, so that it is sent, and when they will begin."""
        live = self.ledger.live
        is_alone = session.is_ready and (len(live) == 1 or sum(other.is_ready for other in live) == 1)
        offer = session.offer(now) if is_alone else None
        if offer is None:
            return commit
        allotment = self._allot_alone(session, offer, now, may_ask=True)
        self._decided = session, offer, allotment
        hold_tokens = max(allotment.asked_tokens - session.pending_siblings, 0)
        if allotment.hold_ms or offer.outlook is None:  # it is not decided, or the edge does not draft yet
            return replace(commit, hold_tokens=hold_tokens, is_holding=allotment.hold_ms > 0.0)
        return replace(commit, hold_tokens=hold_tokens, next_rows=allotment.rows[0] - 1)

    def _send(self, session: CloudSession, commit: Commit) -> Send:
        """With what steps cost, where it is the stream's first: an edge that knows aims well from the start."""
        number = self._stream_of[session.key]
        stream = self._streams[number]
        if not stream.is_told and session.opened.want is Want.SPECULATE:
            stream.is_told = True
            commit = replace(commit, step_ms=self._settings.step_ms)
        return Send(number, commit)

    def _allot_alone(self, session: CloudSession, offer: Offer, now: float, *, may_ask: bool) -> Allotment:
        offer.recycled = session.recycle(now)
        offer.outlook = session.outlook(now, may_ask=may_ask)
        return self._policy.allot([offer])

    # -- messages ---------------------------------------------------------------------------------------------------

    def _must_wait(self, state: _Stream, message: Open | Draft | Close) -> bool:
        """Whether it would take a session away that is in the step in flight."""
        if isinstance(message, Open):
            session = self.ledger.session(_key(state, message))
        else:
            session = state.session if isinstance(message, Close) else None
        return session is not None and session.is_stepping

    def _go_on(self, now: float) -> list[CloudEffect]:
        """A step is over: do what waited for it."""
        effects: list[CloudEffect] = []
        for stream, waiting in [(number, state.waiting) for number, state in self._streams.items() if state.waiting]:
            while waiting and stream in self._streams:  # it may be ended by another one that takes its session over
                message = waiting.popleft()
                if message is None:
                    effects += self._drop(stream, now)
                else:
                    effects += self._try(stream, message, now)
        return effects

    def _try(self, stream: int, message: Open | Draft | Close | Heartbeat, now: float) -> list[CloudEffect]:
        self._decided = None
        try:
            return self._handle(stream, self._streams[stream], message, now)
        except RemoteProtocolError as error:
            return self._fail(stream, Failure(FailureCode.PROTOCOL, str(error)), now)

    def _handle(self, stream: int, state: _Stream, message: EdgeMessage, now: float) -> list[CloudEffect]:
        match message:
            case Heartbeat():
                state.draft_ms, state.rtt_ms = message.draft_ms or state.draft_ms, message.rtt_ms or state.rtt_ms
                session = state.session
                if session is None:
                    return [Send(stream, Heartbeat(message.nonce, 0))]
                session.acknowledged(message.committed_len, state.draft_ms, state.rtt_ms, now)
                return [Send(stream, Heartbeat(message.nonce, len(session.log), read_tokens=session.read_tokens))]
            case Open():
                if state.session is not None:
                    raise RemoteProtocolError("Open on a stream whose session is open")
                return self._open(stream, state, message, now)
            case Draft():
                failure = self._strange_id(message.tokens)
                if failure is not None:
                    return self._fail(stream, failure, now)
                if state.session is not None:  # else it hangs on an Open that was answered by NeedTokens: stale
                    state.session.drafted(message, now)
                return []
            case Close():
                return [*self._drop(stream, now), EndStream(stream)]

    def _open(self, stream: int, state: _Stream, message: Open, now: float) -> list[CloudEffect]:
        failure = self._refusal(message)
        if failure is not None:
            return self._fail(stream, failure, now)
        key = _key(state, message)
        effects = self._take_over(key, now)
        known = self.ledger.parked_log(key)
        if message.known_len and not known.has_prefix(message.known_len, message.known_hash):
            return [*effects, Send(stream, NeedTokens())]
        length = message.known_len + len(message.tokens)  # hashing a log takes 0.3 s per million tokens: look first
        failure = self._no_place(message, length)
        if failure is not None:
            return [*effects, *self._fail(stream, failure, now)]
        log = TokenLog(known.tokens(0, message.known_len) + message.tokens)
        cached_len, found = self.ledger.find(key, state.identity, log, now)
        state.session = CloudSession(key, message, log, cached_len, self._settings.session, now)
        state.session.acknowledged(0, state.draft_ms, state.rtt_ms, now)
        self._stream_of[key] = stream
        return [*effects, *found, *self.ledger.opened(state.session)]

    def _strange_id(self, tokens: tuple[int, ...]) -> Failure | None:
        """An id that the target has no row for would fail every session of its step."""
        size = self._settings.vocabulary.size
        if max(tokens, default=0) < size:
            return None
        return Failure(FailureCode.PROTOCOL, f"token {max(tokens)} is outside of the vocabulary of {size}")

    def _refusal(self, message: Open) -> Failure | None:
        limits = self._settings
        if message.protocol != PROTOCOL_VERSION:
            detail = f"protocol {message.protocol} is not spoken here, only {PROTOCOL_VERSION}"
            return Failure(FailureCode.INVALID_REQUEST, detail)
        if message.vocabulary != limits.vocabulary:
            sizes = f"{message.vocabulary.size} tokens at the edge, {limits.vocabulary.size} here"
            return Failure(FailureCode.VOCABULARY_MISMATCH, f"the draft and target vocabularies differ ({sizes})")
        if message.max_new_tokens > limits.max_new_tokens:
            detail = f"max_new_tokens {message.max_new_tokens} is above this verifier's {limits.max_new_tokens}"
            return Failure(FailureCode.INVALID_REQUEST, detail)
        return self._strange_id(message.tokens)

    def _no_place(self, message: Open, length: int) -> Failure | None:
        """Why a session of this length cannot begin, or not now (admission by context, load and memory)."""
        limits, live = self._settings, self.ledger.live
        context_length = limits.session.context_length
        if length >= min(message.prompt_len + message.max_new_tokens, context_length):
            detail = f"{length} tokens leave no room in a context of {context_length}"
            return Failure(FailureCode.CONTEXT_LENGTH, detail)
        if len(live) >= limits.max_sessions:
            detail = f"all {limits.max_sessions} sessions are in use"
        elif sum(session.is_active for session in live) >= limits.max_active_sessions:
            detail = f"{limits.max_active_sessions} sessions are being served; one more would slow all of them down"
        elif not self.ledger.has_room(length):
            detail = f"the cache of {limits.cache_blocks * BLOCK_TOKENS} tokens is in use"
        else:
            return None
        return Failure(FailureCode.RESOURCE_EXHAUSTED, detail, limits.retry_after_ms)

    def _take_over(self, key: str, now: float) -> list[CloudEffect]:
        stream = self._stream_of.get(key)
        return [] if stream is None else [*self._drop(stream, now), EndStream(stream)]

    def _drop(self, stream: int, now: float) -> list[CloudEffect]:
        """The stream is no more; its session, which no step serves, is parked."""
        self._decided = None
        state = self._streams.pop(stream, None)
        if state is None or state.session is None:
            return []
        del self._stream_of[state.session.key]
        return self.ledger.park(state.session, now)

    def _fail(self, stream: int, failure: Failure, now: float) -> list[CloudEffect]:
        return [Send(stream, failure), *self.lost(stream, now), EndStream(stream)]


def _key(state: _Stream, message: Open) -> str:
    return f"{state.identity}/{message.session_id}"
