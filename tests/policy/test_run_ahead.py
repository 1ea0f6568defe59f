import math
from dataclasses import replace
from typing import Any

import pytest

from shared.core.acceptance import Calibration
from shared.core.policies import BURST_MESSAGES, DraftObservation
from shared.policy.run_ahead import RunAhead, StopAndWait

SEEN = DraftObservation(
    acceptance=0.8,
    reach=1.0,
    use=0.8,
    was_right=False,
    draft_ms=8.0,
    jitter_ms=0.0,
    until_step_ms=100.0,
    step_ms=30.0,
    spare_tokens=0,
    settled_tokens=40,  # no sample is due
    ahead_tokens=0,
    unsent_tokens=0,
    awaited_tokens=0,
    is_fresh=False,
    max_ahead=64,
    interval_ms=30.0,
    since_sent_ms=1_000.0,
    since_burst_ms=9_000.0,
    credit=0.0,
)


def test_what_ends_the_text_goes_at_once_but_keeps_to_the_budget() -> None:
    whole = replace(SEEN, ahead_tokens=5, unsent_tokens=2, spare_tokens=16, credit=1.0, is_whole=True)
    assert RunAhead().send_in_ms(whole, is_drafting=True) == 0.0
    assert RunAhead().send_in_ms(replace(whole, is_whole=False), is_drafting=True) > 0.0
    recent = replace(whole, since_sent_ms=100.0, since_burst_ms=500.0)
    assert RunAhead(message_interval_ms=200.0).send_in_ms(recent, is_drafting=True) == pytest.approx(700.0)


@pytest.mark.parametrize(("draft_ms", "tokens"), [(0.0, 1), (8.0, 1), (2.0, 2), (0.1, 8)])
def test_fast_drafts_come_in_chunks_that_no_commit_waits_long_for(draft_ms: float, tokens: int) -> None:
    assert RunAhead().draft_tokens(replace(SEEN, draft_ms=draft_ms)) == tokens


def test_chunk_ends_when_a_message_is_due_and_with_what_is_awaited() -> None:
    fast = replace(SEEN, draft_ms=0.5)
    assert RunAhead().draft_tokens(replace(fast, until_step_ms=3.5)) == 4  # a millisecond and a half before
    assert RunAhead().draft_tokens(replace(fast, until_step_ms=3.5, jitter_ms=0.5)) == 2
    assert RunAhead().draft_tokens(replace(fast, until_step_ms=1.7)) == 1
    assert RunAhead().draft_tokens(replace(fast, until_step_ms=0.5)) == 8  # it is over
    assert RunAhead().draft_tokens(replace(fast, awaited_tokens=5, unsent_tokens=2, ahead_tokens=2)) == 3
    assert RunAhead().draft_tokens(replace(fast, awaited_tokens=5, unsent_tokens=4, ahead_tokens=4)) == 1


def test_chunks_are_larger_where_steps_have_drafts_to_spare() -> None:
    fast = replace(SEEN, acceptance=0.98, draft_ms=0.05)
    assert RunAhead().draft_tokens(replace(fast, spare_tokens=16)) == 32
    assert RunAhead().draft_tokens(replace(fast, spare_tokens=15)) == 8
    assert RunAhead().draft_tokens(replace(fast, spare_tokens=16, draft_ms=0.5)) == 8  # it would take too long


def test_window_that_is_nearly_full_is_filled_by_a_chunk_and_not_by_each_commit_again() -> None:
    full = replace(SEEN, acceptance=0.98, draft_ms=0.05, max_ahead=256)
    assert RunAhead().draft_tokens(replace(full, ahead_tokens=43)) == 0
    assert RunAhead().draft_tokens(replace(full, ahead_tokens=42)) == 6
    assert RunAhead().draft_tokens(replace(full, ahead_tokens=43, awaited_tokens=5)) == 5  # somebody waits for them
    assert RunAhead().draft_tokens(replace(full, ahead_tokens=47, draft_ms=8.0)) == 1  # each takes its time


@pytest.mark.parametrize(
    ("acceptance", "depth"),
    [(0.0, 0), (0.09, 0), (0.11, 2), (0.2, 3), (0.5, 6), (0.8, 16), (0.98, 48), (0.999, 48), (1.0, 48)],
)
def test_depth_ends_where_a_token_is_hardly_worth_drafting(acceptance: float, depth: int) -> None:
    drafted = 0
    seen = replace(SEEN, acceptance=acceptance, draft_ms=0.1)
    while tokens := RunAhead().draft_tokens(replace(seen, ahead_tokens=drafted, reach=acceptance**drafted)):
        drafted += tokens
    assert drafted == depth


