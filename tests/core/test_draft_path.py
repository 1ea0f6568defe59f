from dataclasses import replace
from math import inf

import pytest

from shared.core.draft_path import DraftPath
from shared.core.effects import Draft, Rollback
from shared.core.errors import LocalProtocolError
from shared.core.link import Link, LinkSettings
from shared.core.messages import Commit
from shared.core.messages import Draft as DraftMessage
from shared.core.policies import DraftObservation

NO_STOPS = frozenset[int]()


def sure(tokens: tuple[int, ...]) -> tuple[float, ...]:
    return (1.0,) * len(tokens)


def path_of(prompt: tuple[int, ...], drafted: tuple[int, ...] = ()) -> DraftPath:
    """A path whose engine drafted these tokens, all of them at hand."""
    path = DraftPath(prompt)
    if drafted:
        path.draft(len(drafted), now=0.0)
        assert path.drafted(drafted, sure(drafted), NO_STOPS, now=0.0) == []
    return path


def test_first_draft_feeds_the_prompt() -> None:
    assert DraftPath((1, 2)).can_draft
    path = DraftPath((1, 2))
    assert path.draft(3, now=0.0) == Draft(start=2, parent_hash=path.log.hash_at(2), feed=(1, 2), n=3)
    assert not path.can_draft
    assert "2 in the engine" in repr(path)  # once it is done


def test_drafts_are_appended_and_need_not_be_fed_again() -> None:
    path = path_of((1, 2), (3, 4))
    assert path.log.tokens() == (1, 2, 3, 4)
    assert path.draft(1, now=0.0).feed == ()
    assert repr(path) == "<DraftPath 4 tokens, 2 sent, 4 in the engine, acceptance 0.80>"


def test_result_without_a_draft_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError, match="drafted without a draft in flight"):
        DraftPath((1,)).drafted((2,), (1.0,), NO_STOPS, now=0.0)


def test_engine_with_no_room_is_asked_no_more() -> None:
    path = DraftPath((1,))
    path.draft(4, now=0.0)
    assert path.drafted((), (), NO_STOPS, now=0.0) == []
    assert path.is_exhausted
    assert not path.can_draft


def test_an_engine_with_nothing_to_say_is_asked_again_if_the_text_changed_meanwhile() -> None:
    path = DraftPath((1,))
    path.draft(4, now=0.0)
    path.lay(1, (5,), num_accepted=0, hold_tokens=0)
    assert path.drafted((), (), NO_STOPS, now=0.0) == []
    assert path.can_draft


def test_path_ends_at_a_stop_token() -> None:
    path = DraftPath((1,))
    path.draft(3, now=0.0)
    assert path.drafted((5, 0, 6), sure((5, 0, 6)), frozenset((0,)), now=0.0) == [Rollback(3)]
    assert path.log.tokens() == (1, 5, 0)
    assert path.wasted_tokens == 1


def test_commit_that_came_meanwhile_and_agrees_keeps_the_rest_of_the_draft() -> None:
    path = DraftPath((1,))
    path.draft(3, now=0.0)
    assert path.lay(1, (5,), 0, 0) == (0, [])
    assert path.drafted((5, 6, 7), sure((5, 6, 7)), NO_STOPS, now=0.0) == []
    assert path.log.tokens() == (1, 5, 6, 7)
    assert path.draft(1, now=0.0).feed == ()


def test_commit_that_came_meanwhile_and_is_longer_wins() -> None:
    path = DraftPath((1,))
    path.draft(2, now=0.0)
    path.lay(1, (5, 6, 7), 0, 0)
    assert path.drafted((5, 6), sure((5, 6)), NO_STOPS, now=0.0) == []
    assert path.draft(1, now=0.0).feed == (7,)


def test_commit_that_came_meanwhile_and_differs_rolls_the_engine_back() -> None:
    path = DraftPath((1,))
    path.draft(3, now=0.0)
    path.lay(1, (5, 9), 0, 0)
    assert path.drafted((5, 6, 7), sure((5, 6, 7)), NO_STOPS, now=0.0) == [Rollback(2)]
    assert path.log.tokens() == (1, 5, 9)
    assert path.wasted_tokens == 2
    assert path.draft(1, now=0.0).feed == (9,)


