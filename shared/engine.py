"""What the runtime needs of a model: two small protocols, one for each side.

An engine is called from one thread at a time and never awaits. Cache lengths count tokens. Each engine states at load
what it can do; what it cannot do is refused with an `EngineError` that says why, never done wrongly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.core.effects import Rows
from shared.core.messages import Fingerprint, Sampling
from shared.core.siblings import Siblings

__all__ = [
    "MODEL_SOURCE",
    "Capabilities",
    "DraftEngine",
    "EngineError",
    "Proposal",
    "Rows",
    "TargetEngine",
    "TargetLimits",
]


class EngineError(Exception):
    """A model cannot be loaded or cannot do what was asked; the message is one line for a person."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do, known at load."""

    can_rollback: bool
    can_tree: bool
    max_context: int


MODEL_SOURCE = "model"


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens and, for each, the draft model's own probability of it (0 to 1).

    `siblings[i]` are other tokens that the model finds likely instead of token i, best first, each with its probability
    given that what comes before it is wrong; where it is empty there are none for any token.
    `sources` names what drafted each, for statistics; where it is empty all are the model's (`MODEL_SOURCE`).
    """

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    sources: tuple[str, ...] = ()
    siblings: tuple[Siblings, ...] = ()


class DraftEngine(Protocol):
    """A small model that proposes tokens. It keeps a token list and a cache that is a prefix of it, one token short."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        ...

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`; select with `sampling` from now on. Keeps what the cache shares with the old tokens."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text; they are evaluated at the next `propose`."""
        ...

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it.

        Fewer may come; none at the end of the context, or where there is nothing to say until the list changes.
        """
        ...

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `EngineError` if the cache cannot."""
        ...

    def close(self) -> None:
        """Free the model; no other call may follow."""
        ...


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """How much a target engine takes: rows in one forward; tokens and sessions in its cache, over all sessions.

    `cache_tokens` counts whole blocks of `kv_blocks.BLOCK_TOKENS`.
    """

    max_rows: int
    cache_tokens: int
    cache_sessions: int


class TargetEngine(Protocol):
    """The full model: evaluates rows of many sessions in one forward, with a cache of its own per session.

    The cache of an unknown session is empty. After `forward` a session's cache holds `start + len(rows.tokens)` tokens
    in row order; the caller then names the rows that stand with `keep`.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        ...

    @property
    def limits(self) -> TargetLimits:
        """How much it takes; the caller keeps to it, by the rules of `kv_blocks`."""
        ...

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """Evaluate the batch; for each session the selected token of each row from `first_selected` on.

        Raises `LocalProtocolError` where `start` is not the session's cache length.
        """
        ...

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """Cut the cache to its first `start` tokens followed by these rows (ascending) of the last forward."""
        ...

    def truncate(self, session_id: str, length: int) -> None:
        """Cut the cache to its first `length` tokens."""
        ...

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """Let the session, which has no cache, begin with the first `length` tokens of another session's cache.

        `length` is a multiple of `kv_blocks.BLOCK_TOKENS`. Neither session ever sees what the other does later.
        """
        ...

    def release(self, session_id: str) -> None:
        """Free the session's cache; unknown sessions are ignored."""
        ...

    def cost_ms(self, rows: int) -> float:
        """Expected duration of a forward of this many rows, ms, interpolated from the curve measured at load."""
        ...
