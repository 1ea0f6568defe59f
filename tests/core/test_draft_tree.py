import pytest

from shared.core.draft_tree import DraftTree, Grafted, Judged, chains
from shared.core.messages import Draft
from shared.core.tokens import TokenLog, next_hash

AS_SAID = [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]  # by range of confidence: 0 to 31, 32 to 63, ...
TABLES = (AS_SAID, AS_SAID)


def hash_after(log: TokenLog, *tokens: int) -> int:
    prefix_hash = log.hash_at(len(log))
    for token in tokens:
        prefix_hash = next_hash(prefix_hash, token)
    return prefix_hash


def on_end(log: TokenLog, tokens: tuple[int, ...], confidence: bytes = b"") -> Draft:
    return Draft(len(log), log.hash_at(len(log)), tokens, confidence)


def after(log: TokenLog, path: tuple[int, ...], tokens: tuple[int, ...], confidence: bytes = b"") -> Draft:
    """A draft that extends pending tokens."""
    return Draft(len(log) + len(path), hash_after(log, *path), tokens, confidence)


def pending(tree: DraftTree) -> list[tuple[int, int]]:
    """(position, token), a parent before its children."""
    nodes, _ = tree.best(10**9, 10**9, *TABLES)
    return [(node.position, node.token) for node in nodes]


def worth(tree: DraftTree) -> list[float]:
    return tree.best(10**9, 10**9, *TABLES)[1]


@pytest.fixture
def log() -> TokenLog:
    return TokenLog((1, 2))


@pytest.fixture
def tree(log: TokenLog) -> DraftTree:
    return DraftTree(log, limit=6)


def test_draft_on_the_committed_end_is_pending(log: TokenLog, tree: DraftTree) -> None:
    assert tree.graft(on_end(log, (5, 6))) == Grafted(added=2, stale=0, overflow=0)
    assert pending(tree) == [(2, 5), (3, 6)]
    assert repr(tree) == "<DraftTree 2 pending, depth 2>"


def test_same_draft_twice_changes_nothing(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6)))
    assert tree.graft(on_end(log, (5, 6))) == Grafted(0, 0, 0)
    assert len(tree) == 2


def test_draft_on_a_pending_token_extends_it(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6)))
    assert tree.graft(after(log, (5,), (7, 8))) == Grafted(2, 0, 0)
    assert pending(tree) == [(2, 5), (3, 6), (3, 7), (4, 8)]


def test_draft_that_overlaps_the_committed_tokens_is_grafted_from_their_end(log: TokenLog, tree: DraftTree) -> None:
    draft = Draft(1, log.hash_at(1), (2, 5, 6), bytes((9, 255, 51)))
    assert tree.graft(draft) == Grafted(2, 0, 0)
    assert worth(tree) == [1.0, pytest.approx(0.2)]


def test_draft_that_the_commit_overtook_is_no_loss(log: TokenLog, tree: DraftTree) -> None:
    assert tree.graft(Draft(1, log.hash_at(1), (2,))) == Grafted(0, 0, 0)
    assert tree.graft(Draft(0, log.hash_at(0), (1,))) == Grafted(0, 0, 0)


@pytest.mark.parametrize(
    ("draft", "stale", "differs"),
    [
        (Draft(2, 12345, (5, 6)), 2, False),  # another prefix
        (Draft(5, 12345, (5,)), 1, False),  # beyond everything
        (Draft(1, 12345, (2, 5)), 2, False),  # another prefix inside the committed tokens
        (Draft(1, TokenLog((1,)).hash_at(1), (9, 5)), 2, True),  # contradicts a committed token
        (Draft(0, 0, (1, 9, 5)), 2, True),  # right for one token only
        (Draft(3, TokenLog((1, 2)).hash_at(2), (5,)), 1, False),  # the root's hash at another position
        (Draft(1, TokenLog((1, 2)).hash_at(2), (5,)), 1, False),  # likewise
    ],
)
def test_draft_on_a_prefix_that_does_not_stand_is_stale(
    tree: DraftTree, draft: Draft, stale: int, differs: bool
) -> None:
    assert tree.graft(draft) == Grafted(0, stale, 0, differs)
    assert len(tree) == 0


def test_pending_hash_at_another_position_is_stale(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5,)))
    assert tree.graft(Draft(4, hash_after(log, 5), (6,))) == Grafted(0, 1, 0)


