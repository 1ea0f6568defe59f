"""Drafts without a model: what followed when the text last looked like this (`shared.core.prompt_lookup`).

It costs microseconds, so it drafts alone where no model fits on the device, or tells a model draft what to check
(`lookup_draft`). A file of texts that the user wrote or read before can be searched, too; it stays on the device.
"""

from collections.abc import Sequence

from shared.core.errors import LocalProtocolError
from shared.core.match_chances import MatchChances
from shared.core.messages import Fingerprint, Sampling
from shared.core.prompt_lookup import COPY_CHANCES, TokenIndex
from shared.engine import Capabilities, Proposal

SOURCE = "ngram"


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
        self._chances = MatchChances(COPY_CHANCES)
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
        length, tokens = self._session.guess(n)
        past_length, start = self._past.find(self._session.tokens)
        return (past_length, tuple(self._past.tokens[start : start + n])) if past_length > length else (length, tokens)

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
