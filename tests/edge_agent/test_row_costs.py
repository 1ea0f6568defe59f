"""What forwards take, by rows and by what is cached."""

from collections.abc import Sequence

import pytest

from edge_agent.engines.row_costs import RowCosts, measure_row_costs
from shared.core.messages import Sampling
from shared.engine import Proposal

ROW_MS = [10.0, 12.0, 14.0, 15.0]


def test_behind_nothing_costs_are_the_measured_ones() -> None:
    costs = RowCosts(ROW_MS)
    assert [costs.ms(rows, 0) for rows in (1, 2, 3, 4)] == ROW_MS
    assert costs.ms(6, 0) == 17.0, "beyond them a row costs as the last one did"
    assert costs.with_guesses(1, 0) == ROW_MS


def test_rows_that_are_due_anyhow_are_no_cost_of_guesses() -> None:
    costs = RowCosts(ROW_MS)
    assert costs.with_guesses(2, 0) == [10.0, 12.0, 13.0, 14.0]
    assert costs.with_guesses(100, 0) == [10.0, 11.0, 12.0, 13.0], "a prompt"


def test_what_the_cache_adds_is_learned_for_one_row_and_for_several_apart() -> None:
    costs = RowCosts(ROW_MS)
    for _ in range(9):
        costs.observe(1, 1000, 12.0)
        costs.observe(2, 1000, 20.0)
    assert costs.ms(1, 1000) == pytest.approx(12.0)
    assert costs.ms(2, 1000) == pytest.approx(20.0)
    assert costs.ms(4, 500) == pytest.approx(19.0)
    assert costs.with_guesses(1, 1000) == pytest.approx([12.0, 20.0, 22.0, 23.0])
    assert costs.with_guesses(2, 1000) == pytest.approx([12.0, 14.0, 15.0, 16.0]), "the cache is laid out anew anyhow"


def test_an_interruption_is_not_learned() -> None:
    costs = RowCosts(ROW_MS)
    for ms in (12.0, 900.0, 12.0, 12.0, 500.0, 12.0, 12.0, 12.0, 12.0):
        costs.observe(1, 1000, ms)
    assert costs.ms(1, 1000) == pytest.approx(12.0)


def test_short_texts_and_prompts_teach_nothing() -> None:
    costs = RowCosts(ROW_MS)
    for _ in range(9):
        costs.observe(1, 10, 99.0)
        costs.observe(300, 1000, 999.0)
    assert [costs.ms(rows, 1000) for rows in (1, 2, 3, 4)] == ROW_MS


class StoppedModel:
    """Takes what the clock of the test says."""

    def __init__(self, row_s: Sequence[float]) -> None:
        self.now_s = 0.0
        self._row_s = row_s

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        self.now_s += 7.0

    def propose_checked(self, guess: Sequence[int]) -> Proposal:
        self.now_s += self._row_s[len(guess)]
        return Proposal((1,), (1.0,))


@pytest.mark.parametrize(
    ("row_s", "measured"), [([1.0, 1.5, 2.0, 2.5], 4), ([1.0, 1.5, 3.0, 3.1], 3), ([1.0, 2.0, 2.1, 2.2], 2)]
)
def test_rows_are_measured_up_to_where_so_many_one_by_one_are_as_fast(row_s: list[float], measured: int) -> None:
    model = StoppedModel(row_s)
    costs = measure_row_costs(model, 4, clock_s=lambda: model.now_s)
    assert costs.with_guesses(1, 0) == [1000 * seconds for seconds in row_s[:measured]]
