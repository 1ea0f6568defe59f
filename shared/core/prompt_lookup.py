"""Prompt lookup: what followed when the text last looked like this (Saxena 2023; Yang et al., arXiv 2304.04487).

Summaries, answers about a document, code and lists repeat their prompt and themselves. The edge drafts such copies,
alone or for its draft model to check (`edge_agent.engines.ngram`, `lookup_draft`). The verifier looks its own text up,
too: while it has no drafts it decodes a token a step, and on most machines a few guessed rows beside it cost next to
nothing. That is so at the start, until the edge has read the prompt, and for a round trip after each rejection.
"""

from collections.abc import Sequence

from shared.core.match_chances import TextChances
from shared.core.tokens import TokenLog

_KEY_TOKENS = 2  # what a single token was followed by is right one time in five: too seldom for a draft
_TRIED = 32  # of the places that end alike, the latest
# How often a token is right by the length of its match: greedy answers of SmolLM2-135M to 49 prompts of Spec-Bench.
COPY_CHANCES = (0.0, 0.2, 0.5, 0.6, 0.65, 0.7, 0.75, *[0.8] * 7, *[0.9] * 2, 0.95)
_LONGEST_MATCH = len(COPY_CHANCES) - 1


class TokenIndex:
    """Tokens, and for each pair of neighbours the positions behind it: about 200 bytes a token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def __repr__(self) -> str:
        return f"<TokenIndex {len(self.tokens)} tokens>"

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= _KEY_TOKENS:
                self._ends.setdefault(tuple(self.tokens[-_KEY_TOKENS:]), []).append(len(self.tokens))

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        while len(self.tokens) > length:
            if len(self.tokens) >= _KEY_TOKENS:
                self._ends[tuple(self.tokens[-_KEY_TOKENS:])].pop()
            self.tokens.pop()

    def find(self, text: Sequence[int]) -> tuple[int, int]:
        """Where here the longest end of `text` was followed by something, the latest such place: (length, position).

        The length is 0 where not even the last two tokens occur.
        """
        best = (0, 0)
        for end in reversed(self._ends.get(tuple(text[-_KEY_TOKENS:]), [])[-_TRIED - 1 :]):
            if end == len(self.tokens):
                continue  # nothing follows, or this is the end of the text itself
            length = _KEY_TOKENS
            limit = min(_LONGEST_MATCH, len(text), end)
            while length < limit and self.tokens[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best[0]:
                best = (length, end)
        return best

    def guess(self, n: int) -> tuple[int, tuple[int, ...]]:
        """Of its own end: the length of the longest match, and `n` tokens that may follow as they followed that."""
        length, start = self.find(self.tokens)
        if not length:
            return 0, ()
        guess = self.tokens[start : start + n]
        while len(guess) < n:
            guess.append(guess[len(guess) - (len(self.tokens) - start)])  # it runs into itself: a repetition
        return length, tuple(guess)


class PromptLookup:
    """Guesses at how a log goes on, from what it holds, and what they are worth."""

    def __init__(self, log: TokenLog) -> None:
        """`log` only grows. Nothing is read before it must be, so what needs no guesses keeps no index."""
        self._log = log
        self._index = TokenIndex()
        self._behind: dict[int, int] = {}  # each token's latest place that something follows: the position behind it
        self._chances = TextChances(COPY_CHANCES)
        self._guess: tuple[int, tuple[int, ...]] = 0, ()  # the one that was offered

    def __repr__(self) -> str:
        return f"<PromptLookup in {self._index!r}, {self._chances!r}>"

    def read(self, length: int) -> None:
        """Index the log up to there, a microsecond a token: long prompts before an offer has to wait for it."""
        known = self._index.tokens
        start = max(len(known) - 1, 0)
        self._index.extend(self._log.tokens(len(known), length))
        self._behind.update(zip(known[start:-1], range(start + 1, len(known)), strict=True))

    def offer(self, n: int) -> tuple[tuple[int, ...], list[float]]:
        """A guess of `n` tokens or none, and how likely it is right up to each of them; `judge` must follow."""
        self.read(len(self._log))
        known = self._index.tokens
        match, tokens = self._index.guess(n)
        if not match and (place := self._behind.get(known[-1])) is not None:
            match, tokens = 1, tuple(known[place : place + n])
        self._guess = match, tokens
        return tokens, self._chances.reach(match, len(tokens))

    def judge(self, tokens: Sequence[int]) -> None:
        """These came where the last offer was made: learn from it."""
        if self._guess[1]:
            self._chances.learn(*self._guess, tokens)
            self._guess = 0, ()
