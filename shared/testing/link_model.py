"""The simulated network between edges and a verifier, harsher than life.

Messages of a direction stay in order, as in a TCP stream. A stall holds them and delivers later; a break loses what is
in flight. After a blackhole neither end is told, and streams from before it never work again in the broken direction.
A stream that the edge gave up can still deliver: the edge session must not listen.
"""

from dataclasses import dataclass
from random import Random


@dataclass(slots=True)
class SimStream:
    """One simulated call: which directions still carry, and when the last message of each lands (order)."""

    number: int
    edge: int
    carries_up: bool = True
    carries_down: bool = True
    edge_closed: bool = False
    cloud_closed: bool = False
    last_up: float = 0.0
    last_down: float = 0.0


@dataclass(slots=True)
class LinkModel:
    """Delay, jitter, stalls and outages between one edge and the verifier. Times in s, delays in ms."""

    random: Random
    one_way_ms: float
    jitter_ms: float
    stalled_until: float = 0.0
    refused_until: float = 0.0
    dark_until: float = 0.0
    duplicate_rate: float = 0.0

    def lands_at(self, now: float, last: float) -> float:
        """When a message sent now arrives, given when the one before it does."""
        delay_ms = self.one_way_ms + self.random.random() * self.jitter_ms
        return max(max(now, self.stalled_until) + delay_ms / 1000, last)

    def copies(self) -> int:
        """How often a message is delivered: twice at times, which TCP never does."""
        return 2 if self.random.random() < self.duplicate_rate else 1
