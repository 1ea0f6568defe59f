"""What draft engines that keep a cache have in common: a token list, and how much of it the cache holds.

The cache is a prefix of the list. The last proposed token is in the list but not in the cache, and what was appended
since is evaluated with it, in one go, at the next `propose`. Where nothing is left to evaluate, behind a rollback with
nothing appended, the last token is evaluated again: it yields the logits of what follows.

With a window the cache holds at most so many tokens, however long the text: the first `SINK_TOKENS` and the latest
ones. What attention has no use for it puts on a text's first tokens, whatever they are, so a draft without them breaks
down and one with them hardly notices what is missing (StreamingLLM: Xiao et al., arXiv 2309.17453, section 3). Between
the two lie `dropped_tokens` tokens, never evaluated or evaluated and dropped; positions count within the cache:

    list    0 ... SINK_TOKENS | dropped_tokens | ... _cached | not yet evaluated ...
    cache   0 ... SINK_TOKENS                  | ...         |

A full window drops a part of itself at once, as the rest must be moved then.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.core.errors import LocalProtocolError
from shared.core.messages import Fingerprint, Sampling
from shared.core.selection import Ids, Logits, confidences, draft_candidates
from shared.core.siblings import Siblings
from shared.engine import Capabilities, EngineError, Proposal

SINK_TOKENS = 4
_SLIDES = 8  # a full window drops so small a part of itself
_SIBLINGS = 3  # of each token: the target's is among the first four of a weak draft three times in four


def context_room(context_tokens: int, window_tokens: int, trained_tokens: int) -> tuple[int, int]:
    """Tokens that a text may have, and how many of them a cache must hold.

    Without a window a text ends where the model's training does, or at `context_tokens`; with one only the cache does.
    """
    if not window_tokens:
        room = min(context_tokens or trained_tokens, trained_tokens)
        return room, room
    return context_tokens or trained_tokens, min(window_tokens, context_tokens or trained_tokens, trained_tokens)


class CachedDraft(ABC):
    """A `DraftEngine` but for the model: a subclass evaluates tokens and cuts its cache."""

    def __init__(self, name: str, batch_tokens: int, capabilities: Capabilities, window_tokens: int = 0) -> None:
        """Evaluate at most `batch_tokens` at once and cache at most `window_tokens`; 0: all of them.

        `name` is the model's, in errors.
        """
        self._name = name
        self._batch_tokens = batch_tokens
        self._capabilities = capabilities
        self._window_tokens = window_tokens or capabilities.max_context
        self._tokens: list[int] = []
        self._cached = 0
        self.dropped_tokens = 0
        self._sampling = Sampling()
        self._prompt_len = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}, {len(self._tokens)} tokens, {self._cached} cached>"

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return self._capabilities

    @property
    def num_cached(self) -> int:
        """Tokens of the list that the cache holds, dropped ones included; the next forward evaluates the others.

        Where there is no other it evaluates the last one again.
        """
        return self._cached

    @property
    def can_check(self) -> bool:
        """Whether it gives the logits of several rows, as far as it knows: `propose_checked` needs them."""
        return True

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`; select with `sampling` from now on. Keeps what the cache shares with the old tokens."""
        kept = 0
        for old, new in zip(self._tokens[: self._cached], tokens[:-1], strict=False):
            if old != new:
                break
            kept += 1
        if not self._cut(kept):
            self._cut(0)
        self._tokens = list(tokens)
        self._sampling, self._prompt_len = sampling, prompt_len

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text; they are evaluated at the next `propose`."""
        self._tokens.extend(tokens)

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it. Fewer come at the end of the context.

        Raises `EngineError` if the runtime fails; the list and the cache still fit each other then.
        """
        if not self._tokens:
            raise LocalProtocolError("nothing to draft from: reset the engine to at least one token first")
        drafted: list[_Drafted] = []
        while len(drafted) < n and len(self._tokens) < self._capabilities.max_context:
            drafted.append(self._select(self._logits(1)[0], 0))
            self._tokens.append(drafted[-1].token)
        return _proposal(drafted)

    def propose_checked(self, guess: Sequence[int]) -> Proposal:
        """Draft on as `propose` does, given a guess at the next tokens, which are all evaluated at once.

        The guess comes back as far as the model selects the same, and one token more of its own: what `propose` would
        have drafted one by one. Fewer come at the end of the context. `guess` is shorter than a batch.
        """
        if not self._tokens:
            raise LocalProtocolError("nothing to draft from: reset the engine to at least one token first")
        start = len(self._tokens)
        if start >= self._capabilities.max_context:
            return Proposal((), ())
        guess = guess[: self._capabilities.max_context - start - 1]
        self._tokens += guess
        try:
            logits = self._logits(len(guess) + 1)
        finally:
            del self._tokens[start:]
        drafted: list[_Drafted] = []
        for row, guessed in enumerate((*guess, None)):
            drafted.append(self._select(logits[row], row))
            self._tokens.append(drafted[-1].token)
            if drafted[-1].token != guessed:
                break
        self._must_cut(len(self._tokens) - 1)  # instead of its own token the cache may hold the guess
        return _proposal(drafted)

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `EngineError` if the cache cannot."""
        if not 0 <= length <= len(self._tokens):
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {len(self._tokens)}")
        self._must_cut(length)
        del self._tokens[length:]

    @abstractmethod
    def close(self) -> None:
        """Free the model; no other call may follow."""

    @abstractmethod
    def _evaluate(self, tokens: Sequence[int], start: int, num_logits: int) -> NDArray[np.float32]:
        """Evaluate tokens, at most `batch_tokens`, at the cache's positions from `start` on, which are the next ones.

        The logits (num_logits, V) of the last rows, good until the next call. Raises `EngineError`; the cache is as it
        was then.
        """

    def _read_ahead(self, tokens: Sequence[int], start: int) -> int:
        """Evaluate the first of these tokens, whose logits nobody wants, at the cache's positions from `start` on.

        For an engine that can do that faster than by `_evaluate`. How many they were; raises `EngineError`.
        """
        return 0

    @abstractmethod
    def _remove(self, length: int) -> bool:
        """Drop the cache from position `length` on; False, and nothing changed, if this model cannot."""

    @abstractmethod
    def _shift(self, start: int, count: int, length: int) -> None:
        """Drop `count` positions of the cache from `start` on and move the rest, up to `length`, into their place.

        Asked for only with a window.
        """

    def _logits(self, num_logits: int) -> NDArray[np.float32]:
        """Evaluate the tokens that the cache lacks; the logits (num_logits, V) after the last of them."""
        self._must_cut(len(self._tokens) - num_logits)
        self._slide()
        unread = self._tokens[self._cached : len(self._tokens) - num_logits]
        self._cached += self._read_ahead(unread, self._cached - self.dropped_tokens)
        while self._cached < len(self._tokens) - self._batch_tokens:
            stop = min(self._cached + self._batch_tokens, len(self._tokens) - num_logits)
            self._evaluate(self._tokens[self._cached : stop], self._cached - self.dropped_tokens, 0)
            self._cached = stop
        logits = self._evaluate(self._tokens[self._cached :], self._cached - self.dropped_tokens, num_logits)
        self._cached = len(self._tokens)
        return logits

    def _slide(self) -> None:
        """Drop what is oldest behind the sinks where the window has no room for the whole list; evaluate the sinks."""
        excess = len(self._tokens) - self.dropped_tokens - self._window_tokens
        if excess > 0:
            count = max(excess, self._window_tokens // _SLIDES)
            if SINK_TOKENS + self.dropped_tokens + count < self._cached:
                self._shift(SINK_TOKENS, count, self._cached - self.dropped_tokens)
            elif self._cached > SINK_TOKENS:
                self._remove(SINK_TOKENS)
                self._cached = SINK_TOKENS
            self.dropped_tokens += count
        if self.dropped_tokens and self._cached < SINK_TOKENS:
            self._evaluate(self._tokens[self._cached : SINK_TOKENS], self._cached, 0)
        if self.dropped_tokens:
            self._cached = max(self._cached, SINK_TOKENS + self.dropped_tokens)

    def _exact(self, row: int) -> Callable[[Ids], Logits] | None:
        """For an engine whose logits are rough: gives better ones of some ids after this row of the last forward."""
        return None

    def _select(self, logits: NDArray[np.float32], row: int) -> "_Drafted":
        """The token that follows the list, by its logits (V,), which are this row of the forward, and its siblings."""
        # Padded ids beyond the vocabulary mean nothing to the verifier, which would refuse them.
        known = logits[: self.fingerprint.size]
        ids = draft_candidates(
            known, self._sampling, len(self._tokens), 1 + _SIBLINGS, self._tokens, self._prompt_len, self._exact(row)
        )
        (token, confidence), *siblings = zip(ids.tolist(), confidences(known, ids), strict=True)
        return _Drafted(token, confidence, tuple(siblings))

    def _must_cut(self, length: int) -> None:
        if not self._cut(length):
            raise EngineError(f"model {self._name} cannot roll back (recurrent state); use another draft model")

    def _cut(self, length: int) -> bool:
        """Keep at most `length` tokens in the cache; False, and nothing changed, if the model cannot."""
        length = max(length, 0)
        if length >= self._cached:
            return True
        dropped = self.dropped_tokens
        if length <= SINK_TOKENS + dropped:  # into what was dropped: what comes before it is evaluated anew
            length, dropped = min(length, SINK_TOKENS) if dropped else length, 0
        if not self._remove(length - dropped):
            return False
        self._cached, self.dropped_tokens = length, dropped
        return True


@dataclass(frozen=True, slots=True)
class _Drafted:
    token: int
    confidence: float
    siblings: Siblings


def _proposal(drafted: Sequence[_Drafted]) -> Proposal:
    return Proposal(
        tuple([one.token for one in drafted]),
        tuple([one.confidence for one in drafted]),
        siblings=tuple([one.siblings for one in drafted]),
    )
