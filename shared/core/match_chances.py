"""How often a copied token is right, by how many tokens before it matched: a prior, drawn to what is observed."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

_PRIOR_WEIGHT = 8.0  # observations
_WINDOW = 64.0
_TEXT_WEIGHT = 8.0  # tokens: that many must be expected before a text counts for half


class MatchChances:
    """Learns one probability for each length of match; a longer match than the prior knows counts as its longest."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior[n]` is the probability, 0 to 1, after a match of n tokens."""
        self._seen = [(chance, _PRIOR_WEIGHT) for chance in prior]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(f'{chance:.2f}' for chance, _ in self._seen)}>"

    def after(self, match_tokens: int) -> float:
        """Probability, 0 to 1, that what followed a match of this length follows again."""
        return self._seen[min(match_tokens, len(self._seen) - 1)][0]

    def reach(self, match_tokens: int, count: int) -> list[float]:
        """The like for `count` tokens behind such a match: that each of them is right, and all before it."""
        return list(accumulate(map(self.after, range(match_tokens, match_tokens + count)), mul))

    def observe(self, match_tokens: int, was_right: bool) -> None:
        """Learn from one token."""
        length = min(match_tokens, len(self._seen) - 1)
        chance, seen = self._seen[length]
        seen = min(seen + 1, _WINDOW)
        self._seen[length] = (chance + (was_right - chance) / seen, seen)

    def learn(self, match_tokens: int, guess: Sequence[int], text: Sequence[int]) -> None:
        """Learn from a guess, behind a match of this length, once `text` is what really came there."""
        for guessed, token in zip(guess, text, strict=False):
            self.observe(match_tokens, guessed == token)
            if guessed != token:
                return
            match_tokens += 1  # each token, if it is right, makes the match longer


class TextChances(MatchChances):
    """Chances that also follow the text at hand: some are copied from their prompt, others hardly repeat a phrase.

    All chances are multiplied by how many tokens were right in this text over how many were expected to be.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior[n]` is the probability, 0 to 1, after a match of n tokens."""
        super().__init__(prior)
        self.begin_text()

    def begin_text(self) -> None:
        """Another text: it is like all others until it shows."""
        self._right = self._expected = _TEXT_WEIGHT

    def after(self, match_tokens: int) -> float:
        """Probability, 0 to 1, that what followed a match of this length follows again."""
        return min(1.0, super().after(match_tokens) * self._right / self._expected)

    def observe(self, match_tokens: int, was_right: bool) -> None:
        """Learn from one token."""
        self._right += was_right
        self._expected += super().after(match_tokens)
        super().observe(match_tokens, was_right)
