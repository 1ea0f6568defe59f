from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engines.ngram import CHANCES, SOURCE, NgramDraft, TokenIndex
from shared.core.errors import LocalProtocolError
from shared.core.match_chances import MatchChances
from shared.core.messages import Fingerprint, Sampling
from shared.engine import Proposal

VOCABULARY = Fingerprint(100, b"toy")


def drafting(tokens: Sequence[int], past: Sequence[int] = (), max_context: int = 64) -> NgramDraft:
    draft = NgramDraft(VOCABULARY, max_context, past)
    draft.reset(tokens, Sampling(), len(tokens))
    return draft


class TestIndex:
    def test_the_longest_match_counts_before_the_latest(self) -> None:
        index = TokenIndex()
        index.extend([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2])
        assert index.find(index.tokens) == (3, 3)
        assert index.find([5, 1, 2]) == (2, 11 - 3 - 1), "of equally long ones the latest that something follows"

    def test_a_single_token_is_no_match(self) -> None:
        index = TokenIndex()
        index.extend([1, 2, 3])
        assert index.find([5, 2]) == (0, 0)
        assert index.find([2]) == (0, 0)

    def test_the_end_of_the_text_is_no_match_for_itself(self) -> None:
        index = TokenIndex()
        index.extend([1, 2])
        assert index.find(index.tokens) == (0, 0)

    @given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
    def test_after_a_truncation_it_is_as_new(self, tokens: list[int], length: int) -> None:
        cut, new = TokenIndex(), TokenIndex()
        cut.extend(tokens)
        cut.truncate(length)
        new.extend(tokens[:length])
        assert cut.tokens == new.tokens
        assert cut.find(tokens) == new.find(tokens)

    @given(st.lists(st.integers(0, 2), max_size=30))
    def test_what_is_found_is_the_longest_that_there_is(self, tokens: list[int]) -> None:
        index = TokenIndex()
        index.extend(tokens)
        lengths = [
            next(
                length for length in range(end + 1) if length == end or tokens[end - 1 - length] != tokens[-1 - length]
            )
            for end in range(1, len(tokens))
        ]
        longest = max(lengths, default=0)
        length, end = index.find(tokens)
        assert length == (min(longest, 16) if longest >= 2 else 0)
        assert tokens[end - length : end] == tokens[len(tokens) - length :]


class TestDraft:
    def test_it_copies_what_followed(self) -> None:
        draft = drafting([1, 2, 3, 4, 5, 6, 9, 2, 3])
        assert draft.propose(3) == Proposal((4, 5, 6), (0.5, 0.6, 0.65), (SOURCE,) * 3)
        assert draft.propose(2).tokens == (9, 2), "it goes on where it was"

    def test_what_was_seen_nowhere_is_not_drafted(self) -> None:
        assert drafting([1, 2, 3, 4]).propose(4) == Proposal((), ())

    def test_a_repetition_goes_on(self) -> None:
        assert drafting([8, 1, 2, 3, 1, 2, 3]).propose(7).tokens == (1, 2, 3, 1, 2, 3, 1)

    def test_the_context_ends_it(self) -> None:
        draft = drafting([1, 2] * 4, max_context=10)
        assert draft.propose(8).tokens == (1, 2)
        assert draft.propose(8).tokens == ()

    def test_past_texts_help_where_they_match_longer(self) -> None:
        past = [9, 1, 2, 7, 7, 7]
        assert drafting([1, 2, 3, 9, 1, 2], past).propose(2).tokens == (7, 7)
        assert drafting([4, 1, 2, 3, 5, 1, 2], past).propose(2).tokens == (3, 5)
        assert drafting([9, 1, 2], past).propose(9).tokens == (7, 7, 7), "no further than they go"

    def test_a_correction_is_drafted_on_from(self) -> None:
        draft = drafting([1, 2, 3, 4, 5, 2, 3])
        draft.propose(3)
        draft.rollback(8)
        draft.extend([1, 2])
        assert draft.propose(2).tokens == (3, 4), "the latest place that was followed by something"
        with pytest.raises(LocalProtocolError, match="cannot roll back to 13 tokens, there are 12"):
            draft.rollback(13)

    def test_another_text_forgets_the_first_but_not_the_past(self) -> None:
        draft = drafting([1, 2, 3, 1, 2], past=[5, 6, 7])
        draft.reset([1, 2], Sampling(), 2)
        assert draft.propose(1).tokens == ()
        draft.reset([5, 6], Sampling(), 2)
        assert draft.propose(1).tokens == (7,)
        draft.close()
        draft.reset([5, 6], Sampling(), 2)
        assert draft.propose(1).tokens == ()

    def test_it_says_what_it_is(self) -> None:
        draft = drafting([1, 2, 3], past=[4, 5])
        assert repr(draft) == "<NgramDraft 3 tokens, 2 of past texts>"
        assert draft.fingerprint == VOCABULARY
        assert (draft.capabilities.can_rollback, draft.capabilities.max_context) == (True, 64)


class TestChances:
    def test_they_are_learnt_by_the_length_of_the_match(self) -> None:
        chances = MatchChances(CHANCES)
        before = chances.after(3)
        for _ in range(100):
            chances.observe(2, was_right=True)
            chances.observe(30, was_right=False)
        assert chances.after(2) > 0.8
        assert chances.after(3) == before
        assert chances.after(16) == chances.after(99) < 0.3

    def test_a_rollback_says_which_copies_were_right(self) -> None:
        text = [1, 2, 3, 4, 5, 2, 3]
        draft = drafting(text)
        for _ in range(40):  # after a match of two tokens it is right, after three wrong
            first = draft.propose(3)
            draft.rollback(len(text) + 1)
            draft.reset(text, Sampling(), 7)
        assert first.tokens == (4, 5, 2)
        assert first.confidence[0] > 0.7
        assert first.confidence[1] < 0.3
        assert first.confidence[2] == MatchChances(CHANCES).after(4), "what follows a wrong one says nothing"
