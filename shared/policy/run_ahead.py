"""How far the edge drafts ahead, and when it sends: pure decisions on what was observed.

Run-ahead drafts on without waiting for answers. Two things bound it: what a further token is worth, and what the
verifier will hold. A token is worth the probability that the whole path up to it is right, by calibrated confidence;
below `_LEAST_WORTH` the rest of a path is wasted energy and bytes (DySpec, 2410.11744, stops growing a tree by the same
threshold). Tokens are also not drafted while hardly any of them is of use: because most are wrong, or because the
verifier goes on faster by itself (cloud-only: drafting 0 tokens is a legal answer). Then only samples are drafted, so
that better times are noticed and the engine stays warm; of a draft that is nearly always wrong a single token now and
then, and one after the other as long as they are right. `draft_duty` below 1 raises both prices for devices that save
energy.

A message goes when it decides something. If the verifier holds its step, as soon as the tokens that it waits for are
here: how many the verifier chose for the most committed tokens per ms of drafting, link and forward (FlexSpec's K* is
that choice for one round of stop-and-wait; a longer delay makes it larger). Or sooner, if the path has become so
unlikely that drafting stopped (with both, PipeSD's dual trigger). If the verifier goes on by itself, just before its
next step begins, with all that is drafted by then. And at once if the text ends with it: nothing will be added.
"""

import math
from dataclasses import dataclass

from shared.core.policies import BURST_MESSAGES, DraftObservation
from shared.policy import branching

_LEAST_WORTH = 0.03
_LEAST_USE = 0.0025
_LEAST_ACCEPTANCE = 0.1  # less cannot gain a tenth, and takes all of a device's power
_SAMPLE_EVERY_TOKENS = 64  # committed ones
_SAMPLE_TOKENS = 16
_WRONG_SAMPLE_EVERY_TOKENS = 16  # of wrong drafts, one each; about so many has the engine to read if the link drops
_CHUNK_MS = 4.0  # a commit must not wait for a long draft call
_CHUNK_TOKENS, _SPARE_CHUNK_TOKENS = 8, 32  # and are more where no step lacks any
_WINDOW_PARTS = 8  # a window that is nearly full is filled by so large a part, where a call drafts so many at once
_SAFETY_MS = 1.5  # land this long before the step, and
_SAFETY_JITTERS = 2.0  # as many times the jitter: too early loses a token or two, too late a step
_GRAIN_MS = 0.5  # timers fire a little early or late
_LEAST_SHARE = 0.6  # of the time between two commits: forecasts fail where the verifier or the link is uneven
_INTERVAL_MS = 42.0  # 24 messages a second leave room for heartbeats below 30
_OPENING_MS = 20.0  # between the first messages: the verifier has read a short prompt any moment
_OPENING_SHARE = 1 / 4  # of the path, and no less, is in each of them: the first step has use for a few tokens only
_SPARED = 1.0  # the answer to a rejection, or to a hold, must not wait for its credit
_SPARE_TOKENS = 16  # with so many there already a step has no use for a message


