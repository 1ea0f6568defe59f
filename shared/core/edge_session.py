"""The edge's state machine for one answer.

Theory of operation
-------------------
The session owns one `TokenLog`: the prompt, what the verifier committed, what was shown as local, and then its own
path, the tokens drafted beyond that. Three marks move along it:

    committed_len   the verifier's tokens, or tokens that it took as given when the session was opened again
    shown_len       what the user has seen; beyond committed_len only while the cloud is away
    sent_len        how much of the own path has been sent as drafts on this stream

The edge runs ahead: it drafts, sends and goes on without waiting. A commit is compared with the own path. Equal: keep
going. Different: the path is cut there, the draft engine rolled back, and drafting goes on from the commit's end. A
commit carries its tokens and its start, so a repeated one changes nothing and a gap is the peer's error.

    phase        tokens shown               leaves by
    CONNECTING   none: the first dial       connected -> OPENING; max_stall_ms or failed dial -> LOCAL
    OPENING      none; local after a hold   first commit -> LINKED (or a second Open, below); silence, loss -> LOCAL
    LINKED       commits                    silence, loss, no commit within patience_ms -> LOCAL; finish -> DONE
    LOCAL        own path, unverified       connected -> OPENING; stop token, limit -> DONE
    DONE         -                          -

Going LOCAL comes first and redialling second: the own path is at hand, so the next token appears at once. Each attempt
has a new stream number (after a jittered backoff): what a dead stream still delivers has an old one and is dropped.

On return the session opens again with its tokens. `continue`: what was shown stands and the cloud goes on from there.
Showing pauses for at most max_stall_ms, because a token shown now could differ from the commit on its way; if the pause
expires first, local tokens are shown after all; the late commit is answered by opening once more, with more patience.
`revise`: it opens at committed_len and sends the local tail as drafts; what is not accepted is retracted.
While the verifier reads a prompt, which it tells, patience counts from its latest progress; amid an answer it does not,
for a pause there is one that a user sees.
Each input returns effects to carry out in order; `wake_at` says when to call `tick`. Times are monotonic seconds.
"""

import math
from collections.abc import Sequence
from enum import Enum

from shared.core.dialler import Dialler
from shared.core.draft_path import DraftPath, Learnt
from shared.core.effects import Disconnect, EdgeEffect, Finished, Refused, Send
from shared.core.errors import RemoteProtocolError
from shared.core.link import Link
from shared.core.messages import Close, CloudMessage, Commit, Failure, Finish, Heartbeat, NeedTokens, Want
from shared.core.policies import DraftPolicy
from shared.core.settings import EdgeSettings, OnDisconnect, OnReconnect, Request
from shared.core.siblings import Siblings
from shared.core.transcript import Transcript

_NEWS = 0.1  # a duration is told again when it differs by more than this part
_CLOCK_GRAIN_MS = 0.1  # shorter waits are none: a timer that rounds to now would fire for ever


class Phase(Enum):
    """Where a session stands; see the table above."""

    CONNECTING = "connecting"
    OPENING = "opening"
    LINKED = "linked"
    LOCAL = "local"
    DONE = "done"


