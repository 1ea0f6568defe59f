from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.policy.step_rule import BestRate


def flat(rows: int) -> float:
    return 30.0 + 0 * rows


def linear(rows: int) -> float:
    return 10.0 * rows


def jump(rows: int) -> float:
    """Two rows cost far more than one, the next seven nothing."""
    return 10.0 if rows == 1 else 30.0


@pytest.mark.parametrize(
    ("cost_ms", "worth", "rows"),
    [
        (flat, [0.9, 0.5, 0.01], 3),  # rows are free
        (flat, [], 0),
        (linear, [0.9, 0.8], 0),  # a draft row costs as much as a sure token of a decode step
        (linear, [1.0, 1.0], 0),  # a tie: the smaller step
        (jump, [0.9, 0.9], 0),
        (jump, [0.9, 0.9, 0.9, 0.9], 4),
    ],
)
def test_step_takes_the_drafts_that_pay(cost_ms: Callable[[int], float], worth: list[float], rows: int) -> None:
    assert BestRate(cost_ms).draft_rows(1, worth) == rows


def test_rows_that_must_be_evaluated_anyway_make_drafts_cheap() -> None:
    assert BestRate(linear).draft_rows(base_rows=20, worth=[0.5]) == 1


@given(
    st.lists(st.floats(0.0, 1.0), max_size=12),
    st.integers(1, 9),
    st.lists(st.floats(0.1, 9.0), min_size=21, max_size=21),
)
def test_best_rate_agrees_with_brute_force(worth: list[float], base_rows: int, steps: list[float]) -> None:
    curve = list(accumulate(steps))
    rates = [(1.0 + sum(worth[:rows])) / curve[base_rows + rows - 1] for rows in range(len(worth) + 1)]
    chosen = BestRate(lambda rows: curve[rows - 1]).draft_rows(base_rows, worth)
    assert rates[chosen] == pytest.approx(max(rates))
