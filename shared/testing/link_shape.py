"""When bytes come out of a link: delay, jitter and rate over time, as a pure function of what went in and when.

A `Direction` is a queue without a bound, as in front of a cellular base station: bytes cross one after another at the
rate that the link has at that moment, then travel for the delay. Conditions are a plan over time, so what waits in the
queue while the rate collapses feels it. Only payload counts; packet headers do not.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shared.config import ConfigError

PACKET_BYTES = 1500


class Trace:
    """Measured capacity: at each of `times_ms` another 1500 bytes may cross; after the last one it begins again.

    The format of mahimahi (Netravali et al., USENIX ATC 2015): one whole millisecond a line, never falling, not all 0.
    """

    def __init__(self, times_ms: tuple[int, ...], name: str = "trace") -> None:
        """Raises `ValueError` where the times are none."""
        if not times_ms or times_ms[-1] <= 0 or times_ms[0] < 0 or list(times_ms) != sorted(times_ms):
            raise ValueError("a trace is milliseconds that never fall, the last one above 0")
        self.name = name
        self._times_ms = times_ms
        self._period_ms = times_ms[-1]

    def __repr__(self) -> str:
        return f"<Trace {self.name}, {self.mean_kbps:.0f} kbit/s over {self._period_ms / 1000:g} s>"

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a trace file. Raises `ConfigError`."""
        try:
            return cls(tuple(int(line) for line in path.read_text(encoding="ascii").split()), path.name)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; give a trace with one millisecond a line") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no trace: {error}; expected one whole millisecond a line") from None

    @property
    def mean_kbps(self) -> float:
        """Mean rate, kbit/s."""
        return len(self._times_ms) * PACKET_BYTES * 8 / self._period_ms

    def at_ms(self, packet: int) -> float:
        """When packet number `packet` may cross, ms from the beginning; counted on through every repetition."""
        rounds, index = divmod(packet, len(self._times_ms))
        return rounds * self._period_ms + self._times_ms[index]

    def first_from(self, time_ms: float) -> int:
        """The first packet that may cross at this time or later."""
        rounds = math.floor(time_ms / self._period_ms)
        return rounds * len(self._times_ms) + bisect_left(self._times_ms, time_ms - rounds * self._period_ms)


@dataclass(frozen=True, slots=True)
class Condition:
    """One direction of a link while nothing changes: `delay_ms` and up to `jitter_ms` more, evenly spread.

    `rate_kbps` (1000 bit/s) or `trace` bounds what crosses; without either it is unlimited. Raises `ValueError`.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    rate_kbps: float | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.delay_ms < math.inf and 0 <= self.jitter_ms < math.inf):
            raise ValueError(f"a link's delay and jitter are 0 ms or more, not {self.delay_ms} and {self.jitter_ms}")
        if self.rate_kbps is not None and not 0 < self.rate_kbps < math.inf:
            raise ValueError(f"a link's rate is above 0 kbit/s, not {self.rate_kbps}; an outage stops it")
        if self.rate_kbps is not None and self.trace is not None:
            raise ValueError("a link has a rate or a trace, not both")

    def __str__(self) -> str:
        jitter = f" +{self.jitter_ms:g}" if self.jitter_ms else ""
        rate = self.trace.name if self.trace else f"{self.rate_kbps:g} kbit/s" if self.rate_kbps else ""
        return f"{self.delay_ms:g}{jitter} ms" + (f" {rate}" if rate else "")

    @property
    def piece_bytes(self) -> int | None:
        """How finely a stream has to be cut to flow at this rate: a packet, or a millisecond's worth. None: not."""
        if self.rate_kbps is not None:
            return max(PACKET_BYTES, int(self.rate_kbps / 8))
        return None if self.trace is None else PACKET_BYTES


@dataclass(frozen=True, slots=True)
class _Span:
    """A condition and when it begins and ends, s."""

    begins: float
    ends: float
    condition: Condition


