"""The siblings of an edge's own path: what the draft would have proposed instead, kept beside the log by position.

A path with siblings is a comb: a chain with leaves. It costs the draft no forward, and hardly a byte more than its ids;
where the target takes a sibling, its step commits that and one token more, instead of the one token that ends a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.acceptance import Acceptance, Calibration
from shared.core.tokens import quantize

Siblings = tuple[tuple[int, float], ...]
"""Of one position, best first: token, and its probability given that the tokens before it are wrong."""

SIBLING_PRIOR = 0.3  # of a weak draft's second choice, once the first is wrong
_LEAST_USE = 0.1  # so that better times are noticed


@dataclass(frozen=True, slots=True)
class Leaf:
    """A sibling to send: it hangs on the token before position `position`."""

    position: int
    token: int
    confidence: int


class PathSiblings:
    """Siblings of the positions that are not committed yet, which of them were sent, and how often they are right."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration or Calibration(SIBLING_PRIOR)
        self.num_hits = 0  # steps that went on behind a sibling
        self._use = Acceptance(1.0)
        self._at: dict[int, tuple[tuple[int, ...], bytes]] = {}
        self._num_sent: dict[int, int] = {}  # by position, from the best on

    def __repr__(self) -> str:
        return f"<PathSiblings at {len(self._at)} positions, {self.num_hits} hits, chance {self.calibration!r}>"

    def put(self, start: int, siblings: Sequence[Siblings]) -> None:
        """Those of the tokens just drafted for positions `start`, ..."""
        for position, ranked in enumerate(siblings, start=start):
            if ranked:
                self._at[position] = (tuple([token for token, _ in ranked]), bytes([quantize(p) for _, p in ranked]))

    def cut(self, length: int) -> None:
        """The path was cut there."""
        self._keep(0, length)

    def judged(self, position: int, token: int | None, is_accepted: bool) -> None:
        """Positions up to this one are committed; the path was wrong here, and should have gone on with `token`.

        None: it was right all along. `is_accepted`: the verifier had a sibling for it.
        """
        if not self._at:
            return
        tokens, confidences = self._at.get(position, ((), b""))
        if token is not None and tokens:
            rank = tokens.index(token) if token in tokens else len(tokens)
            self.calibration.observe(confidences[rank : rank + 1], confidences[:rank])
            self.calibration.refresh()
            if rank < self._num_sent.get(position, 0):
                self.num_hits += is_accepted
                self._use.observe(int(is_accepted), int(not is_accepted))
        self._keep(position + 1, None)

    def num_sent(self, length: int) -> int:
        """How many were sent, of what was sent of the path up to `length`: the verifier holds them, too."""
        if not self._num_sent:
            return 0
        return sum(count for position, count in self._num_sent.items() if position < length)

    def choose(self, start: int, reach: float, chances: Sequence[float], price: float, most: int) -> list[Leaf]:
        """The ones to send with the path's tokens at `start`, ..., which are right with `chances`; counts them as sent.

        `reach` is the chance that the path is right up to there. A sibling is worth the chance that the text goes on
        with it, as far as steps lately had room for those that were right; it must be worth `price`.
        """
        chosen: list[Leaf] = []
        if not self._at:
            return chosen
        table, used = self.calibration.table, max(self._use.rate, _LEAST_USE)
        for position, chance in enumerate(chances, start=start):
            tokens, confidences = self._at.get(position, ((), b""))
            left, before = reach * (1.0 - chance) * used, len(chosen)
            for token, confidence in zip(tokens, confidences, strict=True):
                its_chance = table[confidence >> Calibration.RANGE_BITS]
                if left * its_chance < price or len(chosen) == most:
                    break
                chosen.append(Leaf(position, token, confidence))
                left *= 1.0 - its_chance
            if len(chosen) > before:
                self._num_sent[position] = len(chosen) - before
            reach *= chance
        return chosen

    def _keep(self, first: int, end: int | None) -> None:
        for by_position in (self._at, self._num_sent):
            for position in [one for one in by_position if one < first or (end is not None and one >= end)]:
                del by_position[position]
