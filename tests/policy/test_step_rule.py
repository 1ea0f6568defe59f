from dataclasses import replace
from math import inf

import pytest

from shared.core.policies import Outlook
from shared.policy.step_rule import Choice, StepRule
from shared.testing.sweep import CURVES

DRAFTS = 16
AFTER_BREAK = Outlook(
    acceptance=0.8, draft_ms=1.0, rtt_ms=5.0, unknown_tokens=0, next_ms=6.0, asked_ms=5.0, most_drafts=DRAFTS
)
FLAT, STEEP = (StepRule(CURVES[name][: DRAFTS + 2]) for name in ("flat", "steep"))


def after_break(acceptance: float, draft_ms: float, rtt_ms: float) -> Outlook:
    return Outlook(acceptance, draft_ms, rtt_ms, 0, rtt_ms + draft_ms, rtt_ms, DRAFTS)


def sure(acceptance: float, tokens: int) -> list[float]:
    return [acceptance ** (depth + 1) for depth in range(tokens)]


def test_fast_draft_on_a_short_link_is_worth_holding_for() -> None:
    choice = FLAT.choose([], AFTER_BREAK)
    assert 4 <= choice.drafts <= 8
    assert choice.hold_ms == pytest.approx(5.0 + choice.drafts)  # the last one is here a round trip and n drafts later


@pytest.mark.parametrize(
    ("acceptance", "least", "most"), [(0.3, 0, 0), (0.4, 1, 3), (0.6, 2, 5), (0.9, 7, 12), (0.97, 14, 16)]
)
def test_surer_drafts_are_waited_for_in_greater_number(acceptance: float, least: int, most: int) -> None:
    assert least <= FLAT.choose([], after_break(acceptance, 1.0, 5.0)).drafts <= most


@pytest.mark.parametrize(
    ("rule", "acceptance", "draft_ms", "rtt_ms", "asked"),
    [(FLAT, 0.8, 1.0, 50.0, 10), (FLAT, 0.8, 20.0, 5.0, 0), (FLAT, 0.3, 1.0, 20.0, 0), (STEEP, 0.6, 0.05, 5.0, 0)],
    ids=["long link", "slow draft", "bad draft", "dear rows"],
)
def test_no_step_waits_where_decoding_is_faster(
    rule: StepRule, acceptance: float, draft_ms: float, rtt_ms: float, asked: int
) -> None:
    assert rule.choose([], after_break(acceptance, draft_ms, rtt_ms)) == Choice(0, 0.0, asked)


def test_what_is_here_is_verified_as_far_as_it_pays() -> None:
    flowing = replace(AFTER_BREAK, next_ms=1.0)
    assert FLAT.choose(sure(0.95, 16), replace(flowing, acceptance=0.95)).drafts == 16
    assert FLAT.choose(sure(0.3, 16), replace(flowing, acceptance=0.3)).drafts in (2, 3)
    assert STEEP.choose(sure(0.3, 16), replace(flowing, acceptance=0.3)).drafts == 0  # ignored


def test_few_drafts_are_not_worth_a_dear_step_while_more_come_soon() -> None:
    flowing = replace(AFTER_BREAK, acceptance=0.9, rtt_ms=20.0, next_ms=1.0, asked_ms=20.0)
    assert STEEP.choose(sure(0.9, 1), flowing) == Choice(0, 0.0, 16)
    assert STEEP.choose(sure(0.9, 8), flowing).drafts == 8


def test_drafts_at_hand_are_verified_when_no_more_will_come_for_long() -> None:
    stopped = replace(AFTER_BREAK, acceptance=0.97, next_ms=100.0)
    assert STEEP.choose(sure(0.97, 4), stopped).drafts == 4


