from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks, num_blocks

KEYS = "abcd"
POOL = 12
lengths = st.integers(0, 5 * BLOCK_TOKENS)


def runs(blocks: KvBlocks, key: str) -> int:
    """In how many runs a session's blocks lie."""
    held = blocks.blocks(key)
    return sum(after != before + 1 for before, after in pairwise((-2, *held)))


def test_tokens_fill_whole_blocks() -> None:
    assert [num_blocks(length) for length in (0, 1, 16, 17, 160)] == [0, 1, 1, 2, 10]
    blocks = KvBlocks(POOL)
    assert blocks.resize("a", 17)
    assert (blocks.length("a"), len(blocks.blocks("a")), blocks.num_free) == (17, 2, POOL - 2)
    assert blocks.resize("a", 32)
    assert blocks.num_free == POOL - 2
    assert repr(blocks) == "<KvBlocks 10 of 12 free, 1 sessions>"


def test_a_session_is_known_from_its_first_resize_to_its_release() -> None:
    blocks = KvBlocks(POOL)
    assert "a" not in blocks
    assert (blocks.length("a"), blocks.blocks("a")) == (0, ())
    assert blocks.resize("a", 0)
    assert "a" in blocks
    blocks.release("a")
    blocks.release("a")
    assert "a" not in blocks
    assert len(blocks) == 0


def test_where_blocks_are_short_nothing_changes() -> None:
    blocks = KvBlocks(POOL)
    blocks.resize("a", 10 * BLOCK_TOKENS)
    assert not blocks.resize("b", 33)
    assert "b" not in blocks
    assert not blocks.resize("a", 12 * BLOCK_TOKENS + 1)
    assert blocks.length("a") == 10 * BLOCK_TOKENS
    assert blocks.resize("a", 12 * BLOCK_TOKENS)
    assert blocks.num_free == 0


def test_a_prefix_is_shared_by_whole_blocks_and_kept_until_its_last_holder_goes() -> None:
    blocks = KvBlocks(POOL)
    blocks.resize("a", 40)
    assert blocks.share("b", "a", 39) == 32
    assert blocks.blocks("b") == blocks.blocks("a")[:2]
    assert blocks.num_free == POOL - 3
    blocks.resize("b", 40)
    assert set(blocks.blocks("a")) & set(blocks.blocks("b")) == set(blocks.blocks("a")[:2])
    blocks.release("a")
    assert blocks.num_free == POOL - 3
    blocks.release("b")
    assert blocks.num_free == POOL


def test_a_cut_inside_of_a_shared_block_gives_it_up() -> None:
    blocks = KvBlocks(POOL)
    blocks.resize("a", 40)
    blocks.share("b", "a", 32)
    assert blocks.cut("a", 20) == 16
    assert blocks.length("a") == 16
    assert blocks.cut("b", 20) == 20  # the other half is its own now
    blocks.check_integrity()
    with pytest.raises(LocalProtocolError, match="a: cut to 3 tokens, inside of a shared block"):
        blocks.resize("a", 3)


@pytest.mark.parametrize("length", [-1, 33])
def test_a_cut_is_of_what_is_there(length: int) -> None:
    blocks = KvBlocks(POOL)
    blocks.resize("a", 32)
    with pytest.raises(LocalProtocolError, match=f"a: cut to {length} of 32 tokens"):
        blocks.cut("a", length)
    with pytest.raises(LocalProtocolError, match="b: cut to 0 of 0 tokens"):
        blocks.cut("b", 0)


def test_only_a_new_session_begins_with_anothers_prefix() -> None:
    blocks = KvBlocks(POOL)
    blocks.resize("a", 32)
    blocks.resize("b", 0)
    with pytest.raises(LocalProtocolError, match="b: cannot share"):
        blocks.share("b", "a", 16)
    with pytest.raises(LocalProtocolError, match="c: cannot share 33 of 32 tokens of a"):
        blocks.share("c", "a", 33)


def test_sessions_that_take_turns_each_lie_in_one_run() -> None:
    blocks = KvBlocks(64)
    for length in range(1, 7 * BLOCK_TOKENS):
        for key in KEYS:
            assert blocks.resize(key, length)
    assert [runs(blocks, key) for key in KEYS] == [1, 1, 1, 1]


def test_a_prompt_that_fits_into_the_largest_gap_lies_in_one_run() -> None:
    blocks = KvBlocks(64)
    blocks.resize("a", 10 * BLOCK_TOKENS)
    blocks.resize("b", 50 * BLOCK_TOKENS)  # of 54 free ones
    assert runs(blocks, "b") == 1
    assert blocks.resize("c", 4 * BLOCK_TOKENS)
    assert blocks.num_free == 0


