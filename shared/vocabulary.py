"""What the token ids of a model mean: the bytes of each, a fingerprint to compare two models by, and why they differ.

Two models can work together only where an id means the same bytes in both. Model files pad the tail of their tables to
round sizes (Qwen 151936 and 152064 for one vocabulary), so padding does not count: callers map unused ids to b"".
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from shared.core.messages import Fingerprint

_DIGEST_BYTES = 16
_DIFFERENCES_SHOWN = 3
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's `bytes_to_unicode`, inverted: bytes that print stand for themselves, the others for U+0100 and up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def token_bytes(text: str, byte_level: bool) -> bytes:
    """The bytes that a token stands for, from its text in the model's own table.

    `byte_level` is GPT-2's spelling; characters outside of its alphabet, which only special tokens hold, stand for
    their UTF-8. Otherwise SentencePiece's: U+2581 is a space and `<0xNN>` is that byte.
    """
    if byte_level:
        return b"".join(_BYTE_LEVEL.get(character) or character.encode() for character in text)
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes.fromhex(match[1])
    return text.replace("\u2581", " ").encode()


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each token id, in order; b"" for an id that means nothing."""

    tokens: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"<Vocabulary {self.fingerprint.size} tokens, digest {self.fingerprint.digest.hex()}>"

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Size and digest without the padded tail: sha256 over each token's length (4 bytes, big-endian) and bytes."""
        real = self._real_tokens
        digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in real)).digest()
        return Fingerprint(size=len(real), digest=digest[:_DIGEST_BYTES])

    @cached_property
    def _real_tokens(self) -> tuple[bytes, ...]:
        size = len(self.tokens)
        while size and not self.tokens[size - 1]:
            size -= 1
        return self.tokens[:size]


def describe_mismatch(edge: Vocabulary, cloud: Vocabulary) -> str:
    """Why two vocabularies do not fit, on one line for a person; empty where they do."""
    sizes = edge.fingerprint.size, cloud.fingerprint.size
    common = min(sizes)
    pairs = enumerate(zip(edge.tokens[:common], cloud.tokens[:common], strict=True))
    differing = [(token, ours, theirs) for token, (ours, theirs) in pairs if ours != theirs]
    if differing:
        shown = "; ".join(
            f"id {token} is {ours!r} on the edge, {theirs!r} in the cloud"
            for token, ours, theirs in differing[:_DIFFERENCES_SHOWN]
        )
        return f"{len(differing)} of {common} token ids differ: {shown}"
    if sizes[0] != sizes[1]:
        return f"the edge has {sizes[0]} tokens, the cloud {sizes[1]}; the first {common} are the same"
    return ""