def test_draft_on_a_path_that_was_cut_is_stale() -> None:
    path = path_of((1,), (5, 6))
    path.draft(2, now=0.0)
    assert path.lay(1, (8,), 0, 0) == (0, [Rollback(1)])  # queued behind the draft: it undoes that too
    assert path.drafted((7, 7), sure((7, 7)), NO_STOPS, now=0.0) == []
    assert path.log.tokens() == (1, 8)
    assert path.wasted_tokens == 4
    assert path.draft(1, now=0.0).feed == (8,)


def test_commit_equal_to_the_path_changes_nothing_but_what_counts_as_sent() -> None:
    path = path_of((1,), (5, 6, 7))
    assert path.lay(1, (5, 6), 0, 0) == (2, [])
    assert path.log.tokens() == (1, 5, 6, 7)
    assert path.send(0, 99, 2.0, now=0.0).start == 3


def test_commit_that_differs_cuts_the_path_and_the_engine() -> None:
    path = path_of((1,), (5, 6, 7))
    path.send(0, 99, 2.0, now=0.0)
    assert path.lay(1, (5, 9), 0, 0) == (1, [Rollback(2)])
    assert path.log.tokens() == (1, 5, 9)
    assert path.sent_len == 3
    assert path.wasted_tokens == 2


def test_commit_longer_than_the_path_needs_no_rollback() -> None:
    path = path_of((1,), (5,))
    assert path.lay(1, (5, 6), 0, 0) == (1, [])
    assert path.draft(1, now=0.0).feed == (6,)


@pytest.mark.parametrize(
    ("committed", "rate"),
    [
        ((5, 6), (0.8 * 4 + 2) / 6),  # two right, the third not judged yet
        ((5, 9), (0.8 * 4 + 1) / 6),
        ((5, 6, 7, 8), (0.8 * 4 + 3) / 7),  # the path was too short, not wrong
    ],
)
def test_each_judged_draft_teaches_acceptance(committed: tuple[int, ...], rate: float) -> None:
    path = path_of((1,), (5, 6, 7))
    path.lay(1, committed, 0, 0)
    assert path.calibration.overall == pytest.approx(rate)


def test_commit_on_no_path_teaches_nothing() -> None:
    path = path_of((1,))
    path.lay(1, (5, 6), 0, 0)
    assert path.calibration.overall == 0.8


def test_unsent_drafts_are_sent_once_with_their_confidence() -> None:
    path = DraftPath((1, 2))
    path.draft(2, now=0.0)
    path.drafted((5, 6), (0.5, 1.0), NO_STOPS, now=0.0)
    assert path.send(0, 99, 2.0, now=0.0) == DraftMessage(2, path.log.hash_at(2), (5, 6), bytes((128, 255)))
    path.draft(1, now=0.0)
    path.drafted((7,), (0.0,), NO_STOPS, now=0.0)
    assert path.send(0, 99, 2.0, now=0.0) == DraftMessage(4, path.log.hash_at(4), (7,), bytes((0,)))


def test_only_what_the_verifier_will_hold_is_sent() -> None:
    path = path_of((1, 2), (5, 6, 7))
    assert path.send(0, 4, 2.0, now=0.0) == DraftMessage(2, path.log.hash_at(2), (5, 6), b"\xff\xff")
    assert path.send(0, 9, 2.0, now=0.0) == DraftMessage(4, path.log.hash_at(4), (7,), b"\xff")


def test_confidence_stays_with_its_token_after_a_cut_and_a_commit() -> None:
    path = path_of((1,), (5, 6))
    path.lay(1, (5, 9, 8), 0, 0)
    path.draft(1, now=0.0)
    path.drafted((4,), (0.2,), NO_STOPS, now=0.0)
    assert path.send(0, 99, 2.0, now=0.0) == DraftMessage(4, path.log.hash_at(4), (4,), bytes((51,)))


def test_drafting_time_is_smoothed_and_a_prompt_does_not_count() -> None:
    path = DraftPath(tuple(range(40)))
    path.draft(2, now=0.0)
    path.drafted((5, 6), sure((5, 6)), NO_STOPS, now=2.0)
    assert path.draft_ms == 0.0
    path.draft(2, now=2.0)
    path.drafted((7, 8), sure((7, 8)), NO_STOPS, now=2.02)
    assert path.draft_ms == pytest.approx(10.0)
    path.draft(1, now=3.0)
    path.drafted((9,), (1.0,), NO_STOPS, now=3.02)
    assert path.draft_ms == pytest.approx(12.0)