class Direction:
    """One direction of a link. Times are seconds of the caller's clock, from 0; equal seeds give equal jitter."""

    def __init__(self, condition: Condition, seed: int | str = 0) -> None:
        self._spans = [_Span(0.0, math.inf, condition)]
        self._random = Random(seed)
        self._free_at = 0.0  # when the last byte that was taken in has crossed
        self._begins = 0.0  # of the span whose trace stands at:
        self._packet = 0  # the next one that has room, and how much
        self._room = PACKET_BYTES

    def __repr__(self) -> str:
        return " then ".join(str(span.condition) for span in self._spans)

    def change(self, condition: Condition, at: float) -> None:
        """From `at` on the link is like this, whatever was planned for later; a trace begins there.

        Bytes that were taken in before keep their time.
        """
        kept = [span for span in self._spans if span.begins < at]
        if kept:
            kept[-1] = _Span(kept[-1].begins, at, kept[-1].condition)
        self._spans = [*kept, _Span(at, math.inf, condition)]

    def condition_at(self, now: float) -> Condition:
        """How the link is at this time; what has passed is forgotten."""
        del self._spans[: self._index(now)]
        return self._spans[0].condition

    def due_at(self, num_bytes: int, now: float) -> float:
        """Take in bytes at `now`: when the last of them comes out.

        They cross in order, but with jitter or a shorter delay later ones may come out before: the caller keeps the
        order of a stream.
        """
        left = float(num_bytes)
        crossed_at = max(now, self._free_at)
        index = self._index(crossed_at)
        while True:
            span = self._spans[index]
            if span.condition.trace is None:
                left, crossed_at = _cross(span, left, crossed_at)
            else:
                left, crossed_at = self._cross_trace(
                    span, span.condition.trace, left, max(now, span.begins), crossed_at
                )
            if not left:
                break
            index += 1
        self._free_at = crossed_at
        delay_ms = span.condition.delay_ms + span.condition.jitter_ms * self._random.random()
        return crossed_at + delay_ms / 1000

    def clear(self, now: float) -> None:
        """Whatever waits to cross is lost."""
        self._free_at = now
        self._packet, self._room = 0, PACKET_BYTES

    def _index(self, now: float) -> int:
        return max(0, bisect_right(self._spans, now, key=lambda span: span.begins) - 1)

    def _cross_trace(
        self, span: _Span, trace: Trace, left: float, now: float, crossed_at: float
    ) -> tuple[float, float]:
        """Bytes left at the end of the span, and when the last one crossed. Packets that nobody waits for are lost."""
        if not left:
            return 0.0, crossed_at
        first = trace.first_from((now - span.begins) * 1000)
        if first > self._packet or self._begins != span.begins:
            self._begins, self._packet, self._room = span.begins, first, PACKET_BYTES
        more = max(0, math.ceil((left - self._room) / PACKET_BYTES))
        at = span.begins + trace.at_ms(self._packet + more) / 1000
        if at >= span.ends:
            in_time = trace.first_from((span.ends - span.begins) * 1000) - self._packet
            carried = self._room + (in_time - 1) * PACKET_BYTES if in_time > 0 else 0
            return left - carried, span.ends
        self._packet += more
        self._room = int(self._room + more * PACKET_BYTES - left)
        if not self._room:
            self._packet, self._room = self._packet + 1, PACKET_BYTES
        return 0.0, max(at, crossed_at)


def _cross(span: _Span, left: float, crossed_at: float) -> tuple[float, float]:
    """Bytes left at the end of the span, and when the last one crossed, at a rate or at once."""
    rate_kbps = span.condition.rate_kbps
    if rate_kbps is None or not left:
        return 0.0, crossed_at
    bytes_per_s = rate_kbps * 125
    at = crossed_at + left / bytes_per_s
    if at <= span.ends:
        return 0.0, at
    return left - max(0.0, span.ends - crossed_at) * bytes_per_s, span.ends
