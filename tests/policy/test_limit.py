from collections.abc import Callable
from random import Random

import pytest

from shared.policy.limit import LONGEST_RTT_MS, TAKE_ALL, Measured, Rule, best_tpot_ms, paying_rtt_ms, tpot_ms


def linear(step_ms: float) -> Callable[[int], float]:
    """A cost curve that rises by 3 % a row."""
    return lambda rows: step_ms * (1 + 0.03 * (rows - 1))


def answers(acceptance: float, step_ms: float, rtt_ms: float, draft_ms: float = 5.0) -> list[Measured]:
    chance = Random(1)
    return [
        Measured([chance.random() < acceptance for _ in range(200)], draft_ms, linear(step_ms), rtt_ms / 2, rtt_ms / 2)
        for _ in range(30)
    ]


@pytest.mark.parametrize(
    ("step_ms", "rtt_ms", "acceptance", "known_ms"),
    [(30, 50, 0.6, 26.8), (30, 50, 0.8, 19.1), (30, 50, 0.9, 13.3), (30, 200, 0.8, 26.4), (60, 100, 0.9, 21.2)],
)
def test_agrees_with_another_simulation_of_the_same(
    step_ms: float, rtt_ms: float, acceptance: float, known_ms: float
) -> None:
    take_all = Rule(most_drafts=32, wanted=0, hold_ms=0.0)
    tried = answers(acceptance, step_ms, rtt_ms)
    known = sum(tpot_ms(one, take_all) for one in tried) / len(tried)
    assert known == pytest.approx(known_ms, rel=0.15)
    assert best_tpot_ms(tried[:2]) <= sum(tpot_ms(one, take_all) for one in tried[:2]) / 2


def test_garbage_costs_nothing_where_no_draft_is_taken_and_little_elsewhere() -> None:
    tried = answers(0.0, 30.0, 50.0)[:1]
    assert tpot_ms(tried[0], Rule(0, 0, 0.0)) == pytest.approx(30.0)
    assert best_tpot_ms(tried) <= tpot_ms(tried[0], TAKE_ALL) <= 30.0 * 1.5


def test_perfect_drafts_on_no_link_are_as_fast_as_the_draft() -> None:
    assert best_tpot_ms(answers(1.0, 30.0, 0.0)[:1]) == pytest.approx(5.0, rel=0.05)


def test_a_wrong_token_is_paid_with_a_round_trip_and_the_steps_around_it() -> None:
    right = [True] * 50 + [False] + [True] * 50
    flawless, flawed = (
        tpot_ms(Measured(pattern, 5.0, linear(30.0), 100.0, 100.0), TAKE_ALL) for pattern in ([True] * 101, right)
    )
    assert flawed * 100 - flawless * 100 == pytest.approx(250.0, abs=50.0)


def test_an_edge_that_has_read_the_prompt_sooner_has_drafts_in_store() -> None:
    late, level, ahead = (
        99 * tpot_ms(Measured([True] * 100, 10.0, linear(30.0), 25.0, 25.0, ahead_ms), TAKE_ALL)
        for ahead_ms in (-300.0, 0.0, 100.0)
    )
    assert level - ahead == pytest.approx(100.0, abs=31.0)  # ten drafts more; a step more or less at the end
    assert late - level == pytest.approx(300.0 * (1 - 10 / 30), abs=31.0)  # until then each token takes a step


def test_an_edge_that_is_still_reading_does_not_draft() -> None:
    never = Measured([True] * 50, 5.0, linear(30.0), 25.0, 25.0, ahead_ms=-10_000.0)
    assert tpot_ms(never, TAKE_ALL) == pytest.approx(30.0)


def test_holding_pays_where_the_draft_is_fast_and_the_link_short() -> None:
    tried = answers(0.95, 30.0, 2.0, draft_ms=1.0)[:3]
    assert best_tpot_ms(tried) < sum(tpot_ms(one, TAKE_ALL) for one in tried) / len(tried)


def test_waiting_for_the_last_drafts_saves_the_pause_behind_the_step_before() -> None:
    """The last one is here 10 ms into a step of 30 that would leave it behind."""
    ending = Measured([True] * 9, 10.0, lambda _: 30.0, 0.0, 0.0)
    waiting = Rule(16, 0, 0.0, waits_for_last=True)
    assert 8 * (tpot_ms(ending, TAKE_ALL) - tpot_ms(ending, waiting)) == pytest.approx(20.0)
    assert best_tpot_ms([ending]) == tpot_ms(ending, waiting)


def test_a_draft_slower_than_the_target_never_catches_up() -> None:
    tried = answers(1.0, 20.0, 50.0, draft_ms=40.0)
    assert tpot_ms(tried[0], TAKE_ALL) == pytest.approx(20.0, rel=0.1)


def test_the_longest_round_trip_that_pays() -> None:
    assert paying_rtt_ms(lambda rtt: 10.0 + rtt / 10, 30.0) == pytest.approx(200.0, abs=1.0)
    assert paying_rtt_ms(lambda _: 40.0, 30.0) == 0.0
    assert paying_rtt_ms(lambda _: 20.0, 30.0) == LONGEST_RTT_MS