@dataclass(frozen=True, slots=True)
class RunAhead:
    """Draft on while the verifier works; send just in time for its next step.

    There are four messages to three steps at most, or one every `_INTERVAL_MS` where steps take longer; and they are no
    less than `message_interval_ms` apart. Both on average, over a few of them: a rejection can be answered at once.
    """

    max_ahead_tokens: int = 48
    message_interval_ms: float = 0.0
    draft_duty: float = 1.0

    def draft_tokens(self, seen: DraftObservation) -> int:
        """Tokens to draft now: a few at a time, up to the depth that acceptance justifies."""
        price, most = 1.0 - self.draft_duty, self._chunk(seen)
        if seen.acceptance < _LEAST_ACCEPTANCE and not seen.was_right:
            is_due, most = seen.settled_tokens % _WRONG_SAMPLE_EVERY_TOKENS == 0 and not seen.ahead_tokens, 1
        else:
            is_sampling = seen.settled_tokens % _SAMPLE_EVERY_TOKENS < _SAMPLE_TOKENS
            is_due = is_sampling or seen.use >= max(price, _LEAST_USE)
        if not is_due:
            return 0
        window = min(self.max_ahead_tokens, seen.max_ahead)
        room = window - seen.ahead_tokens
        if not seen.awaited_tokens and room < min(most, window // _WINDOW_PARTS):
            return 0
        return max(0, min(room, most, self._worthwhile(seen, max(price, _LEAST_WORTH))))

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """Until the message would land just before the verifier's next step: sooner gains nothing.

        Every message costs its prefix hash, HTTP/2 framing and a wake-up at both ends, so a step
        has hardly more than one.
        """
        is_urgent = seen.is_fresh or seen.is_whole or seen.awaited_tokens > 0
        pause_ms = self._pause_ms(seen, is_urgent)
        if seen.is_whole:
            return pause_ms
        if not is_urgent:
            if is_drafting and not seen.interval_ms and seen.unsent_tokens < _OPENING_SHARE * seen.ahead_tokens:
                return math.inf
            pause_ms = max(pause_ms, _LEAST_SHARE * seen.interval_ms - seen.since_sent_ms)
        if seen.awaited_tokens:
            return math.inf if seen.unsent_tokens < seen.awaited_tokens and is_drafting else pause_ms
        if seen.spare_tokens >= _SPARE_TOKENS:
            return math.inf
        wait_ms = seen.until_step_ms - self._safety_ms(seen)
        if wait_ms < 0.0 and seen.since_sent_ms < _GRAIN_MS - wait_ms:
            wait_ms += seen.step_ms  # this step has its message
        return max(pause_ms, wait_ms)

    def sibling_price(self, seen: DraftObservation) -> float:
        """See `branching`."""
        return branching.sibling_price(self.draft_duty, seen.acceptance)

    def _pause_ms(self, seen: DraftObservation, is_urgent: bool) -> float:
        """Until a message keeps to the budget."""
        if not seen.interval_ms and not is_urgent:  # the verifier still reads the prompt
            interval_ms = _OPENING_MS if seen.credit > BURST_MESSAGES / 2 else _INTERVAL_MS
            return max(0.0, max(interval_ms, self.message_interval_ms) - seen.since_sent_ms)
        is_paid = seen.credit >= (1.0 if is_urgent else 1.0 + _SPARED)
        interval_ms = max(self.message_interval_ms, 0.0 if is_paid else _INTERVAL_MS)
        return max(0.0, interval_ms * BURST_MESSAGES - seen.since_burst_ms)

    def _worthwhile(self, seen: DraftObservation, least_worth: float) -> int:
        """How many more tokens are likely enough to be right."""
        if seen.reach <= least_worth:
            return 0
        if seen.acceptance >= 0.999:
            return self.max_ahead_tokens
        return math.ceil(math.log(least_worth / seen.reach) / math.log(max(seen.acceptance, 1e-3)))

    def _chunk(self, seen: DraftObservation) -> int:
        """Tokens of one call: it ends when a message is due, and when nothing is known takes a single one."""
        if not seen.draft_ms:
            return 1
        left_ms = seen.until_step_ms - self._safety_ms(seen)
        in_time = int((min(left_ms, _CHUNK_MS) if left_ms > 0.0 else _CHUNK_MS) / seen.draft_ms)
        most = _SPARE_CHUNK_TOKENS if seen.spare_tokens >= _SPARE_TOKENS else _CHUNK_TOKENS
        lacking = seen.awaited_tokens - seen.unsent_tokens
        return max(1, min(most, in_time, lacking if lacking > 0 else most))

    def _safety_ms(self, seen: DraftObservation) -> float:
        return _SAFETY_MS + _SAFETY_JITTERS * seen.jitter_ms


@dataclass(frozen=True, slots=True)
class StopAndWait:
    """Draft a fixed number of tokens, send them in one message, wait for the answer (`run_ahead: false`)."""

    draft_tokens_per_round: int = 5

    def draft_tokens(self, seen: DraftObservation) -> int:
        """The rest of the round, unless it is out."""
        if seen.unsent_tokens < seen.ahead_tokens:
            return 0
        return max(0, min(self.draft_tokens_per_round, seen.max_ahead) - seen.ahead_tokens)

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        """Only when the round is complete."""
        return math.inf if is_drafting else 0.0

    def sibling_price(self, seen: DraftObservation) -> float:
        """See `branching`."""
        return branching.sibling_price(1.0, seen.acceptance)