def test_without_a_gap_that_is_large_enough_a_session_lies_in_pieces() -> None:
    blocks = KvBlocks(9)
    for key in "abcdefghi":
        blocks.resize(key, 1)
    for key in "abcdefghi":
        if blocks.blocks(key)[0] % 2:
            blocks.release(key)
    assert blocks.resize("x", 4 * BLOCK_TOKENS)
    assert runs(blocks, "x") == 4
    blocks.check_integrity()


def test_books_that_do_not_agree_are_found() -> None:
    def broken(number: int) -> KvBlocks:
        blocks = KvBlocks(POOL)
        blocks.resize("a", 40)
        blocks.share("b", "a", 32)
        blocks.check_integrity()
        match number:
            case 0:
                blocks._tables["a"].length = 50
            case 1:
                blocks._tables["a"].blocks[1] = blocks._tables["a"].blocks[0]
            case 2:
                blocks._holders[blocks.blocks("a")[0]] -= 1
            case 3:
                blocks.num_free += 1
            case 4:
                blocks._tables["b"].length = 20
        return blocks

    complaints = ["a: 50 tokens in 3", "a: a block twice", "block 0: 1 holders on record, 2 found", "10 free blocks on"]
    complaints.append("b: would write into block 1, which others hold")
    for number, complaint in enumerate(complaints):
        with pytest.raises(LocalProtocolError, match=complaint):
            broken(number).check_integrity()


class Model:
    """What `KvBlocks` promises, naively: each session is a list of token cells, each cell an object."""

    def __init__(self) -> None:
        self.cells: dict[str, list[object]] = {}

    def holders(self, cell: object) -> int:
        return sum(any(cell is other for other in cells) for cells in self.cells.values())

    def free(self) -> int:
        heads = {id(cell) for cells in self.cells.values() for cell in cells[::BLOCK_TOKENS]}
        return POOL - len(heads)

    def resize(self, key: str, length: int) -> bool:
        cells = self.cells.get(key, [])
        if num_blocks(length) - num_blocks(len(cells)) > self.free():
            return False
        self.cells[key] = cells + [object() for _ in range(length - len(cells))]
        return True

    def cut(self, key: str, length: int) -> int:
        cells = self.cells[key]
        start = length - length % BLOCK_TOKENS
        if length < len(cells) and start < length and self.holders(cells[start]) > 1:
            length = start
        self.cells[key] = cells[:length]
        return length


operations = st.one_of(
    st.tuples(st.just("resize"), st.sampled_from(KEYS), lengths),
    st.tuples(st.just("cut"), st.sampled_from(KEYS), lengths),
    st.tuples(st.just("share"), st.sampled_from(KEYS), lengths),
    st.tuples(st.just("release"), st.sampled_from(KEYS), lengths),
)


@given(st.lists(st.tuples(operations, st.sampled_from(KEYS)), max_size=40))
def test_any_operations_do_what_the_naive_model_does(steps: list[tuple[tuple[str, str, int], str]]) -> None:
    blocks, model = KvBlocks(POOL), Model()
    for (operation, key, length), source in steps:
        known = len(model.cells.get(key, []))
        if operation == "resize" and length >= known:
            before = list(blocks.blocks(key))
            assert blocks.resize(key, length) == model.resize(key, length)
            assert list(blocks.blocks(key))[: len(before)] == before
        elif operation == "cut" and key in model.cells:
            length = min(length, known)
            assert blocks.cut(key, length) == model.cut(key, length)
        elif operation == "share" and key not in model.cells and source in model.cells:
            length = min(length, len(model.cells[source]))
            shared = length - length % BLOCK_TOKENS
            model.cells[key] = model.cells[source][:shared]
            assert blocks.share(key, source, length) == shared
        elif operation == "release":
            model.cells.pop(key, None)
            blocks.release(key)
        blocks.check_integrity()
        assert {other: blocks.length(other) for other in model.cells} == {
            other: len(cells) for other, cells in model.cells.items()
        }
        assert len(blocks) == len(model.cells)
        assert blocks.num_free == model.free()
        # Two sessions hold the same block exactly where they share the cells in it.
        for one, two in pairwise(sorted(model.cells)):
            heads = zip(model.cells[one][::BLOCK_TOKENS], model.cells[two][::BLOCK_TOKENS], strict=False)
            same = [mine is other for mine, other in heads]
            held = zip(blocks.blocks(one), blocks.blocks(two), strict=False)
            assert [mine == other for mine, other in held] == same
