from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from random import Random

import pytest

from shared.core.policies import Allotment, Decodes, Offer, Outlook
from shared.policy.scheduler import LEAST_CHUNK_ROWS, BestRate

CURVES: list[Callable[[int], float]] = [
    lambda _: 30.0,
    lambda rows: 30.0 + rows,
    lambda rows: 10.0 + 15.0 * rows,
    lambda rows: 30.0 if rows <= 4 else 55.0 if rows <= 8 else 60.0,
]


def offer(
    *worth: float,
    decodes: Decodes = Decodes.FREELY,
    prefill_rows: int = 0,
    weight: float = 1.0,
    waited_ms: float = 0.0,
) -> Offer:
    return Offer(prefill_rows, worth, decodes, weight, waited_ms)


def rate(offers: Sequence[Offer], grants: Sequence[int], cost_ms: Callable[[int], float]) -> float:
    worth = sum(one.weight * (1 + sum(one.worth[: rows - 1])) for one, rows in zip(offers, grants, strict=True) if rows)
    return worth / cost_ms(sum(grants))


@pytest.mark.parametrize("cost_ms", CURVES)
def test_no_other_choice_has_a_better_rate(cost_ms: Callable[[int], float]) -> None:
    random = Random(1)
    for _ in range(150):
        offers = [
            offer(*sorted((random.random() for _ in range(random.randrange(4))), reverse=True), weight=random.random())
            for _ in range(3)
        ]
        grants = BestRate(cost_ms, 64).allot(offers).rows
        choices = product(*(range(len(one.worth) + 2) for one in offers))
        best = max(rate(offers, choice, cost_ms) for choice in choices if any(choice))
        assert rate(offers, grants, cost_ms) == pytest.approx(best)


def test_who_may_not_decode_alone_gets_a_draft_row_or_nothing() -> None:
    never = offer(0.1, 0.01, decodes=Decodes.NEVER)
    assert BestRate(lambda rows: 30.0 + 20 * rows, 64).allot([never, offer()]).rows in ([0, 1], [2, 1])
    assert BestRate(lambda rows: 30.0 + 20 * rows, 64).allot([never]).rows == [2]
    assert BestRate(lambda _: 30.0, 64).allot([offer(decodes=Decodes.NEVER)]).rows == [0]


def test_spare_room_is_used_only_where_it_costs_no_rate() -> None:
    spare = offer(decodes=Decodes.SPARE)
    assert BestRate(lambda rows: 30.0 + rows, 64).allot([offer(0.9), spare]).rows == [2, 1]
    assert BestRate(lambda rows: 100.0 ** (rows - 1), 64).allot([offer(), spare]).rows == [1, 0]
    assert BestRate(lambda _: 30.0, 64).allot([spare]).rows == [1]


def test_no_step_exceeds_the_engine() -> None:
    assert sum(BestRate(lambda _: 30.0, 5).allot([offer(0.9, 0.9, 0.9) for _ in range(4)]).rows) == 5


def test_prompts_are_read_in_turn_one_chunk_a_step() -> None:
    policy = BestRate(lambda rows: 10.0 + rows, 512, prefill_chunk_tokens=100, max_step_ms=50.0)
    long, short = offer(prefill_rows=120, waited_ms=9.0), offer(prefill_rows=20, waited_ms=5.0)
    assert policy.allot([short, long]).rows == [0, 100]
    assert policy.allot([short, offer(prefill_rows=60, waited_ms=9.0)]).rows == [21, 61]
    assert policy.allot([offer(), long]).rows == [1, 39]  # beside a running session the step keeps to 50 ms
    slow = BestRate(lambda rows: 60.0 + rows, 512, prefill_chunk_tokens=100, max_step_ms=50.0)
    assert slow.allot([offer(), long]).rows == [1, LEAST_CHUNK_ROWS]


def test_who_has_waited_too_long_is_served_whatever_it_costs() -> None:
    cost: Callable[[int], float] = lambda rows: 10.0 * rows * rows  # noqa: E731  # a curve where one row is best
    assert BestRate(cost, 64, max_step_ms=200).allot([offer(weight=9.0), offer(waited_ms=199.0)]).rows == [1, 0]
    assert BestRate(cost, 64, max_step_ms=200).allot([offer(weight=9.0), offer(waited_ms=200.0)]).rows[1] == 1


def test_who_has_waited_too_long_reads_a_prompt_in_turn_and_takes_no_more_rows_than_there_are() -> None:
    reading = offer(prefill_rows=40, waited_ms=300.0)
    policy = BestRate(lambda rows: 30.0 + rows, 64, prefill_chunk_tokens=16, max_step_ms=200)
    assert policy.allot([reading, offer(waited_ms=250.0)]).rows == [16, 1]
    waiting = [offer(waited_ms=200.0 + index) for index in range(3)]
    assert BestRate(lambda rows: 30.0 + rows, 2, max_step_ms=200).allot(waiting).rows == [0, 1, 1]


def test_good_drafts_get_more_and_nobody_starves() -> None:
    """Three sessions of acceptance 0.9, 0.6 and 0.3 under a step that grows steeply, weighted by smoothed goodput."""
    policy = BestRate(lambda rows: 20.0 + 4.0 * rows, 64)
    acceptances, goodput, tokens, last = (0.9, 0.6, 0.3), [1.0] * 3, [0.0] * 3, [0] * 3
    for step in range(3000):
        offers = [
            offer(*(acceptance ** (depth + 1) for depth in range(8)), weight=1 / goodput[index])
            for index, acceptance in enumerate(acceptances)
        ]
        for index, rows in enumerate(policy.allot(offers).rows):
            gained = 1 + sum(offers[index].worth[: rows - 1]) if rows else 0.0
            tokens[index] += gained
            goodput[index] += (gained - goodput[index]) / 50
            assert step - last[index] < 20
            last[index] = step if rows else last[index]
    assert tokens[0] > tokens[1] > tokens[2] > 0.2 * tokens[0]