@pytest.mark.parametrize(("held_len", "unsent", "awaited"), [(99, 2, 1), (4, 1, 1), (0, 0, 0)])
def test_policy_sees_what_it_decides_on(held_len: int, unsent: int, awaited: int) -> None:
    path, link = path_of((1,), (2, 5, 6, 7)), Link(LinkSettings())
    path.lay(1, (2,), num_accepted=1, hold_tokens=2)
    path.send(0, 3, 2.0, now=0.0)
    seen = path.observe(2, held_len, link, max_ahead=9, now=0.25)
    assert seen.acceptance == pytest.approx((0.8 * 4 + 1) / 5)
    assert seen.reach == pytest.approx(((1 + 4 * seen.acceptance) / 5) ** 3)
    assert seen.use == pytest.approx((4 * 0.98 + 1) / (8 * 0.98))
    assert seen == DraftObservation(
        acceptance=seen.acceptance,
        reach=seen.reach,
        use=seen.use,
        was_right=True,
        draft_ms=0.0,
        jitter_ms=0.0,
        until_step_ms=0.0,
        step_ms=0.0,
        spare_tokens=1,
        settled_tokens=2,
        ahead_tokens=3,
        unsent_tokens=unsent,
        awaited_tokens=awaited,
        is_fresh=False,
        max_ahead=9,
        interval_ms=0.0,
        since_sent_ms=250.0,
        since_burst_ms=inf,
        credit=5.0,
    )


@pytest.mark.parametrize(
    ("committed", "was_right"), [((5,), True), ((5, 6), True), ((5, 6, 7), True), ((5, 9), False), ((9,), False)]
)
def test_the_last_judged_token_says_whether_drafts_are_right_now(committed: tuple[int, ...], was_right: bool) -> None:
    path, link = path_of((1,), (5, 6)), Link(LinkSettings())
    assert not path.observe(1, 99, link, 9, now=0.0).was_right
    path.lay(1, committed, 0, 0)
    assert path.observe(1 + len(committed), 99, link, 9, now=0.0).was_right == was_right
    nothing_judged = len(path)
    path.lay(nothing_judged, (), 0, 0)
    assert path.observe(nothing_judged, 99, link, 9, now=0.0).was_right == was_right


def test_path_is_fresh_from_a_cut_until_it_is_sent() -> None:
    path, link = path_of((1,), (5, 6)), Link(LinkSettings())
    path.lay(1, (9,), 0, 0)
    path.draft(1, now=0.0)
    path.drafted((4,), (1.0,), NO_STOPS, now=0.0)
    assert path.observe(2, 99, link, 9, now=0.1).is_fresh
    path.send(0, 99, 2.0, now=0.1)
    assert not path.observe(2, 99, link, 9, now=0.1).is_fresh


def test_use_is_the_part_of_recent_drafts_that_steps_accepted() -> None:
    path, link = path_of((1,), (5, 6, 7, 8)), Link(LinkSettings())
    path.lay(1, (5, 6, 9), num_accepted=2, hold_tokens=0)
    fading = 0.98**3
    assert path.observe(4, 99, link, 9, now=0.0).use == pytest.approx((4 * fading + 2) / ((4 + 4) * fading))


def test_message_that_a_step_waits_for_sets_the_clock() -> None:
    path, link = path_of((1,), (5, 6, 7)), Link(LinkSettings())
    path.lay(1, (5,), num_accepted=0, hold_tokens=2)
    asking = Commit(1, (5,), verify_ms=30.0, hold_tokens=2, is_holding=True)
    path.committed(asking, rtt_ms=0.0, now=0.0)
    path.send(0, 99, 2.0, now=0.5)
    assert path.observe(2, 99, link, 9, now=0.51).until_step_ms == pytest.approx(20.0)
    path.committed(asking, rtt_ms=100.0, now=0.52)  # sent before that step ended: it begins when the message lands
    assert path.observe(2, 99, link, 9, now=0.52).until_step_ms == pytest.approx(10.0)
    path.committed(replace(asking, is_holding=False), rtt_ms=100.0, now=0.56)  # one began at 0.46 s, others after it
    assert path.observe(2, 99, link, 9, now=0.56).until_step_ms == pytest.approx(20.0)
