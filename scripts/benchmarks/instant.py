"""A target and a draft that cost nothing and always agree: one text, of which each returns slices.

What is left of an answer's time is the runtime's own.
"""

from collections.abc import Sequence

from shared.core.effects import Rows
from shared.core.messages import Fingerprint, Sampling
from shared.engine import Capabilities, Proposal, TargetLimits

CONTEXT_TOKENS = 1 << 16
FINGERPRINT = Fingerprint(size=1000, digest=b"instant")
PROMPT_LEN = 3
TEXT = tuple([1 + position * 7919 % 997 for position in range(CONTEXT_TOKENS)])  # the prompt is its beginning
_STEP_MS, _ROW_MS = 0.05, 0.001  # a rule that compares durations needs some


class _Instant:
    """What target and draft have in common."""

    @property
    def capabilities(self) -> Capabilities:
        """No trees."""
        return Capabilities(can_rollback=True, can_tree=False, max_context=CONTEXT_TOKENS)

    @property
    def fingerprint(self) -> Fingerprint:
        """Nobody else's."""
        return FINGERPRINT


class InstantTarget(_Instant):
    """A `TargetEngine` without a cache; it takes drafts in chains only."""

    @property
    def limits(self) -> TargetLimits:
        """As many tokens as the text has, of each session."""
        return TargetLimits(max_rows=2048, cache_tokens=16 * CONTEXT_TOKENS, cache_sessions=1 << 20)

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """See `TargetEngine`."""
        return [TEXT[rows.start + rows.first_selected + 1 : rows.start + len(rows.tokens) + 1] for rows in batch]

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine`."""

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine`."""

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine`."""

    def release(self, session_id: str) -> None:
        """See `TargetEngine`."""

    def cost_ms(self, rows: int) -> float:
        """Linear, and nearly flat."""
        return _STEP_MS + _ROW_MS * rows


class InstantDraft(_Instant):
    """A `DraftEngine` that remembers how long its text is."""

    def __init__(self) -> None:
        self._length = 0

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self._length += len(tokens)

    def propose(self, n: int) -> Proposal:
        """See `DraftEngine`."""
        tokens = TEXT[self._length : self._length + n]
        self._length += len(tokens)
        return Proposal(tokens, (0.8,) * len(tokens))

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        self._length = length

    def close(self) -> None:
        """See `DraftEngine`."""
        self._length = 0