def test_drafts_that_are_here_beyond_those_on_offer_are_not_waited_for() -> None:
    """The next ones come late, but behind those: until then decoding was taken to be faster than verifying drafts."""
    cheap = StepRule([0.051, 0.051, 0.052, 0.053, 0.054, 0.055])
    stopped = Outlook(1.0, 0.02, 4.0, 0, next_ms=60.0, asked_ms=4.0, most_drafts=4)
    assert cheap.choose([1.0] * 4, stopped).drafts == 0
    assert cheap.choose([1.0] * 4, replace(stopped, further_tokens=100)) == Choice(4, 0.0, 0)


@pytest.mark.parametrize("further", [2, 10, 17, 100])
def test_step_has_no_more_drafts_than_pay_however_many_are_here(further: int) -> None:
    many = replace(AFTER_BREAK, acceptance=0.97, next_ms=1.0, further_tokens=further)
    assert FLAT.choose(sure(0.995, 16), many).drafts == 16
    assert FLAT.choose(sure(0.995, 16), replace(many, most_drafts=3)).drafts == 3
    jump = StepRule([*[30.0] * 9, *[90.0] * 9])  # 1 + 7 rows cost as much as one
    assert jump.choose(sure(0.995, 16), many).drafts == 7


def test_drafts_on_offer_are_not_needed_for_some_to_be_here() -> None:
    """The text ends with the next token: there is room for no draft."""
    ending = replace(AFTER_BREAK, most_drafts=0, further_tokens=100)
    assert FLAT.choose([], ending) == Choice(0, 0.0, 0)


def test_drafts_are_verified_before_a_pause_longer_than_an_answer_takes() -> None:
    """They are dear here; but verified drafts keep the path, while decoding would fill the pause no sooner."""
    paused = Outlook(0.97, 5.0, 50.0, 0, next_ms=400.0, asked_ms=0.0, most_drafts=DRAFTS)
    assert STEEP.choose(sure(0.97, 2), paused).drafts == 2


def test_edge_that_must_be_asked_first_is_waited_for_as_long() -> None:
    soon = replace(AFTER_BREAK, next_ms=1.0, asked_ms=30.0)
    assert FLAT.choose([], soon, may_decode=False).hold_ms == pytest.approx(30.0)


def test_drafts_for_a_later_step_are_asked_for_while_the_verifier_decodes() -> None:
    broken = after_break(0.97, 1.0, 20.0)  # in a decode step of 30 ms nine tokens come unasked, sixteen a little later
    choice = FLAT.choose([], broken)
    assert (choice.drafts, choice.hold_ms) == (0, 0.0)
    assert choice.asked in (15, 16, 17)
    asked = replace(broken, unknown_tokens=1, next_ms=0.0, asked_ms=6.0, asked_tokens=15)
    assert FLAT.choose([], asked) == Choice(15, 6.0, 15)


def test_what_will_be_here_when_decoding_ends_is_asked_for() -> None:
    broken = after_break(0.9, 1.0, 20.0)  # two decode steps of 14 ms: eight tokens are here then, six come unasked
    assert STEEP.choose([], broken) == Choice(0, 0.0, 8)
    assert STEEP.choose([], replace(broken, may_ask=False)) == Choice(0, 0.0)


def test_what_nobody_can_ask_for_is_not_waited_for() -> None:
    flowing = replace(AFTER_BREAK, acceptance=0.97, next_ms=1.0)
    assert FLAT.choose(sure(0.97, 3), flowing) == Choice(16, 13.0, 16)
    assert FLAT.choose(sure(0.97, 3), replace(flowing, may_ask=False)) == Choice(3, 0.0)


def test_drafts_for_the_step_after_are_asked_for_with_a_commit() -> None:
    flowing = replace(AFTER_BREAK, acceptance=0.97, draft_ms=5.0, next_ms=5.0)
    choice = FLAT.choose(sure(0.97, 5), flowing)
    assert (choice.drafts, choice.hold_ms) == (5, 0.0)
    assert choice.asked > 6  # the step's own token is on the path, too


