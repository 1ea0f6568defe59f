"""An n-gram draft in front of a model draft: the model checks its guesses, several tokens in one forward.

A copied token is right two times in three, that of a good model draft nineteen times in twenty: sent unchecked, copies
cost more round trips than they save, even those after long matches. But the model must evaluate these tokens anyhow, or
its cache falls behind, and where the kernels allow it five tokens at once take far less than five times as long as one.
So the guess goes through the model first ("staged" speculation: Spector and Re, arXiv 2308.04623), and what comes out
is what the model alone would have drafted, sooner. How much to guess follows from what a forward of so many rows costs
here, measured at load, and from how often the model agreed with what followed a match of that length.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from edge_agent.engines import ngram
from edge_agent.engines.ngram import CopyChances, NgramDraft
from shared.core.errors import LocalProtocolError
from shared.core.messages import Fingerprint, Sampling
from shared.core.siblings import Siblings
from shared.engine import MODEL_SOURCE, Capabilities, DraftEngine, Proposal

_MOST_GUESSED = 7  # a forward of more rows takes so long that a commit would have to wait for it


class CheckingDraft(DraftEngine, Protocol):
    """A draft engine that can check a guess in one forward."""

    def propose_checked(self, guess: Sequence[int]) -> Proposal:
        """The guess as far as the model drafts the same, and one more token of its own."""
        ...


def guess_length(chances: Sequence[float], row_ms: Sequence[float]) -> int:
    """How many guessed tokens to check for the most tokens per ms; 0: none.

    Guess i is right with `chances[i]` if those before it are; a forward of n rows takes `row_ms[n - 1]`.
    """
    best, best_rate = 0, 1 / row_ms[0]
    expected = reached = 1.0
    for length, chance in enumerate(chances[: len(row_ms) - 1], start=1):
        reached *= chance
        expected += reached
        if expected / row_ms[length] > best_rate:
            best, best_rate = length, expected / row_ms[length]
    return best


def measure_row_ms(model: CheckingDraft) -> list[float]:
    """What a forward of 1, 2, ... rows takes, ms. `reset` the model before any other use."""
    row_ms = list[float]()
    for rows in range(1, _MOST_GUESSED + 2):
        tries = []
        for _ in range(3):  # the best one: something else may have run
            model.reset([0], Sampling(), 1)
            model.propose_checked(())
            began = time.perf_counter()
            model.propose_checked([0] * (rows - 1))
            tries.append((time.perf_counter() - began) * 1000)
        row_ms.append(min(tries))
    return row_ms


class LookupDraft:
    """`DraftEngine` of a model whose next tokens are guessed by n-grams.

    The model may have drafted more than was asked for: those tokens wait in `_ready`; its list is the text and they.
    """

    def __init__(self, model: CheckingDraft, lookup: NgramDraft, row_ms: Sequence[float]) -> None:
        self._model = model
        self._lookup = lookup
        self._row_ms = row_ms
        self._length = 0
        self._ready: list[tuple[int, float, str, Siblings]] = []  # token, confidence, source, siblings
        self._chances = CopyChances()

    def __repr__(self) -> str:
        return f"<LookupDraft {self._length} tokens, {len(self._ready)} ready, {self._lookup!r} before {self._model!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """The model's."""
        return self._model.capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self._model.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`; select with `sampling` from now on."""
        self._model.reset(tokens, sampling, prompt_len)
        self._lookup.reset(tokens, sampling, prompt_len)
        self._length, self._ready = len(tokens), []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text."""
        known = 0
        while known < min(len(tokens), len(self._ready)) and self._ready[known][0] == tokens[known]:
            known += 1
        del self._ready[:known]
        self._length += known
        if known < len(tokens):
            if self._ready:  # the text goes another way
                self._model.rollback(self._length)
                self._ready = []
            self._model.extend(tokens[known:])
            self._length += len(tokens) - known
        self._lookup.extend(tokens)

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it, with one forward at most.

        None come at the end of the context. Raises `EngineError`, as the model does.
        """
        if n > 0 and not self._ready:
            self._ready = self._draft()
        drafted, self._ready = self._ready[:n], self._ready[n:]
        tokens, confidence, sources, siblings = zip(*drafted, strict=True) if drafted else ((), (), (), ())
        self._lookup.extend(tokens)
        self._length += len(tokens)
        return Proposal(tokens, confidence, sources, siblings=siblings)

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self._length:
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {self._length}")
        if length < self._length:  # else what is ready still follows
            self._model.rollback(length)
            self._lookup.rollback(length)
            self._length, self._ready = length, []

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._model.close()
        self._lookup.close()

    def _draft(self) -> list[tuple[int, float, str, Siblings]]:
        """Let the model draft at least one token, with a guess where that pays."""
        length, guess = self._lookup.guess(_MOST_GUESSED)
        matches = range(length, length + len(guess))  # each token, if it is right, makes the match longer
        guess = guess[: guess_length(list(map(self._chances.after, matches)), self._row_ms)]
        proposal = self._model.propose_checked(guess)
        right = max(0, len(proposal.tokens) - 1)  # the last one is the model's own
        for index, match in enumerate(matches[: min(right + 1, len(guess))]):
            self._chances.observe(match, index < right)
        sources = (ngram.SOURCE,) * right + (MODEL_SOURCE,)
        siblings = proposal.siblings or ((),) * len(proposal.tokens)
        return list(zip(proposal.tokens, proposal.confidence, sources, siblings, strict=False))
