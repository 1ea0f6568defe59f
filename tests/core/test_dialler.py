from zlib import crc32

import pytest

from shared.core.dialler import Dialler
from shared.core.effects import Connect
from shared.core.noise import uniform
from shared.core.settings import EdgeSettings

SEED = crc32(b"session")
SETTINGS = EdgeSettings(connect_timeout_ms=1_000.0, backoff_initial_ms=100.0, backoff_max_ms=400.0)


def test_each_attempt_has_a_new_number() -> None:
    dialler = Dialler(SETTINGS, "session")
    assert dialler.dial(5.0, rtt_ms=50.0) == Connect(1, fresh=True)
    assert dialler.dial(6.0, rtt_ms=50.0, fresh=False) == Connect(2, fresh=False)


@pytest.mark.parametrize(("rtt_ms", "give_up_at"), [(50.0, 6.0), (400.0, 6.6)])
def test_attempt_may_take_the_timeout_or_four_round_trips(rtt_ms: float, give_up_at: float) -> None:
    dialler = Dialler(SETTINGS, "session")
    dialler.dial(5.0, rtt_ms)
    assert dialler.give_up_at == pytest.approx(give_up_at)


def test_answer_is_taken_once_and_only_for_the_attempt_in_progress() -> None:
    dialler = Dialler(SETTINGS, "session")
    dialler.dial(0.0, 50.0)
    dialler.dial(1.0, 50.0)
    assert [dialler.answered(stream) for stream in (1, 2, 2)] == [False, True, False]
    assert dialler.give_up_at is None


def test_abandoned_stream_is_dead() -> None:
    dialler = Dialler(SETTINGS, "session")
    dialler.dial(0.0, 50.0)
    dialler.retry(0.0, 0.0)
    assert dialler.abandon() == 1
    assert (dialler.next_at, dialler.give_up_at) == (None, None)
    assert not dialler.answered(1)


def test_backoff_doubles_to_its_cap_with_jitter_from_the_seed() -> None:
    dialler, waits = Dialler(SETTINGS, "session"), []
    for _ in range(5):
        dialler.retry(10.0, after_ms=0.0)
        assert dialler.next_at is not None
        waits.append((dialler.next_at - 10) * 1000 / (0.5 + 0.5 * uniform(SEED, dialler.stream)))
        dialler.dial(10.0, 50.0)
    assert waits == pytest.approx([100, 200, 400, 400, 400])
    assert dialler.next_at is None


def test_verifier_may_ask_for_a_longer_wait() -> None:
    dialler = Dialler(SETTINGS, "session")
    dialler.retry(10.0, after_ms=2_500.0)
    assert dialler.next_at == pytest.approx(12.5 + 0.1 * (0.5 + 0.5 * uniform(SEED, 0)))


def test_sessions_cut_off_together_do_not_dial_together() -> None:
    times = set()
    for session_id in ("a", "b", "c"):
        dialler = Dialler(SETTINGS, session_id)
        dialler.retry(0.0, after_ms=1_000.0)
        times.add(dialler.next_at)
    assert len(times) == 3


def test_progress_makes_the_next_backoff_small_again() -> None:
    dialler = Dialler(SETTINGS, "session")
    for _ in range(5):
        dialler.retry(0.0, 0.0)
    dialler.progressed()
    dialler.retry(0.0, 0.0)
    assert dialler.next_at == pytest.approx(0.1 * (0.5 + 0.5 * uniform(SEED, 0)))


def test_a_very_long_outage_does_not_overflow() -> None:
    dialler = Dialler(SETTINGS, "session")
    for _ in range(5_000):
        dialler.retry(0.0, 0.0)
    assert dialler.next_at is not None
    assert dialler.next_at <= 0.4


def test_unmeasured_round_trip_makes_each_attempt_more_patient() -> None:
    dialler, patience = Dialler(SETTINGS, "session"), []
    for _ in range(5):
        dialler.dial(0.0, rtt_ms=0.0)
        patience.append(dialler.give_up_at)
        dialler.retry(0.0, 0.0)
    assert patience == [1.0, 2.0, 4.0, 8.0, 8.0]