class EdgeSession:
    """One answer from `start` to `Finished`; see the module's theory of operation."""

    def __init__(
        self, request: Request, settings: EdgeSettings, policy: DraftPolicy, learnt: Learnt | None = None
    ) -> None:
        """`learnt` is what an earlier session with this draft and verifier came to know (`path.learnt`)."""
        self.phase = Phase.CONNECTING
        self.path = DraftPath(request.prompt, learnt)
        self.link = Link(settings.link)
        self.committed_len = self._opened_len = len(request.prompt)
        self._known_len = 0  # tokens that the verifier is known to have, if it kept its cache
        self._transcript = Transcript(len(request.prompt))
        self._dialler = Dialler(settings, request.session_id)
        self._request = request
        self._settings = settings
        self._policy = policy
        self._hold_until: float | None = None  # until when a pause before local tokens is worth it
        self._is_slow = False  # the verifier answers, but not within max_stall_ms: wait longer for it next time
        self._patience_until = 0.0
        self._read_tokens = 0  # so far, by the verifier, before its first commit on this stream
        self._send_at = math.inf  # when drafts that gather are due
        self._max_ahead = 64  # until the first commit tells
        self._told_ms = [0.0, 0.0]  # what the verifier knows of `path.draft_ms` and `link.rtt_ms`

    def __repr__(self) -> str:
        return (
            f"<EdgeSession {self._request.session_id} {self.phase.value} on stream {self._dialler.stream}: "
            f"{self.committed_len} committed, {self._transcript.shown_len} shown, {self.path!r}, {self.link!r}>"
        )

    def start(self, now: float) -> list[EdgeEffect]:
        """Begin: dial, and draft in the meantime."""
        if self._settings.offline:
            self.phase = Phase.LOCAL
            return self._advance(now)
        self._hold_until = now + self._settings.link.max_stall_ms / 1000
        return [self._dialler.dial(now, self.link.rtt_ms), *self._advance(now)]

    def connected(self, stream: int, now: float) -> list[EdgeEffect]:
        """The stream is up: open the session on it."""
        if not self._dialler.answered(stream):
            return []
        was_local, revise = self.phase is Phase.LOCAL, self._settings.on_reconnect is OnReconnect.REVISE
        self.phase = Phase.OPENING
        self.link.opened(now)
        self._patience_until, self._read_tokens = now + self._settings.patience_ms / 1000, 0
        is_brief, self._is_slow = was_local and not self._is_slow, False
        hold_ms = self._settings.link.max_stall_ms if is_brief else self._settings.patience_ms
        self._hold_until = None if was_local and revise else now + hold_ms / 1000
        return [self._open(self.committed_len if revise else self._transcript.shown_len), *self._advance(now)]

    def disconnected(self, stream: int, now: float) -> list[EdgeEffect]:
        """The stream ended or could not be had."""
        is_news = stream == self._dialler.stream and self.phase is not Phase.DONE
        return self._go_local(now, "the verifier cannot be reached") if is_news else []

    def receive(self, stream: int, message: CloudMessage, now: float) -> list[EdgeEffect]:
        """A message arrived. Raises `RemoteProtocolError`; the driver then reports the stream as disconnected."""
        if stream != self._dialler.stream or not self._is_up:
            return []  # a dead stream still delivers
        self.link.heard(message, now)
        effects: list[EdgeEffect] = []
        match message:
            case NeedTokens() if self.phase is Phase.OPENING and self._known_len:
                self._known_len = 0
                effects.append(self._open(self._opened_len))
            case Commit():
                effects += self._commit(message, now)
            case Heartbeat(read_tokens=read_tokens) if self.phase is Phase.OPENING and read_tokens > self._read_tokens:
                self._read_tokens = read_tokens
                self._renew_patience(now)
            case Failure(code=code, detail=detail, retry_after_ms=retry_after_ms):
                refused: list[EdgeEffect] = [Refused(code.name, detail)] if code.is_final else []
                return refused + self._go_local(now, detail, retry_after_ms, code.is_final)
            case _:  # a Heartbeat without news, which the link heard, or a repeated NeedTokens
                pass
        return effects + self._advance(now)

    def drafted(
        self, tokens: tuple[int, ...], confidence: tuple[float, ...], now: float, siblings: Sequence[Siblings] = ()
    ) -> list[EdgeEffect]:
        """The draft engine carried out the last `Draft`; no tokens means that its context is full."""
        rollbacks = self.path.drafted(tokens, confidence, self._request.stop_ids, now, siblings)
        return [*rollbacks, *self._advance(now)]

    def tick(self, now: float) -> list[EdgeEffect]:
        """Time passed: judge the link, dial, send what is due."""
        if self.phase is Phase.DONE:
            return []
        if self._dialler.give_up_at is not None and now >= self._dialler.give_up_at:
            return self._go_local(now, "the verifier does not answer")
        if self._is_up and now >= self.link.stalled_at:
            return self._go_local(now, "the link stalled")
        if self._is_up and now >= self._patience_until:
            return self._go_local(now, "the verifier is too slow")
        effects: list[EdgeEffect] = []
        if self._dialler.next_at is not None and now >= self._dialler.next_at:
            effects.append(self._dialler.dial(now, self.link.rtt_ms))
        if self._hold_until is not None and now >= self._hold_until:
            self._hold_until = None
            self.phase = Phase.LOCAL if self.phase is Phase.CONNECTING else self.phase
        return effects + self._advance(now)

    def wake_at(self) -> float | None:
        """When to call `tick`; None: not until something happens."""
        if self.phase is Phase.DONE:
            return None
        times = [
            time for time in (self._dialler.next_at, self._dialler.give_up_at, self._hold_until) if time is not None
        ]
        if self._is_up:
            times += (self.link.stalled_at, self._patience_until, self.link.next_heartbeat_at, self._send_at)
        elif self.path.is_exhausted and self._shows_local:
            times.append(self._patience_until)
        return min(times, default=None)

    @property
    def _is_up(self) -> bool:
        return self.phase is Phase.LINKED or self.phase is Phase.OPENING

    @property
    def _shows_local(self) -> bool:
        wanted = self._settings.offline or self._settings.on_disconnect is OnDisconnect.CONTINUE
        return wanted and self._hold_until is None and self.phase in (Phase.LOCAL, Phase.OPENING)

    def _open(self, opened_len: int) -> Send:
        self._opened_len = self.path.sent_len = opened_len
        self.path.clock.opened()
        self._told_ms = [0.0, 0.0]
        return Send(self._dialler.stream, self._request.open(self.path.log, self._known_len, opened_len))

    def _commit(self, commit: Commit, now: float) -> list[EdgeEffect]:
        if self.phase is Phase.OPENING:
            if commit.start != self._opened_len:
                raise RemoteProtocolError(f"opened at {self._opened_len}, first commit at {commit.start}")
            self._known_len = self._opened_len
            if self._transcript.shown_len > self._opened_len and self._settings.on_reconnect is OnReconnect.CONTINUE:
                # Local tokens were shown beyond what this stream was opened with: open once more, from there.
                self.phase, self._is_slow = Phase.LOCAL, True
                return [Disconnect(self._dialler.stream), self._dialler.dial(now, self.link.rtt_ms, fresh=False)]
            self.phase, self.committed_len = Phase.LINKED, self._opened_len
        start = self.committed_len
        tokens = self.path.news(commit, start, self._request.vocabulary.size)
        self._max_ahead = commit.max_ahead or self._max_ahead
        self.path.verifier_holds(start + self._max_ahead)
        matched, rollbacks = self.path.lay(start, tokens, commit.num_accepted, commit.hold_tokens)
        self.path.committed(commit, self.link.rtt_ms, now)
        self.committed_len = self._known_len = start + len(tokens)
        self._patience_until = now + self._settings.patience_ms / 1000
        self._dialler.progressed()
        shown = self._transcript.show_committed(self.path.log, commit, start, start + matched)
        finished = self._finish(commit.finish) if commit.finish is not Finish.NONE else []
        return [*rollbacks, *shown, *finished]

    def _renew_patience(self, now: float) -> None:
        """The verifier is slow, but it gets on: a pause that lasts as long as the patience goes on, too."""
        lasts_as_long = self._hold_until == self._patience_until
        self._patience_until = now + self._settings.patience_ms / 1000
        self._hold_until = self._patience_until if lasts_as_long else self._hold_until

    def _go_local(self, now: float, why: str, delay_ms: float = 0.0, is_final: bool = False) -> list[EdgeEffect]:
        """Show the own path first, then drop the stream and dial again later (never, where the refusal is final)."""
        stream, self._hold_until = self._dialler.abandon(), None
        on_disconnect = self._settings.on_disconnect
        if on_disconnect is OnDisconnect.FAIL or (is_final and on_disconnect is OnDisconnect.PAUSE):
            self.phase = Phase.DONE
            return [Disconnect(stream), Finished(Finish.NONE, why)]
        if self.phase is not Phase.LOCAL or is_final:
            self._patience_until = now if is_final else now + self._settings.patience_ms / 1000
        self.phase = Phase.LOCAL
        if not is_final:
            self._dialler.retry(now, delay_ms)
        return [*self._advance(now), Disconnect(stream)]

    def _finish(self, finish: Finish) -> list[EdgeEffect]:
        stream, was_up = self._dialler.abandon(), self._is_up
        self.phase = Phase.DONE
        return [Send(stream, Close(finish.name)) if was_up else Disconnect(stream), Finished(finish)]

    def _advance(self, now: float) -> list[EdgeEffect]:
        """Whatever the state as it stands calls for."""
        self._send_at = math.inf
        effects: list[EdgeEffect] = []
        if self._shows_local:
            effects += self._transcript.show_local(self.path.log)
            ending = self._request.ending(self.path.log)
            if ending is Finish.NONE and self.path.is_exhausted and now >= self._patience_until:
                ending = Finish.LENGTH
            if ending is not Finish.NONE:
                return effects + self._finish(ending)
        if self._is_up and now >= self.link.next_heartbeat_at:
            effects.append(Send(self._dialler.stream, self._heartbeat(now)))
        if self.phase is Phase.DONE or (self._request.want is Want.STREAM and not self._shows_local):
            return effects
        return effects + self._run_ahead(now)

    def _heartbeat(self, now: float) -> Heartbeat:
        """With the durations that are news: a number costs five bytes."""
        news = [0.0, 0.0]
        for index, ms in enumerate((self.path.draft_ms, self.link.rtt_ms)):
            if abs(ms - self._told_ms[index]) > _NEWS * self._told_ms[index]:
                news[index] = self._told_ms[index] = ms
        return Heartbeat(self.link.heartbeat(now), self.committed_len, draft_ms=news[0], rtt_ms=news[1])

    def _run_ahead(self, now: float) -> list[EdgeEffect]:
        """Send what is due and draft further."""
        path, settled_len = self.path, max(self.committed_len, self._transcript.shown_len)
        held_len = (
            max(self.committed_len, self._opened_len) + self._max_ahead - path.sent_siblings if self._is_up else 0
        )
        if not path.can_draft and path.sent_len >= min(len(path), held_len):
            return []  # nothing to decide
        seen = path.observe(settled_len, held_len, self.link, self._max_ahead, now)
        drafts: list[EdgeEffect] = []
        if path.can_draft:
            n = 1 if self._shows_local else min(self._policy.draft_tokens(seen), self._request.limit - len(path))
            drafts = [path.draft(n, now)] if n and self._request.ending(path.log) is Finish.NONE else []
        if seen.unsent_tokens:
            seen.is_whole = len(path) <= held_len and self._request.is_drafted(path.log)
            wait_ms = self._policy.send_in_ms(seen, path.in_flight is not None)
            if wait_ms < _CLOCK_GRAIN_MS:
                draft = path.send(settled_len, held_len, self._policy.sibling_price(seen), now)
                return [Send(self._dialler.stream, draft), *drafts]
            self._send_at = now + wait_ms / 1000
        return drafts