def test_tokens_over_the_limit_are_dropped_and_counted(log: TokenLog, tree: DraftTree) -> None:
    assert tree.graft(on_end(log, tuple(range(10, 18)))) == Grafted(6, 0, 2)
    assert tree.graft(on_end(log, (10, 11, 99))) == Grafted(0, 0, 1)
    assert len(tree) == 6


def test_commit_along_the_drafts_keeps_what_hangs_below(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7), bytes((10, 20, 30))))
    tree.graft(on_end(log, (9,)))
    log.extend((5, 6))
    assert tree.advance((5, 6)) == Judged(matched=bytes((10, 20)), failed=b"")
    assert pending(tree) == [(4, 7)]
    ((node,), _) = tree.best(9, 9, *TABLES)
    assert node.parent is not None
    assert node.parent.parent is None  # what is committed is let go
    assert tree.graft(on_end(log, (7, 8))) == Grafted(1, 0, 0)


def test_commit_off_the_drafts_prunes_them(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7), bytes((10, 20, 30))))
    log.extend((5, 8))
    assert tree.advance((5, 8)) == Judged(matched=bytes((10,)), failed=bytes((20,)))
    assert repr(tree) == "<DraftTree 0 pending, depth 0>"
    assert tree.graft(Draft(4, log.hash_at(4), (1,))) == Grafted(1, 0, 0)


def test_commit_beyond_the_drafts_is_no_failure(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5,)))
    log.extend((5, 6))
    assert tree.advance((5, 6)) == Judged(matched=bytes((255,)), failed=b"")
    assert len(tree) == 0


def test_draft_of_pruned_tokens_is_stale(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6)))
    late = after(log, (5, 6), (7,))
    log.extend((9,))
    tree.advance((9,))
    assert tree.graft(late) == Grafted(0, 1, 0)


def test_siblings_that_all_failed_are_judged_apart_from_the_first_child(log: TokenLog, tree: DraftTree) -> None:
    for token, confidence in ((5, 40), (6, 90), (7, 60)):
        tree.graft(on_end(log, (token,), bytes((confidence,))))
    log.extend((8,))
    assert tree.advance((8,)) == Judged(b"", bytes((40,)), b"", bytes((90, 60)))


def test_nothing_pending_nothing_judged(log: TokenLog, tree: DraftTree) -> None:
    log.extend((5,))
    assert tree.advance((5,)) == Judged(b"", b"")
    assert tree.graft(on_end(log, (6,))) == Grafted(1, 0, 0)


def test_most_confident_paths_come_first_and_parents_before_children(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6), bytes((204, 255))))
    tree.graft(on_end(log, (9, 8), bytes((230, 51))))
    assert pending(tree) == [(2, 5), (3, 6), (2, 9), (3, 8)]
    assert worth(tree) == pytest.approx([0.8, 0.8, 0.2, 0.04])  # 9 has what 5 leaves over
    nodes, least = tree.best(2, 10**9, *TABLES)
    assert [(node.position, node.token) for node in nodes] == [(2, 5), (3, 6)]
    assert least == pytest.approx([0.8, 0.8])


def test_siblings_have_chances_of_their_own(log: TokenLog, tree: DraftTree) -> None:
    for token, confidence in ((5, 204), (9, 204), (8, 51)):
        tree.graft(on_end(log, (token,), bytes((confidence,))))
    nodes, chances = tree.best(9, 9, AS_SAID, [0.5] * 8)
    assert [node.token for node in nodes] == [5, 9, 8]
    assert chances == pytest.approx([0.8, 0.1, 0.05])


def test_commit_behind_a_sibling_judges_each_by_its_rank(log: TokenLog, tree: DraftTree) -> None:
    for path in ((5, 6), (8,), (9, 4)):
        tree.graft(on_end(log, path, bytes((100 * path[0] // 5,) + (7,) * (len(path) - 1))))
    log.extend((9, 4))
    assert tree.advance((9, 4)) == Judged(matched=bytes((7,)), failed=bytes((100,)), sibling_matched=bytes((180,)),
                                          sibling_failed=bytes((160,)))  # fmt: skip


def test_siblings_behind_the_right_one_are_not_judged(log: TokenLog, tree: DraftTree) -> None:
    for token in (5, 6):
        tree.graft(on_end(log, (token,), bytes((token,))))
    log.extend((5,))
    assert tree.advance((5,)) == Judged(bytes((5,)), b"")


def test_fork_beyond_what_was_committed_stands(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7)))
    tree.graft(after(log, (5,), (8,)))
    log.extend((5,))
    assert tree.advance((5,)) == Judged(bytes((255,)), b"")
    assert pending(tree) == [(3, 6), (4, 7), (3, 8)]


def test_own_path_goes_along_first_children(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6)))
    assert tree.path_len == 2
    for path in ((9, 4), (5, 8)):
        tree.graft(on_end(log, path))
    assert tree.path_len == 2
    log.extend((9,))
    tree.advance((9,))
    assert tree.path_len == 1


