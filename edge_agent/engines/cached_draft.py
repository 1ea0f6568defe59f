"""What draft engines that keep a cache have in common: a token list, and how much of it the cache holds.

The cache is always a proper prefix of the list: the last token is never in it, so there is always one to evaluate and
it yields the logits of what follows. (The last proposed token is in the list but not in the cache; a rollback to length
n leaves at most n - 1.) What was appended meanwhile is evaluated in one go at the next `propose`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.core.errors import LocalProtocolError
from shared.core.messages import Fingerprint, Sampling
from shared.core.selection import candidates, confidences
from shared.core.siblings import Siblings
from shared.engine import Capabilities, EngineError, Proposal

_SIBLINGS = 3  # of each token: the target's is among the first four of a weak draft three times in four


class CachedDraft(ABC):
    """A `DraftEngine` but for the model: a subclass evaluates tokens and cuts its cache."""

    def __init__(self, name: str, batch_tokens: int, capabilities: Capabilities) -> None:
        """Evaluate at most `batch_tokens` at once; `name` is the model's, in errors."""
        self._name = name
        self._batch_tokens = batch_tokens
        self._capabilities = capabilities
        self._tokens: list[int] = []
        self._cached = 0
        self._sampling = Sampling()
        self._prompt_len = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}, {len(self._tokens)} tokens, {self._cached} cached>"

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return self._capabilities

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
            drafted.append(self._select(self._logits(1)[0]))
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
        for row, guessed in zip(logits, (*guess, None), strict=True):
            drafted.append(self._select(row))
            self._tokens.append(drafted[-1].token)
            if drafted[-1].token != guessed:
                break
        if not self._cut(len(self._tokens) - 1):
            raise EngineError(f"model {self._name} cannot roll back (recurrent state); use another draft model")
        return _proposal(drafted)

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `EngineError` if the cache cannot."""
        if not 0 <= length <= len(self._tokens):
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {len(self._tokens)}")
        if not self._cut(length - 1):
            raise EngineError(f"model {self._name} cannot roll back (recurrent state); use another draft model")
        del self._tokens[length:]

    @abstractmethod
    def close(self) -> None:
        """Free the model; no other call may follow."""

    @abstractmethod
    def _evaluate(self, start: int, stop: int, num_logits: int) -> NDArray[np.float32]:
        """Evaluate tokens `start` to `stop` of the list, which follow what the cache holds, at most `batch_tokens`.

        The logits (num_logits, V) of the last rows. Raises `EngineError`, with the cache as it was.
        """

    @abstractmethod
    def _remove(self, length: int) -> bool:
        """Drop the cache from position `length` on; False, and nothing changed, if this model cannot."""

    def _logits(self, num_logits: int) -> NDArray[np.float32]:
        """Evaluate the tokens that the cache lacks; the logits (num_logits, V) after the last of them."""
        assert self._cached <= len(self._tokens) - num_logits, f"nothing left to evaluate in {self!r}"
        while self._cached < len(self._tokens) - self._batch_tokens:
            stop = min(self._cached + self._batch_tokens, len(self._tokens) - num_logits)
            self._evaluate(self._cached, stop, 0)
            self._cached = stop
        logits = self._evaluate(self._cached, len(self._tokens), num_logits)
        self._cached = len(self._tokens)
        return logits

    def _select(self, logits: NDArray[np.float32]) -> "_Drafted":
        """The token that follows the list, by its logits (V,), and its siblings."""
        # Padded ids beyond the vocabulary mean nothing to the verifier, which would refuse them.
        known = logits[: self.fingerprint.size]
        ids = candidates(known, self._sampling, len(self._tokens), 1 + _SIBLINGS, self._tokens, self._prompt_len)
        (token, confidence), *siblings = zip(ids.tolist(), confidences(known, ids), strict=True)
        return _Drafted(token, confidence, tuple(siblings))

    def _cut(self, length: int) -> bool:
        """Keep at most `length` tokens in the cache; False, and nothing changed, if the model cannot."""
        length = max(length, 0)
        if length >= self._cached:
            return True
        if not self._remove(length):
            return False
        self._cached = length
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
