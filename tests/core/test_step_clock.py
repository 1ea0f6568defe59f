from math import inf

import pytest

from shared.core.messages import Commit
from shared.core.policies import BURST_MESSAGES
from shared.core.step_clock import NextStep, StepClock


def next_of(clock: StepClock, committed_len: int, sent_len: int, now: float) -> tuple[float, float, int]:
    step = clock.next_step(committed_len, sent_len, now)
    return round(step.until_ms, 6), step.step_ms, step.spare_tokens


def committed(
    clock: StepClock, num_drafted: int, verify_ms: float, now: float, queue_ms: float = 0.0, awaited_len: int = 0
) -> None:
    """A commit arrives over a round trip of 20 ms."""
    commit = Commit(5, (9,), num_drafted=num_drafted, queue_ms=queue_ms, verify_ms=verify_ms)
    clock.committed(commit, awaited_len, rtt_ms=20.0, now=now)


def clock_of(**verify_ms: float) -> StepClock:
    """Steps of n drafts took `_n` ms; the last commit arrived at 1 s over a round trip of 20 ms."""
    clock = StepClock()
    for name, duration_ms in verify_ms.items():
        committed(clock, int(name[1:]), duration_ms, now=1.0)
    return clock


def test_nothing_is_known_before_the_first_commit() -> None:
    clock = StepClock()
    assert clock.next_step(5, 7, now=3.0) == NextStep(0.0, 0.0, 2)
    assert clock.interval_at(3.0) == 0.0
    assert clock.since_ms(1, 3.0) == inf


@pytest.mark.parametrize(("since_ms", "until_ms"), [(0.0, 10.0), (9.0, 1.0), (15.0, 25.0), (39.0, 1.0), (41.0, 29.0)])
def test_steps_follow_one_another_from_the_moment_the_commit_was_sent(since_ms: float, until_ms: float) -> None:
    assert next_of(clock_of(_0=30.0), 5, 5, now=1.0 + since_ms / 1000) == (until_ms, 30.0, 0)


def test_step_takes_as_long_as_the_last_with_as_many_drafts_or_the_next_fewer() -> None:
    clock = clock_of(_0=30.0, _4=50.0)
    clock.sent(8, is_awaited=False, now=0.9)
    assert next_of(clock, 5, 8, now=1.0) == (10.0, 30.0, 0)  # three of them: no such step yet
    clock.sent(9, is_awaited=False, now=0.98)  # lands as the step begins
    assert next_of(clock, 5, 9, now=1.0) == (30.0, 50.0, 0)


def test_rarest_step_counts_where_none_had_as_few_drafts() -> None:
    assert clock_of(_4=50.0).next_step(5, 5, now=1.0).step_ms == 50.0


def test_what_steps_cost_is_told_until_it_is_seen() -> None:
    clock = StepClock()
    clock.opened()
    clock.committed(Commit(5, (9,), verify_ms=755.0, step_ms=(30.0, 40.0, 60.0)), 0, rtt_ms=20.0, now=1.0)
    clock.sent(7, is_awaited=False, now=0.97)
    assert next_of(clock, 6, 7, now=1.0) == (20.0, 40.0, 0)
    assert next_of(clock, 5, 7, now=1.0) == (40.0, 60.0, 0)
    assert next_of(clock, 4, 7, now=1.0) == (40.0, 60.0, 0)  # no step takes more than it says how long it would last
    committed(clock, 1, 80.0, now=1.1)  # twice as long: beside other sessions, say
    assert next_of(clock, 7, 7, now=1.1) == (40.0, 60.0, 0)
    clock.sent(9, is_awaited=False, now=1.07)
    assert next_of(clock, 7, 9, now=1.1) == (100.0, 120.0, 0)


def test_a_step_of_what_the_verifier_guessed_says_nothing_of_one_without() -> None:
    clock = clock_of(_0=30.0)
    clock.committed(Commit(5, (9,), verify_ms=30.0, next_rows=2), 0, rtt_ms=20.0, now=1.1)
    assert next_of(clock, 6, 6, now=1.1) == (10.0, 30.0, 0)
    committed(clock, 0, 36.0, now=1.2)
    assert next_of(clock, 7, 7, now=1.2) == (10.0, 30.0, 0)
    clock.committed(Commit(7, (9,), verify_ms=30.0, next_rows=2), 0, rtt_ms=20.0, now=1.3)
    assert next_of(clock, 8, 8, now=1.3) == (16.0, 36.0, 0)


