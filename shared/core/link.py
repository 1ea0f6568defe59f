"""The link as judged by the edge: smoothed RTT, heartbeats, and when silence means that it stalled.

The transport is never trusted for liveness: on mobile links a half-open TCP connection can hang for a quarter of an
hour. While a stream is up the edge sends a heartbeat every `heartbeat_ms` and the verifier echoes it at once, so the
longest silence to expect on a live link is one heartbeat interval plus a round trip. RTT smoothing and its variance
follow RFC 6298 (section 2), but for the mean of the first eight; the stall deadline plays the part of its
retransmission timeout. Its variance begins at half the round trip, in doubt; whoever aims at a moment reads
`jitter_ms`, which begins with what was seen.

Times are seconds on the caller's monotonic clock, durations milliseconds.
"""

from dataclasses import dataclass

from shared.core.messages import CloudMessage, Heartbeat

_GAIN_RTT = 1 / 8  # RFC 6298's alpha
_GAIN_VARIANCE = 1 / 4  # RFC 6298's beta


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Limits of the judgement; all durations in ms."""

    max_stall_ms: float = 600.0
    heartbeat_ms: float = 200.0
    min_stall_ms: float = 150.0  # slack on top of the round trip: schedulers, radios and kernels hiccup too


class Link:
    """RTT estimate and stall judgement of one stream after another."""

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self.jitter_ms = 0.0  # how far round trips are from the smoothed one, on average; 0 before the second
        self._srtt_ms: float | None = None
        self._variance_ms = 0.0
        self._num_measured = 0
        self._nonce = 0
        self._sent_at: dict[int, float] = {}
        self._heard_at = 0.0
        self._next_heartbeat_at = 0.0

    def __repr__(self) -> str:
        return f"<Link rtt {self.rtt_ms:.0f}+-{self._variance_ms:.0f} ms, patience {self.silence_ms:.0f} ms>"

    @property
    def rtt_ms(self) -> float:
        """Smoothed round trip, ms; 0 before the first echo."""
        return self._srtt_ms or 0.0

    @property
    def silence_ms(self) -> float:
        """The longest silence that a live link explains, never above `max_stall_ms`."""
        if self._srtt_ms is None:
            return self._settings.max_stall_ms
        echo_ms = self._srtt_ms + max(4 * self._variance_ms, self._settings.min_stall_ms)
        return min(self._settings.heartbeat_ms + echo_ms, self._settings.max_stall_ms)

    @property
    def stalled_at(self) -> float:
        """When the link counts as stalled if nothing is heard until then."""
        return self._heard_at + self.silence_ms / 1000

    @property
    def next_heartbeat_at(self) -> float:
        """When the next heartbeat is due."""
        return self._next_heartbeat_at

    def opened(self, now: float) -> None:
        """A new stream is up: heartbeats begin, older ones will not be answered."""
        self._sent_at.clear()
        self._heard_at = now
        self._next_heartbeat_at = now

    def heartbeat(self, now: float) -> int:
        """A heartbeat is sent now; returns its nonce."""
        self._nonce += 1
        self._sent_at[self._nonce] = now
        self._next_heartbeat_at = now + self._settings.heartbeat_ms / 1000
        return self._nonce

    def heard(self, message: CloudMessage, now: float) -> None:
        """Something arrived from the verifier. An echo of an unknown or repeated nonce teaches nothing."""
        self._heard_at = now
        if isinstance(message, Heartbeat) and message.nonce in self._sent_at:
            self._measured((now - self._sent_at.pop(message.nonce)) * 1000)

    def _measured(self, rtt_ms: float) -> None:
        self._num_measured += 1
        if self._srtt_ms is None:
            self._srtt_ms, self._variance_ms = rtt_ms, rtt_ms / 2
            return
        off_ms = abs(self._srtt_ms - rtt_ms)
        self._variance_ms += _GAIN_VARIANCE * (off_ms - self._variance_ms)
        self.jitter_ms += max(_GAIN_VARIANCE, 1 / (self._num_measured - 1)) * (off_ms - self.jitter_ms)
        self._srtt_ms += max(_GAIN_RTT, 1 / self._num_measured) * (rtt_ms - self._srtt_ms)
