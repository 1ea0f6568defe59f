"""How far the edge drafts ahead, and when it sends: pure decisions on what was observed.

Run-ahead drafts on without waiting for answers. Two things bound it. A token at depth d of the own path is worth
acceptance^d committed tokens, so beyond the depth where that falls under `_MIN_WORTH` the drafts are mostly wasted
energy and bytes (DySpec, 2410.11744, stops growing a tree by the same threshold). And the verifier says how much it
will hold.
"""

import math
from dataclasses import dataclass

from shared.core.policies import DraftObservation

_MIN_WORTH = 0.1
_SAFETY_MS = 5.0  # land this long before the step: its duration and the round trip vary
_CHUNK_MS = 4.0  # a commit must not wait for a long draft call


@dataclass(frozen=True, slots=True)
class RunAhead:
    """Draft on while the verifier works; send just in time for its next step, at most every `message_interval_ms`."""

    max_ahead_tokens: int = 48
    message_interval_ms: float = 42.0

    def draft_tokens(self, seen: DraftObservation) -> int:
        """Tokens to draft now: a few at a time, up to the depth that acceptance justifies."""
        room = min(self._depth(seen.acceptance), self.max_ahead_tokens, seen.max_ahead) - seen.ahead_tokens
        chunk = max(1, min(8, int(_CHUNK_MS / seen.draft_ms))) if seen.draft_ms else 1
        return max(0, min(room, chunk))

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """Until the message would land just before the verifier's next step: sooner gains nothing.

        Every message costs its prefix hash, HTTP/2 framing and a wake-up at both ends, so they keep an interval.
        """
        return max(0.0, self.message_interval_ms - seen.since_sent_ms, seen.until_step_ms - _SAFETY_MS)

    def _depth(self, acceptance: float) -> int:
        if acceptance >= 0.999:
            return self.max_ahead_tokens
        return max(1, int(math.log(_MIN_WORTH) / math.log(max(acceptance, 1e-3))))


@dataclass(frozen=True, slots=True)
class StopAndWait:
    """Draft a fixed number of tokens, send them in one message, wait for the answer (`run_ahead: false`)."""

    draft_tokens_per_round: int = 5

    def draft_tokens(self, seen: DraftObservation) -> int:
        """The rest of the round, unless it is out."""
        if seen.unsent_tokens < seen.ahead_tokens:
            return 0
        return max(0, min(self.draft_tokens_per_round, seen.max_ahead) - seen.ahead_tokens)

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """Only when the round is complete."""
        return math.inf if is_drafting else 0.0