def test_the_verifier_says_how_many_drafts_its_next_step_takes() -> None:
    clock = StepClock()
    clock.opened()
    clock.sent(9, is_awaited=False, now=0.9)
    told = Commit(4, (9,), next_rows=1, step_ms=(30.0, 40.0, 50.0, 60.0, 70.0))
    clock.committed(told, 0, rtt_ms=20.0, now=1.0)
    assert next_of(clock, 5, 9, now=1.0) == (20.0, 40.0, 0)  # four are there; the others will not be of use
    assert next_of(clock, 5, 9, now=1.03) == (20.0, 30.0, 0)
    clock.opened()
    assert next_of(clock, 5, 9, now=1.0) == (50.0, 70.0, 0)


def test_the_step_that_reads_a_prompt_says_nothing_of_others() -> None:
    clock = StepClock()
    clock.opened()
    committed(clock, 0, 755.0, now=1.0)
    assert clock.next_step(5, 5, now=1.0) == NextStep(0.0, 0.0, 0)
    committed(clock, 2, 40.0, now=1.1)
    assert next_of(clock, 5, 5, now=1.1) == (20.0, 40.0, 0), "the only one that is known, though it had drafts"
    clock.opened()  # again, after an outage
    committed(clock, 2, 500.0, now=9.0)
    assert next_of(clock, 5, 5, now=9.0) == (20.0, 40.0, 0)
    assert clock.error_ms == 0.0


def test_what_lands_later_is_in_the_step_after_and_what_is_left_is_spare() -> None:
    clock = clock_of(_0=30.0, _2=40.0)
    clock.sent(7, is_awaited=False, now=1.005)  # too late for the step of 0.98 s, in time for that of 1.01 s
    assert next_of(clock, 5, 7, now=1.006) == (4.0, 30.0, 1)
    assert next_of(clock, 5, 20, now=1.012) == (28.0, 30.0, 12)


def test_step_takes_no_more_drafts_than_any_did() -> None:
    clock = clock_of(_0=30.0, _2=40.0)
    clock.sent(20, is_awaited=False, now=0.5)
    assert next_of(clock, 5, 20, now=1.0) == (20.0, 40.0, 12)


def test_messages_beyond_the_remembered_ones_land_no_sooner() -> None:
    clock = clock_of(_0=30.0, _2=40.0)
    for length in range(6, 46):
        clock.sent(length, is_awaited=False, now=1.001)
    assert next_of(clock, 5, 45, now=1.002) == (8.0, 30.0, 39)


def test_a_message_takes_nothing_back_that_landed_before_it() -> None:
    clock = clock_of(_0=30.0, _2=40.0)
    clock.sent(7, is_awaited=False, now=0.9)
    clock.sent(6, is_awaited=False, now=0.95)
    assert next_of(clock, 5, 7, now=1.0) == (20.0, 40.0, 0)


def test_cut_tokens_were_never_sent() -> None:
    clock = clock_of(_0=30.0, _2=40.0)
    clock.sent(20, is_awaited=False, now=0.5)
    clock.cut(5)
    assert clock.next_step(5, 5, now=1.0).step_ms == 30.0
    assert clock.since_ms(1, 1.0) == pytest.approx(500.0)


def test_step_that_waited_begins_when_the_message_lands_and_its_wait_is_no_part_of_it() -> None:
    clock = clock_of(_0=30.0)
    clock.sent(7, is_awaited=True, now=1.1)
    assert clock.next_step(5, 7, now=1.11).until_ms == pytest.approx(20.0)
    committed(clock, 0, 30.0, now=2.0, queue_ms=15.0)
    assert clock.next_step(5, 5, now=2.0).step_ms == 30.0
    committed(clock, 0, 30.0, now=3.0, queue_ms=15.0)
    assert clock.next_step(5, 5, now=3.0).step_ms == 45.0  # others went first


