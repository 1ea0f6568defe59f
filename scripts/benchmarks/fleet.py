"""Many edges in one process: real edge sessions and channels over real gRPC; only their drafting is emulated.

A driver like `edge_agent.agent`, with timers in the place of draft engines: a proposal is at hand at once and is told
when it would have been drafted. So hundreds of devices fit on one core.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.channel import Channel
from edge_agent.config import EdgeConfig
from shared.core.edge_session import EdgeSession
from shared.core.effects import (
    Connect,
    Disconnect,
    Draft,
    EdgeEffect,
    Emit,
    Finished,
    Provenance,
    Refused,
    Rollback,
    Send,
)
from shared.core.messages import CloudMessage
from shared.core.policies import DraftPolicy
from shared.core.settings import EdgeSettings, Request
from shared.engine import DraftEngine


@dataclass(slots=True)
class Answer:
    """One answer as its user saw it: tokens, their times in s, and how many of them were local."""

    session: int
    request: Request
    began: float
    tokens: list[int] = field(default_factory=list)
    shown_at: list[float] = field(default_factory=list)
    local_tokens: int = 0
    is_complete: bool = False

    def shown_in(self, began: float, ended: float) -> int:
        """Tokens shown from one moment to before another."""
        return bisect_left(self.shown_at, ended) - bisect_left(self.shown_at, began)

    def tpot_ms(self, began: float, ended: float) -> float:
        """Time per output token over what was shown within that time, two tokens at least."""
        first, last = bisect_left(self.shown_at, began), bisect_left(self.shown_at, ended) - 1
        return (self.shown_at[last] - self.shown_at[first]) * 1000 / (last - first)


class FleetEdge:
    """One device: answers back to back until cancelled. `requests` makes the next one, by number of answers so far."""

    def __init__(
        self,
        index: int,
        config: EdgeConfig,
        settings: EdgeSettings,
        policy: DraftPolicy,
        engine: DraftEngine,
        draft_ms: float,
        requests: Callable[[int, int], Request],
    ) -> None:
        self.answers: list[Answer] = []
        self._index = index
        self._channel = Channel(config.verifier, None)
        self._settings = settings
        self._policy = policy
        self._engine = engine
        self._draft_s = draft_ms / 1000
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._session: EdgeSession | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._drafting: asyncio.TimerHandle | None = None
        self._is_reset = False
        self._ended = asyncio.Event()
        self.refusal: str | None = None

    async def run(self) -> None:
        """Answer after answer; ends by itself where the verifier refuses."""
        try:
            while self.refusal is None:
                await self._answer()
        finally:
            self._stop()
            await self._channel.close()

    async def _answer(self) -> None:
        request = self._requests(self._index, len(self.answers))
        self._ended.clear()
        self._is_reset = False
        self.answers.append(Answer(self._index, request, time.monotonic()))
        self._session = EdgeSession(request, self._settings, self._policy)
        self._do(self._session.start(time.monotonic()))
        await self._ended.wait()
        self._stop()
        self._session = None
        await self._channel.finish(0.5)

    def _stop(self) -> None:
        for timer in (self._timer, self._drafting):
            if timer is not None:
                timer.cancel()
        self._timer = self._drafting = None

    # -- Listener ---------------------------------------------------------------------------------------------------

    def connected(self, stream: int) -> None:
        """See `channel.Listener`."""
        if self._session is not None:
            self._do(self._session.connected(stream, time.monotonic()))

    def received(self, stream: int, message: CloudMessage) -> None:
        """See `channel.Listener`."""
        if self._session is not None:
            self._do(self._session.receive(stream, message, time.monotonic()))

    def disconnected(self, stream: int) -> None:
        """See `channel.Listener`."""
        if self._session is not None:
            self._do(self._session.disconnected(stream, time.monotonic()))

    # -- effects ----------------------------------------------------------------------------------------------------

    def _do(self, effects: list[EdgeEffect]) -> None:
        for effect in effects:
            self._enact(effect)
        wake_at = self._session.wake_at() if self._session is not None else None
        if wake_at is None or (self._timer is not None and self._timer.when() <= wake_at):
            return  # a timer that fires early costs less than one that is set anew for each message
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(wake_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        session, now = self._session, time.monotonic()
        if session is not None:
            wake_at = session.wake_at()
            self._do(session.tick(now) if wake_at is not None and wake_at <= now else [])

    def _enact(self, effect: EdgeEffect) -> None:
        match effect:
            case Send(stream=stream, message=message):
                self._channel.send(stream, message)  # type: ignore[arg-type]  # an edge session sends edge messages
            case Connect(stream=stream, fresh=fresh):
                self._channel.connect(stream, fresh and stream > 1, self)
            case Disconnect(stream=stream):
                self._channel.disconnect(stream)
            case Draft():
                self._draft(effect)
            case Rollback(length=length):
                self._engine.rollback(length)
            case Emit(tokens=tokens, provenance=provenance):
                answer = self.answers[-1]
                answer.tokens += tokens
                answer.shown_at += [time.monotonic()] * len(tokens)
                answer.local_tokens += provenance.count(Provenance.LOCAL)
            case Refused(detail=detail):
                self.refusal = detail
            case Finished(error=error):
                self.answers[-1].is_complete = not error
                self._ended.set()
            case _:  # Confirm and Retract change nothing that is measured
                pass

    def _draft(self, effect: Draft) -> None:
        if self._is_reset:
            self._engine.extend(effect.feed)
        else:
            request = self.answers[-1].request
            self._engine.reset(effect.feed, request.sampling, len(request.prompt))
            self._is_reset = True
        proposal = self._engine.propose(effect.n)
        session = self._session
        assert session is not None

        def drafted() -> None:
            if self._session is session:
                self._do(session.drafted(proposal.tokens, proposal.confidence, time.monotonic(), proposal.siblings))

        self._drafting = self._loop.call_later(self._draft_s * effect.n, drafted)