SOON = Outlook(acceptance=0.8, draft_ms=1.0, rtt_ms=8.0, unknown_tokens=0, next_ms=9.0, asked_ms=8.0, most_drafts=16)


@pytest.mark.parametrize("slope_ms", [0.0, 1.0, 10.0, 20.0])
@pytest.mark.parametrize("decodes", [Decodes.FREELY, Decodes.SPARE])
def test_session_alone_of_which_nothing_is_told_gets_the_rows_of_the_best_rate(
    slope_ms: float, decodes: Decodes
) -> None:
    policy = BestRate(lambda rows: 30.0 + slope_ms * rows, 64)
    alone = offer(*(0.8 ** (depth + 1) for depth in range(8)), decodes=decodes)
    nobody = offer(decodes=Decodes.NEVER)  # beside whom it is chosen as of several
    assert policy.allot([alone]).rows[0] == policy.allot([alone, nobody]).rows[0]
    assert policy.allot([offer(decodes=decodes)]).rows == [1]


def test_session_alone_is_held_for_drafts_that_are_worth_it() -> None:
    policy = BestRate(lambda rows: 30.0 + rows, 64)
    allotment = policy.allot([replace(offer(), outlook=SOON)])
    assert (allotment.rows, allotment.asked_tokens) == ([0], 6)
    assert allotment.hold_ms == pytest.approx(8.0 + 6.0 + 3.0 + 0.25 * 8.0)  # with some slack


def test_hold_is_long_enough_for_the_answer_to_what_it_asks_for() -> None:
    policy = BestRate(lambda rows: 30.0 + rows, 64)
    due = replace(SOON, rtt_ms=20.0, next_ms=0.0, asked_ms=4.0)  # a message should be here by then
    assert policy.allot([replace(offer(), outlook=due)]).hold_ms == pytest.approx(20.0 + 3.0 + 0.25 * 20.0)


def test_session_alone_is_served_as_the_step_rule_says() -> None:
    policy = BestRate(lambda rows: 30.0 + rows, 64)
    flowing = replace(SOON, next_ms=1.0)
    worth = [0.9 ** (depth + 1) for depth in range(12)]
    allotment = policy.allot([replace(offer(*worth), outlook=replace(flowing, acceptance=0.9))])
    assert allotment == Allotment([13])
    never = replace(offer(0.1, decodes=Decodes.NEVER), outlook=replace(SOON, acceptance=0.1, next_ms=500.0))
    assert policy.allot([never]) == Allotment([2])
    dear = BestRate(lambda rows: 10.0 + 15.0 * rows, 64)
    assert dear.allot([never]) == Allotment([2])
    assert dear.allot([replace(never, decodes=Decodes.SPARE)]) == Allotment([1])


def test_decode_step_alone_carries_recycled_rows_that_pay() -> None:
    policy = BestRate(lambda rows: 30.0 if rows <= 4 else 55.0, 64)
    decoding = replace(offer(), outlook=replace(SOON, rtt_ms=200.0, next_ms=201.0, asked_ms=200.0))
    recycling = replace(decoding, recycled=[0.5, 0.4, 0.3, 0.2, 0.1])
    assert policy.allot([decoding]).rows == [1]
    assert policy.allot([recycling]).rows == [4]
    assert policy.allot([recycling, recycling]).rows == [1, 1]
    assert policy.allot([replace(recycling, outlook=SOON)]).rows == [0], "one that waits for drafts carries none"
    assert policy.allot([replace(recycling, outlook=None)]).rows == [4], "before anything is known of the edge"
    assert policy.allot([replace(recycling, outlook=None, decodes=Decodes.NEVER)]).rows == [0]


def test_spare_decode_rows_carry_recycled_rows_that_lower_no_rate() -> None:
    spare = replace(offer(decodes=Decodes.SPARE), recycled=[0.5, 0.2, 0.1])
    assert BestRate(lambda _: 30.0, 64).allot([offer(0.9), spare, spare]).rows == [2, 4, 4]
    assert BestRate(lambda _: 30.0, 7).allot([offer(0.9), spare, spare]).rows == [2, 3, 2], "the better ones first"
    assert BestRate(lambda rows: 20.0 + 5 * rows, 64).allot([offer(0.9), spare, spare]).rows == [2, 2, 2]
    assert BestRate(lambda rows: 10.0 * rows, 64).allot([offer(0.9), spare, spare]).rows == [1, 1, 1]
    slow = replace(spare, weight=3.0)
    assert BestRate(lambda _: 30.0, 4).allot([offer(), spare, slow]).rows == [1, 1, 2], "who is slower counts more"


def test_nobody_waits_while_another_session_or_a_prompt_is_ready() -> None:
    policy = BestRate(lambda rows: 30.0 + rows, 64)
    held = replace(offer(), outlook=SOON)
    assert policy.allot([held, held]) == Allotment([1, 1])
    assert policy.allot([replace(held, prefill_rows=3)]) == Allotment([4])


def test_step_rule_takes_no_more_drafts_than_the_operator_allows() -> None:
    policy = BestRate(lambda _: 30.0, 64, max_draft_rows=4)
    sure = replace(offer(*[0.99] * 4), outlook=replace(SOON, acceptance=0.99, next_ms=1.0))
    assert policy.allot([sure]) == Allotment([5])
