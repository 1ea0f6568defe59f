"""What a draft model's forward takes, by its rows and by the tokens that are cached.

Rows share what the weights cost, so on a short text five of them take far less than five times as long as one. That is
measured at load. But attention goes through the cache for each of them, and kernels made for many rows first lay it out
anew: behind 1,000 tokens the second row of a small model may cost two thirds of the first. That is learned from what
forwards take, those of one row and of several apart, and with it whatever else makes them slower than at load: a core
that is shared, or too hot.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from shared.core.messages import Sampling
from shared.engine import Proposal

_FEWEST_CACHED = 64  # behind less, noise would pass for what the cache costs
_LATEST = 9  # forwards; their median leaves out those that something else interrupted
_TRIES = 3  # at load; the best one counts


class MeasurableDraft(Protocol):
    """A draft engine that evaluates several rows in one forward."""

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`; select with `sampling` from now on."""
        ...

    def propose_checked(self, guess: Sequence[int]) -> Proposal:
        """The guess as far as the model drafts the same, and one more token of its own, all in one forward."""
        ...


class RowCosts:
    """Times of forwards, ms: measured ones behind an empty cache, and what each cached token adds, learned."""

    def __init__(self, row_ms: Sequence[float]) -> None:
        """`row_ms`: what forwards of 1, 2, ... rows take behind an empty cache."""
        self._row_ms = list(row_ms)
        self._one = deque([0.0], _LATEST)
        self._several = deque([0.0], _LATEST)

    def __repr__(self) -> str:
        per_thousand = ", ".join(f"{1000 * median(added):.1f}" for added in (self._one, self._several))
        return f"<RowCosts {self._row_ms[0]:.1f} to {self._row_ms[-1]:.1f} ms, {per_thousand} more behind 1000 tokens>"

    def ms(self, rows: int, cached: int) -> float:
        """What a forward of `rows` behind `cached` tokens takes; beyond what was measured a row costs as the last."""
        known = min(rows, len(self._row_ms))
        beyond = (rows - known) * (self._row_ms[-1] - self._row_ms[-2]) if rows > known else 0.0
        return self._row_ms[known - 1] + beyond + cached * median(self._one if rows == 1 else self._several)

    def with_guesses(self, rows: int, cached: int) -> list[float]:
        """What a token costs with 0, 1, ... guesses, as many as were measured, beside `rows` that are due anyhow."""
        due, one = self.ms(rows, cached), self.ms(1, cached)
        return [one + self.ms(rows + guesses, cached) - due for guesses in range(len(self._row_ms))]

    def observe(self, rows: int, cached: int, ms: float) -> None:
        """Learn from one forward."""
        if cached >= _FEWEST_CACHED and rows <= len(self._row_ms):
            added = self._one if rows == 1 else self._several
            added.append(max(0.0, ms - self._row_ms[rows - 1]) / cached)


def measure_row_costs(
    model: MeasurableDraft, most_rows: int, clock_s: Callable[[], float] = time.perf_counter
) -> RowCosts:
    """Measure forwards of 1, 2, ... rows, up to where so many one by one would be as fast.

    `reset` the model before any other use.
    """
    row_ms = list[float]()
    for rows in range(1, most_rows + 1):
        tries = []
        for _ in range(_TRIES):
            model.reset([0], Sampling(), 1)
            model.propose_checked(())
            began_s = clock_s()
            model.propose_checked([0] * (rows - 1))
            tries.append((clock_s() - began_s) * 1000)
        row_ms.append(min(tries))
        if rows > 1 and row_ms[-1] >= rows * row_ms[0]:
            break
    return RowCosts(row_ms)
