"""How likely the next draft token is to be accepted, learnt from the ones that were judged."""


class Acceptance:
    """Exponentially smoothed per-token acceptance probability.

    Draft tokens on one path are judged until the first one that differs, so an observation is `matched` successes and,
    if the path failed there, one failure. The prior counts as a few observations, then fades.
    """

    __slots__ = ("_rate", "_seen")

    WINDOW_TOKENS = 64

    def __init__(self, prior: float = 0.8) -> None:
        self._rate = prior
        self._seen = 4.0

    def __repr__(self) -> str:
        return f"{self._rate:.2f}"

    @property
    def rate(self) -> float:
        """Probability that the next draft token is accepted, given that the ones before it were; 0 to 1."""
        return self._rate

    def observe(self, matched: int, failed: bool) -> None:
        """Learn from one judged path."""
        for outcome in (1.0,) * matched + (0.0,) * failed:
            self._seen = min(self._seen + 1, self.WINDOW_TOKENS)
            self._rate += (outcome - self._rate) / self._seen


class Calibration:
    """A draft token's confidence turned into the probability that it is accepted, learnt as tokens are judged.

    Each of eight ranges of confidence has a smoothed acceptance of its own, drawn towards that of the whole session by
    the weight of a few observations: a range that was never seen believes the session.
    """

    __slots__ = ("_overall", "_ranges", "_table")

    RANGE_BITS = 5
    _DRAWN_BY = 4.0

    def __init__(self) -> None:
        self._overall = Acceptance()
        self._ranges = [(0.0, 0.0)] * (256 >> self.RANGE_BITS)  # (smoothed acceptance, observations)
        self._table: list[float] | None = None  # until it is asked for

    def __repr__(self) -> str:
        return repr(self._overall)

    @property
    def table(self) -> list[float]:
        """For a confidence of one byte `table[confidence >> RANGE_BITS]` is the probability, 0 to 1."""
        if self._table is None:
            drawn = self._overall.rate * self._DRAWN_BY
            self._table = [(rate * seen + drawn) / (seen + self._DRAWN_BY) for rate, seen in self._ranges]
        return self._table

    def observe(self, accepted: bytes, rejected: bytes) -> None:
        """Learn from one judged path: the confidences of the tokens that matched, and of the one that did not."""
        if not accepted and not rejected:
            return
        self._overall.observe(len(accepted), bool(rejected))
        for outcome, confidences in ((1.0, accepted), (0.0, rejected)):
            for confidence in confidences:
                rate, seen = self._ranges[confidence >> self.RANGE_BITS]
                seen = min(seen + 1, Acceptance.WINDOW_TOKENS)
                self._ranges[confidence >> self.RANGE_BITS] = (rate + (outcome - rate) / seen, seen)
        self._table = None
