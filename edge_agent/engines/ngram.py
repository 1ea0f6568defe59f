"""Drafts without a model: what followed when the text last looked like this.

Known as prompt lookup or n-gram speculation (Saxena 2023; Yang et al., "Inference with Reference", arXiv 2304.04487).
Summaries, answers about a document, code and lists repeat their prompt and themselves. It costs microseconds, so it
drafts alone where no model fits on the device, or tells a model draft what to check (`lookup_draft`). A file of texts
that the user wrote or read before can be searched, too; it stays on the device.
"""

from collections.abc import Sequence

from shared.core.errors import LocalProtocolError
from shared.core.match_chances import MatchChances
from shared.core.messages import Fingerprint, Sampling
from shared.engine import Capabilities, Proposal

SOURCE = "ngram"
_KEY_TOKENS = 2  # what a single token was followed by is right one time in five
_TRIED = 32  # of the places that end alike, the latest
# How often a token is right by the length of its match: greedy answers of SmolLM2-135M to 49 prompts of Spec-Bench.
CHANCES = (0.0, 0.2, 0.5, 0.6, 0.65, 0.7, 0.75, *[0.8] * 7, *[0.9] * 2, 0.95)
_LONGEST_MATCH = len(CHANCES) - 1


class TokenIndex:
    """Tokens, and for each pair of neighbours the positions behind it."""

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


class NgramDraft:
    """`DraftEngine` that copies from the session's own tokens, and from texts kept on the device.

    It learns how often it is right from the rollbacks: what stands before one was right, and what begins there was not.
    """

    def __init__(self, fingerprint: Fingerprint, max_context: int, past_texts: Sequence[int] = ()) -> None:
        """`past_texts` are token ids of that vocabulary."""
        self._fingerprint = fingerprint
        self._capabilities = Capabilities(can_rollback=True, can_tree=False, max_context=max_context)
        self._session = TokenIndex()
        self._past = TokenIndex()
        self._past.extend(past_texts)
        self._chances = MatchChances(CHANCES)
        self._unjudged: list[tuple[int, int]] = []  # copied tokens: position, length of match

    def __repr__(self) -> str:
        return f"<NgramDraft {len(self._session.tokens)} tokens, {len(self._past.tokens)} of past texts>"

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return self._capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self._fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`. The sampling setting changes nothing: there are no probabilities to select by."""
        self._session = TokenIndex()
        self._session.extend(tokens)
        self._unjudged = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text."""
        self._session.extend(tokens)

    def guess(self, n: int) -> tuple[int, tuple[int, ...]]:
        """The length of the longest match, and up to `n` tokens that followed it; nothing is appended."""
        text, index = self._session.tokens, self._session
        length, start = index.find(text)
        past_length, past_start = self._past.find(text)
        if past_length > length:
            index, length, start = self._past, past_length, past_start
        if not length:
            return 0, ()
        guess = index.tokens[start : start + n]
        while index is self._session and len(guess) < n:
            guess.append(guess[len(guess) - (len(text) - start)])  # it runs into itself: a repetition
        return length, tuple(guess)

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it; none where nothing like it was seen before."""
        start = len(self._session.tokens)
        n = min(n, self._capabilities.max_context - start)
        length, tokens = self.guess(n) if n > 0 else (0, ())
        matches = range(length, length + len(tokens))  # each token, if it is right, makes the match longer
        self._session.extend(tokens)
        self._unjudged += enumerate(matches, start)
        return Proposal(tokens, tuple(map(self._chances.after, matches)), (SOURCE,) * len(tokens))

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= len(self._session.tokens):
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {len(self._session.tokens)}")
        self._session.truncate(length)
        for position, match in self._unjudged:
            if position <= length:
                self._chances.observe(match, position < length)
        self._unjudged = []

    def close(self) -> None:
        """Forget everything."""
        self._session, self._past = TokenIndex(), TokenIndex()
