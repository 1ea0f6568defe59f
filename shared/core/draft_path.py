"""The edge's tokens: one log with what stands, then the own path; what draft engine and verifier have of it.

`sent_len` marks how much of the log was sent on this stream, either in the Open or as drafts.

The draft engine runs behind a queue, so this class tracks what its token list will be once everything queued is done:
`engine_len` tokens of the log. At most one `Draft` is in flight; when its result comes back it is laid on the log by
content: the log may have grown by a commit (the overlap must agree) or been cut (then the result is stale, and the
`Rollback` that was queued at the cut has already put the engine right).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.core.acceptance import Calibration
from shared.core.effects import Draft, Rollback
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.link import Link
from shared.core.messages import Commit
from shared.core.messages import Draft as DraftMessage
from shared.core.policies import BURST_MESSAGES, DraftObservation
from shared.core.siblings import PathSiblings, Siblings
from shared.core.step_clock import StepClock
from shared.core.tokens import TokenLog, quantize

_GAIN = 0.2
_USE_FADING = 0.98  # a committed token, of what is known of the use of drafts
_USE_PRIOR = 4.0  # tokens that were drafted, and of use, before anything is known


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a session knows of its draft at the end, for the next one with the same draft and verifier.

    `draft_ms` is per token, 0 while unknown.
    """

    calibration: Calibration
    sibling_calibration: Calibration
    draft_ms: float


