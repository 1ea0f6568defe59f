"""An edge session brought to a state, and ways to read its effects."""

from dataclasses import dataclass, replace

from shared.core.edge_session import EdgeSession
from shared.core.effects import (
    Connect,
    EdgeEffect,
    Provenance,
    Send,
)
from shared.core.link import LinkSettings
from shared.core.messages import (
    Commit,
    Heartbeat,
)
from shared.core.policies import DraftObservation
from shared.core.settings import EdgeSettings, OnReconnect, Request
from shared.testing.engines import TOY_VOCABULARY

REQUEST = Request("s", (1, 2), max_new_tokens=20, vocabulary=TOY_VOCABULARY, stop_ids=frozenset((0,)))
SETTINGS = EdgeSettings(
    link=LinkSettings(max_stall_ms=600.0, heartbeat_ms=200.0),
    patience_ms=5_000.0,
    connect_timeout_ms=1_000.0,
    backoff_initial_ms=50.0,
    backoff_max_ms=250.0,
)
REVISE = replace(SETTINGS, on_reconnect=OnReconnect.REVISE)
LOCAL = Provenance.LOCAL


@dataclass
class Ahead:
    """Keeps so many tokens ahead of what is settled."""

    tokens: int
    wait_ms: float = 0.0
    price: float = 0.03

    def draft_tokens(self, seen: DraftObservation) -> int:
        return max(0, min(self.tokens, seen.max_ahead) - seen.ahead_tokens)

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        return self.wait_ms

    def sibling_price(self, seen: DraftObservation) -> float:
        return self.price


def session_of(settings: EdgeSettings = SETTINGS, request: Request = REQUEST, ahead: int = 2) -> EdgeSession:
    return EdgeSession(request, settings, Ahead(ahead))


def linked(settings: EdgeSettings = SETTINGS, request: Request = REQUEST) -> EdgeSession:
    """On stream 1 since 0 s, token 5 committed, 6 and 7 drafted and sent, nothing in flight."""
    session = session_of(settings, request)
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.0)
    session.connected(1, 0.0)
    session.receive(1, Commit(2, (5,)), 0.0)
    session.drafted((7,), (1.0,), 0.0)
    return session


def sent(effects: list[EdgeEffect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def of_type(effects: list[EdgeEffect], *types: type[object]) -> list[EdgeEffect]:
    return [effect for effect in effects if isinstance(effect, types)]


def redialled(session: EdgeSession, now: float) -> int:
    """Let the backoff pass; the number of the new attempt."""
    connects = of_type(session.tick(now + 1.0), Connect)
    assert len(connects) == 1
    assert isinstance(connects[0], Connect)
    assert connects[0].fresh
    return connects[0].stream


def local(settings: EdgeSettings = SETTINGS) -> EdgeSession:
    """The stream broke at 1 s; 6 and 7 are shown as local, a draft is in flight."""
    session = linked(settings)
    session.receive(1, Heartbeat(0, 3), 0.9)
    session.disconnected(1, 1.0)
    return session
