import hashlib

import pytest

from shared.vocabulary import Vocabulary, describe_mismatch, token_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ġthe", b" the"),
        ("Ċ", b"\n"),
        ("Ã©", "é".encode()),
        ("ðŁ", b"\xf0\x9f"),  # half of a character
        ("Ń", b"\xad"),
        ("<|im_start|>", b"<|im_start|>"),
        ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>".encode()),  # noqa: RUF001 (DeepSeek spells it so)
        ("", b""),
    ],
)
def test_byte_level_tokens(text: str, expected: bytes) -> None:
    assert token_bytes(text, byte_level=True) == expected


def test_every_byte_has_its_own_byte_level_character() -> None:
    spelled = [chr(point) for point in range(0x144) if len(token_bytes(chr(point), byte_level=True)) == 1]
    assert sorted(
        token_bytes(text, byte_level=True) for text in spelled if not text.isspace() and text.isprintable()
    ) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("▁the", b" the"), ("<0x0A>", b"\n"), ("<0xfF>", b"\xff"), ("<0x0A> ", b"<0x0A> "), ("é", "é".encode())],
)
def test_sentencepiece_tokens(text: str, expected: bytes) -> None:
    assert token_bytes(text, byte_level=False) == expected


def test_fingerprint_is_of_the_lengths_and_bytes() -> None:
    fingerprint = Vocabulary((b"a", b"", b"bc")).fingerprint
    assert fingerprint.size == 3
    assert fingerprint.digest == hashlib.sha256(b"\0\0\0\1a\0\0\0\0\0\0\0\2bc").digest()[:16]


def test_a_padded_tail_does_not_count_but_a_hole_does() -> None:
    plain = Vocabulary((b"a", b"b"))
    assert Vocabulary((b"a", b"b", b"", b"")).fingerprint == plain.fingerprint
    assert Vocabulary((b"a", b"", b"b")).fingerprint != plain.fingerprint
    assert Vocabulary((b"ab", b"")).fingerprint != plain.fingerprint
    assert Vocabulary((b"", b"")).fingerprint.size == 0


def test_repr_is_one_short_line() -> None:
    assert repr(Vocabulary((b"a",) * 1000)).startswith("<Vocabulary 1000 tokens, digest ")


def test_mismatch_names_the_first_three_ids_with_both_meanings() -> None:
    edge = Vocabulary((b"a", b"b", b"c", b"d", b"e", b"f"))
    cloud = Vocabulary((b"a", b"x", b"c", b"y", b"z", b"\xff", b"g"))
    line = describe_mismatch(edge, cloud)
    assert line == (
        "4 of 6 token ids differ: id 1 is b'b' on the edge, b'x' in the cloud; "
        "id 3 is b'd' on the edge, b'y' in the cloud; id 4 is b'e' on the edge, b'z' in the cloud"
    )


def test_mismatch_of_size_alone_says_so() -> None:
    line = describe_mismatch(Vocabulary((b"a", b"b", b"")), Vocabulary((b"a", b"b", b"c")))
    assert line == "the edge has 2 tokens, the cloud 3; the first 2 are the same"


def test_no_mismatch_is_empty() -> None:
    assert describe_mismatch(Vocabulary((b"a", b"b", b"")), Vocabulary((b"a", b"b"))) == ""
