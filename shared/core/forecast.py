"""When drafts will be here: the verifier's picture of an edge that drafts on while its messages travel.

The edge's path is right up to a length, as far as is known, and goes on from there by one token every `draft_ms`. Three
events correct that picture:

    a draft came         what it reaches is here now; the next token is one draft later
    a commit broke it    the edge hears of it half a round trip later and drafts on from the commit's end
    a commit overtook it a slow edge has not drafted so far yet: it takes the commit's tokens over, and drafts on

An edge sends about once a step, aimed to land just before one. So a message is due when the last one is as old as they
usually are; one that is a little late is worth waiting for, as a step without it commits a single token.

Committed tokens that the path is not known to agree with are unknown: the drafts on their way are of use only if all of
them agree. When a draft shows that one did not, the edge's path broke at the commit of that token.
Times are seconds on the caller's clock, durations milliseconds.
"""

from bisect import bisect_right
from collections import deque
from math import inf

_GAIN = 0.25
_FADING = 0.98
_REMEMBERED = 64  # commits; older ones are answered by now
_OVERDUE_MS, _OVERDUE_SHARE = 3.0, 0.25  # of an answer: drafts that were asked for and are later will not come
_LATE = 0.3  # of the usual time between messages: one that is later does not count as due any more


class Forecast:
    """Where the path is known to stand, and from when on its next tokens arrive."""

    __slots__ = (
        "_arrived_at", "_asked_at", "_asked_len", "_commits", "_every_ms", "_known_at", "_known_len", "_late_ms",
        "_step_ms", "draft_ms", "rtt_ms",
    )  # fmt: skip

    def __init__(self, length: int, now: float) -> None:
        self.draft_ms = 0.0  # per token; 0: unknown
        self.rtt_ms = 0.0  # 0: unknown
        self._known_len = length
        self._known_at = now
        self._late_ms = 0.0
        self._arrived_at = -inf  # the last message with drafts of the path as it stands
        self._asked_len = 0  # what a commit has asked for, up to here; 0: nothing
        self._asked_at = now
        self._every_ms = 0.0  # from one to the next, smoothed; 0: unknown
        self._step_ms = 0.0  # from commit to commit, the last time
        self._commits: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)  # (end, when)

    def __repr__(self) -> str:
        return f"<Forecast {self._known_len} known, {self.draft_ms:.1f} ms each, {self.answer_ms:.0f} ms to answer>"

    @property
    def answer_ms(self) -> float:
        """From a commit to the arrival of what is drafted at once on hearing of it, drafting apart."""
        return self.rtt_ms + self._late_ms

    def unknown_tokens(self, committed_len: int) -> int:
        """Committed tokens that the path on its way may differ from."""
        return max(committed_len - self._known_len, 0)

    def next_ms(self, length: int, now: float) -> float:
        """Until the path's token at this position is here; what is overdue for a step may be so for as long again."""
        expected_ms = self._expected_ms(length, now)
        return max(expected_ms, -expected_ms - self._step_ms, 0.0)

    def landed_tokens(self, length: int, now: float) -> int:
        """How many tokens of the path from this position on will be here a step from now, if it lasts as the last."""
        left_ms = self._step_ms - self.next_ms(length, now)
        return 1 + int(left_ms / self.draft_ms) if self.draft_ms and left_ms >= 0.0 else 0

    def asked(self, length: int, now: float) -> None:
        """A commit asks for drafts up to this length, 0: for none; what was asked before keeps its time."""
        if length != self._asked_len or not self._is_asked(now):
            self._asked_len, self._asked_at = length, now

    def asked_tokens(self, committed_len: int, now: float) -> int:
        """How many drafts will come together, as they were asked for; 0 when no wait for them would still go on."""
        return max(self._asked_len - committed_len, 0) if self._is_asked(now) else 0

    def asked_ms(self, now: float) -> float:
        """Until drafts are here that a commit has asked for, or could have asked for, or that are due unasked."""
        if self._is_asked(now):
            return self._asked_in_ms(now)
        committed_at = self._commits[-1][1] if self._commits else -inf
        asked_ms = (committed_at - now) * 1000 + self.answer_ms if self._commits else 0.0
        if self._arrived_at > committed_at:  # the answer was that, and only a commit asks again
            asked_ms = inf
        due_ms = (self._arrived_at - now) * 1000 + self._every_ms
        late_ms = due_ms + _LATE * self._every_ms  # left of the time for which it counts as due
        return min(asked_ms, due_ms if due_ms > 0.0 else late_ms) if late_ms > 0.0 else asked_ms

    def committed(self, length: int, is_break: bool, now: float) -> None:
        """Tokens up to `length` are committed; `is_break`: pending drafts differed."""
        if self._commits:
            self._step_ms = (now - self._commits[-1][1]) * 1000
        else:  # while the prompt was read the edge had no cause to send more: that is no silence
            self._known_at = max(self._known_at, now - self.draft_ms / 1000)
        self._commits.append((length, now))
        self._late_ms *= _FADING
        answered_at = now + self.answer_ms / 1000
        overtaken = self._known_at + (length - self._known_len) * self.draft_ms / 1000 > answered_at
        if is_break:
            self._arrived_at = -inf
        if is_break or overtaken:
            self._known_len, self._known_at = length, answered_at

    def arrived(self, length: int, was_awaited: bool, now: float) -> None:
        """A draft up to `length` stands, as far as anything is known of it; a step may have waited for it."""
        if self._arrived_at > -inf:
            every_ms = (now - self._arrived_at) * 1000
            self._every_ms += (every_ms - self._every_ms) * (_GAIN if self._every_ms else 1.0)
        expected_ms, asked_ms = self._expected_ms(length - 1, now), self.asked_ms(now)
        early_ms = max(expected_ms, asked_ms) if asked_ms < inf else expected_ms
        self._arrived_at = now
        if length >= self._asked_len or (now - self._asked_at) * 1000 >= self.rtt_ms:
            self._asked_len = 0
        if length < self._known_len:
            return
        if was_awaited:
            self._late_ms = max(0.0, self._late_ms - early_ms * _GAIN)
        self._known_len, self._known_at = length, now

    def differed(self, position: int) -> None:
        """A draft had another token at this committed position: the edge goes on behind its commit."""
        if position < self._known_len:
            return  # of a path that was given up before
        index = bisect_right(self._commits, (position, float("inf")))
        if index < len(self._commits):
            self._arrived_at = -inf
            self._known_len, sent_at = self._commits[index]
            self._known_at = sent_at + self.answer_ms / 1000

    def _is_asked(self, now: float) -> bool:
        """Whether a commit has asked for drafts, and a wait for them would still go on."""
        return self._asked_len > 0 and self._asked_in_ms(now) > -_OVERDUE_MS - _OVERDUE_SHARE * self.answer_ms

    def _asked_in_ms(self, now: float) -> float:
        asked_ms = (self._asked_at - now) * 1000 + self.answer_ms
        return max(asked_ms, self._expected_ms(self._asked_len - 1, now))

    def _expected_ms(self, length: int, now: float) -> float:
        return (self._known_at - now) * 1000 + (length - self._known_len + 1) * self.draft_ms
