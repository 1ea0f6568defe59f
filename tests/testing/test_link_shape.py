import math
import random
from pathlib import Path

import pytest

from shared.config import ConfigError
from shared.testing.link_shape import PACKET_BYTES, Condition, Direction, Trace


def test_without_a_condition_bytes_come_out_at_once() -> None:
    assert Direction(Condition()).due_at(1_000_000, 3.0) == 3.0


def test_delay_is_added_to_every_byte() -> None:
    direction = Direction(Condition(delay_ms=40.0))
    assert [direction.due_at(10, now) for now in (1.0, 1.001, 2.0)] == pytest.approx([1.04, 1.041, 2.04])


def test_jitter_is_spread_evenly_and_fixed_by_the_seed() -> None:
    condition = Condition(delay_ms=10.0, jitter_ms=20.0)

    def delays(seed: int) -> list[float]:
        direction = Direction(condition, seed)
        return [(direction.due_at(1, float(now)) - now) * 1000 for now in range(1000)]

    assert delays(1) == delays(1) != delays(2)
    assert all(10.0 <= delay <= 30.0 for delay in delays(1))
    assert sum(delays(1)) / 1000 == pytest.approx(20.0, rel=0.05)


def test_a_rate_lets_bytes_cross_one_after_another() -> None:
    direction = Direction(Condition(delay_ms=100.0, rate_kbps=8.0))  # 1000 bytes a second
    assert direction.due_at(500, 10.0) == pytest.approx(10.6)
    assert direction.due_at(1000, 10.1) == pytest.approx(11.6), "it waits for the first"
    assert direction.due_at(0, 10.2) == pytest.approx(11.6), "so does the end of the stream"
    assert direction.due_at(1000, 20.0) == pytest.approx(21.1), "the link was idle"


def test_the_rate_is_kept_over_any_mix_of_sizes() -> None:
    sizes = random.Random(2)
    direction = Direction(Condition(rate_kbps=1234.0))
    sent, last = 0, 0.0
    while sent < 1_000_000:
        size = sizes.choice((1, 40, 1400, 9000))
        sent += size
        last = direction.due_at(size, 5.0)
    assert sent * 8 / 1000 / (last - 5.0) == pytest.approx(1234.0)


def test_bytes_in_the_queue_feel_a_planned_collapse() -> None:
    direction = Direction(Condition(rate_kbps=8000.0))
    direction.change(Condition(rate_kbps=8.0), at=10.0)
    direction.change(Condition(delay_ms=5.0), at=12.0)
    assert direction.due_at(1_001_000, 9.0) == pytest.approx(11.0), "a million in the first second, then 1000 a second"
    assert direction.due_at(5000, 10.0) == pytest.approx(12.005), "1000 more in the next second, the rest at once"


def test_a_change_replaces_what_was_planned_for_later() -> None:
    direction = Direction(Condition())
    direction.change(Condition(delay_ms=50.0), at=20.0)
    direction.change(Condition(delay_ms=10.0), at=15.0)
    assert direction.due_at(1, 14.0) == 14.0
    assert direction.due_at(1, 21.0) == pytest.approx(21.01)
    assert repr(direction) == "0 ms then 10 ms"
    assert direction.condition_at(16.0).delay_ms == 10.0
    assert repr(direction) == "10 ms"


def test_what_waits_is_lost_when_the_link_is_cleared() -> None:
    direction = Direction(Condition(rate_kbps=8.0))
    direction.due_at(5000, 0.0)
    direction.clear(1.0)
    assert direction.due_at(500, 1.0) == pytest.approx(1.5)


def test_a_trace_carries_a_packet_at_each_of_its_times() -> None:
    direction = Direction(Condition())
    direction.change(Condition(trace=Trace((2, 2, 10))), at=100.0)
    assert direction.due_at(PACKET_BYTES, 100.0) == pytest.approx(100.002)
    assert direction.due_at(PACKET_BYTES, 100.0) == pytest.approx(100.002), "the line is there twice"
    assert direction.due_at(PACKET_BYTES, 100.0) == pytest.approx(100.010)
    assert direction.due_at(2 * PACKET_BYTES, 100.0) == pytest.approx(100.012), "it begins again"
    assert direction.due_at(1, 100.0135) == pytest.approx(100.020)
    assert direction.due_at(1, 100.014) == pytest.approx(100.020), "small messages share a packet"
    assert direction.due_at(PACKET_BYTES, 100.014) == pytest.approx(100.022), "as far as there is room"


