"""A model draft that checks guesses of its next tokens, several in one forward.

Guesses come from two places. After a rejection, from the path that was rejected: the draft soon comes back to it
(`shared.core.rejected_path`), and has all of it to draft again. With n-grams in front of the model, also from the text.

A copied token is right two times in three, that of a good model draft nineteen times in twenty: sent unchecked, copies
cost more round trips than they save, even those after long matches. But the model must evaluate these tokens anyhow, or
its cache falls behind, and where the kernels allow it five tokens at once take far less than five times as long as one.
So the guess goes through the model first ("staged" speculation: Spector and Re, arXiv 2308.04623), and what comes out
is what the model alone would have drafted, sooner. How much to guess follows from what a forward of so many rows costs
here (`row_costs`), and from how often the model agreed with what followed a match of that length, in this text most
of all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_agent.engines import ngram
from edge_agent.engines.ngram import NgramDraft
from edge_agent.engines.row_costs import MeasurableDraft, RowCosts
from shared.core.errors import LocalProtocolError
from shared.core.match_chances import MatchChances, TextChances
from shared.core.messages import Fingerprint, Sampling
from shared.core.prompt_lookup import COPY_CHANCES
from shared.core.rejected_path import RejectedPath
from shared.core.siblings import Siblings
from shared.engine import MODEL_SOURCE, Capabilities, DraftEngine, Proposal

RECYCLED = "recycled"
MOST_GUESSED = 7  # a forward of more rows takes so long that a commit would have to wait for it


class CheckingDraft(DraftEngine, MeasurableDraft, Protocol):
    """A draft engine that can check a guess in one forward."""

    @property
    def num_cached(self) -> int:
        """Tokens of its list that the cache holds; the next forward evaluates the others."""
        ...


def guess_length(chances: Sequence[float], row_ms: Sequence[float]) -> tuple[int, float]:
    """How many guessed tokens to check for the most tokens per ms, 0: none; and how many tokens per ms these are.

    Guess i is right with `chances[i]` if those before it are; a forward of n rows takes `row_ms[n - 1]`.
    """
    best, best_rate = 0, 1 / row_ms[0]
    expected = reached = 1.0
    for length, chance in enumerate(chances[: len(row_ms) - 1], start=1):
        reached *= chance
        expected += reached
        if expected / row_ms[length] > best_rate:
            best, best_rate = length, expected / row_ms[length]
    return best, best_rate


@dataclass(frozen=True, slots=True)
class _Guess:
    """Tokens that may come next, and how often such ones are right."""

    source: str
    match: int
    tokens: tuple[int, ...]
    chances: MatchChances

    def best(self, row_ms: Sequence[float]) -> tuple[int, float]:
        """How many of them to check, and for how many tokens per ms (see `guess_length`)."""
        behind = range(self.match, self.match + len(self.tokens))
        return guess_length(list(map(self.chances.after, behind)), row_ms)


class LookupDraft:
    """`DraftEngine` of a model whose next tokens are guessed, by n-grams too where there is a `lookup`.

    The model may have drafted more than was asked for: those tokens wait in `_ready`; its list is the text and they.
    """

    def __init__(
        self,
        model: CheckingDraft,
        costs: RowCosts,
        lookup: NgramDraft | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._costs = costs
        self._lookup = lookup
        self._clock_s = clock_s
        self._tokens: list[int] = []
        self._ready: list[tuple[int, float, str, Siblings]] = []  # token, confidence, source, siblings
        self._rejected = RejectedPath()
        self._copy_chances = TextChances(COPY_CHANCES)

    def __repr__(self) -> str:
        guessed = f"{self._rejected!r}" if self._lookup is None else f"{self._rejected!r}, {self._lookup!r}"
        return f"<LookupDraft {len(self._tokens)} tokens, {len(self._ready)} ready, {guessed} before {self._model!r}>"

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
        if self._lookup is not None:
            self._lookup.reset(tokens, sampling, prompt_len)
        self._tokens, self._ready = list(tokens), []
        self._rejected = RejectedPath(self._rejected.chances)
        self._copy_chances.begin_text()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text."""
        known = 0
        while known < min(len(tokens), len(self._ready)) and self._ready[known][0] == tokens[known]:
            known += 1
        del self._ready[:known]
        self._append(tokens[:known])
        if known < len(tokens):
            if self._ready:  # the text goes another way
                self._reject(len(self._tokens))
            self._model.extend(tokens[known:])
            self._append(tokens[known:])

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it, with one forward at most.

        None come at the end of the context. Raises `EngineError`, as the model does.
        """
        if n > 0 and not self._ready:
            self._ready = self._draft()
        drafted, self._ready = self._ready[:n], self._ready[n:]
        tokens, confidence, sources, siblings = zip(*drafted, strict=True) if drafted else ((), (), (), ())
        self._append(tokens)
        return Proposal(tokens, confidence, sources, siblings=siblings)

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= len(self._tokens):
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {len(self._tokens)}")
        if length < len(self._tokens):  # else what is ready still follows
            self._reject(length)
            if self._lookup is not None:
                self._lookup.rollback(length)
            del self._tokens[length:]

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._model.close()
        if self._lookup is not None:
            self._lookup.close()

    def _append(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        if self._lookup is not None:
            self._lookup.extend(tokens)

    def _reject(self, length: int) -> None:
        """Take the model back to this length; the path that it leaves is good for guesses."""
        self._model.rollback(length)
        self._rejected.replace(length, [*self._tokens[length:], *(token for token, *_ in self._ready)])
        self._ready = []

    def _draft(self) -> list[tuple[int, float, str, Siblings]]:
        """Let the model draft at least one token, with the guess that pays best, if any does."""
        guesses = [_Guess(RECYCLED, *self._rejected.guess(self._behind(), MOST_GUESSED), self._rejected.chances)]
        if self._lookup is not None:
            guesses.append(_Guess(ngram.SOURCE, *self._lookup.guess(MOST_GUESSED), self._copy_chances))
        cached = self._model.num_cached
        due = max(1, len(self._tokens) - cached)
        row_ms = self._costs.with_guesses(due, cached)
        (length, _), best = max(((guess.best(row_ms), guess) for guess in guesses), key=lambda pair: pair[0][1])
        began_s = self._clock_s()
        proposal = self._model.propose_checked(best.tokens[:length])
        self._costs.observe(due + length, cached, (self._clock_s() - began_s) * 1000)
        for guess in guesses:
            guess.chances.learn(guess.match, guess.tokens, proposal.tokens)
        right = max(0, len(proposal.tokens) - 1)  # the last one is the model's own
        sources = (best.source,) * right + (MODEL_SOURCE,)
        siblings = proposal.siblings or ((),) * len(proposal.tokens)
        return list(zip(proposal.tokens, proposal.confidence, sources, siblings, strict=False))

    def _behind(self) -> list[int]:
        """The text from where the rejected path began."""
        return self._tokens[self._rejected.start :] if self._rejected else []
