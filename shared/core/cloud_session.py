"""The verifier's state machine for one session.

Theory of operation
-------------------
A session is a committed `TokenLog` and a `DraftTree` of pending drafts on its end. Before each target step it makes an
`offer`: the rows that it could use and what each is worth. The step policy grants some; `take` turns the grant into
rows; the forward runs; `stepped` gets the selected tokens. Committed tokens that the cache does not hold yet always
come first, so prefill, verification and self-decode are one case that differs in its rows:

    rows                          kind          gives
    a chunk of uncached tokens    prefill       nothing yet
    the uncached rest, no drafts  self-decode   next_token
    the uncached rest + drafts    verify        accepted drafts + next_token

Row i's selected token is the target's own token after row i. Starting from the last committed row, a child row whose
token equals the selected one is accepted and judged next; the first selected token without such a child is next_token.
So what is committed is the target stream whatever the drafts were (Daliri et al. 2408.07978 with the target's choice
fixed by the seed): drafts only change when it is known.

Cache rule: after a committing step the target's cache holds exactly committed_len - 1 tokens; the last committed token
is the next input. `stepped` returns the rows to keep so that this holds. A cache may be evicted between two steps;
then everything is uncached again, and is rebuilt as a prompt is.

When no drafts are pending, `self_decode` decides: `always` decodes, `idle` decodes when the step has room for it,
`off` waits for drafts. After `starved_after_ms` without a draft, and until one arrives, the session
decodes: an edge that cannot draft (its context is full) must not starve beside busy ones. So it does for its last
token, for which no draft is of use. A session never runs more than `window_tokens` past what the edge has acknowledged:
a dead or slow reader costs no forwards.

A decode step may carry *recycled* rows: a guess at how the text goes on, from the path that was rejected last
(`rejected_path`) or from the text itself (`prompt_lookup`). They are judged as drafts are, but count as none: what they
tell is not the edge's. A plain stream has none: it is what the target does by itself.

Drafts may arrive while a step is in flight: they name their prefix by hash, so they hang where they belong, and what
the step commits re-roots them.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf

from shared.core.acceptance import Calibration
from shared.core.acceptance_report import RequestAcceptance
from shared.core.draft_tree import DraftTree, Grafted, Node, chains, detached, hash_behind
from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.forecast import Forecast
from shared.core.messages import Commit, Draft, Finish, Open, SessionStatus, Want
from shared.core.policies import Decodes, Offer, Outlook
from shared.core.prompt_lookup import PromptLookup
from shared.core.rejected_path import RejectedPath
from shared.core.settings import CloudSettings, SelfDecode
from shared.core.siblings import SIBLING_PRIOR
from shared.core.step_in_flight import StepInFlight
from shared.core.tokens import TokenLog

_GOODPUT_WINDOW_S = 2.0
_LEAST_GOODPUT = 1.0  # tokens/s: bounds the weight of a session that has none yet


@dataclass(slots=True)
class Stepped:
    """What a step came to: the commit to send (None for a prefill chunk) and the forward's rows that stand."""

    commit: Commit | None
    start: int
    kept_rows: tuple[int, ...]