def test_unlikely_path_goes_on_no_further_whatever_the_average() -> None:
    assert RunAhead().draft_tokens(replace(SEEN, reach=0.02, ahead_tokens=2)) == 0


def test_verifier_bounds_the_depth() -> None:
    seen = replace(SEEN, acceptance=1.0, draft_ms=0.1, max_ahead=12)
    assert RunAhead().draft_tokens(replace(seen, ahead_tokens=9)) == 3
    assert RunAhead().draft_tokens(replace(seen, ahead_tokens=15)) == 0


def test_drafts_that_are_of_no_use_are_drafted_as_samples_only() -> None:
    useless = replace(SEEN, use=0.002)
    assert RunAhead().draft_tokens(replace(SEEN, acceptance=0.09, settled_tokens=64)) == 1
    drafting = [RunAhead().draft_tokens(replace(useless, settled_tokens=settled)) > 0 for settled in range(64, 192)]
    assert drafting == ([True] * 16 + [False] * 48) * 2


def test_drafts_that_are_nearly_always_wrong_are_drafted_one_by_one_and_rarely() -> None:
    wrong = replace(SEEN, acceptance=0.09, draft_ms=0.1)
    drafted = [RunAhead().draft_tokens(replace(wrong, settled_tokens=settled)) for settled in range(64, 128)]
    assert drafted == ([1] + [0] * 15) * 4
    assert RunAhead().draft_tokens(replace(wrong, settled_tokens=64, ahead_tokens=1, reach=0.09)) == 0
    assert RunAhead(draft_duty=0.0).draft_tokens(replace(wrong, settled_tokens=64)) == 0


def test_wrong_drafts_that_begin_to_be_right_are_looked_at_until_they_fail() -> None:
    better = replace(SEEN, acceptance=0.02, draft_ms=0.1, was_right=True)
    assert RunAhead().draft_tokens(better) == 1
    assert RunAhead().draft_tokens(replace(better, was_right=False)) == 0


def test_an_answer_begins_with_drafts_however_bad_the_last_ones_were() -> None:
    calibration = Calibration()
    for _ in range(20):
        calibration.observe(b"", bytes((255,)) * 100)
        assert RunAhead().draft_tokens(replace(SEEN, acceptance=calibration.overall)) == 0
        calibration = calibration.carried()
        assert RunAhead().draft_tokens(replace(SEEN, acceptance=calibration.overall)) == 1


def test_low_duty_wants_more_use_and_surer_tokens() -> None:
    saving = RunAhead(draft_duty=0.4)
    assert saving.draft_tokens(replace(SEEN, use=0.59)) == 0
    assert saving.draft_tokens(replace(SEEN, use=0.61)) == 1
    fast = replace(SEEN, draft_ms=0.1)
    assert (saving.draft_tokens(fast), RunAhead().draft_tokens(fast)) == (3, 8)  # 0.8^3 is the first below 0.6
    assert RunAhead(draft_duty=0.0).draft_tokens(replace(SEEN, use=0.99)) == 0


@pytest.mark.parametrize(
    ("until_step_ms", "jitter_ms", "wait_ms"), [(20.0, 0.0, 18.5), (20.0, 3.0, 12.5), (0.5, 0.0, 0.0)]
)
def test_message_waits_until_it_lands_just_before_the_next_step(
    until_step_ms: float, jitter_ms: float, wait_ms: float
) -> None:
    seen = replace(SEEN, until_step_ms=until_step_ms, jitter_ms=jitter_ms, ahead_tokens=3, unsent_tokens=3)
    assert RunAhead().send_in_ms(seen, is_drafting=True) == pytest.approx(wait_ms)


def test_a_step_gets_one_message() -> None:
    seen = replace(SEEN, until_step_ms=5.0, jitter_ms=3.0, unsent_tokens=1, interval_ms=1.0)
    assert RunAhead().send_in_ms(replace(seen, since_sent_ms=2.9), is_drafting=True) == pytest.approx(27.5)
    assert RunAhead().send_in_ms(replace(seen, since_sent_ms=3.1), is_drafting=True) == 0.0


def test_step_that_has_enough_needs_no_message() -> None:
    assert RunAhead().send_in_ms(replace(SEEN, spare_tokens=16), is_drafting=True) == math.inf


URGENT: list[dict[str, Any]] = [{"is_fresh": True}, {"awaited_tokens": 1}]


@pytest.mark.parametrize("changes", [{}, *URGENT])
def test_messages_keep_their_distance_on_average_where_no_commits_pay_for_them(changes: dict[str, Any]) -> None:
    seen = replace(SEEN, until_step_ms=0.0, unsent_tokens=1, **changes)
    for since_burst_ms, wait_ms in ((42.0 * BURST_MESSAGES - 52.0, 52.0), (42.0 * BURST_MESSAGES, 0.0)):
        assert RunAhead().send_in_ms(replace(seen, since_burst_ms=since_burst_ms), is_drafting=True) == wait_ms


