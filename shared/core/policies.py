"""What the machines ask of a policy: pure decisions, plugged in by the driver (`shared.policy` implements them)."""

from dataclasses import dataclass
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


class StepPolicy(Protocol):
    """How many draft rows a step takes."""

    def draft_rows(self, base_rows: int, worth: list[float]) -> int:
        """Rows to take on top of `base_rows`; `worth[i]` is the expected number of tokens that the i-th one commits."""
        ...
