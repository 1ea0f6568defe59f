import pytest

from shared.core.acceptance import Acceptance, Calibration


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


def test_unseen_confidence_believes_the_session() -> None:
    calibration = Calibration()
    assert calibration.table == [0.8] * 8
    calibration.observe(bytes((255,)), b"")
    assert calibration.table == [0.8] * 8  # until somebody has time
    calibration.refresh()
    assert calibration.table[0] == pytest.approx((0.8 * 4 + 1) / 5)  # the session's, which rose
    assert repr(calibration) == "0.84"


def test_range_is_drawn_towards_the_session_by_four_observations() -> None:
    calibration = Calibration()
    calibration.observe(bytes((255, 224)), bytes((31,)))
    calibration.refresh()
    overall = (0.8 * 4 + 2) / 7
    assert calibration.table[7] == pytest.approx((1.0 * 2 + overall * 4) / 6)
    assert calibration.table[0] == pytest.approx((0.0 * 1 + overall * 4) / 5)
    assert calibration.table[3] == pytest.approx(overall)


def test_ranges_are_told_apart_by_the_upper_bits_of_the_confidence() -> None:
    calibration = Calibration()
    calibration.observe(bytes((63,)), bytes((64,)))
    calibration.refresh()
    below, above = calibration.table[1], calibration.table[2]
    assert below > calibration.table[0] > above
    assert 63 >> Calibration.RANGE_BITS == 1


def test_nothing_judged_leaves_the_calibration_alone() -> None:
    calibration = Calibration()
    before = list(calibration.table)
    calibration.observe(b"", b"")
    calibration.refresh()
    assert calibration.table == before


def test_it_is_young_until_it_has_seen_more_than_it_supposed() -> None:
    calibration = Calibration()
    assert calibration.is_young
    calibration.observe(bytes((255,)) * 40, bytes((10,)) * 19)  # and four before anything was seen
    assert calibration.is_young
    calibration.observe(bytes((255,)), b"")
    assert not calibration.is_young


def test_overconfident_draft_is_seen_through() -> None:
    """Says 255 and is right one time in four; says 10 and is right always."""
    calibration = Calibration()
    for _ in range(100):
        calibration.observe(b"", bytes((255,)))
        calibration.observe(b"", bytes((255,)))
        calibration.observe(b"", bytes((255,)))
        calibration.observe(bytes((255, 10)), b"")
    calibration.refresh()
    assert calibration.table[7] == pytest.approx(0.25, abs=0.05)
    assert calibration.table[0] > 0.9


def test_old_observations_of_a_range_fade_after_the_window() -> None:
    calibration = Calibration()
    calibration.observe(bytes((255,)) * 1_000, b"")
    for _ in range(Acceptance.WINDOW_TOKENS):
        calibration.observe(b"", bytes((255,)))
    calibration.refresh()
    assert calibration.table[7] < 0.45  # 1,000 old ones against 64 new ones: (1 - 1/64)^64 of them is left


def test_reach_is_the_chance_of_a_whole_path() -> None:
    calibration = Calibration()
    assert calibration.overall == 0.8
    assert calibration.reach([]) == 1.0
    assert calibration.reach([10, 200]) == pytest.approx(0.8**2)
    calibration.observe(bytes((255,)) * 50, bytes((10,)) * 10)
    assert calibration.reach([255, 255]) == pytest.approx(calibration.table[7] ** 2)
    assert calibration.reach([255, 10]) == pytest.approx(calibration.table[7] * calibration.table[0])


def test_what_is_carried_is_the_same_but_for_some_doubt_and_is_soon_outweighed() -> None:
    calibration = Calibration()
    calibration.observe(bytes((255,)) * 100, b"")
    calibration.observe(b"", bytes((10,)) * 100)
    carried = calibration.carried()
    assert carried.overall == pytest.approx((calibration.overall * 7 + 0.8) / 8)
    assert carried.table[7] == pytest.approx((8 + carried.overall * 4) / 12)
    assert carried.table[0] == pytest.approx(carried.overall * 4 / 12)
    assert carried.table[3] == pytest.approx(carried.overall)  # never seen: what is carried of the whole
    carried.observe(b"", bytes((255,)) * 8)
    carried.refresh()
    assert carried.table[7] < 0.5
    assert calibration.table[7] == calibration.table[0]  # the old one was not even refreshed


def test_little_knowledge_is_carried_as_little() -> None:
    seen, prior = Calibration(0.3), Calibration(0.3)
    assert seen.carried().overall == pytest.approx(0.3)
    seen.observe(b"", bytes((255,)))
    assert seen.carried().overall == pytest.approx((seen.overall * 5 + 0.3) / 6)
    assert prior.carried().table == pytest.approx(prior.table)


def test_a_draft_that_never_was_right_gets_another_chance() -> None:
    calibration = Calibration()
    for _ in range(20):
        calibration.observe(b"", bytes((255,)) * 10)
        calibration = calibration.carried()
        assert calibration.overall > 0.1
    assert calibration.overall < 0.2
