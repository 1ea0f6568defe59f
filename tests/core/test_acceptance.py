import pytest

from shared.core.acceptance import Acceptance


def test_prior_counts_as_four_observations() -> None:
    acceptance = Acceptance(prior=0.8)
    acceptance.observe(matched=0, failed=True)
    assert acceptance.rate == pytest.approx(0.8 * 4 / 5)
    assert repr(acceptance) == "0.64"


def test_nothing_judged_teaches_nothing() -> None:
    acceptance = Acceptance()
    acceptance.observe(matched=0, failed=False)
    assert acceptance.rate == 0.8


def test_path_that_fails_late_is_mostly_success() -> None:
    acceptance = Acceptance(prior=0.5)
    acceptance.observe(matched=3, failed=True)
    assert acceptance.rate == pytest.approx((0.5 * 4 + 3) / 8)


def test_old_observations_fade_after_the_window() -> None:
    acceptance = Acceptance()
    acceptance.observe(matched=10_000, failed=False)
    before = acceptance.rate
    acceptance.observe(matched=0, failed=True)
    assert before - acceptance.rate == pytest.approx(before / Acceptance.WINDOW_TOKENS)
