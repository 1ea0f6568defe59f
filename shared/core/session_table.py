"""All sessions of one verifier: which stream serves which session, and what is kept of sessions whose stream is gone.

A stream is a number chosen by the server; a session has at most one. When a stream is lost its session is parked: the
token log and the cache stay, so the session can be opened again by its known prefix, on any stream. Opening a session
that another stream still serves takes it over (the edge redialled before we noticed): the old stream ends.

While a target step is in flight only heartbeats are answered; everything else waits in the inbox until `stepped`, so
nothing ever changes under a running forward.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, EndStream, Keep, Release, Rows, Send, Truncate
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.messages import (
    PROTOCOL_VERSION,
    Close,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Heartbeat,
    NeedTokens,
    Open,
)
from shared.core.policies import StepPolicy
from shared.core.settings import TableSettings
from shared.core.tokens import TokenLog


@dataclass(slots=True)
class _Stream:
    identity: str
    heard_at: float
    session: CloudSession | None = None


@dataclass(frozen=True, slots=True)
class _Parked:
    log: TokenLog
    cached_len: int
    heard_at: float


class SessionTable:
    """Pure bookkeeping between streams and sessions; the worker's one source of rows and effects."""

    def __init__(self, settings: TableSettings, policy: StepPolicy) -> None:
        self._settings = settings
        self._policy = policy
        self._streams: dict[int, _Stream] = {}
        self._parked: dict[str, _Parked] = {}  # oldest first
        self._planned: list[CloudSession] = []
        self._inbox: deque[tuple[int, Open | Draft | Close | None]] = deque()  # None: the stream was lost

    def __repr__(self) -> str:
        live = ", ".join(repr(session) for session in self.sessions)
        return f"<SessionTable {len(self._streams)} streams, {len(self._parked)} parked: {live}>"

    @property
    def sessions(self) -> list[CloudSession]:
        """Sessions that a stream serves, finished ones included."""
        return [stream.session for stream in self._streams.values() if stream.session]

    @property
    def is_stepping(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._planned)

    def opened(self, stream: int, identity: str, now: float) -> None:
        """A new stream from this identity; its Open is still to come."""
        self._streams[stream] = _Stream(identity, now)

    def receive(self, stream: int, message: EdgeMessage, now: float) -> list[CloudEffect]:
        """A message arrived. A peer's mistake ends its stream with a Failure and touches no other session."""
        state = self._streams.get(stream)
        if state is None:
            return []  # already ended from our side
        state.heard_at = now
        try:
            if isinstance(message, Heartbeat):
                return [self._echo(stream, state, message)]
            if self.is_stepping:
                self._inbox.append((stream, message))
                return []
            return self._handle(stream, state, message, now)
        except RemoteProtocolError as error:
            return self._fail(stream, Failure(FailureCode.PROTOCOL, str(error)))

    def lost(self, stream: int) -> list[CloudEffect]:
        """The stream is gone: park its session."""
        if self.is_stepping:
            self._inbox.append((stream, None))
            return []
        return self._drop(stream)

    def plan(self, now: float) -> list[Rows]:
        """Rows of the next step, one entry a session; empty if there is nothing to do. Then `stepped` must follow."""
        if self.is_stepping:
            raise LocalProtocolError("planned a step while one is in flight")
        live = self.sessions
        return self._plan(live, False, now) or self._plan(live, True, now)

    def stepped(self, results: Sequence[tuple[int, ...]], verify_ms: float, now: float) -> list[CloudEffect]:
        """Selected tokens of the planned rows, in order: commit them, then take what arrived in the meantime."""
        planned, self._planned = self._planned, []
        streams = {id(state.session): number for number, state in self._streams.items()}
        effects: list[CloudEffect] = []
        for session, selected in zip(planned, results, strict=True):
            stepped = session.stepped(selected, verify_ms, now)
            effects.append(Keep(session.key, stepped.start, stepped.kept_rows))
            if stepped.commit is not None:
                effects.append(Send(streams[id(session)], stepped.commit))
        while self._inbox:
            stream, message = self._inbox.popleft()
            effects += self._drop(stream) if message is None else self.receive(stream, message, now)
        return effects

    def tick(self, now: float) -> list[CloudEffect]:
        """End streams and forget parked sessions that were silent for too long; `stepped` asks again after a step."""
        if self.is_stepping:
            return []
        timeout = self._settings.idle_timeout_ms / 1000
        silent = [number for number, state in self._streams.items() if state.heard_at + timeout <= now]
        effects: list[CloudEffect] = []
        for stream in silent:
            effects += [*self.lost(stream), EndStream(stream)]
        keep = self._settings.park_timeout_ms / 1000
        for key in [key for key, parked in self._parked.items() if parked.heard_at + keep <= now]:
            del self._parked[key]
            effects.append(Release(key))
        return effects

    def wake_at(self) -> float | None:
        """When to call `tick` and `plan` though nothing arrived; None: not until something does, or `stepped`."""
        if self.is_stepping:
            return None
        timeout = self._settings.idle_timeout_ms / 1000
        times = [state.heard_at + timeout for state in self._streams.values()]
        times += [parked.heard_at + self._settings.park_timeout_ms / 1000 for parked in self._parked.values()]
        times += [wake_at for session in self.sessions if (wake_at := session.wake_at()) is not None]
        return min(times, default=None)

    def _plan(self, live: list[CloudSession], spare: bool, now: float) -> list[Rows]:
        batch: list[Rows] = []
        for session in live:
            rows = session.plan(self._policy, spare, now)
            if rows is not None:
                self._planned.append(session)
                batch.append(rows)
        return batch

    def _echo(self, stream: int, state: _Stream, heartbeat: Heartbeat) -> Send:
        if state.session is not None:
            state.session.acknowledged(heartbeat.committed_len, heartbeat.draft_ms)
        committed_len = len(state.session.log) if state.session else 0
        return Send(stream, Heartbeat(heartbeat.nonce, committed_len))

    def _handle(self, stream: int, state: _Stream, message: Open | Draft | Close, now: float) -> list[CloudEffect]:
        match message:
            case Open():
                if state.session is not None:
                    raise RemoteProtocolError("Open on a stream whose session is open")
                return self._open(stream, state, message, now)
            case Draft():
                failure = self._strange_id(message.tokens)
                if failure is not None:
                    return self._fail(stream, failure)
                if state.session is not None:  # else it hangs on an Open that was answered by NeedTokens: stale
                    state.session.drafted(message, now)
                return []
            case _:  # Close: nobody will come back for it
                del self._streams[stream]
                return [*([Release(state.session.key)] if state.session else []), EndStream(stream)]

    def _open(self, stream: int, state: _Stream, message: Open, now: float) -> list[CloudEffect]:
        failure = self._refusal(message)
        if failure is not None:
            return self._fail(stream, failure)
        key = f"{state.identity}/{message.session_id}"
        effects = self._take_over(key)
        if len(self.sessions) >= self._settings.max_sessions:
            detail = f"all {self._settings.max_sessions} sessions are in use"
            busy = Failure(FailureCode.RESOURCE_EXHAUSTED, detail, self._settings.retry_after_ms)
            return [*effects, *self._fail(stream, busy)]
        parked = self._parked.get(key, _Parked(TokenLog(), 0, now))
        if message.known_len and not parked.log.has_prefix(message.known_len, message.known_hash):
            return [*effects, Send(stream, NeedTokens())]
        length = message.known_len + len(message.tokens)  # hashing a log takes 0.3 s per million tokens: look first
        if length >= min(message.prompt_len + message.max_new_tokens, self._settings.session.context_length):
            detail = f"{length} tokens leave no room in a context of {self._settings.session.context_length}"
            return [*effects, *self._fail(stream, Failure(FailureCode.CONTEXT_LENGTH, detail))]
        log = TokenLog(parked.log.tokens(0, message.known_len) + message.tokens)
        cached_len = min(parked.cached_len, parked.log.match(0, log.tokens()), len(log) - 1)
        if cached_len < parked.cached_len:
            effects.append(Truncate(key, cached_len))
        self._parked.pop(key, None)
        state.session = CloudSession(key, message, log, cached_len, self._settings.session, now)
        return [*effects, *self._evict()]

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

    def _take_over(self, key: str) -> list[CloudEffect]:
        for number, state in list(self._streams.items()):
            if state.session is not None and state.session.key == key:
                return [*self._drop(number), EndStream(number)]
        return []

    def _drop(self, stream: int) -> list[CloudEffect]:
        state = self._streams.pop(stream, None)
        if state is None or state.session is None:
            return []
        session = state.session
        self._parked[session.key] = _Parked(session.log, session.cached_len, state.heard_at)
        return self._evict()

    def _evict(self) -> list[CloudEffect]:
        effects: list[CloudEffect] = []
        while self._parked and len(self._parked) + len(self.sessions) > self._settings.max_sessions:
            key = next(iter(self._parked))
            del self._parked[key]
            effects.append(Release(key))
        return effects

    def _fail(self, stream: int, failure: Failure) -> list[CloudEffect]:
        return [Send(stream, failure), *self.lost(stream), EndStream(stream)]
