"""A cloud session brought to a state, and ways to step it."""

from shared.core.cloud_session import CloudSession, Stepped
from shared.core.effects import Rows
from shared.core.messages import Commit, Draft, Open, Sampling
from shared.core.policies import Offer
from shared.core.settings import CloudSettings, SelfDecode
from shared.core.tokens import TokenLog, next_hash
from shared.testing.engines import TOY_VOCABULARY

STOP = 0
OPEN = Open("s", (1, 2, 3), 3, 10, TOY_VOCABULARY, Sampling(seed=7), frozenset((STOP,)))
SETTINGS = CloudSettings(
    context_length=100,
    self_decode=SelfDecode.ALWAYS,
    max_draft_rows=4,
    max_pending_tokens=8,
    window_tokens=6,
    starved_after_ms=500.0,
)


def session_of(opened: Open = OPEN, settings: CloudSettings = SETTINGS, cached_len: int = 2) -> CloudSession:
    return CloudSession("me/s", opened, TokenLog(opened.tokens), cached_len, settings, now=0.0)


def draft_on(session: CloudSession, *tokens: int, after: tuple[int, ...] = ()) -> Draft:
    """A draft on the committed end, or on pending tokens after it."""
    prefix_hash = session.log.hash_at(len(session.log))
    for token in after:
        prefix_hash = next_hash(prefix_hash, token)
    return Draft(len(session.log) + len(after), prefix_hash, tokens)


def planned(session: CloudSession, now: float = 0.0, most: int = 99) -> Rows | None:
    """Take all that is offered, or `most` rows of it; a self-decode that is only spare counts too."""
    offer = session.offer(now)
    if offer is None:
        return None
    return session.take(min(offer.prefill_rows + 1 + len(offer.worth), most), now)


def step(session: CloudSession, *selected: int, now: float = 0.0) -> Stepped:
    return session.stepped(selected, 1.0, 8, now)


def offered(session: CloudSession, now: float = 0.0) -> Offer:
    offer = session.offer(now)
    assert offer is not None
    return offer


def commit_of(stepped: Stepped) -> Commit:
    assert stepped.commit is not None
    return stepped.commit