class DraftPath:
    """The log, each token's confidence byte, and the draft in flight. Times in s, durations in ms."""

    def __init__(self, prompt: Sequence[int], learnt: Learnt | None = None) -> None:
        self.log = TokenLog(prompt)
        self.calibration = learnt.calibration.carried() if learnt else Calibration()
        self.siblings = PathSiblings(learnt.sibling_calibration.carried() if learnt else None)
        self.clock = StepClock()
        self.sent_len = len(self.log)
        self.in_flight: Draft | None = None
        self.is_exhausted = False  # the draft context is full, or the draft has nothing to say
        self.wasted_tokens = 0
        self.draft_ms = learnt.draft_ms if learnt else 0.0  # per token, smoothed; 0 while unknown
        self._confidence = bytearray(len(self.log))
        self._engine_len = 0
        self._drafting_since = 0.0
        self._is_fresh = False  # nothing was sent since the last cut
        self._awaited_len = 0  # a step of the verifier waits for drafts up to here
        self._is_held = False  # the next one
        self._recently_drafted = self._recently_used = _USE_PRIOR
        self._was_right = False  # the last drafted token that was judged

    def __len__(self) -> int:
        return len(self.log)

    def __repr__(self) -> str:
        state = f"{self.sent_len} sent, {self._engine_len} in the engine, acceptance {self.calibration!r}"
        return f"<DraftPath {len(self.log)} tokens, {state}>"

    @property
    def learnt(self) -> Learnt:
        """What is known of the draft by now."""
        return Learnt(self.calibration, self.siblings.calibration, self.draft_ms)

    @property
    def can_draft(self) -> bool:
        """Whether the draft engine is free and has room."""
        return self.in_flight is None and not self.is_exhausted

    @property
    def sent_siblings(self) -> int:
        """Siblings that were sent on this stream, of tokens that are not committed yet."""
        return self.siblings.num_sent(self.sent_len)

    def verifier_holds(self, length: int) -> None:
        """The verifier holds no more than so many tokens, siblings included, and dropped what is beyond."""
        self.sent_len = min(self.sent_len, length - self.sent_siblings)

    def observe(self, settled_len: int, held_len: int, link: Link, max_ahead: int, now: float) -> DraftObservation:
        """What the policy decides on; the own path begins at `settled_len`, the verifier will hold up to `held_len`."""
        step = self.clock.next_step(settled_len, self.sent_len, now)
        return DraftObservation(
            acceptance=self.calibration.overall,
            reach=self.calibration.reach(self._confidence[settled_len:]),
            use=self._recently_used / self._recently_drafted,
            was_right=self._was_right,
            draft_ms=self.draft_ms,
            jitter_ms=link.jitter_ms + self.clock.error_ms,
            until_step_ms=step.until_ms,
            step_ms=step.step_ms,
            spare_tokens=step.spare_tokens,
            settled_tokens=settled_len,
            ahead_tokens=len(self.log) - settled_len,
            unsent_tokens=max(0, min(len(self.log), held_len) - self.sent_len),
            awaited_tokens=max(0, min(self._awaited_len, held_len) - self.sent_len),
            is_fresh=self._is_fresh,
            max_ahead=max_ahead,
            interval_ms=self.clock.interval_at(now),
            since_sent_ms=self.clock.since_ms(1, now),
            since_burst_ms=self.clock.since_ms(BURST_MESSAGES, now),
            credit=self.clock.credit,
        )

    def draft(self, n: int, now: float) -> Draft:
        """The effect that drafts `n` more tokens; `drafted` must follow."""
        feed = self.log.tokens(self._engine_len)
        self._engine_len = len(self.log)
        self._drafting_since = now
        self.in_flight = Draft(len(self.log), self.log.hash_at(len(self.log)), feed, n)
        return self.in_flight

    def drafted(
        self,
        tokens: Sequence[int],
        confidence: Sequence[float],
        stop_ids: frozenset[int],
        now: float,
        siblings: Sequence[Siblings] = (),
    ) -> list[Rollback]:
        """The draft in flight came back: append what still stands, up to a stop token.

        Raises `LocalProtocolError` if none is in flight.
        """
        draft, self.in_flight = self.in_flight, None
        if draft is None:
            raise LocalProtocolError("drafted without a draft in flight")
        self.is_exhausted = not tokens and self.log.hash_at(len(self.log)) == draft.parent_hash
        self._recently_drafted += len(tokens)
        if tokens and len(draft.feed) <= 1 + draft.n:  # a prompt's evaluation says nothing about drafting
            elapsed_ms = (now - self._drafting_since) * 1000 / len(tokens)
            self.draft_ms += (elapsed_ms - self.draft_ms) * (_GAIN if self.draft_ms else 1.0)
        if not self.log.has_prefix(draft.start, draft.parent_hash):
            self.wasted_tokens += len(tokens)
            return []
        stop = next((index + 1 for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
        common = self.log.match(draft.start, tokens[:stop])
        if draft.start + common == len(self.log):
            self.siblings.put(len(self.log), siblings[common:stop])
            self._append(tokens[common:stop], bytes(map(quantize, confidence[common:stop])))
            common = stop
        self._engine_len = draft.start + common
        self.wasted_tokens += len(tokens) - common
        return [Rollback(self._engine_len)] if common < len(tokens) else []

    def news(self, commit: Commit, committed_len: int, vocabulary_size: int) -> tuple[int, ...]:
        """The commit's tokens beyond the committed ones. Raises `RemoteProtocolError` where it does not follow them."""
        repeated = min(committed_len - commit.start, len(commit.tokens))
        if repeated < 0 or self.log.match(commit.start, commit.tokens[:repeated]) < repeated:
            raise RemoteProtocolError(f"commit at {commit.start} does not follow the {committed_len} committed tokens")
        if max(commit.tokens, default=0) >= vocabulary_size:
            raise RemoteProtocolError(f"token {max(commit.tokens)} is outside of the vocabulary of {vocabulary_size}")
        return commit.tokens[repeated:]

    def lay(self, start: int, tokens: Sequence[int], num_accepted: int, hold_tokens: int) -> tuple[int, list[Rollback]]:
        """Commit tokens at `start`: cut the own path where it differs; returns how many it had right.

        The verifier had use for `num_accepted` drafts, and holds a coming step for `hold_tokens` further ones.
        """
        ahead = len(self.log) - start
        matched = self.log.match(start, tokens)
        end, failed = start + matched, int(matched < min(ahead, len(tokens)))
        self.calibration.observe(bytes(self._confidence[start:end]), bytes(self._confidence[end : end + failed]))
        self.calibration.refresh()
        self._was_right = not failed and (matched > 0 or self._was_right)
        differing = tokens[matched] if failed else None
        self.siblings.judged(end if failed else start + len(tokens) - 1, differing, num_accepted > matched)
        fading = _USE_FADING ** len(tokens)
        self._recently_used = self._recently_used * fading + num_accepted
        self._recently_drafted *= fading
        self._awaited_len = start + len(tokens) + hold_tokens
        effects = self._cut(start + matched) if matched < len(tokens) else []
        self._append(tokens[matched:], bytes(len(tokens) - matched))
        if matched < len(tokens):
            self.is_exhausted = False  # what had nothing to say to the old text may have to the new
        self.sent_len = max(self.sent_len, start + len(tokens))
        return matched, effects

    def committed(self, commit: Commit, rtt_ms: float, now: float) -> None:
        """A commit was laid: what it tells of the verifier's steps."""
        self._is_held = commit.is_holding
        self.clock.committed(commit, self._awaited_len if commit.is_holding else 0, rtt_ms, now)

    def send(self, settled_len: int, held_len: int, sibling_price: float, now: float) -> DraftMessage:
        """The tokens before `held_len` that were not sent yet, as a draft; counts them as sent.

        With siblings that are worth their price (see `PathSiblings`), as far as the verifier holds them, too.
        """
        start, end = self.sent_len, min(len(self.log), held_len)
        self._is_fresh = False
        self.clock.sent(end, self._is_held and start < self._awaited_len, now)
        self.sent_len = end
        confidence, tokens = bytes(self._confidence[start:end]), self.log.tokens(start, end)
        reach = self.calibration.reach(self._confidence[settled_len:start])
        chances = [self.calibration.table[byte >> Calibration.RANGE_BITS] for byte in confidence]
        leaves = self.siblings.choose(start, reach, chances, sibling_price, held_len - end)
        return DraftMessage(
            start,
            self.log.hash_at(start),
            tokens + tuple([leaf.token for leaf in leaves]),
            confidence + bytes([leaf.confidence for leaf in leaves]),
            tuple([leaf.position - start - 1 for leaf in leaves]),
        )

    def _append(self, tokens: Sequence[int], confidence: bytes) -> None:
        self.log.extend(tokens)
        self._confidence += confidence

    def _cut(self, length: int) -> list[Rollback]:
        self.wasted_tokens += len(self.log) - length
        self.is_exhausted = self.is_exhausted and length == len(self.log)
        self.log.truncate(length)
        del self._confidence[length:]
        self.siblings.cut(length)
        self.sent_len = min(self.sent_len, length)
        self._is_fresh = True
        self.clock.cut(length)
        if self._engine_len <= length:
            return []
        self._engine_len = length
        return [Rollback(length)]
