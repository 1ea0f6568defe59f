import pytest

from shared.core.forecast import Forecast


def forecast_of(draft_ms: float = 5.0, rtt_ms: float = 40.0) -> Forecast:
    """Ten tokens at 1 s; the edge drafts one every 5 ms, 20 ms away."""
    forecast = Forecast(10, now=1.0)
    forecast.draft_ms, forecast.rtt_ms = draft_ms, rtt_ms
    return forecast


def test_path_goes_on_by_one_token_each_draft() -> None:
    forecast = forecast_of()
    assert forecast.next_ms(10, now=1.0) == pytest.approx(5.0)
    assert forecast.next_ms(12, now=1.002) == pytest.approx(13.0)
    assert forecast.unknown_tokens(10) == 0


def test_draft_that_came_moves_the_path() -> None:
    forecast = forecast_of()
    forecast.arrived(14, was_awaited=False, now=1.1)
    assert forecast.next_ms(14, now=1.1) == pytest.approx(5.0)
    forecast.arrived(12, was_awaited=False, now=1.2)  # an old one, again
    assert forecast.next_ms(14, now=1.1) == pytest.approx(5.0)


def test_after_a_break_the_next_token_is_a_round_trip_and_a_draft_away() -> None:
    forecast = forecast_of()
    forecast.committed(12, is_break=True, now=1.1)
    assert forecast.next_ms(12, now=1.1) == pytest.approx(45.0)
    assert forecast.asked_ms(now=1.11) == pytest.approx(30.0)
    assert forecast.unknown_tokens(12) == 0


def test_answer_to_a_break_lands_within_a_step_that_is_long_enough() -> None:
    forecast = forecast_of()
    assert forecast.landed_tokens(10, now=1.0) == 0, "no step is known"
    forecast.committed(11, is_break=False, now=1.0)
    forecast.committed(12, is_break=True, now=1.1)  # the next token is here in 45 ms, and one every 5 ms then
    assert forecast.landed_tokens(12, now=1.1) == 12
    forecast.committed(13, is_break=True, now=1.12)
    assert forecast.landed_tokens(13, now=1.12) == 0
    forecast.draft_ms = 0.0
    assert forecast.landed_tokens(13, now=1.12) == 0


def test_nothing_was_asked_for_before_the_first_commit() -> None:
    assert forecast_of().asked_ms(now=1.0) == 0.0


def arrived_every_40_ms() -> Forecast:
    """Messages at 1.00, 1.04 and 1.08 s; the last commit at 1.10 s."""
    forecast = forecast_of()
    for count in range(3):
        forecast.arrived(14 + count, was_awaited=False, now=1.0 + 0.04 * count)
    forecast.committed(15, is_break=False, now=1.1)
    return forecast


@pytest.mark.parametrize(("now", "asked_ms"), [(1.1, 20.0), (1.12, 12.0), (1.13, 2.0)])
def test_a_message_is_due_as_long_after_the_last_as_they_usually_come(now: float, asked_ms: float) -> None:
    assert arrived_every_40_ms().asked_ms(now) == pytest.approx(asked_ms, abs=1e-6)


def test_a_message_that_is_late_is_not_waited_for() -> None:
    forecast = arrived_every_40_ms()
    forecast.committed(16, is_break=False, now=1.12)
    assert forecast.asked_ms(now=1.131) == pytest.approx(1.0)
    assert forecast.asked_ms(now=1.133) == pytest.approx(27.0)  # until the commit is answered


def test_after_a_break_no_message_is_due_but_the_answer() -> None:
    forecast = arrived_every_40_ms()
    forecast.committed(16, is_break=True, now=1.1)
    assert forecast.asked_ms(now=1.11) == pytest.approx(30.0)
    forecast = arrived_every_40_ms()
    forecast.committed(18, is_break=False, now=1.1)
    forecast.differed(16)
    assert forecast.asked_ms(now=1.11) == pytest.approx(30.0)


def test_commit_that_agrees_leaves_the_path_alone_and_what_it_added_is_unknown() -> None:
    forecast = forecast_of()
    forecast.arrived(14, was_awaited=False, now=1.1)
    forecast.committed(15, is_break=False, now=1.1)
    assert forecast.unknown_tokens(15) == 1
    assert forecast.next_ms(15, now=1.1) == pytest.approx(10.0)


def test_slow_edge_is_overtaken_and_drafts_on_from_the_commit() -> None:
    forecast = forecast_of(draft_ms=60.0)
    forecast.committed(11, is_break=False, now=1.0)  # it drafts token 10 until 1.06 s, but hears of it at 1.02 s
    assert forecast.unknown_tokens(11) == 0
    assert forecast.next_ms(11, now=1.0) == pytest.approx(100.0)


def test_draft_that_differs_dates_the_break() -> None:
    forecast = forecast_of()
    for length, now in ((11, 1.0), (12, 1.03), (13, 1.06)):
        forecast.committed(length, is_break=False, now=now)
    assert forecast.unknown_tokens(13) == 3
    forecast.differed(11)
    assert forecast.unknown_tokens(13) == 1
    assert forecast.next_ms(13, now=1.06) == pytest.approx(30 - 60 + 40 + 10)
    forecast.differed(10)  # of the path before
    assert forecast.unknown_tokens(13) == 1


def test_difference_beyond_every_commit_says_nothing() -> None:
    forecast = forecast_of()
    forecast.committed(11, is_break=False, now=1.0)
    forecast.differed(11)
    assert forecast.unknown_tokens(11) == 1


def test_what_a_step_waited_for_tells_how_late_answers_are() -> None:
    forecast = forecast_of()
    forecast.committed(12, is_break=True, now=1.1)
    forecast.arrived(13, was_awaited=True, now=1.165)  # 20 ms late
    assert forecast.answer_ms == pytest.approx(45.0)
    forecast.committed(15, is_break=True, now=1.2)
    assert forecast.answer_ms == pytest.approx(40 + 5 * 0.98)  # it fades
    assert repr(forecast) == "<Forecast 15 known, 5.0 ms each, 45 ms to answer>"
    forecast.arrived(16, was_awaited=True, now=1.2)  # much too early: not more than punctual
    assert forecast.answer_ms == 40.0


def test_what_is_overdue_for_a_step_may_be_so_for_as_long_again() -> None:
    forecast = forecast_of()
    forecast.committed(11, is_break=True, now=1.0)
    forecast.arrived(14, was_awaited=False, now=1.04)
    forecast.committed(12, is_break=False, now=1.06)
    assert forecast.next_ms(14, now=1.06) == 0.0  # 15 ms overdue, the last step took 60
    forecast.committed(13, is_break=False, now=1.09)
    assert forecast.next_ms(14, now=1.09) == pytest.approx(45 - 30)


def test_an_edge_that_had_nothing_to_send_while_the_prompt_was_read_is_not_overdue() -> None:
    forecast = forecast_of()
    forecast.arrived(30, was_awaited=False, now=1.1)
    assert forecast.next_ms(30, now=4.1) == pytest.approx(2995.0)
    forecast.committed(20, is_break=False, now=4.1)
    assert [forecast.next_ms(length, now=4.1) for length in (30, 31)] == pytest.approx([0.0, 5.0])
    fresh = forecast_of()
    fresh.arrived(30, was_awaited=False, now=4.099)
    fresh.committed(20, is_break=False, now=4.1)
    assert fresh.next_ms(30, now=4.1) == pytest.approx(4.0)
