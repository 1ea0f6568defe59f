import pytest

from shared.core.errors import LocalProtocolError
from shared.core.tokens import TokenLog, next_hash, quantize

MODULUS = 2**61 - 1
BASE = 1_102_233_445_566_778_899


def test_hash_is_the_polynomial_of_the_wire_contract() -> None:
    assert next_hash(0, 0) == 1  # token 0 counts: h(n + 1) = h(n) * B + token + 1
    assert next_hash(next_hash(0, 4), 9) == (5 * BASE + 10) % MODULUS


def test_every_prefix_of_a_log_has_its_hash() -> None:
    log = TokenLog((4, 9))
    assert [log.hash_at(length) for length in range(3)] == [0, 5, (5 * BASE + 10) % MODULUS]
    assert log.has_prefix(2, log.hash_at(2))
    assert not log.has_prefix(1, log.hash_at(2))
    assert not log.has_prefix(3, log.hash_at(2))


@pytest.mark.parametrize("length", [-1, 3])
def test_hash_of_a_prefix_that_is_not_there_is_refused(length: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"no prefix of {length} tokens in a log of 2"):
        TokenLog((4, 9)).hash_at(length)


def test_log_forgets_what_is_truncated() -> None:
    log, same = TokenLog((1, 2, 3)), TokenLog((1, 7))
    log.truncate(1)
    log.extend((7,))
    assert (len(log), log[1], log.tokens()) == (2, 7, (1, 7))
    assert log.hash_at(2) == same.hash_at(2)
    assert repr(log) == repr(same) == f"<TokenLog 2 tokens, hash {same.hash_at(2):016x}>"


def test_tokens_are_a_slice() -> None:
    log = TokenLog((1, 2, 3, 4))
    assert log.tokens(1, 3) == (2, 3)
    assert log.tokens(2) == (3, 4)
    assert log.tokens(9) == ()


@pytest.mark.parametrize(
    ("start", "tokens", "common"),
    [(0, (1, 2, 3), 3), (1, (2, 9), 1), (2, (3, 4, 5), 1), (3, (7,), 0), (1, (), 0), (0, (9, 2), 0)],
)
def test_match_counts_tokens_before_a_difference_or_the_end(start: int, tokens: tuple[int, ...], common: int) -> None:
    assert TokenLog((1, 2, 3)).match(start, tokens) == common


@pytest.mark.parametrize(("probability", "byte"), [(0.0, 0), (0.5, 128), (1.0, 255), (-0.1, 0), (1.2, 255)])
def test_confidence_is_a_byte(probability: float, byte: int) -> None:
    assert quantize(probability) == byte
