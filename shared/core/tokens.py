"""The token log of a session with its rolling prefix hash, and the one-byte confidence code.

The hash names a prefix of the log: `h(0) = 0; h(n+1) = (h(n) * B + token + 1) mod (2^61 - 1)` (Karp and Rabin's
fingerprint over a Mersenne prime). Two different prefixes of n tokens collide with probability below n / 2^61.
"""

from array import array
from collections.abc import Iterable, Sequence

from shared.core.errors import LocalProtocolError

_MODULUS = (1 << 61) - 1
_BASE = 1_102_233_445_566_778_899 % _MODULUS


def next_hash(prefix_hash: int, token: int) -> int:
    """Hash of the prefix that is one token longer."""
    return (prefix_hash * _BASE + token + 1) % _MODULUS


class TokenLog:
    """Append-only tokens with the hash of every prefix; `truncate` is the only way back."""

    __slots__ = ("_hashes", "_tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")  # a server holds thousands of logs: 12 bytes a token, not 80
        self._hashes = array("Q", (0,))
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"<TokenLog {len(self)} tokens, hash {self._hashes[-1]:016x}>"

    def __getitem__(self, position: int) -> int:
        return self._tokens[position]

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
        """The tokens of positions `start` to `stop` (exclusive), as a copy."""
        return tuple(self._tokens[start:stop])

    def hash_at(self, length: int) -> int:
        """Hash of the first `length` tokens. Raises `LocalProtocolError` beyond the end."""
        if not 0 <= length <= len(self):
            raise LocalProtocolError(f"no prefix of {length} tokens in a log of {len(self)}")
        return self._hashes[length]

    def has_prefix(self, length: int, prefix_hash: int) -> bool:
        """Whether the first `length` tokens stand here and have this hash."""
        return length <= len(self) and self._hashes[length] == prefix_hash

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        last = self._hashes[-1]
        for token in tokens:
            last = (last * _BASE + token + 1) % _MODULUS  # `next_hash`, without the time that a call takes
            self._tokens.append(token)
            self._hashes.append(last)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        del self._tokens[length:]
        del self._hashes[length + 1 :]

    def match(self, start: int, tokens: Sequence[int]) -> int:
        """How many of `tokens`, laid at position `start`, equal the log before they differ or it ends."""
        common = 0
        for ours, theirs in zip(self._tokens[start : start + len(tokens)], tokens, strict=False):
            if ours != theirs:
                break
            common += 1
        return common


def quantize(probability: float) -> int:
    """One byte for a probability: 0 to 255, linear."""
    return round(min(max(probability, 0.0), 1.0) * 255)
