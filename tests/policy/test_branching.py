from dataclasses import replace

from shared.policy.branching import CHAIN_ACCEPTANCE, CHAIN_WORTH, LEAST_WORTH, sibling_price
from shared.policy.run_ahead import RunAhead, StopAndWait
from tests.policy.test_run_ahead import SEEN


def test_sibling_must_be_worth_its_bytes_and_more_beside_a_good_chain() -> None:
    assert sibling_price(1.0, CHAIN_ACCEPTANCE - 0.01) == LEAST_WORTH < CHAIN_WORTH
    assert sibling_price(1.0, CHAIN_ACCEPTANCE) == CHAIN_WORTH
    for acceptance, price in ((0.5, LEAST_WORTH), (0.95, CHAIN_WORTH)):
        seen = replace(SEEN, acceptance=acceptance)
        assert RunAhead().sibling_price(seen) == StopAndWait().sibling_price(seen) == price


def test_device_that_saves_energy_sends_fewer() -> None:
    assert RunAhead(draft_duty=0.7).sibling_price(SEEN) == sibling_price(0.7, SEEN.acceptance) > LEAST_WORTH
