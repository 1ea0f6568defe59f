from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.prompt_lookup import PromptLookup, TokenIndex
from shared.core.tokens import TokenLog


def test_the_longest_match_counts_before_the_latest() -> None:
    index = TokenIndex()
    index.extend([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2])
    assert index.find(index.tokens) == (3, 3)
    assert index.find([5, 1, 2]) == (2, 11 - 3 - 1), "of equally long ones the latest that something follows"


def test_a_single_token_is_no_match() -> None:
    index = TokenIndex()
    index.extend([1, 2, 3])
    assert index.find([5, 2]) == (0, 0)
    assert index.find([2]) == (0, 0)


def test_the_end_of_the_text_is_no_match_for_itself() -> None:
    index = TokenIndex()
    index.extend([1, 2])
    assert index.find(index.tokens) == (0, 0)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_after_a_truncation_it_is_as_new(tokens: list[int], length: int) -> None:
    cut, new = TokenIndex(), TokenIndex()
    cut.extend(tokens)
    cut.truncate(length)
    new.extend(tokens[:length])
    assert cut.tokens == new.tokens
    assert cut.find(tokens) == new.find(tokens)


@given(st.lists(st.integers(0, 2), max_size=30))
def test_what_is_found_is_the_longest_that_there_is(tokens: list[int]) -> None:
    index = TokenIndex()
    index.extend(tokens)
    lengths = [
        next(length for length in range(end + 1) if length == end or tokens[end - 1 - length] != tokens[-1 - length])
        for end in range(1, len(tokens))
    ]
    longest = max(lengths, default=0)
    length, end = index.find(tokens)
    assert length == (min(longest, 16) if longest >= 2 else 0)
    assert tokens[end - length : end] == tokens[len(tokens) - length :]


def test_repetition_goes_on() -> None:
    index = TokenIndex()
    index.extend([8, 1, 2, 3, 1, 2, 3])
    assert index.guess(7) == (3, (1, 2, 3, 1, 2, 3, 1))
    index.extend([9])
    assert index.guess(7) == (0, ())


def test_guess_is_worth_what_such_matches_are() -> None:
    log = TokenLog((1, 2, 3, 4, 5, 6, 9, 2, 3))
    lookup = PromptLookup(log)
    tokens, worth = lookup.offer(3)
    assert tokens == (4, 5, 6)
    assert worth == pytest.approx([0.5, 0.5 * 0.6, 0.5 * 0.6 * 0.65])
    log.extend((4,))
    assert lookup.offer(2)[0] == (5, 6), "it follows the log"
    log.extend((7,))
    assert lookup.offer(2) == ((), [])


def test_single_token_is_looked_up_where_nothing_longer_is() -> None:
    log = TokenLog((1, 2, 3, 2, 4, 5, 2))
    lookup = PromptLookup(log)
    tokens, worth = lookup.offer(2)
    assert tokens == (4, 5), "the latest one that something follows"
    assert worth == pytest.approx([0.2, 0.2 * 0.5])
    log.extend((4,))
    assert lookup.offer(2)[0] == (5, 2), "a pair is better"
    log.extend((1,))
    assert lookup.offer(9)[0] == (2, 3, 2, 4, 5, 2, 4, 1), "no further than the text goes"
    assert PromptLookup(TokenLog((1,))).offer(2) == ((), [])


def test_what_came_tells_what_the_next_guess_is_worth() -> None:
    log = TokenLog((1, 2, 3, 4, 1, 2))
    right, wrong = PromptLookup(log), PromptLookup(log)
    before = [lookup.offer(2)[1][0] for lookup in (right, wrong)]
    right.judge((3, 4))
    wrong.judge((9,))
    wrong.judge((9,))
    after = [lookup.offer(2)[1][0] for lookup in (right, wrong)]
    assert after[0] > before[0] == before[1] > after[1]
    assert repr(wrong).startswith("<PromptLookup in <TokenIndex 6 tokens>, <TextChances ")


def test_nothing_is_looked_up_before_it_is_asked_for() -> None:
    assert "<TokenIndex 0 tokens>" in repr(PromptLookup(TokenLog(range(100))))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_reading_ahead_changes_no_guess(tokens: list[int], lengths: list[int]) -> None:
    log = TokenLog(tokens)
    ahead = PromptLookup(log)
    for length, furthest in zip(lengths, accumulate(lengths, max), strict=True):
        ahead.read(length)
        assert f"<TokenIndex {min(furthest, len(tokens))} tokens>" in repr(ahead)
    assert ahead.offer(5) == PromptLookup(log).offer(5)
