"""How likely the next draft token is to be accepted, learnt from the ones that were judged."""

from collections.abc import Iterable
from math import prod

_CARRIED_TOKENS = 8.0  # so many observations does an earlier session weigh in the next one
# One of them is the prior, so that each answer begins with drafts: a draft that never was right gets another chance,
# and its engine reads the prompt, for local text.
_DOUBTED_TOKENS = 1.0
_YOUNG_TOKENS = 64.0


class Acceptance:
    """Exponentially smoothed per-token acceptance probability.

    Draft tokens on one path are judged until the first one that differs, so an observation is `matched` successes and,
    if the path failed there, one failure. The prior counts as a few observations, then fades.
    """

    __slots__ = ("_rate", "_seen")

    WINDOW_TOKENS = 128

    def __init__(self, prior: float = 0.8) -> None:
        self._rate = prior
        self._seen = 4.0

    def __repr__(self) -> str:
        return f"{self._rate:.2f}"

    @property
    def rate(self) -> float:
        """Probability that the next draft token is accepted, given that the ones before it were; 0 to 1."""
        return self._rate

    def carried(self, prior: float) -> "Acceptance":
        """What the next session begins with: this and one observation of `prior`, soon outweighed by its own."""
        known = min(self._seen, _CARRIED_TOKENS - _DOUBTED_TOKENS)
        carried = Acceptance((self._rate * known + prior * _DOUBTED_TOKENS) / (known + _DOUBTED_TOKENS))
        carried._seen = known + _DOUBTED_TOKENS
        return carried

    @property
    def seen(self) -> float:
        """Observations that it rests on, the prior's included; no more than `WINDOW_TOKENS`."""
        return self._seen

    def observe(self, matched: int, failed: int) -> None:
        """Learn from one judged path: in a tree more than one may have failed."""
        rate, seen, most = self._rate, self._seen, self.WINDOW_TOKENS
        for _ in range(matched):
            seen = seen + 1 if seen < most else most
            rate += (1.0 - rate) / seen
        for _ in range(failed):
            seen = seen + 1 if seen < most else most
            rate -= rate / seen
        self._rate, self._seen = rate, seen


class Calibration:
    """A draft token's confidence turned into the probability that it is accepted, learnt as tokens are judged.

    Each of eight ranges of confidence has a smoothed acceptance of its own, drawn towards that of the whole session by
    the weight of a few observations: a range that was never seen believes the session. For a confidence of one byte
    `table[confidence >> RANGE_BITS]` is the probability, 0 to 1, as of the last `refresh`.
    """

    __slots__ = ("_overall", "_prior", "_ranges", "table")

    RANGE_BITS = 5
    _DRAWN_BY = 4.0

    def __init__(self, prior: float = 0.8) -> None:
        self._prior = prior
        self._overall = Acceptance(prior)
        self._ranges = [(0.0, 0.0)] * (256 >> self.RANGE_BITS)  # (smoothed acceptance, observations)
        self.table = [self._overall.rate] * len(self._ranges)

    def __repr__(self) -> str:
        return repr(self._overall)

    @property
    def overall(self) -> float:
        """The session's acceptance, whatever the confidence."""
        return self._overall.rate

    @property
    def is_young(self) -> bool:
        """Whether it has seen so little that a few tokens more change much: then `refresh` should not wait."""
        return self._overall.seen < _YOUNG_TOKENS

    def reach(self, confidences: Iterable[int]) -> float:
        """The probability that a whole path with these confidences is accepted."""
        ranges = bytes(confidences).translate(_RANGES)  # counted: a path may be long, and ranges are few
        return prod([self.table[index] ** ranges.count(index) for index in set(ranges)])

    def carried(self) -> "Calibration":
        """What the next session with the same draft begins with: this, soon outweighed by its own tokens."""
        carried = Calibration(self._prior)
        carried._overall = self._overall.carried(self._prior)
        carried._ranges = [(rate, min(seen, _CARRIED_TOKENS)) for rate, seen in self._ranges]
        carried.refresh()
        return carried

    def observe(self, accepted: bytes, rejected: bytes) -> None:
        """Learn from one judged path: the confidences of the tokens that matched, and of those that did not."""
        if not accepted and not rejected:
            return
        self._overall.observe(len(accepted), len(rejected))
        ranges, most = self._ranges, Acceptance.WINDOW_TOKENS
        for confidences, outcome in ((accepted, 1.0), (rejected, 0.0)):
            for confidence in confidences:
                index = confidence >> self.RANGE_BITS
                rate, seen = ranges[index]
                seen = seen + 1 if seen < most else most
                ranges[index] = (rate + (outcome - rate) / seen, seen)

    def refresh(self) -> None:
        """Bring `table` up to date; apart from `observe`, so that it can be done while nobody waits."""
        drawn = self._overall.rate * self._DRAWN_BY
        self.table = [(rate * seen + drawn) / (seen + self._DRAWN_BY) for rate, seen in self._ranges]


_RANGES = bytes([confidence >> Calibration.RANGE_BITS for confidence in range(256)])  # of each confidence
