"""The rules that callers are held to are tested with the engines, in tests/models/test_target_contract.py."""

import pytest

from cloud_verifier.engines.session_book import SessionBook, count_blocks, depths, is_chain, path
from shared.core.kv_blocks import KvBlocks
from shared.core.messages import Sampling
from shared.engine import EngineError, Rows

TREE = (-1, 0, 0, 2, 1)
PENALISED = Sampling(repetition_penalty=1.5)


def test_a_chain_is_known_from_a_tree() -> None:
    assert is_chain((-1,))
    assert is_chain([-1, 0, 1])
    assert not is_chain((-1, -1))
    assert not is_chain(TREE)


def test_depths_and_paths_follow_the_parents() -> None:
    assert list(depths((-1, 0, 1))) == [0, 1, 2]
    assert list(depths(TREE)) == [0, 1, 1, 2, 2]
    assert [path(TREE, row) for row in range(5)] == [[0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4]]


def test_budget_is_counted_in_whole_blocks() -> None:
    token_bytes = 2 * 2 * 2 * 4 * 4
    assert count_blocks(token_bytes, 100, kv_cache_mb=1) == 2**20 // (16 * token_bytes)
    assert count_blocks(token_bytes, 100, kv_cache_mb=0) == 16 * 7
    with pytest.raises(
        EngineError, match=r"^target.kv_cache_mb 1 does not hold one session of 9000 tokens: set it to 2"
    ):
        count_blocks(token_bytes, 9000, kv_cache_mb=1)


def test_only_rows_that_greedy_selection_does_not_settle_are_listed_each_with_its_own_context() -> None:
    blocks = KvBlocks(8)
    book = SessionBook(blocks, size=50, max_context=100)
    batch = [
        Rows("greedy", 0, (1, 2), (-1, 0), 0, Sampling(), 1),
        Rows("sampled", 0, (3, 4, 5), (-1, 0, 1), 1, Sampling(temperature=1.0), 1),
        Rows("tree", 0, (6, 7, 8, 9, 10), TREE, 3, PENALISED, 1),
    ]
    book.check(batch)
    for rows in batch:
        blocks.resize(rows.session_id, len(rows.tokens))
    book.forwarded(batch)
    listed = [(one.row, one.position, one.context) for one in book.sampled_rows(batch)]
    assert listed == [(2, 2, []), (3, 3, []), (4, 3, [6, 8, 9]), (5, 3, [6, 7, 10])]
    assert repr(book) == "3 sessions, 10 tokens"
    book.keep("tree", 0, (0, 1))
    follow = [Rows("tree", 2, (11,), (-1,), 0, PENALISED, 1)]
    book.check(follow)
    book.forwarded(follow)
    assert [one.context for one in book.sampled_rows(follow)] == [[6, 7, 11]]
