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
