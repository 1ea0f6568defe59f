"""How many pending draft tokens a target step takes: the number that commits most tokens per millisecond."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BestRate:
    """Maximise expected committed tokens per ms over the number of draft rows m.

    A step of b base rows and m draft rows commits 1 + worth[0] + ... + worth[m-1] tokens in cost_ms(b + m); m = 0 is
    plain decoding, so drafts that do not pay are left out (SpecInfer's and GoodSpeed's objective with a measured cost
    curve).
    """

    cost_ms: Callable[[int], float]

    def draft_rows(self, base_rows: int, worth: list[float]) -> int:
        """The best m; the smaller one on a tie. `worth` is in the order in which rows are taken."""
        expected, best, best_rate = 1.0, 0, 1.0 / self.cost_ms(base_rows)
        for rows, gain in enumerate(worth, start=1):
            expected += gain
            rate = expected / self.cost_ms(base_rows + rows)
            if rate > best_rate:
                best, best_rate = rows, rate
        return best
