from shared.policy.branching import LEAST_WORTH, sibling_price
from shared.policy.run_ahead import RunAhead, StopAndWait
from tests.policy.test_run_ahead import SEEN


def test_sibling_must_be_worth_its_bytes() -> None:
    assert sibling_price(1.0) == LEAST_WORTH
    assert RunAhead().sibling_price(SEEN) == StopAndWait().sibling_price(SEEN) == LEAST_WORTH


def test_device_that_saves_energy_sends_fewer() -> None:
    assert RunAhead(draft_duty=0.7).sibling_price(SEEN) == sibling_price(0.7) > LEAST_WORTH