def test_a_trace_agrees_with_packets_counted_one_by_one() -> None:
    chance = random.Random(3)
    for _ in range(50):
        times = sorted(chance.randrange(0, 40) for _ in range(chance.randrange(1, 12)))
        times[-1] += 1
        direction = Direction(Condition(trace=Trace(tuple(times))))
        link, now = CountedTrace(times), 0
        for _ in range(40):
            now += chance.choice((0, 0, 1, 7, 60))
            size = chance.choice((1, 700, PACKET_BYTES, 5000))
            assert direction.due_at(size, now / 1000 + 1e-7) == pytest.approx(link.due_ms(size, now) / 1000)


class CountedTrace:
    """The same, naively: one packet after another."""

    def __init__(self, times: list[int]) -> None:
        self.packets = [(round_ * times[-1] + time) for round_ in range(3000 // times[-1] + 100) for time in times]
        self.room = [PACKET_BYTES] * len(self.packets)
        self.first = 0

    def due_ms(self, size: int, now: int) -> int:
        for index in range(self.first, len(self.packets)):
            if self.packets[index] <= now or not self.room[index]:  # just after the millisecond began
                continue
            self.first = index
            taken = min(size, self.room[index])
            self.room[index] -= taken
            size -= taken
            if not size:
                return self.packets[index]
        raise AssertionError("the counted trace is too short")


def test_a_trace_ends_with_its_span_and_the_next_one_begins_anew() -> None:
    trace = Trace((1, 5, 10))
    direction = Direction(Condition())
    direction.change(Condition(trace=trace), at=1.0)
    direction.change(Condition(trace=trace), at=1.007)
    direction.change(Condition(), at=1.030)
    assert direction.due_at(3 * PACKET_BYTES, 1.0) == pytest.approx(1.008), "two in the first span, one in the second"
    assert direction.due_at(100 * PACKET_BYTES, 1.0) == pytest.approx(1.030)


def test_a_trace_says_its_mean_rate() -> None:
    trace = Trace((0, 5, 10), "t")
    assert trace.mean_kbps == pytest.approx(3600.0)
    assert repr(trace) == "<Trace t, 3600 kbit/s over 0.01 s>"


@pytest.mark.parametrize("times", [(), (0,), (0, 0), (-1, 5), (5, 4)])
def test_what_is_no_trace_is_refused(times: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="never fall"):
        Trace(times)


def test_a_trace_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.up", tmp_path / "bad.up"
    good.write_text("0\n3\n3\n")
    bad.write_text("0\nx\n")
    assert Trace.load(good).at_ms(4) == 6
    with pytest.raises(ConfigError, match=r"bad.up: no trace: .*'x'; expected one whole millisecond a line"):
        Trace.load(bad)
    with pytest.raises(ConfigError, match=r"none.up: no such file"):
        Trace.load(tmp_path / "none.up")


@pytest.mark.parametrize(
    "fields",
    [
        {"delay_ms": -1.0},
        {"jitter_ms": math.inf},
        {"rate_kbps": 0.0},
        {"rate_kbps": 1.0, "trace": Trace((1,))},
    ],
)
def test_a_condition_that_cannot_be_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a link"):
        Condition(**fields)  # type: ignore[arg-type]  # floats, but for the trace


def test_pieces_are_a_packet_or_a_millisecond() -> None:
    assert Condition().piece_bytes is None
    assert Condition(rate_kbps=100.0).piece_bytes == PACKET_BYTES
    assert Condition(rate_kbps=800_000.0).piece_bytes == 100_000
    assert Condition(trace=Trace((1,))).piece_bytes == PACKET_BYTES
