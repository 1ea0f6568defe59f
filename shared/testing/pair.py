"""An edge session and a session table joined by a perfect link: the two machines in concert, in a few lines of a test.

No delays, no losses and no wire: for those see `shared.testing.world`. Time moves by one turn after another.
"""

from collections import deque

from shared.core import effects as fx
from shared.core.edge_session import EdgeSession
from shared.core.messages import CloudMessage, Commit, EdgeMessage
from shared.core.policies import DraftPolicy, StepPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import EdgeSettings, Request, TableSettings
from shared.core.tokens import TokenLog
from shared.engine import DraftEngine, TargetEngine
from shared.policy.scheduler import BestRate

TURN_S = 0.01


class Pair:
    """Carries effects out at once. `shown` is the user's text after the prompt, `commits` what the verifier said."""

    def __init__(
        self, request: Request, edge: EdgeSettings, policy: DraftPolicy, engine: DraftEngine, target: TargetEngine,
        table: TableSettings, step_policy: StepPolicy | None = None,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self.session = EdgeSession(request, edge, policy)
        self.table = SessionTable(table, step_policy or BestRate(target.cost_ms, target.limits.max_rows))
        self.shown = TokenLog(request.prompt)
        self.commits: list[Commit] = []
        self.finished: fx.Finished | None = None
        self._request = request
        self._engine = engine
        self._target = target
        self._todo: deque[fx.EdgeEffect] = deque()
        self._is_busy = False
        engine.reset((), request.sampling, len(request.prompt))

    def run(self, turns: int = 100_000) -> None:
        """Until the text ends, or for so many turns."""
        self._edge(self.session.start(self.now))
        for _ in range(turns):
            if self.finished is not None:
                return
            self.now += TURN_S
            plan = self.table.plan(self.now)
            self._cloud(plan.effects)
            if plan.batch:
                self._cloud(self.table.stepped(self._target.forward(plan.batch), 1.0, self.now))
            wakes_at = self.session.wake_at()
            if wakes_at is not None and wakes_at <= self.now:
                self._edge(self.session.tick(self.now))

    def _edge(self, effects: list[fx.EdgeEffect]) -> None:
        self._todo.extend(effects)
        if self._is_busy:
            return  # in order, and never one inside another
        self._is_busy = True
        while self._todo:
            match effect := self._todo.popleft():
                case fx.Connect(stream=stream):
                    self.table.opened(stream, "edge", self.now)
                    self._edge(self.session.connected(stream, self.now))
                case fx.Send(stream=stream, message=message):
                    assert isinstance(message, EdgeMessage)
                    self._cloud(self.table.receive(stream, message, self.now))
                case fx.Draft(feed=feed, n=n):
                    self._engine.extend(feed)
                    proposal = self._engine.propose(n)
                    self._edge(self.session.drafted(proposal.tokens, proposal.confidence, self.now, proposal.siblings))
                case fx.Rollback(length=length):
                    self._engine.rollback(length)
                case fx.Emit(tokens=tokens):
                    self.shown.extend(tokens)
                case fx.Finished():
                    self.finished = effect
                case _:
                    raise AssertionError(f"{effect} on a perfect link")
        self._is_busy = False

    def _cloud(self, effects: list[fx.CloudEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(stream=stream, message=message):
                    assert isinstance(message, CloudMessage)
                    self.commits += [message] if isinstance(message, Commit) else []
                    self._edge(self.session.receive(stream, message, self.now))
                case fx.Keep(session_id=key, start=start, rows=rows):
                    self._target.keep(key, start, rows)
                case fx.Release(session_id=key):
                    self._target.release(key)
                case fx.EndStream():
                    pass  # after the edge's Close
                case _:
                    raise AssertionError(f"{effect} on a perfect link")