@pytest.mark.parametrize(("credit", "is_sent", "is_urgent_sent"), [(0.9, 0, 0), (1.0, 0, 1), (1.9, 0, 1), (2.0, 1, 1)])
def test_commits_pay_for_messages_and_the_last_credit_is_kept_for_an_answer(
    credit: float, is_sent: int, is_urgent_sent: int
) -> None:
    seen = replace(SEEN, until_step_ms=0.0, unsent_tokens=1, since_burst_ms=200.0, credit=credit)
    assert (RunAhead().send_in_ms(seen, is_drafting=True) == 0.0) == is_sent
    for changes in URGENT:
        urgent = replace(seen, **changes)
        assert (RunAhead().send_in_ms(urgent, is_drafting=True) == 0.0) == is_urgent_sent


@pytest.mark.parametrize("interval_ms", [0.0, 100.0])
def test_before_the_first_commits_messages_keep_their_distance(interval_ms: float) -> None:
    policy = RunAhead(message_interval_ms=interval_ms)
    seen = replace(SEEN, until_step_ms=0.0, interval_ms=0.0, unsent_tokens=1, credit=6.0, since_sent_ms=12.0)
    assert policy.send_in_ms(seen, is_drafting=True) == (88.0 if interval_ms else 8.0)
    assert policy.send_in_ms(replace(seen, credit=3.0), is_drafting=True) == (88.0 if interval_ms else 30.0)
    assert policy.send_in_ms(replace(seen, since_sent_ms=math.inf), is_drafting=True) == 0.0
    assert policy.send_in_ms(replace(seen, awaited_tokens=1), is_drafting=True) == 0.0


def test_while_the_prompt_is_read_each_message_has_a_part_of_the_path() -> None:
    seen = replace(SEEN, until_step_ms=0.0, interval_ms=0.0, unsent_tokens=1, ahead_tokens=5, credit=6.0)
    assert RunAhead().send_in_ms(seen, is_drafting=True) == math.inf
    assert RunAhead().send_in_ms(replace(seen, ahead_tokens=4), is_drafting=True) == 0.0
    assert RunAhead().send_in_ms(seen, is_drafting=False) == 0.0
    assert RunAhead().send_in_ms(replace(seen, interval_ms=30.0), is_drafting=True) < math.inf
    assert RunAhead().send_in_ms(replace(seen, awaited_tokens=1), is_drafting=True) == 0.0  # a step is held for it


def test_no_commit_pays_for_messages_that_the_settings_forbid() -> None:
    seen = replace(SEEN, until_step_ms=0.0, unsent_tokens=1, since_burst_ms=500.0, credit=6.0)
    assert RunAhead(message_interval_ms=100.0).send_in_ms(seen, is_drafting=True) == pytest.approx(100.0)


def test_messages_do_not_outrun_the_commits_whatever_is_forecast() -> None:
    seen = replace(SEEN, until_step_ms=0.0, interval_ms=100.0, since_sent_ms=20.0, unsent_tokens=1)
    assert RunAhead().send_in_ms(seen, is_drafting=True) == pytest.approx(40.0)
    assert RunAhead().send_in_ms(replace(seen, is_fresh=True), is_drafting=True) == 0.0


def test_what_a_step_waits_for_goes_when_it_is_complete_or_grows_no_more() -> None:
    seen = replace(SEEN, awaited_tokens=4, unsent_tokens=3, ahead_tokens=3, until_step_ms=25.0)
    assert RunAhead().send_in_ms(seen, is_drafting=True) == math.inf
    assert RunAhead().send_in_ms(seen, is_drafting=False) == 0.0
    assert RunAhead().send_in_ms(replace(seen, unsent_tokens=4), is_drafting=True) == 0.0


def test_stop_and_wait_drafts_one_round_and_then_waits() -> None:
    policy = StopAndWait(draft_tokens_per_round=5)
    assert policy.draft_tokens(SEEN) == 5
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=2, unsent_tokens=2)) == 3
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=5, unsent_tokens=5)) == 0
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=3, unsent_tokens=0)) == 0
    assert policy.draft_tokens(replace(SEEN, max_ahead=2)) == 2


def test_stop_and_wait_sends_a_whole_round() -> None:
    assert StopAndWait().send_in_ms(SEEN, is_drafting=True) == math.inf
    assert StopAndWait().send_in_ms(SEEN, is_drafting=False) == 0.0
