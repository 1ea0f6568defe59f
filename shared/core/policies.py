"""What the machines ask of a policy: pure decisions, plugged in by the driver (`shared.policy` implements them)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

BURST_MESSAGES = 6  # a pace is kept over so many


@dataclass(slots=True)
class DraftObservation:
    """What the run-ahead policy decides on; not frozen, because each input makes one. Durations in ms.

    How good drafts are: `acceptance` is the probability that one more token of a path that stands is right, `reach`
    that all of the own path is, `use` the part of what was drafted lately that a step accepted; `was_right` says
    whether the last drafted token that was judged was.

    When a message would be in time: one sent within `until_step_ms` lands before a step of the verifier begins, for
    which `spare_tokens` are there already; the step before takes `step_ms`. `jitter_ms` is how far such forecasts are
    off. Commits come every `interval_ms`; 0: not known yet.

    The own path goes on behind `settled_tokens` by `ahead_tokens`; `unsent_tokens` of it are not sent, and for
    `awaited_tokens` of those the verifier holds its next step. It takes `max_ahead` of them in. `is_fresh`: nothing
    was sent since the path was last cut; `is_whole`: it ends the text, and the verifier would hold all of it.
    `since_sent_ms` is the time since the last message with drafts, `since_burst_ms` since the one `BURST_MESSAGES`
    - 1 before it; commits have paid for `credit` further ones.
    """

    acceptance: float
    reach: float
    use: float
    was_right: bool
    draft_ms: float
    jitter_ms: float
    until_step_ms: float
    step_ms: float
    spare_tokens: int
    settled_tokens: int
    ahead_tokens: int
    unsent_tokens: int
    awaited_tokens: int
    is_fresh: bool
    max_ahead: int
    interval_ms: float
    since_sent_ms: float
    since_burst_ms: float
    credit: float
    is_whole: bool = False


class DraftPolicy(Protocol):
    """How far to draft ahead and when to send."""

    def draft_tokens(self, seen: DraftObservation) -> int:
        """Tokens to draft now; 0: none until something arrives."""
        ...

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """How long to let unsent tokens gather: 0 sends them now, infinity waits until drafting stops."""
        ...

    def sibling_price(self, seen: DraftObservation) -> float:
        """The least probability of being the committed token with which a sibling is sent; above 1: none is."""
        ...


class Decodes(Enum):
    """Whether a session's last committed token may be evaluated without a draft behind it (self-decode)."""

    FREELY = "freely"
    SPARE = "spare"  # only where the step has room for it
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of the drafts to come for one session. Durations in ms.

    `acceptance` is the probability that the next token of a path that stands is right, `draft_ms` the edge's time to
    draft one, `rtt_ms` from a commit to the arrival of what was drafted at once on hearing of it. The first
    `unknown_tokens` of the path on its way are committed already: only if they agree is the rest of use. The first
    useful token is expected in `next_ms`. Of those that are not here, the first `asked_tokens` of the path come
    together in `asked_ms`, for a commit has asked for them; with 0, none comes before that. A step has room for
    `most_drafts`; `further_tokens` of the path are here beyond those on offer. `left_tokens` more end the text: the
    limit, or a stop token that is drafted; 0: not known. With `may_ask` this is decided at a commit, which can ask for
    more.
    """

    acceptance: float
    draft_ms: float
    rtt_ms: float
    unknown_tokens: int
    next_ms: float
    asked_ms: float
    most_drafts: int
    asked_tokens: int = 0
    further_tokens: int = 0
    left_tokens: int = 0
    may_ask: bool = True


@dataclass(slots=True)
class Offer:
    """What one session could put into the next step; not frozen, because thousands of them are made each second.

    `prefill_rows` committed tokens come before the last one and must be evaluated first; `worth[i]` is the probability
    that draft row i commits its token, in the order in which rows are taken, never rising. `weight` is what a committed
    token of this session counts, `waited_ms` how long the session has been ready. `outlook` is None where nothing is
    to be waited for. Where there are no drafts, `recycled[i]` is the like of `worth` for rows that the verifier guessed
    itself; it never rises either.
    """

    prefill_rows: int
    worth: Sequence[float]
    decodes: Decodes
    weight: float
    waited_ms: float
    outlook: Outlook | None = None
    recycled: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a step policy decided: rows of each offer, or to wait `hold_ms` at most for drafts (0: no hold).

    `asked_tokens` are to be asked of the edge, pending ones included: for this step if it is held, or a later one.
    """

    rows: Sequence[int]
    hold_ms: float = 0.0
    asked_tokens: int = 0


class StepPolicy(Protocol):
    """Which sessions a target step serves, and how many rows each may use."""

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        """Rows of each offer, 0: not in this step; or a hold.

        Up to `prefill_rows` they are a prefill chunk; one more evaluates the last committed token and commits its
        successor; further ones are draft rows.
        """
        ...