def test_drafts_that_were_asked_for_and_sent_begin_a_step_that_comes_after_the_commit() -> None:
    clock = clock_of(_0=30.0, _4=50.0)
    clock.sent(9, is_awaited=True, now=1.01)
    committed(clock, 0, 30.0, now=1.02, awaited_len=9)  # the verifier has decoded meanwhile
    assert next_of(clock, 5, 9, now=1.02) == (40.0, 50.0, 0)
    committed(clock, 3, 48.0, now=1.08, queue_ms=10.0)
    assert clock.error_ms == 0.0  # its wait was for us


def test_drafts_that_are_asked_for_again_or_in_greater_number_are_still_to_be_sent() -> None:
    clock = clock_of(_0=30.0, _4=50.0)
    clock.sent(9, is_awaited=True, now=1.01)
    committed(clock, 0, 30.0, now=1.02, awaited_len=10)
    assert next_of(clock, 5, 9, now=1.02) == (10.0, 30.0, 3)
    clock.cut(5)
    committed(clock, 0, 30.0, now=1.02, awaited_len=9)
    assert next_of(clock, 5, 5, now=1.02) == (10.0, 30.0, 0)


def test_error_is_how_far_steps_are_from_their_like() -> None:
    clock = clock_of(_0=30.0)
    committed(clock, 0, 34.0, now=1.0)
    assert clock.error_ms == pytest.approx(1.0)
    committed(clock, 3, 90.0, now=1.0)  # the first of its kind
    assert clock.error_ms == pytest.approx(0.75)


def test_interval_between_commits_is_smoothed_and_grows_while_one_is_missing() -> None:
    clock = clock_of(_0=30.0)
    assert clock.interval_at(1.0) == 0.0
    committed(clock, 0, 30.0, now=1.04)
    assert clock.interval_at(1.041) == pytest.approx(10.0)  # from 0, by a quarter
    assert clock.interval_at(1.1) == pytest.approx(60.0)


def test_bursts_are_counted_back_from_the_last_message() -> None:
    clock = StepClock()
    for now in (1.0, 1.2, 1.3):
        clock.sent(9, is_awaited=False, now=now)
    assert [round(clock.since_ms(count, 1.5)) for count in (1, 2, 3)] == [200, 300, 500]


def test_three_commits_pay_for_four_messages_and_a_few_are_saved_up() -> None:
    clock = StepClock()
    for _ in range(BURST_MESSAGES + 2):
        clock.sent(9, is_awaited=False, now=1.0)
    assert clock.credit == 0.0
    for count in range(1, BURST_MESSAGES + 3):
        committed(clock, 0, 30.0, now=1.0 + 0.03 * count)
        assert clock.credit == pytest.approx(min(count * 4 / 3, BURST_MESSAGES))
    clock.sent(9, is_awaited=False, now=2.0)
    assert clock.credit == BURST_MESSAGES - 1


def test_commits_of_very_short_steps_pay_for_a_part_of_a_message() -> None:
    clock = StepClock()
    for _ in range(BURST_MESSAGES):
        clock.sent(9, is_awaited=False, now=1.0)
    for count in range(4):
        committed(clock, 0, 5.0, now=1.0 + 0.005 * count)
    assert clock.credit == pytest.approx(4 / 3 + 3 * 5 / 15)


def test_far_future_is_not_played_through() -> None:
    assert clock_of(_0=0.001).next_step(5, 5, now=9.0).until_ms == 0.0


def test_step_of_less_than_a_millisecond_takes_as_long_as_commits_are_apart() -> None:
    clock = StepClock()
    for number in range(100):
        committed(clock, 4, 0.0, now=1.0 + number * 0.001)
    clock.sent(1005, is_awaited=False, now=1.0)
    step = clock.next_step(5, 1005, now=1.0992)
    assert step.step_ms == pytest.approx(1.0)
    assert step.until_ms == pytest.approx(0.8)
    assert step.spare_tokens == 1000 - 21 * 5  # those of a round trip, and of the step that goes on


def test_first_step_of_less_than_a_millisecond_says_nothing_of_the_next_ones() -> None:
    clock = StepClock()
    committed(clock, 0, 0.0, now=1.0)
    assert clock.next_step(5, 105, now=1.0) == NextStep(0.0, 0.0, 99)