def test_rejected_is_the_own_path_from_its_first_wrong_token(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7)))

    def rejected(*tokens: int) -> list[tuple[int, int]]:
        return [(node.position, node.token) for node in tree.rejected(tokens)]

    end = len(log)
    assert rejected(5, 6) == rejected(5, 6, 7, 8) == rejected() == []
    assert rejected(5, 9) == [(end + 1, 6), (end + 2, 7)]
    tree.graft(on_end(log, (8,)))  # a sibling is no part of it
    assert rejected(8) == [(end, 5), (end + 1, 6), (end + 2, 7)]
    assert rejected(5, 6, 9) == [(end + 2, 7)]


def test_tree_in_one_draft_is_a_chain_and_its_branches(log: TokenLog) -> None:
    prefix_hash = log.hash_at(2)
    draft = Draft(2, prefix_hash, (5, 6, 8, 9, 7), bytes((1, 2, 3, 4, 5)), parents=(-1, 0, 3))
    assert chains(draft) == [
        Draft(2, prefix_hash, (5, 6), bytes((1, 2))),
        Draft(2, prefix_hash, (8,), bytes((3,))),
        Draft(3, hash_after(log, 5), (9,), bytes((4,))),
        Draft(4, hash_after(log, 5, 9), (7,), bytes((5,))),
    ]
    assert chains(Draft(2, prefix_hash, (5, 6), parents=(-1, 0))) == [
        Draft(2, prefix_hash, (5,)), Draft(3, hash_after(log, 5), (6,))]  # fmt: skip
    chain = Draft(2, prefix_hash, (5, 6))
    assert chains(chain) == [chain]


def test_what_became_of_a_tree_is_what_became_of_its_chains() -> None:
    assert Grafted(1, 2, 3, differs=True) + Grafted(4, 5, 6) == Grafted(5, 7, 9, differs=True)
    assert Grafted(1, 2, 3) + Grafted(4, 5, 6, differs=True) == Grafted(5, 7, 9)


def test_equally_likely_drafts_go_by_age(log: TokenLog, tree: DraftTree) -> None:
    for token in (7, 5, 6):
        tree.graft(on_end(log, (token,), bytes((100,))))
    assert pending(tree) == [(2, 7), (2, 5), (2, 6)]


def test_no_node_behind_the_last_position_is_taken(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7)))
    tree.graft(on_end(log, (9, 8)))
    nodes, _ = tree.best(9, 3, *TABLES)
    assert [(node.position, node.token) for node in nodes] == [(2, 5), (3, 6), (2, 9), (3, 8)]
    assert tree.best(9, 2, *TABLES)[1] == [1.0, 0.0]
    assert tree.best(9, 1, *TABLES) == ([], [])
    assert tree.best(0, 9, *TABLES) == ([], [])


def test_worth_never_rises_whatever_the_table_says(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7), bytes((100, 255, 255))))
    tree.graft(on_end(log, (9, 8), bytes((200, 200))))
    assert worth(tree) == sorted(worth(tree), reverse=True)


def test_worth_is_counted_from_the_new_root(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6), bytes((51, 102))))
    log.extend((5,))
    tree.advance((5,))
    assert worth(tree) == pytest.approx([0.4])


def test_drafts_that_are_never_right_are_worth_nothing_and_still_pending(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6), bytes((0, 255))))
    assert worth(tree) == [0.0, 0.0]
    log.extend((5,))
    tree.advance((5,))
    assert pending(tree) == [(3, 6)]


def test_lower_limit_holds_for_what_is_to_come(log: TokenLog, tree: DraftTree) -> None:
    tree.graft(on_end(log, (5, 6, 7)))
    tree.limit = 2
    assert len(tree) == 3
    assert tree.graft(on_end(log, (5, 6, 7, 8))) == Grafted(0, 0, 1)
    log.extend((5, 6))
    tree.advance((5, 6))
    assert tree.graft(on_end(log, (7, 8, 9))) == Grafted(1, 0, 1)
