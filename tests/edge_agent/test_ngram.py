from collections.abc import Sequence

import pytest

from edge_agent.engines.ngram import SOURCE, NgramDraft
from shared.core.errors import LocalProtocolError
from shared.core.match_chances import MatchChances
from shared.core.messages import Fingerprint, Sampling
from shared.core.prompt_lookup import COPY_CHANCES
from shared.engine import Proposal

VOCABULARY = Fingerprint(100, b"toy")


def drafting(tokens: Sequence[int], past: Sequence[int] = (), max_context: int = 64) -> NgramDraft:
    draft = NgramDraft(VOCABULARY, max_context, past)
    draft.reset(tokens, Sampling(), len(tokens))
    return draft


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
        chances = MatchChances(COPY_CHANCES)
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
        assert first.confidence[2] == MatchChances(COPY_CHANCES).after(4), "what follows a wrong one says nothing"
