"""Step, hold or decode: what one session's next target step should wait for, by what commits most tokens per ms.

Theory of operation
-------------------
A verifier with one session to serve has three choices whenever it is free: verify what is here, capped at some rows;
*hold* until more drafts are here; or self-decode, with the drafts ignored. Which is best is no matter of this step
alone. Self-decode commits a token now, but each token that the edge did not foresee ends its path, and the next draft
is then a round trip away. So choices are compared as one compares rewards over a long time: by expected tokens minus
g * ms, g being the best rate of committing that this session can have, plus what the state is worth that they lead to.

    plan (s, n)      self-decode s times, wait until n draft tokens beyond those are here, verify them
    tokens           s + 1 + sum of reach[j], j = s + 1 .. s + n
    ms               s * cost(1) + wait + cost(1 + n)
    leads to         with probability reach[s + n + 1] the edge's path still stands: worth `flow`; else a break: worth 0

reach[j] is the probability that the path's first j tokens beyond the committed ones are all right: the pending ones by
their calibrated confidence, later ones by the session's acceptance. `flow` is the value of a path that stands: verify
the x tokens that are drafted meanwhile, again and again until one is wrong. g is the rate at which the best plan after
a break is worth nothing more than its time; it never falls below cloud-only's, 1 / cost(1), so neither does the choice
(as far as the forecast is right). Stop-and-wait at its best length is the plan s = 0 (FlexSpec's K*, the n of most
tokens per ms of drafting, link and verification); s > 0 is self-decode over a long round trip.

Everything is expectation under a forecast, made anew whenever something arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.core.policies import Outlook

_Floats = NDArray[np.float64]
_MOST_DECODES = 16
_LEAST, _SURE = 0.01, 0.995  # no acceptance is 0, nor 1: a path that never ends would be worth any wait
_MAX_SOLVED = 512
_MOST_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """What the next step of a session should be: `drafts` to verify once they are here, the first in `hold_ms`."""

    drafts: int
    hold_ms: float


@dataclass(frozen=True, slots=True)
class _Reachable:
    """The best rate, tokens per ms, and what a path that stands is worth at it, tokens."""

    rate: float
    flow: float


class StepRule:
    """The choice of the module's theory of operation, for one cost curve.

    `cost[rows]` is a forward's duration in ms; at most `len(cost) - 2` drafts go into a step.
    """

    def __init__(self, cost: Sequence[float] | _Floats) -> None:
        self._cost: _Floats = np.asarray(cost, dtype=np.float64)
        self._drafts = np.arange(len(self._cost) - 1)
        self._decodes = np.arange(_MOST_DECODES + 1)
        self._until = self._decodes[:, None] + self._drafts[None, :]  # (s, n): tokens of the path up to the plan's end
        self._decoding = self._decodes[:, None] * self._cost[1]
        self._solved: dict[tuple[float, ...], _Reachable] = {}

    def choose(self, worth: Sequence[float], outlook: Outlook, may_decode: bool = True) -> Choice:
        """For pending drafts of this `worth`. Without `may_decode` at least one draft is verified or waited for.

        Then there must be one, or at least one for which the step has room.
        """
        reachable = self._solve(outlook)
        reach = self._reach(worth, outlook)
        here_in = self._here_in(len(worth), outlook.next_ms, outlook.draft_ms)
        wait_ms = np.where(self._drafts > len(worth), np.maximum(here_in[: len(self._drafts)], outlook.asked_ms), 0.0)
        values = self._values(
            reach, here_in, wait_ms, reachable.rate, reachable.flow, outlook.rtt_ms + outlook.draft_ms
        )
        values[:, outlook.most_drafts + 1 :] = -np.inf
        if not may_decode:
            values[1:] = -np.inf
            values[0, 0] = -np.inf
        decodes, drafts = divmod(int(values.argmax()), len(self._drafts))
        if decodes:
            return Choice(0, 0.0)
        return Choice(drafts, float(wait_ms[drafts]))

    def _solve(self, outlook: Outlook) -> _Reachable:
        """Newton's method from cloud-only's rate: the value of the best plan is convex in the rate, so it climbs."""
        acceptance = min(max(round(outlook.acceptance, 2), _LEAST), _SURE)
        key = (acceptance, float(f"{outlook.draft_ms:.2g}"), float(f"{outlook.rtt_ms:.2g}"))
        found = self._solved.get(key)
        if found is not None:
            return found
        acceptance, draft_ms, rtt_ms = key
        reach = np.power(acceptance, np.arange(self._until[-1, -1] + 2))
        here_in = self._here_in(0, rtt_ms + draft_ms, draft_ms)
        rate, flow = 1.0 / self._cost[1], 0.0
        for _ in range(_MOST_ROUNDS):
            flow, flow_ms = self._flow(acceptance, draft_ms, rate)
            values = self._values(reach, here_in, here_in[: len(self._drafts)], rate, flow, rtt_ms + draft_ms)
            best = int(values.argmax())
            if values.flat[best] <= 1e-6:
                break
            decodes, drafts = divmod(best, len(self._drafts))
            took_ms = (
                self._took_ms(here_in, here_in[: len(self._drafts)]).flat[best] + reach[decodes + drafts + 1] * flow_ms
            )
            rate += float(values.flat[best] / took_ms)
        if len(self._solved) >= _MAX_SOLVED:
            self._solved.clear()
        found = self._solved[key] = _Reachable(rate, flow)
        return found

    def _flow(self, acceptance: float, draft_ms: float, rate: float) -> tuple[float, float]:
        """Value of a path that stands, and its expected duration in ms."""
        tokens = np.cumsum(np.power(acceptance, self._drafts))
        step_ms = np.maximum(self._cost[1:], (self._drafts + 1) * draft_ms)
        ends = 1.0 - np.power(acceptance, self._drafts + 1)
        values = (tokens - rate * step_ms) / ends
        best = int(values.argmax())
        return max(float(values[best]), 0.0), float(step_ms[best] / ends[best]) if values[best] > 0 else 0.0

    def _reach(self, worth: Sequence[float], outlook: Outlook) -> _Floats:
        acceptance = min(max(outlook.acceptance, _LEAST), _SURE)
        known = min(len(worth), len(self._drafts) - 1)
        reach: _Floats = np.power(acceptance, np.arange(self._until[-1, -1] + 2) - known, dtype=np.float64)
        survives = acceptance**outlook.unknown_tokens
        reach *= worth[known - 1] if known else survives
        reach[1 : known + 1] = worth[:known]
        reach[0] = 1.0  # part of no plan, but it must not swamp the sums
        return reach

    def _here_in(self, pending: int, next_ms: float, draft_ms: float) -> _Floats:
        """When the path's first j tokens are here, j = 0, 1, ...; in ms from now."""
        count = self._until[-1, -1] + 2
        later = np.maximum(np.arange(count) - pending, 0)
        here_in: _Floats = np.where(later > 0, next_ms + (later - 1) * draft_ms, 0.0)
        return here_in

    def _took_ms(self, here_in: _Floats, wait_ms: _Floats) -> _Floats:
        needed = np.where(self._drafts[None, :] > 0, here_in[self._until], 0.0)
        needed[0] = wait_ms
        took_ms: _Floats = np.maximum(needed, self._decoding) + self._cost[None, 1:]
        return took_ms

    def _values(
        self, reach: _Floats, here_in: _Floats, wait_ms: _Floats, rate: float, flow: float, answer_ms: float
    ) -> _Floats:
        gained = np.cumsum(reach)
        tokens = self._decodes[:, None] + 1 + gained[self._until] - gained[self._decodes][:, None]
        took_ms = self._took_ms(here_in, wait_ms)
        first_to_come = int(np.argmax(here_in > 0.0)) or len(here_in) - 1
        goes_on_ms = here_in[np.maximum(self._until + 1, first_to_come)]
        gap_ms = np.maximum(goes_on_ms - took_ms, 0.0)
        # Where the path goes on later than after a break, self-decoding fills the time.
        filled = (1.0 / self._cost[1] - rate) * np.maximum(gap_ms - answer_ms, 0.0)
        values: _Floats = tokens - rate * took_ms + reach[self._until + 1] * np.maximum(flow - rate * gap_ms, filled)
        return values
