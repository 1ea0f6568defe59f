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
    leads to         with probability reach[s + n + 1] the edge's path still stands: worth `_onward`; else a break: 0

reach[j] is the probability that the path's first j tokens beyond the committed ones are all right: the pending ones by
their calibrated confidence, later ones by the session's acceptance. A path that stands is worth `flow` where its tokens
come fast enough: verify the x that are drafted meanwhile, again and again until one is wrong. Until so many are here it
is worth less (`_onward`): a step of those that are, and the pause until the next message. g is the rate at which the
best plan after a break is worth nothing more than its time; it never falls below cloud-only's, 1 / cost(1), so neither
does the choice (as far as the forecast is right). Stop-and-wait at its best length is the plan s = 0 (FlexSpec's K*,
the n of most tokens per ms of drafting, link and verification); s > 0 is self-decode over a long round trip.

A commit *asks* (only it can: `may_ask`) for the tokens that its plan waits for, or else for tokens that are to be here
when the plan ends, while the verifier decodes or verifies what it has: those that can be by then, or as many as it is
best to verify, whichever is worth more (`_asked`). The edge sends what was asked for as soon as it is drafted. What
nobody asks for comes as the edge sends by itself: one message just before each step that it foresees (`_gather`). What
was asked for stays asked for, whatever is chosen later.

Where more drafts are here than a step takes and those on offer are nearly sure, there is nothing to wait or to ask for,
and the path goes on whatever is chosen: the step of the most tokens per ms is taken (`fastest`).

The end has no path behind it. Where a step may reach it (`left_tokens`), a plan that leaves l tokens is worth what they
are if they commit as they are drafted, as long as they are right, and one more step verifies the last of them
(`_ending`). So the last drafts are waited for, unless they take longer than a step without them. The edge, which knows
the end as well, sends them as soon as it has them.

A decode step without drafts may carry recycled rows (`rejected_path`, `prompt_lookup`), as many as are worth their time
at the rate g; before anything is known of the edge, as many as give the most tokens per ms of the step alone.

Everything is expectation under a forecast, made anew whenever something arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from shared.core.policies import Outlook

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_MOST_DECODES = 16
_DOUBT = 0.05  # tokens: a step that waits may wait in vain, one that does not cannot
_LEAST, _SURE = 0.01, 0.995  # no acceptance is 0, nor 1: a path that never ends would be worth any wait
_MAX_SOLVED = 512
_NEARLY_SURE = 0.9  # that all drafts on offer are right
_LEAST_GAIN = 0.01  # tokens: for less nothing is asked
_LEAST_RECYCLED = 0.1  # of a guess's first token: rows cost a little more than their curve says
_AIMED_MS = 1.5  # so long before a step its message is complete: later drafts are not in it
_MOST_ROUNDS, _SOLVED = 20, 0.02  # to find the rate at which a break is worth so few tokens
_NOW_OR_LATER = np.arange(2)[:, None, None, None]  # decode steps before what is here is verified


@dataclass(frozen=True, slots=True)
class Choice:
    """What the next step of a session should be: `drafts` to verify once they are here, in `hold_ms`.

    `asked` tokens of the path are waited for, by this step or by one that comes after it; 0: none.
    """

    drafts: int
    hold_ms: float
    asked: int = 0


@dataclass(frozen=True, slots=True)
class _Reachable:
    """The best rate, tokens per ms, the time from a break to the next draft, and what a path that stands is worth.

    It is worth `flow` tokens, in `flow_ms`, if always the best number of drafts is verified, at which the tables end. A
    step of n drafts takes `cost_ms[n]` and commits `gains[n]` more than `rate` would, the path stands behind it with
    probability `stands[n]`, and the next so many are here `lacking_ms[n]` after it. With these here the path is worth
    `most`, but with n only they lack `waiting_ms[n]`. A commit may ask for what goes on behind each plan, up to `last`:
    for its first token or for as many as are best; (2, s, n).
    """

    rate: float
    answer_ms: float
    flow: float
    flow_ms: float
    cost_ms: _Floats
    gains: _Floats
    stands: _Floats
    lacking_ms: _Floats
    waiting_ms: _Floats
    most: float
    last: _Ints


