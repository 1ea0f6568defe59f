"""When the edge dials: one attempt at a time, each with a new stream number, after a jittered exponential backoff."""

from zlib import crc32

from shared.core.effects import Connect
from shared.core.noise import uniform
from shared.core.settings import EdgeSettings


class Dialler:
    """The current stream number, and the times of the next attempt and of giving up the one in progress."""

    def __init__(self, settings: EdgeSettings, session_id: str) -> None:
        self.stream = 0
        self.next_at: float | None = None
        self.give_up_at: float | None = None
        self._settings = settings
        self._seed = crc32(session_id.encode())  # devices cut off together must not dial together
        self._attempt = 0

    def dial(self, now: float, rtt_ms: float, fresh: bool = True) -> Connect:
        """Start an attempt; it may take four round trips (TCP and TLS) or `connect_timeout_ms`, whichever is longer.

        `rtt_ms` 0 means that no round trip was ever measured: then each failed attempt makes the next more patient.
        """
        self.stream += 1
        self.next_at = None
        patience = 1 if rtt_ms else 2 ** min(self._attempt, 3)
        self.give_up_at = now + max(self._settings.connect_timeout_ms * patience, 4 * rtt_ms) / 1000
        return Connect(self.stream, fresh)

    def answered(self, stream: int) -> bool:
        """The stream is up; False if nobody waits for it any more."""
        expected = stream == self.stream and self.give_up_at is not None
        self.give_up_at = None if expected else self.give_up_at
        return expected

    def abandon(self) -> int:
        """Give up the stream or the attempt, and dial no more; returns its number, which is dead from now on."""
        self.next_at = self.give_up_at = None
        self.stream += 1
        return self.stream - 1

    def retry(self, now: float, after_ms: float) -> None:
        """Dial again after what the verifier asked for and the backoff."""
        settings = self._settings
        backoff_ms = min(settings.backoff_initial_ms * 2 ** min(self._attempt, 16), settings.backoff_max_ms)
        jittered_ms = backoff_ms * (0.5 + 0.5 * uniform(self._seed, self.stream))
        self.next_at = now + (after_ms + jittered_ms) / 1000
        self._attempt += 1

    def progressed(self) -> None:
        """The stream was good for something: the next backoff starts small."""
        self._attempt = 0
