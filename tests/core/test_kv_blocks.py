from random import Random

import pytest

from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks


def test_random_operations_keep_the_books() -> None:
    """Against a naive model: each session's length, and no block written by one session while another holds it."""
    random, blocks, lengths = Random(3), KvBlocks(24), dict[str, int]()
    for _ in range(4000):
        key, other = random.choice("abcdef"), random.choice("abcdef")
        length = lengths.get(key, 0)
        match random.randrange(4):
            case 0:
                grown = length + random.randrange(60)
                fits = -(-grown // BLOCK_TOKENS) - len(blocks.blocks(key)) <= blocks.num_free
                held = {block for name in lengths if name != key for block in blocks.blocks(name)}
                before = len(blocks.blocks(key))
                assert blocks.resize(key, grown) is fits
                assert held.isdisjoint(blocks.blocks(key)[before:])
                lengths |= {key: grown} if fits else {}
            case 1 if key in lengths:
                wanted = random.randrange(length + 1)
                lengths[key] = blocks.cut(key, wanted)
                assert wanted - BLOCK_TOKENS < lengths[key] <= wanted
            case 2 if key not in lengths and other in lengths:
                lengths[key] = blocks.share(key, other, lengths[other])
                assert list(blocks.blocks(key)) == list(blocks.blocks(other)[: lengths[key] // BLOCK_TOKENS])
            case 3:
                blocks.release(key)
                lengths.pop(key, None)
        blocks.check_integrity()
        assert {name: blocks.length(name) for name in lengths} == lengths
        assert len(blocks) == len(lengths)


def test_a_session_grows_in_one_run_beside_others() -> None:
    blocks = KvBlocks(64)
    for length in range(16, 129, 16):
        for key in "abc":
            assert blocks.resize(key, length)
    for key in "abc":
        first = blocks.blocks(key)[0]
        assert list(blocks.blocks(key)) == list(range(first, first + 8))


def test_a_cut_inside_of_a_shared_block_gives_it_up() -> None:
    blocks = KvBlocks(8)
    blocks.resize("a", 40)
    assert blocks.share("b", "a", 40) == 32
    assert blocks.cut("b", 20) == 16
    assert blocks.cut("a", 20) == 20  # the second block is its own again
    with pytest.raises(LocalProtocolError, match="b: cut to 5 tokens, inside of a shared block"):
        blocks.resize("b", 5)
    with pytest.raises(LocalProtocolError, match="a: cut to 99 of 20 tokens"):
        blocks.cut("a", 99)


def test_what_does_not_fit_changes_nothing() -> None:
    blocks = KvBlocks(2)
    assert blocks.resize("a", 17)
    assert not blocks.resize("b", 1)
    assert "b" not in blocks
    blocks.release("a")
    assert (blocks.num_free, len(blocks)) == (2, 0)
