"""What the machines ask of a policy: pure decisions, plugged in by the driver (`shared.policy` implements them)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DraftObservation:
    """What the run-ahead policy decides on.

    `ahead_tokens` is the own path beyond committed, `unsent_tokens` of it not sent. `until_step_ms`: how long a message
    sent now would wait at the verifier for its next step. Durations in ms.
    """

    acceptance: float
    draft_ms: float
    rtt_ms: float
    until_step_ms: float
    ahead_tokens: int
    unsent_tokens: int
    max_ahead: int
    since_sent_ms: float


class DraftPolicy(Protocol):
    """How far to draft ahead and when to send."""

    def draft_tokens(self, seen: DraftObservation) -> int:
        """Tokens to draft now; 0: none until something arrives."""
        ...

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """How long to let unsent tokens gather: 0 sends them now, infinity waits until drafting stops."""
        ...


class Decodes(Enum):
    """Whether a session's last committed token may be evaluated without a draft behind it (self-decode)."""

    FREELY = "freely"
    SPARE = "spare"  # only where the step has room for it
    NEVER = "never"


@dataclass(slots=True)
class Offer:
    """What one session could put into the next step; not frozen, because thousands of them are made each second.

    `prefill_rows` committed tokens come before the last one and must be evaluated first; `worth[i]` is the probability
    that draft row i commits its token, in the order in which rows are taken, never rising. `weight` is what a committed
    token of this session counts, `waited_ms` how long the session has been ready.
    """

    prefill_rows: int
    worth: Sequence[float]
    decodes: Decodes
    weight: float
    waited_ms: float


class StepPolicy(Protocol):
    """Which sessions a target step serves, and how many rows each may use."""

    def allot(self, offers: Sequence[Offer]) -> list[int]:
        """Rows of each offer, 0: not in this step.

        Up to `prefill_rows` they are a prefill chunk; one more evaluates the last committed token and commits its
        successor; further ones are draft rows.
        """
        ...
