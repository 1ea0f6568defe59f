"""Which sessions a target step serves, and with how many rows: the choice that commits most, fairly shared.

Theory of operation
-------------------
A step of R rows takes cost_ms(R), a curve that was measured: nearly flat while the weights' way through the memory is
the bottleneck, then rising, with jumps. What it is worth is the expected number of tokens that it commits, each counted
with the weight of its session. The rate, worth per ms, is to be as large as possible:

    rows            worth
    base row        weight * 1            the last committed token: its successor is committed whatever the drafts are
    draft row i     weight * worth[i]     the probability that the whole path up to it is accepted

With weight = 1 / smoothed goodput, the weighted rate is the gradient of the sum of log(goodput) over the sessions, so a
step per step the choice climbs to proportional fairness (GoodSpeed). Within one session taking rows by falling worth is
DySpec's greedy growth of a token tree. So both are one greedy order: all rows of all sessions by falling worth. The
worth of a session's rows never rises from one to the next, so every prefix of that order can be carried out (a base
before its drafts, a parent before its child), and no other choice of as many rows is worth more. The best step is
therefore a prefix, and the one of the best rate is found by looking at all of them: with jumps in the curve the rate
may fall and rise again. (A session that may not decode without drafts has its base and its first draft as one
item of two rows; then the order is the usual greedy one for a knapsack.)

Fairness over seconds is not enough for somebody who watches the text: who has waited for `max_step_ms` is served by
this step, whatever that costs the rate, and only its drafts compete.

Self-decode rows that only spare capacity may pay for (`Decodes.SPARE`), and the recycled rows behind them, come after
that choice is made, as long as they do not lower the rate. Prompts, and caches that must be rebuilt, are read in
chunks, first come first served, one chunk a step in all; beside running sessions it is cut so that the step keeps to
`max_step_ms` (Sarathi-Serve's stall-free batching).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.core.policies import Allotment, Decodes, Offer, Outlook
from shared.policy.step_rule import StepRule

_SLACK_MS = 3.0  # a hold waits this much longer than it should take, and a part of the round trip: links jitter
_SLACK_SHARE = 0.25
LEAST_CHUNK_ROWS = 16  # a prompt always goes on by so many rows a step

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


class BestRate:
    """The `StepPolicy` of the module's theory of operation.

    `cost_ms` gives the duration of a forward by its rows, up to `max_rows`, which no step exceeds.
    """

    def __init__(
        self,
        cost_ms: Callable[[int], float],
        max_rows: int,
        prefill_chunk_tokens: int = 256,
        max_step_ms: float = 200.0,
        max_draft_rows: int = 16,
    ) -> None:
        self._cost: _Floats = np.array([cost_ms(max(rows, 1)) for rows in range(max_rows + 1)])
        self._max_rows = max_rows
        self._chunk_rows = min(prefill_chunk_tokens, max_rows)
        self._max_wait_ms = max_step_ms
        self._step_rule = StepRule(self._cost[: max_draft_rows + 2])
        self._rows_in_time = max(int(np.searchsorted(self._cost, max_step_ms, side="right")) - 1, 0)

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        """See `StepPolicy`."""
        if len(offers) == 1 and not offers[0].prefill_rows:
            offer = offers[0]
            if offer.outlook is not None:
                return self._allot_one(offer, offer.outlook)
            if offer.decodes is not Decodes.NEVER:
                return Allotment([self._with_recycled(offer, 1 + self._step_rule.fastest(offer.worth))])
        return Allotment(self._allot_shared(offers))

    def _allot_one(self, offer: Offer, outlook: Outlook) -> Allotment:
        choice = self._step_rule.choose(offer.worth, outlook, offer.decodes is not Decodes.NEVER)
        if choice.drafts > len(offer.worth):
            # What is due may not come, but what is asked for will.
            hold_ms = max(choice.hold_ms, outlook.rtt_ms) if outlook.may_ask else choice.hold_ms
            hold_ms += _SLACK_MS + _SLACK_SHARE * outlook.rtt_ms
            return Allotment([0], hold_ms=hold_ms, asked_tokens=choice.asked)
        return Allotment([self._with_recycled(offer, 1 + choice.drafts)], asked_tokens=choice.asked)

    def _with_recycled(self, offer: Offer, rows: int) -> int:
        """These, or where that is a decode step with recycled rows, as many as pay."""
        return rows if rows > 1 else rows + self._step_rule.recycled_rows(offer.recycled, offer.outlook)

    def _allot_shared(self, offers: Sequence[Offer]) -> list[int]:
        grants = [0] * len(offers)
        self._allot_late(offers, grants)
        prompts = [index for index, offer in enumerate(offers) if offer.prefill_rows]
        if prompts:
            other_rows = _Items(offers, grants).take_best(self._cost)
            self._allot_chunk(offers, prompts, other_rows, grants)
        items = _Items(offers, grants)
        items.take_best(self._cost)
        items.grant(grants)
        self._allot_spare(offers, grants)
        return grants

    def _allot_late(self, offers: Sequence[Offer], grants: list[int]) -> None:
        """Who has waited for too long, the longest first."""
        room = self._max_rows
        late = [index for index, offer in enumerate(offers) if offer.waited_ms >= self._max_wait_ms]
        for index in sorted(late, key=lambda index: -offers[index].waited_ms):
            least = _least_rows(offers[index])
            if least <= room and not offers[index].prefill_rows:
                grants[index] = least
                room -= least

    def _allot_chunk(self, offers: Sequence[Offer], prompts: list[int], other_rows: int, grants: list[int]) -> None:
        room = self._chunk_rows
        if other_rows:
            in_time = max(self._rows_in_time - other_rows, LEAST_CHUNK_ROWS)
            room = min(room, in_time, self._max_rows - sum(grants))
        for index in sorted(prompts, key=lambda index: -offers[index].waited_ms):
            grants[index] = min(offers[index].prefill_rows + 1, room)
            room -= grants[index]
            if not room:
                break

    def _allot_spare(self, offers: Sequence[Offer], grants: list[int]) -> None:
        num_rows = sum(grants)
        room = self._max_rows - num_rows
        spare = [
            index
            for index, offer in enumerate(offers)
            if offer.decodes is Decodes.SPARE and not (grants[index] or offer.worth or offer.prefill_rows)
        ]
        if not spare or room < 1:
            return
        # A row is worth no less than the one behind it, so each prefix of this order can be carried out.
        rows = [(offers[index].weight * worth, index) for index in spare for worth in (1.0, *offers[index].recycled)]
        rows = sorted(rows, key=lambda row: -row[0])[:room]
        worth = sum(_expected(offer, granted) for offer, granted in zip(offers, grants, strict=True))
        gains = np.cumsum([0.0] + [gain for gain, _ in rows])
        rates = (worth + gains) / self._cost[num_rows : num_rows + len(gains)]
        if not num_rows:
            rates[0] = 0.0
        best = len(rates) - 1 - int(rates[::-1].argmax())
        for _, index in rows[:best]:
            grants[index] += 1


class _Items:
    """The rows that compete for what is left of a step, in greedy order, and how many of them are taken."""

    def __init__(self, offers: Sequence[Offer], grants: Sequence[int]) -> None:
        """`grants` are in the step anyway; what an offer has beyond its grant competes, a prompt's base row never."""
        worth: list[float] = []
        counts, owners, weights, pairs = list[int](), list[int](), list[float](), list[int]()
        self._base_rows = sum(grants)
        self._base_worth = 0.0
        waited = [offer.waited_ms for offer in offers]
        for index in sorted(range(len(offers)), key=waited.__getitem__, reverse=True):
            offer, rows = offers[index], grants[index]
            before = len(worth)
            if rows > offer.prefill_rows:
                self._base_worth += _expected(offer, rows)
                worth += offer.worth[rows - offer.prefill_rows - 1 :]
            elif offer.prefill_rows or not _least_rows(offer):
                continue
            else:
                if offer.decodes is Decodes.NEVER:
                    pairs.append(before)
                worth.append(1.0)
                worth += offer.worth
            counts.append(len(worth) - before)
            owners.append(index)
            weights.append(offer.weight)
        gains: _Floats = np.array(worth) * np.repeat(np.array(weights), counts)
        owner: _Ints = np.repeat(np.array(owners, dtype=np.int64), counts)
        sizes: _Ints = np.ones(len(worth), dtype=np.int64)
        if pairs:  # the base and the first draft are one item
            first = np.array(pairs)
            gains[first] += gains[first + 1]
            sizes[first] = 2
            rest = np.ones(len(worth), dtype=np.bool_)
            rest[first + 1] = False
            gains, owner, sizes = gains[rest], owner[rest], sizes[rest]
        order = np.argsort(-gains / sizes, kind="stable")
        self._owner = owner[order]
        self._sizes = sizes[order]
        self._gains = np.cumsum(gains[order])
        self._ends = np.cumsum(self._sizes)
        self._num_taken = 0

    def take_best(self, cost: _Floats) -> int:
        """Take the prefix of the best rate; returns the rows of the step with it."""
        fitting = int(np.searchsorted(self._ends, len(cost) - 1 - self._base_rows, side="right"))
        worths = self._base_worth + np.concatenate(([0.0], self._gains[:fitting]))
        ends = self._base_rows + np.concatenate(([0], self._ends[:fitting]))
        self._num_taken = int((worths / cost[ends]).argmax())
        return int(ends[self._num_taken])

    def grant(self, grants: list[int]) -> None:
        """Add the rows that were taken to their owners' grants."""
        taken = np.bincount(self._owner[: self._num_taken], self._sizes[: self._num_taken], len(grants))
        for index in np.flatnonzero(taken):
            grants[index] += int(taken[index])


def _least_rows(offer: Offer) -> int:
    """Rows that commit a token of a session without a prompt to read: 0 where it must wait for drafts or spare room."""
    if offer.decodes is Decodes.FREELY:
        return 1
    if not offer.worth:
        return 0
    return 2 if offer.decodes is Decodes.NEVER else 1


def _expected(offer: Offer, rows: int) -> float:
    """What these rows of an offer are worth."""
    drafts = rows - offer.prefill_rows - 1
    return offer.weight * (1.0 + sum(offer.worth[:drafts])) if drafts >= 0 else 0.0
