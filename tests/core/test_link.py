import pytest

from shared.core.link import Link, LinkSettings
from shared.core.messages import Heartbeat, NeedTokens

SETTINGS = LinkSettings(max_stall_ms=600.0, heartbeat_ms=200.0, min_stall_ms=60.0)


def echoed(*round_trips_ms: float) -> Link:
    """A link opened at 10 s that measured these round trips."""
    link = Link(SETTINGS)
    link.opened(10.0)
    for round_trip_ms in round_trips_ms:
        link.heard(Heartbeat(link.heartbeat(10.0), 0), 10.0 + round_trip_ms / 1000)
    return link


def test_unknown_link_has_all_the_patience_there_is() -> None:
    link = echoed()
    assert (link.silence_ms, link.stalled_at, link.next_heartbeat_at) == (600.0, 10.6, 10.0)


def test_first_echo_sets_the_round_trip_and_half_of_it_as_variance() -> None:
    link = echoed(50.0)
    assert link.rtt_ms == pytest.approx(50.0)
    assert link.silence_ms == pytest.approx(200 + 50 + 4 * 25)
    assert repr(link) == "<Link rtt 50+-25 ms, patience 350 ms>"


def test_later_echoes_are_smoothed_as_rfc_6298_says_but_the_first_ones_weigh_alike() -> None:
    link = echoed(50.0, 90.0)
    assert link.rtt_ms == pytest.approx(70)
    assert link.silence_ms == pytest.approx(200 + 70 + 4 * (25 * 3 / 4 + 40 / 4))
    assert echoed(*[50.0] * 7, 90.0, 90.0).rtt_ms == pytest.approx(55 * 7 / 8 + 90 / 8)


def test_steady_link_still_gets_the_least_patience() -> None:
    assert echoed(*[20.0] * 60).silence_ms == pytest.approx(200 + 20 + 60)


def test_patience_ends_at_the_configured_cap() -> None:
    assert echoed(400.0).silence_ms == 600.0


@pytest.mark.parametrize("nonce", [0, 2])
def test_unknown_nonce_teaches_nothing_but_that_the_link_lives(nonce: int) -> None:
    link = echoed()
    link.heartbeat(10.0)
    link.heard(Heartbeat(nonce, 0), 10.3)
    assert link.silence_ms == 600.0
    assert link.stalled_at == pytest.approx(10.9)


def test_repeated_echo_teaches_nothing() -> None:
    link = echoed(50.0)
    link.heard(Heartbeat(1, 0), 19.0)
    assert link.rtt_ms == pytest.approx(50.0)


def test_new_stream_forgets_heartbeats_of_the_old_one() -> None:
    link = echoed(50.0)
    nonce = link.heartbeat(11.0)
    link.opened(20.0)
    link.heard(Heartbeat(nonce, 0), 20.1)
    assert link.rtt_ms == pytest.approx(50.0)
    assert link.next_heartbeat_at == 20.0


def test_heartbeats_are_numbered_and_spaced() -> None:
    link = echoed()
    assert [link.heartbeat(10.0), link.heartbeat(10.2)] == [1, 2]
    assert link.next_heartbeat_at == pytest.approx(10.4)


def test_any_message_is_a_sign_of_life() -> None:
    link = echoed()
    link.heard(NeedTokens(), 12.0)
    assert link.stalled_at == pytest.approx(12.6)


def test_jitter_is_how_far_round_trips_were_off_and_nothing_that_was_not_seen() -> None:
    assert echoed(50.0).jitter_ms == 0.0
    assert echoed(50.0, 90.0).jitter_ms == pytest.approx(40)
    assert echoed(50.0, 90.0, 70.0).jitter_ms == pytest.approx(20)
    assert echoed(*[50.0] * 5, 90.0).jitter_ms == pytest.approx(40 / 4)