class CloudSession:
    """One session from its Open to its last commit; see the module's theory of operation."""

    def __init__(
        self, key: str, opened: Open, log: TokenLog, cached_len: int, settings: CloudSettings, now: float
    ) -> None:
        self.key = key
        self.opened = opened
        self.log = log
        self.cached_len = cached_len
        self.finish = Finish.NONE
        self.stale_tokens = 0
        self.is_suspect = False  # a step that it was part of failed: its next one is its own
        self.stepped_at = now
        self._settings = settings
        self._limit = min(opened.prompt_len + opened.max_new_tokens, settings.context_length)
        self._tree = DraftTree(log, settings.max_pending_tokens)
        self._calibration = Calibration()
        self._sibling_calibration = Calibration(SIBLING_PRIOR)
        self._acked_len = len(log)
        self._is_plain = opened.want is Want.STREAM or settings.self_decode is SelfDecode.ALWAYS
        self._forecast = Forecast(len(log), now)
        self._held_until: float | None = None  # since the last commit or draft; inf: that hold is over
        self._is_starved = False
        self._step: StepInFlight | None = None
        self._offered: list[Node] = []
        self._rejected = RejectedPath()
        self._lookup = PromptLookup(log)
        self._is_recycling = False  # what is offered are no drafts
        self._ready_at = now
        self._recent_tokens = 0.0  # committed in the goodput window, older ones fading
        self.acceptance = RequestAcceptance()

    def __repr__(self) -> str:
        return (
            f"<CloudSession {self.key} {self._state}: {len(self.log)} committed, {self.cached_len} cached, "
            f"{self._acked_len} acknowledged, {self._tree!r}, "
            f"acceptance {self._calibration!r}, {self._forecast!r}>"
        )

    @property
    def is_stepping(self) -> bool:
        """Whether a step is in flight."""
        return self._step is not None

    @property
    def pending_tokens(self) -> int:
        """Draft tokens that wait to be verified."""
        return len(self._tree)

    @property
    def pending_siblings(self) -> int:
        """How many of them are beside the edge's own path."""
        return len(self._tree) - self._tree.path_len

    @property
    def held_until(self) -> float | None:
        """Until when its next step waits for drafts; None: it does not."""
        return self._held_until if self._held_until is not None and self._held_until < inf else None

    @property
    def is_active(self) -> bool:
        """Whether it has anything to do: its text goes on, and its edge keeps up."""
        return self.finish is Finish.NONE and len(self.log) - self._acked_len < self._settings.window_tokens

    @property
    def is_ready(self) -> bool:
        """Whether a step could serve it, drafts or not: it is active, and no step is in flight."""
        return self._step is None and self.is_active

    @property
    def read_tokens(self) -> int:
        """How much it has read of a prompt, or of a text whose cache is gone; 0: all, but for the last token."""
        return self.cached_len if self.cached_len < len(self.log) - 1 else 0

    def goodput(self, now: float) -> float:
        """Committed tokens per second, smoothed over the last seconds."""
        return self._recent_tokens * exp((self.stepped_at - now) / _GOODPUT_WINDOW_S) / _GOODPUT_WINDOW_S

    def status(self, heard_at: float, now: float) -> SessionStatus:
        """What an operator is shown."""
        return SessionStatus(
            session=self.key,
            state=self._state,
            want=self.opened.want,
            prompt_len=self.opened.prompt_len,
            committed_len=len(self.log),
            cached_len=self.cached_len,
            pending_tokens=self.pending_tokens,
            num_steps=self.acceptance.num_steps,
            num_drafted=self.acceptance.num_draft_tokens,
            num_accepted=self.acceptance.num_accepted_tokens,
            goodput=self.goodput(now),
            draft_ms=self._forecast.draft_ms,
            silent_ms=(now - heard_at) * 1000,
        )

    def acknowledged(self, committed_len: int, draft_ms: float, rtt_ms: float, now: float) -> None:
        """The edge has seen this many committed tokens. Raises `RemoteProtocolError` for more than there are.

        It drafts a token in `draft_ms`, and measured a round trip of `rtt_ms`; 0: not known yet.
        """
        if committed_len > len(self.log):
            raise RemoteProtocolError(f"acknowledged {committed_len} tokens of {len(self.log)} committed")
        was_ready = self.is_ready
        self._acked_len = max(self._acked_len, committed_len)
        if self.is_ready and not was_ready:
            self._ready_at = now
        self._forecast.draft_ms, self._forecast.rtt_ms = draft_ms, rtt_ms

    def drafted(self, draft: Draft, now: float) -> Grafted:
        """Pending drafts arrived; a session that asked for a plain stream has no use for them."""
        if not len(self._tree):
            self._ready_at = now
        self._is_starved = False
        if self.opened.want is Want.STREAM or self.finish is not Finish.NONE:
            grafted = Grafted(0, len(draft.tokens), 0)
        else:
            path, *branches = chains(draft)
            grafted = self._tree.graft(path)
            stands = len(path.tokens) - grafted.stale - grafted.overflow
            overtaken = max(min(len(self.log) - path.start, stands), 0)  # too late to be of use, but not to be judged
            self._calibration.observe(path.confidence[:overtaken], path.confidence[stands:][: grafted.differs])
            self._calibration.refresh()  # now, not when the next step waits for its plan
            self._sibling_calibration.refresh()
            if stands:
                self._forecast.arrived(path.start + stands, self._held_until is not None, now)
                self._held_until = None
            start, tokens = path.start + stands, path.tokens[stands:]
            if grafted.differs:
                self._forecast.differed(start)
                if start > self._rejected.start:  # else it is a message from before
                    self._rejected.replace(start, tokens, hash_behind(path.parent_hash, path.tokens))
            elif grafted.stale:
                self._rejected.follow(start, path.parent_hash, tokens, hash_behind(path.parent_hash, tokens))
            for branch in branches:
                grafted += self._tree.graft(branch)
        self.stale_tokens += grafted.stale
        return grafted

    def evicted(self) -> None:
        """The target's cache of this session is gone. Raises `LocalProtocolError` during a step."""
        if self._step is not None:
            raise LocalProtocolError(f"{self.key}: its cache was evicted under a running forward")
        self.cached_len = 0

    def wake_at(self) -> float | None:
        """When an offer may come, or be another one, although nothing has arrived."""
        if self.held_until is not None and self.is_ready:
            return self.held_until
        waits_for_drafts = self.is_ready and self._settings.self_decode is SelfDecode.OFF and not self._is_starved
        return self._ready_at + self._settings.starved_after_ms / 1000 if waits_for_drafts else None

    def offer(self, now: float) -> Offer | None:
        """What the next step could do for it; None: finished, stepping, or waiting for an acknowledgement or drafts."""
        # Like `take` and `stepped` this runs for hundreds of sessions while the engine waits: few calls.
        log_len, settings = len(self.log), self._settings
        if self._step is not None or self.finish is not Finish.NONE:
            return None
        if self._held_until is not None and now >= self._held_until:
            self._held_until = inf
        if log_len - self._acked_len >= settings.window_tokens:
            return None
        tables = self._calibration.table, self._sibling_calibration.table
        self._is_recycling = False
        self._offered, worth = self._tree.best(settings.max_draft_rows, self._limit - 2, *tables)
        decodes = self._decodes(now)
        prefill_rows = log_len - self.cached_len - 1
        if not worth and not prefill_rows and decodes is Decodes.NEVER:
            return None
        weight = 1.0 / max(self.goodput(now), _LEAST_GOODPUT)
        return Offer(prefill_rows, worth, decodes, weight, (now - self._ready_at) * 1000)

    def recycle(self, now: float) -> list[float]:
        """Offer recycled rows beside a decode step that has no drafts: what each is worth.

        That is how likely it is right, and that the edge's own drafts will not be there for the step behind this one:
        where they will, a guess only says sooner what they say. At most `max_draft_rows`; call after `offer`.
        """
        most = min(self._settings.max_draft_rows, self._limit - 1 - len(self.log))
        if self._offered or most < 1 or self.opened.want is Want.STREAM:
            return []
        tokens, worth = self._lookup.offer(most)
        if self._rejected:
            again = self._rejected.offer(self.log.tokens(self._rejected.start), most)
            tokens, worth = max((tokens, worth), again, key=lambda guess: sum(guess[1]))
        self._offered, self._is_recycling = detached(len(self.log) - 1, tokens), True
        length = len(self.log)
        # The step's own token is the first of those that will have landed, a guess takes the place of the next ones.
        foretold = self._forecast.landed_tokens(length, now) - 1
        missed = 1.0 - self._calibration.overall ** (1 + self._forecast.unknown_tokens(length))
        worth = [chance * missed if count < foretold else chance for count, chance in enumerate(worth)]
        return list(accumulate(worth, min))  # a row is no good without the ones before it

    def hold(self, until: float) -> None:
        """No step before that time, unless drafts come; a hold that goes on keeps its end."""
        if self._held_until is None:
            self._held_until = until

    def asked(self, tokens: int, now: float) -> None:
        """The commit asks the edge for so many drafts, for which a step will wait; 0: for none."""
        self._forecast.asked(len(self.log) + tokens if tokens else 0, now)

    def take(self, num_rows: int, now: float) -> Rows:
        """The offer was granted this many rows: a step is in flight. Raises `LocalProtocolError` for no rows."""
        if num_rows < 1 or self._step is not None:
            raise LocalProtocolError(f"{self.key}: took {num_rows} rows, {self!r}")
        uncached = self.log.tokens(self.cached_len)
        partial = num_rows < len(uncached)
        fed = uncached[:num_rows]
        nodes = self._offered[: num_rows - len(fed)]
        self._offered = []
        parents, tokens = list(range(-1, len(fed) - 1)), list(fed)
        for row, node in enumerate(nodes):
            assert node.parent is not None, "only the root hangs on nothing"
            node.row = row
            parents.append(len(fed) + node.parent.row)
            tokens.append(node.token)
        queue_ms = (now - self._ready_at) * 1000
        self._step = StepInFlight(len(fed), nodes, self._is_recycling, partial, queue_ms)
        return Rows(
            session_id=self.key,
            start=self.cached_len,
            tokens=tuple(tokens),
            parents=tuple(parents),
            first_selected=len(fed) if partial else len(fed) - 1,
            sampling=self.opened.sampling,
            prompt_len=self.opened.prompt_len,
        )

    def stepped(self, selected: tuple[int, ...], verify_ms: float, max_ahead: int, now: float) -> Stepped:
        """The step's selected tokens are here: commit. At most `max_ahead` draft tokens may be pending from now on.

        Raises `LocalProtocolError` without a step in flight.
        """
        step, self._step = self._step, None
        if step is None:
            raise LocalProtocolError("stepped without a step in flight")
        start = self.cached_len
        self.is_suspect = False
        if step.partial:  # it goes on where it is in the line of prompts
            self.cached_len += step.fed
            return Stepped(None, start, tuple(range(step.fed)))
        self._ready_at = now
        accepted, tokens = step.judge(selected, self.opened.stop_ids)
        self._rejected.judge(tokens)
        self._lookup.judge(tokens)
        if rejected := self._tree.rejected(tokens):
            wrong = [node.token for node in rejected]
            self._rejected.replace(rejected[0].position, wrong, rejected[-1].prefix_hash)
        self.log.extend(tokens)
        judged = self._tree.advance(tokens)
        self._tree.limit = max_ahead
        self._forecast.committed(len(self.log), bool(judged.failed), now)
        self._held_until = None
        self._calibration.observe(judged.matched, judged.failed)
        self._sibling_calibration.observe(judged.sibling_matched, judged.sibling_failed)
        if self._calibration.is_young:  # what is pending has more, or less, of a chance than when it came
            self._calibration.refresh()
        self._recent_tokens = self.goodput(now) * _GOODPUT_WINDOW_S + len(tokens)
        self.stepped_at = now
        self.finish = self._finish_of(tokens[-1])
        self.cached_len = len(self.log) - 1
        rows = (*range(step.fed), *[step.fed + index for index in accepted])[: self.cached_len - start]
        commit = Commit(
            start=len(self.log) - len(tokens),
            tokens=tokens,
            num_drafted=0 if step.is_recycled else len(step.nodes),
            num_accepted=0 if step.is_recycled else len(accepted),
            num_recycled=len(accepted) if step.is_recycled else 0,
            finish=self.finish,
            queue_ms=step.queue_ms,
            verify_ms=verify_ms,
            max_ahead=max_ahead,
        )
        self.acceptance.count(commit)
        return Stepped(commit, start, rows)

    def read_along(self) -> None:
        """Look over what the step in flight reads of a prompt, while it runs: the guesses to come need it."""
        if self._step is not None and self._step.fed > 1 and self.opened.want is not Want.STREAM:
            self._lookup.read(self.cached_len + self._step.fed)

    def failed(self) -> None:
        """The forward of the step in flight failed: nothing was committed, and what the cache holds is unknown."""
        self._step = None
        self.cached_len = 0
        self.is_suspect = True

    @property
    def _state(self) -> str:
        if self.finish is not Finish.NONE:
            return "finished"
        if self._step is not None:
            return "stepping"
        if len(self.log) - self.cached_len > 1:
            return "prefill"
        return "ready" if self.is_ready else "waiting"

    def _decodes(self, now: float) -> Decodes:
        """May the step be a plain decode step? A session that drafts nothing is always served."""
        is_last = len(self.log) + 1 >= self._limit  # no draft is of use any more
        self._is_starved |= is_last or now >= self._ready_at + self._settings.starved_after_ms / 1000
        if self._is_plain or self._is_starved:
            return Decodes.FREELY
        return Decodes.SPARE if self._settings.self_decode is SelfDecode.IDLE else Decodes.NEVER

    def outlook(self, now: float, *, may_ask: bool = False) -> Outlook | None:
        """What is known, at an offer, of the drafts to come; None where no step should wait for them."""
        forecast, length, path_len = self._forecast, len(self.log), self._tree.path_len
        if not (forecast.draft_ms and forecast.rtt_ms) or self._held_until == inf or self.opened.want is Want.STREAM:
            return None
        left_tokens = path_len if self._tree.last_token in self.opened.stop_ids else self._limit - length
        return Outlook(
            acceptance=self._calibration.overall,
            draft_ms=forecast.draft_ms,
            rtt_ms=forecast.answer_ms,
            unknown_tokens=forecast.unknown_tokens(length),
            next_ms=forecast.next_ms(length + path_len, now),
            asked_ms=max(forecast.asked_ms(now), 0.0),
            most_drafts=min(self._settings.max_draft_rows, self._limit - 1 - length),
            left_tokens=left_tokens,
            asked_tokens=forecast.asked_tokens(length, now),
            further_tokens=max(path_len - len(self._offered), 0),
            may_ask=may_ask,
        )

    def _finish_of(self, last: int) -> Finish:
        if last in self.opened.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.log) >= self._limit else Finish.NONE