@dataclass(frozen=True, slots=True)
class _Path:
    """The path's first j tokens, j = 0, 1, ...: whether all are right, and when they are here, in ms from now.

    `pending` ones are. The others could be in `drafted_ms`, are in `asked_ms` for whoever waits for them, and else come
    in `unasked_ms`. What a commit asks for takes `rtt_ms` at least. With `left` further tokens the text ends, if that
    is in reach of a step; else 0.
    """

    reach: _Floats
    pending: int
    drafted_ms: _Floats
    asked_ms: _Floats
    unasked_ms: _Floats
    rtt_ms: float
    may_ask: bool = True
    left: int = 0


class StepRule:
    """The choice of the module's theory of operation, for one cost curve.

    `cost[rows]` is a forward's duration in ms; at most `len(cost) - 2` drafts go into a step.
    """

    def __init__(self, cost: Sequence[float] | _Floats) -> None:
        self._cost: _Floats = np.asarray(cost, dtype=np.float64)
        self._step_ms: list[float] = self._cost[1:].tolist()  # of one with 0, 1, ... drafts
        self._drafts = np.arange(len(self._cost) - 1)
        self._decodes = np.arange(_MOST_DECODES + 1)
        self._until = self._decodes[:, None] + self._drafts  # (s, n): tokens of the path up to the plan's end
        self._needed = self._until * (self._drafts > 0)  # 0 where the plan ends without drafts
        # The plan's own token, the first one that goes on, the one after that.
        self._bonus, self._after, self._second = self._until + 1, self._until + 2, self._until + 3
        self._tokens = np.arange(self._until[-1, -1] + 3)
        self._decoding = self._decodes[:, None] * self._cost[1]
        self._now_or_later_ms: _Floats = _NOW_OR_LATER * self._cost[1]
        self._solved: dict[tuple[float, float, float], _Reachable] = {}

    def choose(self, worth: Sequence[float], outlook: Outlook, may_decode: bool = True) -> Choice:
        """For pending drafts of this `worth`. Without `may_decode` at least one draft is verified or waited for.

        Then there must be one, or at least one for which the step has room.
        """
        pending = len(worth) + outlook.further_tokens
        if worth and worth[-1] >= _NEARLY_SURE and pending > len(self._drafts):  # this step and its path lack nothing
            drafts = self.fastest(worth[: outlook.most_drafts])
            return Choice(drafts if may_decode else max(drafts, 1), 0.0, outlook.asked_tokens)
        reachable = self._solve(outlook)
        reach = self._reach(worth, outlook)
        drafted_ms = self._drafted_ms(pending, outlook.next_ms, outlook.draft_ms)
        asked_ms, unasked_ms = drafted_ms.copy(), drafted_ms.copy()
        first, last = pending + 1, max(pending, outlook.asked_tokens) + 1
        asked_ms[first:last] = unasked_ms[first:last] = outlook.asked_ms
        asked_ms[last:] = np.maximum(drafted_ms[last:], outlook.rtt_ms if outlook.asked_tokens else outlook.asked_ms)
        if not outlook.asked_tokens:
            self._gather(unasked_ms, pending)
        if not outlook.may_ask:
            asked_ms = unasked_ms
        # Who may not decode may have to verify the token that ends the text.
        left = outlook.left_tokens if may_decode and outlook.left_tokens <= len(self._drafts) else 0
        for here_in in (asked_ms, unasked_ms) if left else ():  # the last ones are sent as soon as they are drafted
            here_in[:left] = np.minimum(here_in[:left], drafted_ms[left - 1])
        path = _Path(reach, pending, drafted_ms, asked_ms, unasked_ms, outlook.rtt_ms, outlook.may_ask, left)
        values, asks = self._values(path, reachable)
        values -= _DOUBT * (asked_ms.take(self._needed) > self._decoding)
        values[:, outlook.most_drafts + 1 :] = -np.inf
        if not may_decode:
            values[1:] = -np.inf
            values[0, 0] = -np.inf
        best = int(values.argmax())
        decodes, drafts = divmod(best, len(self._drafts))
        asks_for = min(int(asks.flat[best]), decodes + outlook.most_drafts) if outlook.may_ask else 0
        asked = asks_for if asks_for > max(pending, decodes) else 0
        asked = max(asked, outlook.asked_tokens)  # what was asked for is on its way
        return Choice(0, 0.0, asked) if decodes else Choice(drafts, float(asked_ms[drafts]), asked)

    def fastest(self, worth: Sequence[float]) -> int:
        """How many of these drafts to verify for the most tokens per ms of this step alone."""
        best, tokens = 0, 1.0
        most = tokens / self._step_ms[0]
        for drafts, (reach, cost_ms) in enumerate(zip(worth, self._step_ms[1:], strict=False), 1):
            tokens += reach
            if tokens / cost_ms > most:
                best, most = drafts, tokens / cost_ms
        return best

    def recycled_rows(self, worth: Sequence[float], outlook: Outlook | None) -> int:
        """How many recycled rows of this worth a decode step should carry: as long as each is worth its time.

        Time is worth what drafts will make of it, or where none are to come what this step does.
        """
        if not worth or worth[0] < _LEAST_RECYCLED:
            return 0
        if outlook is None:
            return self.fastest(worth)
        cost = self._cost[1 : 2 + len(worth)]
        gains = np.cumsum([0.0, *worth[: len(cost) - 1]]) - self._solve(outlook).rate * cost
        return int(gains.argmax())

    def _solve(self, outlook: Outlook) -> _Reachable:
        """The rate at which the best plan after a break is worth nothing more than its time."""
        acceptance = min(max(round(outlook.acceptance, 2), _LEAST), _SURE)
        key = acceptance, float(f"{outlook.draft_ms:.2g}"), float(f"{outlook.rtt_ms:.2g}")
        found = self._solved.get(key)
        if found is not None:
            return found
        # The value falls with the rate: the secant method, from cloud-only's and from what a path that stands allows.
        last = 1.0 / float(self._cost[1])
        last_value, found = self._broken(last, *key)
        rate = last + last_value / (found.answer_ms + found.flow_ms + float(self._cost[1]))
        for _ in range(_MOST_ROUNDS if last_value > _SOLVED else 0):
            value, found = self._broken(rate, *key)
            if abs(value) <= _SOLVED or value == last_value:
                break
            last, rate, last_value = rate, rate - value * (rate - last) / (value - last_value), value
        if len(self._solved) >= _MAX_SOLVED:
            self._solved.clear()
        self._solved[key] = found
        return found

    def _broken(self, rate: float, acceptance: float, draft_ms: float, rtt_ms: float) -> tuple[float, _Reachable]:
        """What the best plan after a break is worth, should this be the rate."""
        reach = np.power(acceptance, self._tokens)
        asked_ms = self._drafted_ms(0, rtt_ms + draft_ms, draft_ms)
        unasked_ms = asked_ms.copy()
        self._gather(unasked_ms, 0)
        found = self._flow(acceptance, draft_ms, rtt_ms, rate)
        values, _ = self._values(_Path(reach, 0, asked_ms, asked_ms, unasked_ms, rtt_ms), found)
        return float(values.max()), found

    def _flow(self, acceptance: float, draft_ms: float, rtt_ms: float, rate: float) -> _Reachable:
        """What a path that stands is worth at this rate."""
        tokens = np.cumsum(np.power(acceptance, self._drafts))
        stands = np.power(acceptance, self._drafts + 1)
        step_ms = np.maximum(self._cost[1:], (self._drafts + 1) * draft_ms)
        values = (tokens - rate * step_ms) / (1.0 - stands)
        best = int(values.argmax())
        flow = max(float(values[best]), 0.0)
        flow_ms = float(step_ms[best] / (1.0 - stands[best])) if flow > 0.0 else 0.0
        cost_ms, stands = self._cost[1 : best + 2], stands[: best + 1]
        lacking_ms = np.maximum(best - np.floor(cost_ms / draft_ms), 0.0) * draft_ms
        waiting_ms = np.maximum(best - 1 - self._drafts[: best + 1], 0) * draft_ms
        gains = tokens[: best + 1] - rate * cost_ms
        most = float(gains[best] + stands[best] * flow)
        last = np.stack((self._after, np.minimum(self._until + (best + 1), len(self._tokens) - 1)))
        return _Reachable(
            rate, rtt_ms + draft_ms, flow, flow_ms, cost_ms, gains, stands, lacking_ms, waiting_ms, most, last
        )

    def _onward(self, reachable: _Reachable, here: _Ints, next_ms: _Floats) -> _Floats:
        """What a path is worth with so many tokens here, and further ones in `next_ms`; (ways, s, n).

        Those that are here are verified at once, or after one more decode step; or as many as are best are waited for.
        """
        now, later = self._verified(reachable, here - _NOW_OR_LATER, next_ms - self._now_or_later_ms)
        decoding = reachable.stands[0] * later + (1.0 - reachable.rate * self._cost[1])
        waiting_ms = np.maximum(reachable.waiting_ms.take(here, mode="clip") + next_ms, reachable.answer_ms)
        values: _Floats = np.maximum(np.maximum(now, decoding), reachable.most - reachable.rate * waiting_ms)
        return values

    def _verified(self, reachable: _Reachable, here: _Ints, next_ms: _Floats) -> _Floats:
        """What it is worth if of the tokens that are here as many as are best are verified, none where none is."""
        # Each table ends at the best number, and begins with none: what is beyond is clipped.
        lacking_ms, cost_ms = reachable.lacking_ms.take(here, mode="clip"), reachable.cost_ms.take(here, mode="clip")
        onward = self._paused(reachable, reachable.flow, np.maximum(lacking_ms, next_ms - cost_ms))
        stands, gains = reachable.stands.take(here, mode="clip"), reachable.gains.take(here, mode="clip")
        values: _Floats = gains + stands * onward
        return values

    def _paused(self, reachable: _Reachable, worth: float | _Floats, pause_ms: _Floats) -> _Floats:
        """What a path is worth now that is worth so much after a pause; one longer than an answer takes is no path."""
        decoding = (1.0 / self._cost[1] - reachable.rate) * np.maximum(pause_ms - reachable.answer_ms, 0.0)
        values: _Floats = np.maximum(worth - reachable.rate * pause_ms, decoding + np.minimum(worth, 0.0))
        return values

    def _reach(self, worth: Sequence[float], outlook: Outlook) -> _Floats:
        acceptance = min(max(outlook.acceptance, _LEAST), _SURE)
        known = min(len(worth), len(self._drafts) - 1)
        reach: _Floats = np.power(acceptance, self._tokens - known, dtype=np.float64)
        survives = acceptance**outlook.unknown_tokens
        reach *= worth[known - 1] if known else survives
        reach[1 : known + 1] = worth[:known]
        reach[0] = 1.0  # part of no plan, but it must not swamp the sums
        return reach

    def _drafted_ms(self, pending: int, next_ms: float, draft_ms: float) -> _Floats:
        """When the path's first j tokens could be here, j = 0, 1, ...; in ms from now."""
        drafted_ms: _Floats = self._tokens * draft_ms + (next_ms - (pending + 1) * draft_ms)
        drafted_ms[: pending + 1] = 0.0
        return drafted_ms

    def _gather(self, here_in: _Floats, pending: int) -> None:
        """Let tokens that nobody asked for come as they do: in one message just before a step, and then in the next.

        The edge takes all that it has sent to be verified at once, and aims its next message at the end of that; where
        it has sent nothing, at the end of a decode step.
        """
        most = len(self._drafts) - 1
        at_ms = self._cost[1 + min(pending, most)]
        if not pending:
            at_ms *= max(ceil((here_in[1] + _AIMED_MS) / at_ms), 1)
        count = max(int(np.searchsorted(here_in, at_ms - _AIMED_MS, side="right")) - 1, pending)
        rows = min(count - pending, most)
        here_in[pending + 1 : count + 1] = at_ms
        here_in[count + 1 :] = np.maximum(here_in[count + 1 :], at_ms + self._cost[1 + rows])

    def _values(self, path: _Path, reachable: _Reachable) -> tuple[_Floats, _Ints]:
        """What each plan (s, n) is worth, and for how many of the path's tokens it asks."""
        gained = path.reach.cumsum()
        tokens = gained.take(self._until) - (gained[: len(self._decodes)] - self._bonus[:, 0])[:, None]
        took_ms = np.maximum(path.asked_ms.take(self._needed), self._decoding) + self._cost[1:]
        waits = self._needed > path.pending
        goes_on_ms, here, next_ms = self._behind(path, reachable, took_ms, waits)
        onward = self._onward(reachable, here - self._after, next_ms)
        onward = self._paused(reachable, onward, goes_on_ms - took_ms)
        best, asks = onward[0], self._until * waits
        if path.may_ask:
            asked = np.maximum(onward[1], onward[2])
            is_asked = ~waits & (asked > best + _LEAST_GAIN)
            best = np.where(is_asked, asked, best)
            asks = np.where(is_asked, np.where(onward[2] > onward[1], here[2], here[1]) - 1, asks)
        behind: _Floats = path.reach.take(self._bonus) * best
        if path.left:
            behind, asks = self._ending(path, reachable, gained, took_ms), np.minimum(asks, path.left - 1)
        return tokens - reachable.rate * took_ms + behind, asks

    def _ending(self, path: _Path, reachable: _Reachable, gained: _Floats, took_ms: _Floats) -> _Floats:
        """What the tokens are worth that the text still lacks behind each plan (s, n), if its path stands.

        They commit as they are drafted, as long as they are right, and one more step verifies the last of them. No plan
        goes beyond the end.
        """
        left, last, stands = path.left - self._bonus, path.left - 1, path.reach.take(self._bonus)
        tokens = stands + gained[last] - gained.take(self._bonus)
        pause_ms = np.maximum(path.asked_ms[last] - took_ms, 0.0) / np.maximum(left, 1)
        step_ms = self._cost.take(np.maximum(left, 0))
        values: _Floats = tokens * (1.0 - reachable.rate * pause_ms) - stands * reachable.rate * step_ms
        return np.where(left > 0, values, np.where(left < 0, -np.inf, 0.0))

    def _behind(
        self, path: _Path, reachable: _Reachable, took_ms: _Floats, waits: NDArray[np.bool_]
    ) -> tuple[_Floats, _Ints, _Floats]:
        """How the path goes on behind each plan: (1 or 3 ways, s, n).

        When its first token behind the plan is here, how many tokens of the path are here then, and when the next is.
        The first way asks for no more than what the plan waits for itself. The others ask for tokens behind it, at
        least up to `reachable.last`: those that will be here by then.
        """
        shape = 3 if path.may_ask else 1, *took_ms.shape
        goes_on_ms, here, next_ms = np.empty(shape), np.empty(shape, dtype=np.intp), np.empty(shape)
        # An edge that was asked aims its next message at the end of the step that waited for this one.
        aimed_ms, unasked_ms = path.drafted_ms + _AIMED_MS, path.unasked_ms
        told_ms = np.maximum(path.drafted_ms.take(self._after), took_ms + path.rtt_ms)  # if the plan's commit asks
        first_ms = np.minimum(unasked_ms.take(self._after), told_ms)
        np.copyto(first_ms, aimed_ms.take(self._after), where=waits)
        first_ms = np.maximum(first_ms, took_ms, out=goes_on_ms[0])
        count = unasked_ms.searchsorted(first_ms, "right")
        np.copyto(count, aimed_ms.searchsorted(first_ms, "right"), where=waits)
        np.maximum(count, self._second, out=here[0])
        np.subtract(unasked_ms.take(here[0], mode="clip"), first_ms, out=next_ms[0])
        np.copyto(next_ms[0], 0.0, where=waits)
        if path.may_ask:
            answered_ms = np.maximum(path.asked_ms, path.rtt_ms)
            answered_ms[: path.pending + 1] = 0.0
            asked_ms = np.maximum(answered_ms.take(reachable.last), took_ms, out=goes_on_ms[1:])
            here[1:] = answered_ms.searchsorted(asked_ms, "right")
            drafted_ms = path.drafted_ms.take(here[1:], mode="clip")
            np.maximum(drafted_ms - asked_ms, 0.0, out=next_ms[1:])
        return goes_on_ms, here, next_ms
