"""What a rejected path still tells: the text often comes back to it.

A path is rejected for its first wrong token. What was drafted behind that is the same thought put otherwise, and text
and path soon run alike again, side by side or shifted by a word:

    rejected path     the small | dog   was barking at the moon
    text              the small | puppy was barking at the moon

So until the edge's next draft is here, which takes a round trip, the verifier guesses on from where the last tokens of
the text occur in the rejected path, and evaluates the guess beside its own decode step where rows cost next to nothing
(rejected candidates as drafts: token recycling, Luo et al., arXiv 2408.08696; the search is prompt lookup's). The edge
has its draft model check such a guess, several tokens in one forward. Nothing of it crosses the wire, and like every
draft it only decides when a token is known, never which.

Greedy answers of SmolLM2-135M (bfloat16) to 40 prompts of Spec-Bench, 135 rejected paths of its 4-bit draft: the token
behind the rejected one was right one time in five, what followed a match of 1 / 2 / 4 / 8 tokens 44 / 72 / 80 / 90
times in a hundred. Four decode steps with three such guesses each committed 6.7 tokens instead of 4.
"""

from collections.abc import Sequence

from shared.core.match_chances import MatchChances

# By the length of the match; 0 is the token behind the rejected one.
_CHANCES = (0.2, 0.44, 0.7, 0.75, 0.8, 0.85, 0.85, 0.9, 0.9)
_LONGEST_MATCH = len(_CHANCES) - 1
_MOST_TOKENS = 64  # of a path, and of the text behind it: further on it says nothing


class RejectedPath:
    """The tokens of the last rejected path from its wrong token on, at position `start`, and what they are worth."""

    def __init__(self, chances: MatchChances | None = None) -> None:
        """None yet. `chances` are what was learnt before."""
        self.start = 0
        self.chances = chances or MatchChances(_CHANCES)
        self._tokens: list[int] = []
        self._end_hash = 0
        self._guess: tuple[int, tuple[int, ...]] = 0, ()  # the one that was offered

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"<RejectedPath of {len(self)} tokens at {self.start}, {self.chances!r}>"

    def replace(self, start: int, tokens: Sequence[int], end_hash: int = 0) -> None:
        """A path was rejected at `start`; `end_hash` is that of the prefix that ends with it."""
        self.start, self._tokens, self._end_hash = start, list(tokens[:_MOST_TOKENS]), end_hash

    def follow(self, start: int, parent_hash: int, tokens: Sequence[int], end_hash: int) -> None:
        """More of a path, which may be the rejected one: it was on its way when that was rejected."""
        if self._tokens and (start, parent_hash) == (self.start + len(self._tokens), self._end_hash):
            self._tokens += tokens[: _MOST_TOKENS - len(self._tokens)]
            self._end_hash = end_hash

    def guess(self, text: Sequence[int], n: int) -> tuple[int, tuple[int, ...]]:
        """Up to `n` tokens that may follow `text`, which is what came from `start` on, and behind how long a match.

        None where nothing matches, but for the token behind the rejected one.
        """
        tokens, length = self._tokens, len(text)
        if not 0 < length <= _MOST_TOKENS:
            return 0, ()
        best, best_at = 0, 1 if length == 1 else len(tokens)
        for at in range(1, len(tokens)):
            if tokens[at - 1] != text[-1]:
                continue
            match, limit = 1, min(at, length, _LONGEST_MATCH)
            while match < limit and tokens[at - 1 - match] == text[-1 - match]:
                match += 1
            if match > best or (match == best and abs(at - length) < abs(best_at - length)):
                best, best_at = match, at
        return best, tuple(tokens[best_at : best_at + n])

    def offer(self, text: Sequence[int], n: int) -> tuple[tuple[int, ...], list[float]]:
        """A guess (see `guess`), and how likely it is right up to each of its tokens; `judge` must follow."""
        match, tokens = self._guess = self.guess(text, n)
        return tokens, self.chances.reach(match, len(tokens))

    def judge(self, tokens: Sequence[int]) -> None:
        """These came where the last offer was made: learn from it."""
        if self._guess[1]:
            self.chances.learn(*self._guess, tokens)
            self._guess = 0, ()