def test_what_was_asked_for_stays_asked_for() -> None:
    broken = replace(after_break(0.9, 0.05, 70.0), asked_ms=71.0, asked_tokens=15)
    assert FLAT.choose([], broken) == Choice(0, 0.0, 15)
    assert FLAT.choose([], replace(broken, asked_tokens=3, asked_ms=70.5)).asked >= 3


def test_the_last_drafts_are_waited_for_if_they_come_before_a_step_would_end() -> None:
    """Each takes 5 ms, a step 30: with what is here there would be another step, and another pause behind it."""
    flowing = replace(AFTER_BREAK, acceptance=0.97, draft_ms=5.0, rtt_ms=50.0, next_ms=5.0, asked_ms=28.0)
    ending = replace(flowing, most_drafts=6, left_tokens=7, may_ask=False)
    assert FLAT.choose(sure(0.97, 4), flowing).drafts == 4
    assert FLAT.choose(sure(0.97, 4), ending) == Choice(6, 10.0)
    assert FLAT.choose(sure(0.97, 4), replace(ending, next_ms=45.0)) == Choice(4, 0.0)  # later than a step ends
    assert FLAT.choose(sure(0.5, 4), replace(ending, acceptance=0.5)) == Choice(4, 0.0)  # hardly ever all right


def test_drafts_that_cannot_be_right_change_nothing_at_the_end() -> None:
    ending = replace(AFTER_BREAK, acceptance=0.0, next_ms=1.0, most_drafts=3, left_tokens=4)
    assert FLAT.choose([0.0, 0.0], ending) == Choice(0, 0.0)


def test_all_that_ends_the_text_is_verified_at_once() -> None:
    stopped = replace(AFTER_BREAK, acceptance=0.97, next_ms=1.0, left_tokens=8)
    assert FLAT.choose(sure(0.97, 8), stopped) == Choice(7, 0.0)  # the stop token is the step's own


@pytest.mark.parametrize("left", range(1, DRAFTS + 3))
def test_nothing_is_asked_for_behind_the_end(left: int) -> None:
    ending = replace(after_break(0.97, 1.0, 20.0), most_drafts=min(left - 1, DRAFTS), left_tokens=left)
    assert FLAT.choose([], ending).asked < left
    assert FLAT.choose(sure(0.97, left - 1), replace(ending, asked_ms=5.0, next_ms=5.0)).asked < left


def test_nothing_is_asked_for_where_drafts_flow() -> None:
    assert FLAT.choose(sure(0.9, 16), replace(AFTER_BREAK, acceptance=0.9, next_ms=1.0, asked_ms=40.0)).asked == 0


def test_drafts_that_the_edge_takes_to_be_verified_are_not_left_for_a_later_step() -> None:
    """Its next message comes at the end of a step with them: after one without there would be three and no more."""
    flowing = replace(AFTER_BREAK, acceptance=0.9, rtt_ms=20.0, next_ms=1.0, asked_ms=20.0)
    assert STEEP.choose(sure(0.9, 4), flowing) == Choice(4, 0.0)


def test_decoded_tokens_that_the_edge_may_not_have_foreseen_make_a_hold_less_likely() -> None:
    soon = replace(AFTER_BREAK, acceptance=0.6, draft_ms=0.05, rtt_ms=20.0, next_ms=2.0, asked_ms=2.0)
    assert FLAT.choose([], soon).drafts > 0
    assert FLAT.choose([], replace(soon, unknown_tokens=6)).drafts == 0


def test_no_more_drafts_are_chosen_than_there_is_room_for() -> None:
    assert FLAT.choose([], replace(AFTER_BREAK, most_drafts=5)).drafts == 5
    assert FLAT.choose([], replace(AFTER_BREAK, most_drafts=0)) == Choice(0, 0.0)
    assert FLAT.choose(sure(0.99, 40), replace(AFTER_BREAK, acceptance=0.99)).drafts == DRAFTS


