"""What time per token drafting ahead gives at given speeds: an event simulation of one answer, without any overhead.

The edge drafts without a pause, each token leaving at once. The verifier takes what is there, holds for more, or
decodes by itself, by a `Rule`. What is idealised: messages cost nothing, every duration is exact, and the verifier
knows when drafts will arrive. So `best_tpot_ms`, the best of many rules, is a limit that no real verifier beats by
much, but for what guesses from rejected paths and checked copies bring: here a forward is a token, on the edge as on a
verifier that decodes. `TAKE_ALL`, which never holds, gives a forecast of the runtime once it is scaled by what was
measured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

LONGEST_RTT_MS = 2000.0


@dataclass(frozen=True)
class Measured:
    """One answer as measured, durations in ms.

    `right[i]` says whether the draft model proposes token i of the text after its true prefix; `cost_ms` is the
    duration of a target step by its rows. `ahead_ms`: how much sooner the edge has read the prompt than the verifier,
    each from when it has it; negative: later.
    """

    right: Sequence[bool]
    draft_ms: float
    cost_ms: Callable[[int], float]
    up_ms: float
    down_ms: float
    ahead_ms: float = 0.0


@dataclass(frozen=True)
class Rule:
    """How the verifier decides: at most `most_drafts` a step; wait for `wanted` of them, if within `hold_ms`.

    With `waits_for_last` for all drafts that the text lacks, also if they come later, but before a step would end.
    """

    most_drafts: int
    wanted: int
    hold_ms: float
    waits_for_last: bool = False


TAKE_ALL = Rule(most_drafts=16, wanted=0, hold_ms=0.0)


def best_tpot_ms(answers: Sequence[Measured]) -> float:
    """Mean TPOT over the answers under the one rule that is best for them."""
    step_ms = min(answer.cost_ms(1) for answer in answers)
    return min(sum(tpot_ms(answer, rule) for answer in answers) for rule in _rules(step_ms)) / len(answers)


def tpot_ms(answer: Measured, rule: Rule) -> float:
    """(last - first) / (n - 1) at the user, for two tokens or more."""
    total = len(answer.right)
    edge = _Edge(answer)
    now, committed = 0.0, 1  # the prompt's step commits the first token
    shown_at = [answer.down_ms]
    edge.told(answer.down_ms, 1)
    while committed < total:
        count, last = edge.arrived(committed, now), total - committed - 1
        wanted, hold_ms = min(rule.wanted, last), rule.hold_ms
        if rule.waits_for_last and last <= rule.most_drafts:
            wanted, hold_ms = last, max(hold_ms, answer.cost_ms(1 + min(count, last)))
        if count < wanted:
            then = edge.arrives(committed, wanted, now + hold_ms)
            if then is not None:
                now, count = then, wanted
        rows = min(count, rule.most_drafts, last)
        now += answer.cost_ms(1 + rows)
        committed += 1 + edge.right_run(committed, rows)
        edge.told(now + answer.down_ms, committed)
        shown_at.append(now + answer.down_ms)
    return (shown_at[-1] - shown_at[0]) / (total - 1)


def paying_rtt_ms(tpot_at: Callable[[float], float], enough_ms: float) -> float:
    """The longest round trip, up to `LONGEST_RTT_MS`, at which TPOT is no more than `enough_ms`; 0 where none is.

    `tpot_at` gives the TPOT by the round trip; on the whole it must not fall.
    """
    low, high = 0.0, LONGEST_RTT_MS
    if tpot_at(high) <= enough_ms:
        return high
    while high - low > 1.0:
        middle = (low + high) / 2
        low, high = (middle, high) if tpot_at(middle) <= enough_ms else (low, middle)
    return round(low)


def _rules(step_ms: float) -> Iterator[Rule]:
    for most, wanted, hold in product((2, 4, 8, 16, 32), (0, 1, 2, 3, 4, 6, 8, 12, 16), (0.1, 0.25, 0.5, 1.0, 2.0)):
        if wanted <= most and (wanted or hold == 0.1):
            yield Rule(most, wanted, hold * step_ms)
            yield Rule(most, wanted, hold * step_ms, waits_for_last=True)


@dataclass
class _Run:
    """A stretch of drafting: from `since` until `until` one token after another, the first at position `start`.

    The token at position `wrong` is the first that is not the target's.
    """

    start: int
    since: float
    wrong: int
    until: float = math.inf


class _Edge:
    """The edge's drafting over time: one run after another, each begun by a commit that the one before it missed."""

    def __init__(self, answer: Measured) -> None:
        self._answer = answer
        self._next_wrong = [len(answer.right)] * (len(answer.right) + 1)
        for index in range(len(answer.right) - 1, -1, -1):
            self._next_wrong[index] = self._next_wrong[index + 1] if answer.right[index] else index
        # The prompt was on its way for `up_ms`, too.
        self._runs = [self._run(0, -answer.up_ms - answer.ahead_ms)]
        self._news: list[tuple[float, int]] = []

    def told(self, at: float, committed: int) -> None:
        """A commit will arrive."""
        self._news.append((at, committed))

    def right_run(self, committed: int, rows: int) -> int:
        """How many of the next `rows` drafts are accepted."""
        return min(rows, self._next_wrong[committed] - committed)

    def arrived(self, committed: int, now: float) -> int:
        """Drafts at the verifier that extend the committed tokens."""
        self._advance(now - self._answer.up_ms)
        return max((self._count(run, committed, now) for run in self._runs[-2:]), default=0)

    def arrives(self, committed: int, wanted: int, limit: float) -> float | None:
        """When there will be `wanted` of them, unless that is after `limit`."""
        self._advance(limit - self._answer.up_ms)
        times = [
            run.since + (committed + wanted - run.start) * self._answer.draft_ms
            for run in self._runs[-2:]
            if run.start <= committed <= run.wrong
        ]
        ends = [run.until for run in self._runs[-2:] if run.start <= committed <= run.wrong]
        found = [time + self._answer.up_ms for time, end in zip(times, ends, strict=True) if time <= end]
        return min((time for time in found if time <= limit), default=None)

    def _count(self, run: _Run, committed: int, now: float) -> int:
        if not run.start <= committed <= run.wrong:
            return 0
        drafted_until = min(now - self._answer.up_ms, run.until)
        drafted = math.floor((drafted_until - run.since) / self._answer.draft_ms + 1e-9)
        return max(0, run.start + drafted - committed)

    def _advance(self, now: float) -> None:
        """Let the edge read what has come until now."""
        while self._news and self._news[0][0] <= now:
            at, committed = self._news.pop(0)
            run = self._runs[-1]
            drafted = run.start + max(0, math.floor((at - run.since) / self._answer.draft_ms + 1e-9))
            if run.wrong < min(committed, drafted) or drafted < committed:
                # The token that is being drafted is finished first.
                since = run.since + math.ceil((at - run.since) / self._answer.draft_ms - 1e-9) * self._answer.draft_ms
                run.until = at
                self._runs.append(self._run(committed, max(at, since, run.since)))  # it may still be reading

    def _run(self, start: int, since: float) -> _Run:
        return _Run(start, since, self._next_wrong[min(start, len(self._next_wrong) - 1)])
