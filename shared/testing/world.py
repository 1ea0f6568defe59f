"""The simulator: edge sessions and a session table, driven through a bad network by one seed, in virtual time.

It plays both drivers. Everything the real ones do with an effect is done here with the toy engines, and every message
goes through `shared.wire` and back, so bytes are counted as they are on the real wire. `shared.testing.checks` says
what must hold meanwhile.
"""

import heapq
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

from shared import wire
from shared.core import effects as fx
from shared.core.edge_session import EdgeSession, Phase
from shared.core.errors import RemoteProtocolError
from shared.core.messages import CloudMessage, Commit, Draft, EdgeMessage, Heartbeat, Open
from shared.core.policies import DraftPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import EdgeSettings, Request, TableSettings
from shared.core.tokens import TokenLog
from shared.policy.scheduler import BestRate
from shared.testing.checks import Checks, SimEdge, SimUser
from shared.testing.engines import ToyDraft, ToyModel, ToyTarget
from shared.testing.link_model import LinkModel, SimStream


class World:
    """One verifier and its edges. Add edges and faults, then `run`."""

    def __init__(
        self, seed: int, model: ToyModel, target: ToyTarget, settings: TableSettings, chunk_tokens: int = 256
    ) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.edges: list[SimEdge] = []
        self.checks = Checks(model)
        self._slow_until = 0.0
        self._slow_ms = 0.0
        self._poison = ""
        self._poison_until = 0.0
        self.table: SessionTable
        self._target = target
        self._settings = settings
        self._chunk_tokens = chunk_tokens
        self._streams: dict[int, SimStream] = {}
        self._numbers: dict[tuple[int, int], int] = {}  # (edge, the edge's stream number) -> ours
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._boots = 0
        self._boot()

    def add_edge(
        self,
        request: Request,
        settings: EdgeSettings,
        policy: DraftPolicy,
        engine: ToyDraft,
        link: LinkModel,
        draft_ms: float,
        is_branching: bool = False,
    ) -> SimEdge:
        """A device that starts now."""
        session = EdgeSession(request, settings, policy)
        user = SimUser(TokenLog(request.prompt), len(request.prompt), self.now)
        index = len(self.edges)
        edge = SimEdge(index, session, request, policy, settings, engine, link, draft_ms, is_branching, user)
        engine.reset((), request.sampling, len(request.prompt))
        self.edges.append(edge)
        self._enact(edge, session.start(self.now))
        return edge

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, action))

    def run(self, until: float = 600.0) -> None:
        """Until every edge has finished and the verifier noticed; an edge that has not by `until` is a violation."""
        grace_s = self._settings.idle_timeout_ms / 1000 + 1
        budget = 200_000  # events: a timer that fires for ever must fail, not hang
        while self._events and self._events[0][0] <= until and budget:
            budget -= 1
            if all(edge.finished for edge in self.edges):
                until = min(until, self.now + grace_s)
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.checks.ended(self.edges, self.now)

    # -- faults ---------------------------------------------------------------------------------------------------

    def restart_verifier(self) -> None:
        """Every stream is reset and every cache lost."""
        self.checks.visits["fault:restart"] += 1
        for stream in list(self._streams.values()):
            self._reset(stream)
        self._boot()

    def reset_link(self, edge: SimEdge, down_s: float) -> None:
        """Connections are reset, in-flight messages lost, new dials refused for a while."""
        self.checks.visits["fault:reset"] += 1
        edge.link.refused_until = self.now + down_s
        for stream in self._streams_of(edge):
            self._reset(stream)

    def blackhole(self, edge: SimEdge, dark_s: float, up: bool = True, down: bool = True) -> None:
        """Nothing passes and nobody is told; the streams of now stay half dead for ever."""
        self.checks.visits["fault:blackhole" if up and down else "fault:half_open"] += 1
        edge.link.dark_until = self.now + dark_s
        for stream in self._streams_of(edge):
            stream.carries_up &= not up
            stream.carries_down &= not down

    def overload(self, busy_s: float) -> None:
        """Others take every place: new sessions are refused, parked ones evicted."""
        self.checks.visits["fault:overload"] += 1
        self._serial += self._settings.max_sessions
        places = [-self._serial + index for index in range(self._settings.max_sessions)]
        table = self.table
        for place in places:
            table.opened(place, f"other{place}", self.now)
            opened = Open("other", (1, 2), 2, 1, self._settings.vocabulary)
            self._cloud_enact(table.receive(place, opened, self.now))

        def leave() -> None:
            if table is self.table:
                for place in places:
                    self._cloud_enact(table.lost(place, self.now))

        self.at(self.now + busy_s, leave)

    def slow_down(self, slow_s: float, slow_ms: float) -> None:
        """Target steps take this much longer for a while."""
        self.checks.visits["fault:slow"] += 1
        self._slow_until, self._slow_ms = self.now + slow_s, slow_ms

    def poison(self, edge: SimEdge, ill_s: float) -> None:
        """Every forward that this session is part of fails for a while."""
        self.checks.visits["fault:forward"] += 1
        self._poison, self._poison_until = f"edge{edge.index}/{edge.request.session_id}", self.now + ill_s

    def stall(self, edge: SimEdge, stall_s: float) -> None:
        """What is sent from now on is held for a while, then delivered."""
        self.checks.visits["fault:stall"] += 1
        edge.link.stalled_until = self.now + stall_s

    # -- the edge's driver ------------------------------------------------------------------------------------------

    def _enact(self, edge: SimEdge, effects: list[fx.EdgeEffect]) -> None:
        self.checks.visits[f"phase:{edge.session.phase.value}"] += 1
        for effect in effects:
            self.checks.visits[f"effect:{type(effect).__name__}"] += 1
            match effect:
                case fx.Send():
                    self._send_up(edge, effect)
                case fx.Connect():
                    self._dial(edge, effect)
                case fx.Disconnect(stream=number):
                    self._hang_up(edge, number)
                case fx.Draft() | fx.Rollback():
                    edge.queue.append(effect)
                case fx.Emit():
                    self.checks.shown(edge, effect, self.now)
                case fx.Confirm():
                    self.checks.confirmed(edge, effect, self.now)
                case fx.Retract():
                    self.checks.retracted(edge, effect, self.now)
                case fx.Refused():
                    edge.refused = effect
                case fx.Finished():
                    self.checks.finished(edge, effect, self.now)
        self._work(edge)
        wakes_at = edge.session.wake_at()
        if wakes_at is not None and wakes_at != edge.wakes_at:
            edge.wakes_at = wakes_at
            self.at(max(wakes_at, self.now), partial(self._tick, edge, wakes_at))

    def _tick(self, edge: SimEdge, wakes_at: float) -> None:
        if edge.session.wake_at() == wakes_at:
            edge.wakes_at = float("inf")
            effects = edge.session.tick(self.now)
            self.checks.ticked(edge, self.now)
            self._enact(edge, effects)

    def _work(self, edge: SimEdge) -> None:
        """Run the draft engine's queue, one operation after the other."""
        while edge.queue and not edge.is_drafting:
            operation = edge.queue.popleft()
            if isinstance(operation, fx.Rollback):
                edge.engine.rollback(operation.length)
                continue
            edge.is_drafting = True
            edge.engine.extend(operation.feed)
            took_ms = edge.draft_ms * (operation.n + 0.05 * len(operation.feed))
            self.at(self.now + took_ms / 1000, partial(self._drafted, edge, operation.n))
        if not edge.queue and not edge.is_drafting and edge.session.phase is not Phase.DONE:
            self.checks.engine_follows(edge, self.now)

    def _drafted(self, edge: SimEdge, n: int) -> None:
        edge.is_drafting = False
        proposal = edge.engine.propose(n)
        self._enact(edge, edge.session.drafted(proposal.tokens, proposal.confidence, self.now, proposal.siblings))

    def _dial(self, edge: SimEdge, connect: fx.Connect) -> None:
        self.checks.visits["dial:fresh" if connect.fresh else "dial:again"] += 1
        link = edge.link
        if self.now < link.dark_until:
            return  # no answer ever; the session gives the dial up
        lands_at = link.lands_at(link.lands_at(self.now, 0.0), 0.0)
        if self.now < link.refused_until:
            self.at(lands_at, lambda: self._enact(edge, edge.session.disconnected(connect.stream, self.now)))
            return
        self._serial += 1
        number = self._serial
        self._numbers[edge.index, connect.stream] = number
        self._streams[number] = SimStream(connect.stream, edge.index)
        boot = self._boots

        def up() -> None:
            stream = self._streams.get(number)
            if stream is None or boot != self._boots:
                self._enact(edge, edge.session.disconnected(connect.stream, self.now))
            elif stream.carries_up and not stream.edge_closed:
                self.table.opened(number, f"edge{edge.index}", self.now)
                self._enact(edge, edge.session.connected(connect.stream, self.now))

        self.at(lands_at, up)

    def _hang_up(self, edge: SimEdge, number: int) -> None:
        """The edge drops a stream. The verifier hears of it if the way up still carries."""
        stream = self._streams.get(self._numbers.get((edge.index, number), 0))
        if stream is None:
            return
        stream.edge_closed = True
        if stream.carries_up:
            lands_at = edge.link.lands_at(self.now, stream.last_up)
            self.at(lands_at, lambda: self._cloud_lost(self._numbers[edge.index, number]))

    def _send_up(self, edge: SimEdge, send: fx.Send) -> None:
        number = self._numbers.get((edge.index, send.stream), 0)
        stream = self._streams.get(number)
        assert isinstance(send.message, EdgeMessage)
        encoded = wire.edge_to_wire(send.message)
        message = wire.edge_from_wire(encoded)
        self.checks.sent(edge, message, encoded.ByteSize(), self.now)
        if stream is None or not stream.carries_up:
            return
        if isinstance(message, Draft) and edge.is_branching and not message.parents and message.parent_hash % 2:
            sibling = tuple(token % 998 + 1 for token in message.tokens)
            self.checks.visits["up:sibling"] += 1
            self._fly_up(edge, stream, number, replace(message, tokens=sibling))
        for _ in range(edge.link.copies() if not isinstance(message, Open) else 1):
            self._fly_up(edge, stream, number, message)

    def _fly_up(self, edge: SimEdge, stream: SimStream, number: int, message: EdgeMessage) -> None:
        stream.last_up = edge.link.lands_at(self.now, stream.last_up)
        self.at(stream.last_up, partial(self._cloud_receives, number, message))

    # -- the verifier's driver --------------------------------------------------------------------------------------

    def _boot(self) -> None:
        self._boots += 1
        self._target.restart()
        policy = BestRate(self._target.cost_ms, self._target.limits.max_rows, self._chunk_tokens)
        self.table = SessionTable(self._settings, policy)

    def _cloud_receives(self, number: int, message: EdgeMessage) -> None:
        stream = self._streams.get(number)
        if stream is not None and stream.carries_up and not stream.cloud_closed:
            key = f"edge{stream.edge}/{self.edges[stream.edge].request.session_id}"
            session = next((session for session in self.table.sessions if session.key == key), None)
            pending, stale = (session.pending_tokens, session.stale_tokens) if session else (0, 0)
            effects = self.table.receive(number, message, self.now)
            if session is not None and isinstance(message, Draft):
                self.checks.drafted(session, message, session.pending_tokens - pending, self.now)
                self.checks.visits["sibling:stale"] += bool(message.parents) and session.stale_tokens > stale
            self._cloud_enact(effects)

    def _cloud_lost(self, number: int) -> None:
        if self._streams.pop(number, None) is not None:
            self._cloud_enact(self.table.lost(number, self.now))

    def _cloud_enact(self, effects: list[fx.CloudEffect]) -> None:
        self._carry_out(effects)
        self._step()
        wakes_at = self.table.wake_at()
        if wakes_at is not None:
            self.at(max(wakes_at, self.now), partial(self._cloud_tick, self._boots))

    def _carry_out(self, effects: list[fx.CloudEffect]) -> None:
        for effect in effects:
            self.checks.visits[f"effect:{type(effect).__name__}"] += 1
            match effect:
                case fx.Send(stream=number, message=message):
                    assert isinstance(message, CloudMessage)
                    self._send_down(number, message)
                case fx.EndStream(stream=number):
                    self._end_stream(number)
                case fx.Keep(session_id=key, start=start, rows=rows):
                    self._target.keep(key, start, rows)
                case fx.Truncate(session_id=key, length=length):
                    self._target.truncate(key, length)
                case fx.Share(session_id=key, source_id=source, length=length):
                    self._target.share(key, source, length)
                case fx.Release(session_id=key):
                    self._target.release(key)

    def _cloud_tick(self, boot: int) -> None:
        wakes_at = self.table.wake_at()
        if boot == self._boots and wakes_at is not None and wakes_at <= self.now:
            effects = self.table.tick(self.now)
            if effects:
                self.checks.visits["fault:silent_edge"] += 1
            self._cloud_enact(effects)
            self.checks.rests(self.table, self.now)

    def _step(self) -> None:
        if self.table.is_stepping:
            return
        plan = self.table.plan(self.now)
        self.checks.held(self.table, bool(plan.batch), self.now)
        self._carry_out(plan.effects)
        if not plan.batch:
            return
        self.checks.planned(plan.batch, self._settings.session, self._chunk_tokens)
        num_rows = sum(len(rows.tokens) for rows in plan.batch)
        took_ms = self._target.cost_ms(num_rows) + (self._slow_ms if self.now < self._slow_until else 0.0)
        boot = self._boots
        poisoned = self.now < self._poison_until and any(rows.session_id == self._poison for rows in plan.batch)
        results = self._target.forward(plan.batch)

        def done() -> None:
            if boot != self._boots:
                return
            if poisoned:
                self._cloud_enact(self.table.failed(self.now))
            else:
                self._cloud_enact(self.table.stepped(results, took_ms, self.now))
            self.checks.caches_hold(self.table, self._target)

        self.at(self.now + took_ms / 1000, done)

    def _send_down(self, number: int, sent: CloudMessage) -> None:
        stream = self._streams.get(number)
        if stream is None or stream.cloud_closed:
            return
        edge = self.edges[stream.edge]
        if isinstance(sent, Commit):
            self.checks.committed(edge, sent, self.now)
        encoded = wire.cloud_to_wire(sent)
        message = wire.cloud_from_wire(encoded)
        self.checks.visits[f"down:{type(message).__name__}"] += 1
        self.checks.visits["prefill:told"] += isinstance(message, Heartbeat) and message.read_tokens > 0
        edge.bytes_down += encoded.ByteSize()
        if not stream.carries_down:
            return
        for _ in range(edge.link.copies()):
            stream.last_down = edge.link.lands_at(self.now, stream.last_down)
            self.at(stream.last_down, lambda: self._edge_receives(edge, stream, message))

    def _edge_receives(self, edge: SimEdge, stream: SimStream, message: CloudMessage) -> None:
        if not stream.carries_down:
            return
        if stream.edge_closed:
            self.checks.visits["fault:late_delivery"] += 1
        num_hits = edge.session.path.siblings.num_hits
        edge.commits += isinstance(message, Commit)
        try:
            self._enact(edge, edge.session.receive(stream.number, message, self.now))
            self.checks.visits["sibling:hit"] += edge.session.path.siblings.num_hits - num_hits
        except RemoteProtocolError as error:
            self.checks.violated(edge, self.now, f"the verifier broke the protocol: {error}")
            self._enact(edge, edge.session.disconnected(stream.number, self.now))

    def _end_stream(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is None or stream.cloud_closed:
            return
        stream.cloud_closed = True
        if stream.carries_down:
            edge = self.edges[stream.edge]
            lands_at = edge.link.lands_at(self.now, stream.last_down)
            self.at(lands_at, lambda: self._enact(edge, edge.session.disconnected(stream.number, self.now)))

    def _reset(self, stream: SimStream) -> None:
        """Both ends are told, what is in flight is lost."""
        stream.carries_up = stream.carries_down = False
        number = self._numbers[stream.edge, stream.number]
        edge = self.edges[stream.edge]
        self._enact(edge, edge.session.disconnected(stream.number, self.now))
        self._cloud_lost(number)

    def _streams_of(self, edge: SimEdge) -> list[SimStream]:
        return [stream for stream in self._streams.values() if stream.edge == edge.index]