def test_who_may_not_decode_verifies_or_waits() -> None:
    bad = after_break(0.3, 20.0, 50.0)
    assert FLAT.choose([], bad).drafts == 0
    assert FLAT.choose(sure(0.3, 1), bad, may_decode=False) == Choice(1, 0.0)
    assert FLAT.choose([], bad, may_decode=False).hold_ms == pytest.approx(70.0)


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_extremes_are_no_special_case(acceptance: float) -> None:
    assert 0 <= FLAT.choose(sure(acceptance, 2), replace(AFTER_BREAK, acceptance=acceptance)).drafts <= DRAFTS


@pytest.mark.parametrize(
    ("acceptance", "draft_ms", "rtt_ms", "best_fixed_ms"),
    [(0.8, 0.05, 5.0, 9.5), (0.6, 1.0, 20.0, 20.9), (0.9, 5.0, 20.0, 11.2), (0.8, 5.0, 50.0, 19.7)],
)
def test_reachable_rate_is_near_what_the_simulation_reaches(
    acceptance: float, draft_ms: float, rtt_ms: float, best_fixed_ms: float
) -> None:
    rate = FLAT._solve(after_break(acceptance, draft_ms, rtt_ms)).rate
    assert best_fixed_ms * 0.8 < 1 / rate < best_fixed_ms * 1.1


def test_reachable_rate_is_never_below_cloud_only() -> None:
    assert STEEP._solve(after_break(0.3, 20.0, 150.0)).rate == pytest.approx(1 / 14)


@pytest.mark.parametrize("acceptance", [0.6, 0.9, 0.97])
@pytest.mark.parametrize("draft_ms", [0.05, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("rtt_ms", [1.0, 20.0, 150.0])
def test_a_break_is_worth_nothing_at_the_reachable_rate(acceptance: float, draft_ms: float, rtt_ms: float) -> None:
    for rule in FLAT, STEEP:
        rate = rule._solve(after_break(acceptance, draft_ms, rtt_ms)).rate
        value, _ = rule._broken(rate, acceptance, draft_ms, rtt_ms)
        assert value == pytest.approx(0.0, abs=0.02) or (value < 0.0 and rate == 1 / rule._cost[1])


def test_solutions_are_kept_but_not_without_bound() -> None:
    rule = StepRule(CURVES["flat"][:4])
    situations = [
        after_break(acceptance / 100, 1.0, float(rtt_ms)) for acceptance in range(10, 90) for rtt_ms in range(1, 9)
    ]
    most = 0
    for outlook in situations:
        rule._solve(outlook)
        most = max(most, len(rule._solved))
    assert most == 512
    assert len(rule._solved) == len(situations) - most
    assert rule._solve(situations[-1]) is rule._solve(situations[-1])


def test_patience_is_finite() -> None:
    for acceptance in (0.3, 0.9, 1.0):
        assert FLAT.choose([], after_break(acceptance, 5.0, 150.0)).hold_ms < inf


def test_recycled_rows_are_taken_as_long_as_each_is_worth_its_time() -> None:
    broken = after_break(0.8, 1.0, 50.0)
    stepwise = StepRule([30.0, 30.0, 30.0, 30.0, 55.0, 55.0])
    assert stepwise.recycled_rows([0.4, 0.2, 0.1, 0.05], broken) == 2, "a third would be the fourth row's"
    assert FLAT.recycled_rows([0.3, 0.1, 0.05, 0.04], broken) == 2, "the others gain less than a row costs"
    assert stepwise.recycled_rows([0.09, 0.08], broken) == 0, "a guess that is hardly ever right is none, free or not"
    assert stepwise.recycled_rows([0.9] * 9, broken) == 4, "as many as the curve tells of"
    assert StepRule(CURVES["steep"][: DRAFTS + 2]).recycled_rows([0.7, 0.6], broken) == 0
    assert stepwise.recycled_rows([], broken) == 0
    assert stepwise.recycled_rows([0.9, 0.8, 0.7, 0.6], None) == 2, "the fourth row takes longer than it saves"
    assert stepwise.recycled_rows([0.09, 0.08], None) == 0
