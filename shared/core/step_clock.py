"""The edge's picture of the verifier's steps: when the next one begins for which a message would be in time.

The verifier takes drafts in only between two steps, and each commit is sent at such a moment. From the last commit on,
its steps are played through: each takes as long as the last one with as many rows did, begins with what had landed
by then, and is taken to accept it all (where it does not, what is sent now is of no use anyway).

How many rows the next step has, and what a step takes that never had a like, the verifier says itself
(`Commit.next_rows`, `Commit.step_ms`). Rows are counted beside the last token's: drafts, or where a step has none,
maybe what the verifier has guessed.

A moment here is when a message would have to be sent to land at it: half a round trip before the verifier's own time.
Times are seconds on the caller's clock, durations milliseconds.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf

from shared.core.messages import Commit
from shared.core.policies import BURST_MESSAGES

_REMEMBERED = 24  # messages
_MOST_STEPS = 32  # that are played through
_LEAST_INTERVAL_MS = 15.0  # between commits that pay for a message: a token or two are not worth one
_MESSAGES_PER_STEP = 4 / 3  # with just one, each answer to a rejection would leave a step without
_GAIN = 1 / 4


@dataclass(frozen=True, slots=True)
class NextStep:
    """A message sent within `until_ms` lands before a step begins that would otherwise begin with `spare_tokens`.

    The step before it takes `step_ms`; 0: nothing is known yet.
    """

    until_ms: float
    step_ms: float
    spare_tokens: int


class StepClock:
    """What was sent when, and how long steps take."""

    __slots__ = (
        "_began", "_committed_at", "_curve_ms", "_is_awaited", "_is_opening", "_next_rows", "_sent_at", "_sent_to",
        "_step_ms", "credit", "error_ms", "interval_ms",
    )  # fmt: skip

    def __init__(self) -> None:
        self.error_ms = 0.0  # of the expected durations, smoothed
        self.interval_ms = 0.0  # from commit to commit, smoothed
        self.credit = float(BURST_MESSAGES)  # messages that commits have paid for; no more than these are saved up
        self._began = self._committed_at = 0.0
        self._is_awaited = False  # the step that goes on had waited for our message
        self._is_opening = False  # the next commit's step reads a prompt, too
        self._curve_ms: tuple[float, ...] = ()  # of a step by its rows, as expected by the verifier: its shape
        self._next_rows: int | None = None  # of the step that goes on, where the verifier said so
        self._step_ms: dict[int, float] = {}  # of the last step with so many rows
        # When each message was sent, and up to where the tokens of it and those before it go; both ascend. The first
        # one stands for what is forgotten.
        self._sent_at = [-inf] * (1 + _REMEMBERED)
        self._sent_to = [0] * (1 + _REMEMBERED)

    def committed(self, commit: Commit, awaited_len: int, rtt_ms: float, now: float) -> None:
        """A commit arrived: the next step began when it was sent.

        If it waits for drafts up to `awaited_len` (0: for none), it begins when these land, in case they were sent.
        What a step waits for other than these is part of it.
        """
        self._curve_ms = commit.step_ms or self._curve_ms
        if not self._is_opening:
            self._learn(commit)
        self._is_opening, self._next_rows = False, commit.next_rows
        since_ms = (now - self._committed_at) * 1000
        self.credit = min(self.credit + min(since_ms / _LEAST_INTERVAL_MS, _MESSAGES_PER_STEP), BURST_MESSAGES)
        if self._committed_at:
            self.interval_ms += _GAIN * (since_ms - self.interval_ms)
        self._committed_at = now
        answer = bisect_left(self._sent_to, awaited_len) if awaited_len else len(self._sent_to)
        self._is_awaited = answer < len(self._sent_to)
        self._began = now - rtt_ms / 1000
        if self._is_awaited:
            self._began = max(self._began, self._sent_at[answer])

    def opened(self) -> None:
        """The session was opened, maybe not for the first time: how long its first step takes is no use for others."""
        self._is_opening = True
        self._next_rows = None

    def sent(self, length: int, is_awaited: bool, now: float) -> None:
        """Drafts up to `length` are sent; if the verifier's step waits for them, it begins when they land."""
        del self._sent_at[1], self._sent_to[1]
        self._sent_at.append(now)
        self._sent_to.append(max(length, self._sent_to[-1]))
        self.credit = max(self.credit - 1.0, 0.0)
        if is_awaited:
            self._began, self._is_awaited = now, True

    def cut(self, length: int) -> None:
        """What was sent beyond `length` does not stand."""
        sent_to = self._sent_to
        beyond = bisect_right(sent_to, length)
        sent_to[beyond:] = [length] * (len(sent_to) - beyond)

    def interval_at(self, now: float) -> float:
        """From commit to commit, ms, smoothed; longer if the next one is late, 0 before the first two."""
        return max(self.interval_ms, (now - self._committed_at) * 1000) if self.interval_ms else 0.0

    def since_ms(self, messages: int, now: float) -> float:
        """Since the last message, or the one `messages` - 1 before it."""
        return (now - self._sent_at[-messages]) * 1000

    def next_step(self, committed_len: int, sent_len: int, now: float) -> NextStep:
        """The next one that a message sent now would be in time for."""
        began, length, step_ms, durations = self._began, committed_len, 0.0, self._step_ms
        sent_at, sent_to, told_rows = self._sent_at, self._sent_to, self._next_rows
        most = max(len(self._curve_ms) - 1, max(durations, default=0))
        for _ in range(_MOST_STEPS if durations or self._curve_ms else 0):
            drafts = sent_to[bisect_right(sent_at, began) - 1] - length  # those that have landed
            rows = drafts = 0 if drafts < 0 else drafts if drafts < most else most
            if told_rows is not None:
                rows, told_rows = told_rows, None
            step_ms = durations[rows] if rows in durations else self._expected_ms(rows)
            began += step_ms / 1000
            length += drafts + 1
            if began > now or not step_ms:
                break
        return NextStep(max(began - now, 0.0) * 1000, step_ms, max(sent_len - length, 0))

    def _learn(self, commit: Commit) -> None:
        step_ms = commit.verify_ms + (0.0 if self._is_awaited else commit.queue_ms)
        step_ms = step_ms or self.interval_ms  # they come in whole ms
        rows = commit.num_drafted or self._next_rows or 0  # without drafts they were the verifier's own guesses
        error_ms = abs(step_ms - self._step_ms.get(rows, step_ms))
        self.error_ms += _GAIN * (error_ms - self.error_ms)
        self._step_ms[rows] = step_ms

    def _expected_ms(self, rows: int) -> float:
        """Of a step with so many rows, where none had as many yet: by the one with the most below that.

        They are as different as the verifier's own curve has them; where it is not known, they are alike.
        """
        durations = self._step_ms
        if not durations:
            return self._curve(rows)
        fewer = [count for count in durations if count <= rows]
        like = max(fewer) if fewer else min(durations)
        return durations[like] * (self._curve(rows) / self._curve(like) if self._curve_ms else 1.0)

    def _curve(self, rows: int) -> float:
        return self._curve_ms[min(rows, len(self._curve_ms) - 1)]
