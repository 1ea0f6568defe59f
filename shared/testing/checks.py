"""What must hold in every simulated session, checked at each effect, and what was reached.

`visits` counts phases, effects, messages and faults: a simulation that hardly reaches something proves nothing of it.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.core import effects as fx
from shared.core.cloud_session import CloudSession
from shared.core.edge_session import EdgeSession
from shared.core.messages import Commit, Draft, EdgeMessage, Finish, Open
from shared.core.policies import DraftPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import CloudSettings, EdgeSettings, Request
from shared.core.tokens import TokenLog
from shared.policy.run_ahead import RunAhead
from shared.testing.engines import HashModel, NoisyModel, ToyDraft, ToyModel, ToyTarget
from shared.testing.link_model import LinkModel

WINDOW_MESSAGES = 32  # so many are judged together:
MESSAGES_PER_S = 30  # and four for three commits, and
BURST_MESSAGES = 8  # what was saved up, and one at either end
LONGEST_HOLD_S = 1.0


@dataclass(slots=True)
class SimUser:
    """What one user has in front of them, and since when they wait for the next token."""

    log: TokenLog
    verified_len: int
    gap_since: float
    first_gap_s: float = 0.0
    longest_gap_s: float = 0.0  # after the first


@dataclass(slots=True)
class SimEdge:
    """One simulated device."""

    index: int
    session: EdgeSession
    request: Request
    policy: DraftPolicy
    settings: EdgeSettings
    engine: ToyDraft
    link: LinkModel
    draft_ms: float
    is_branching: bool  # some drafts come with a wrong sibling before them, so that the verifier sees trees
    user: SimUser
    queue: deque[fx.Draft | fx.Rollback] = field(default_factory=deque)
    is_drafting: bool = False
    wakes_at: float = float("inf")
    bytes_up: int = 0
    bytes_down: int = 0
    messages_up: int = 0
    commits: int = 0  # that arrived
    sent_at: deque[tuple[float, int]] = field(default_factory=deque)  # the last WINDOW_MESSAGES, and `commits` then
    finished: fx.Finished | None = None
    refused: fx.Refused | None = None


class Checks:
    """Collects `violations` (one line each) and `visits`."""

    def __init__(self, model: ToyModel) -> None:
        self.violations: list[str] = []
        self.visits: Counter[str] = Counter()
        self._model = model

    def violated(self, edge: SimEdge, now: float, what: str) -> None:
        """Note a violation."""
        self.violations.append(f"edge {edge.index} at {now:.3f} s: {what}")

    # -- what the user sees -----------------------------------------------------------------------------------------

    def shown(self, edge: SimEdge, emit: fx.Emit, now: float) -> None:
        """Tokens were shown: they go on where the text ends, and what is claimed as the target's is."""
        user, request = edge.user, edge.request
        if emit.start != len(user.log) or len(emit.tokens) != len(emit.provenance):
            self.violated(edge, now, f"shown at {emit.start}, the user has {len(user.log)} tokens")
        if edge.finished is not None:
            self.violated(edge, now, "shown after the end")
        gap_s = now - user.gap_since
        if len(user.log) == len(request.prompt):
            user.first_gap_s = gap_s
        else:
            user.longest_gap_s = max(user.longest_gap_s, gap_s)
        user.gap_since = now
        for token, provenance in zip(emit.tokens, emit.provenance, strict=True):
            self.visits[f"shown:{provenance.value}"] += 1
            if request.ending(user.log) is not Finish.NONE:
                self.violated(edge, now, f"shown beyond {request.ending(user.log).name} at {len(user.log)}")
            user.log.extend((token,))
            if provenance is not fx.Provenance.LOCAL:
                self._verify(edge, len(user.log), now)

    def confirmed(self, edge: SimEdge, confirm: fx.Confirm, now: float) -> None:
        """Local tokens are claimed as the target's."""
        if not edge.user.verified_len < confirm.length <= len(edge.user.log):
            self.violated(edge, now, f"{confirm} of {len(edge.user.log)} shown, {edge.user.verified_len} verified")
        for length in range(edge.user.verified_len, confirm.length):
            self._verify(edge, length + 1, now)
        edge.user.gap_since = now  # news of a kind: a plain stream catches up token by token

    def retracted(self, edge: SimEdge, retract: fx.Retract, now: float) -> None:
        """Tokens were taken back: only unverified ones may be."""
        if not edge.user.verified_len <= retract.length < len(edge.user.log):
            self.violated(edge, now, f"{retract} of {len(edge.user.log)} shown, {edge.user.verified_len} verified")
        edge.user.log.truncate(retract.length)

    def finished(self, edge: SimEdge, finished: fx.Finished, now: float) -> None:
        """The text ended, once, and for the reason given."""
        self.visits[f"finish:{finished.finish.name.lower()}"] += 1
        if edge.finished is not None:
            self.violated(edge, now, "finished twice")
        edge.finished = finished
        ending = edge.request.ending(edge.user.log)
        if ending is not finished.finish and not (ending is Finish.NONE and finished.finish is Finish.LENGTH):
            self.violated(edge, now, f"{finished} on a text that ends with {ending.name}")  # a context may be shorter

    def ended(self, edges: Sequence[SimEdge], now: float) -> None:
        """The simulation is over."""
        for edge in edges:
            if edge.finished is None:
                self.violated(edge, now, f"never ended: {edge.session!r}")

    def _verify(self, edge: SimEdge, length: int, now: float) -> None:
        """Tokens up to `length` are claimed as the target's; those that stand from before as local are not."""
        user = edge.user
        position, log = length - 1, user.log
        token = self._model.token(log.hash_at(position), log[position - 1], position, edge.request.sampling)
        if length > user.verified_len and log[position] != token:
            self.violated(edge, now, f"token {position} is not the target's")
        user.verified_len = max(user.verified_len, length)

    # -- the machines ------------------------------------------------------------------------------------------------

    def ticked(self, edge: SimEdge, now: float) -> None:
        """A tick does all that is due: a driver that asks again at once would spin."""
        wakes_at = edge.session.wake_at()
        if wakes_at is not None and wakes_at <= now:
            self.violated(edge, now, f"a tick left a timer due: {edge.session!r}")

    def sent(self, edge: SimEdge, message: EdgeMessage, size: int, now: float) -> None:
        """A message went up: run-ahead never floods; an Open counts to no budget."""
        self.visits[f"up:{type(message).__name__}"] += 1
        if isinstance(message, Open):
            return
        if isinstance(message, Draft) and message.parents:
            self._sent_siblings(edge, message, now)
        edge.bytes_up += size
        edge.messages_up += 1
        edge.sent_at.append((now, edge.commits))
        if len(edge.sent_at) > WINDOW_MESSAGES:
            since, commits = edge.sent_at.popleft()
            most = MESSAGES_PER_S * (now - since) + (edge.commits - commits) * 4 / 3 + BURST_MESSAGES
            if most < WINDOW_MESSAGES and isinstance(edge.policy, RunAhead):
                self.violated(edge, now, f"{WINDOW_MESSAGES} messages, {most:.1f} allowed")

    def _sent_siblings(self, edge: SimEdge, draft: Draft, now: float) -> None:
        """A sibling hangs where the draft model has it among its next choices, and nowhere twice."""
        model, log = edge.engine.model, edge.session.path.log
        assert isinstance(model, NoisyModel), "no other model has siblings"
        places = list(zip(draft.parents, draft.tokens[-len(draft.parents) :], strict=True))
        self.visits["sibling:sent"] += len(places)
        for parent, token in places:
            position = draft.start + parent + 1
            _, *others = model.ranked(log.hash_at(position), log[position - 1], position, edge.request.sampling)
            if token not in others or places.count((parent, token)) > 1:
                self.violated(edge, now, f"{token} is no sibling at {position}")

    def engine_follows(self, edge: SimEdge, now: float) -> None:
        """With nothing queued, the draft engine's tokens are a prefix of the session's."""
        log, engine_log = edge.session.path.log, edge.engine.log
        if not log.has_prefix(len(engine_log), engine_log.hash_at(len(engine_log))):
            self.violated(edge, now, f"the draft engine left the path: {engine_log!r} against {log!r}")

    def drafted(self, session: CloudSession, draft: Draft, grown: int, now: float) -> None:
        """Draft tokens became pending: only on a prefix that stands."""
        log = session.log
        if grown and draft.start <= len(log) and not log.has_prefix(draft.start, draft.parent_hash):
            self.violations.append(f"verifier at {now:.3f} s: {draft} grafted on another prefix of {session!r}")

    def committed(self, edge: SimEdge, commit: Commit, now: float) -> None:
        """A step commits what it accepted and the token after it, unless an accepted one ended the text."""
        num_foretold = commit.num_accepted + commit.num_recycled
        is_foretold_end = commit.finish is Finish.STOP and len(commit.tokens) == num_foretold
        if len(commit.tokens) != num_foretold + 1 and not is_foretold_end:
            self.violated(edge, now, f"{commit} has no next_token")
        self.visits["recycled"] += commit.num_recycled > 0
        repeats = isinstance(self._model, HashModel) and self._model.period > 0
        self.visits["recycled:repetition"] += repeats and commit.num_recycled > 0
        if commit.num_accepted > commit.num_drafted:
            self.violated(edge, now, f"{commit} accepts more than was drafted")

    def planned(self, batch: Sequence[fx.Rows], settings: CloudSettings, chunk_tokens: int) -> None:
        """A step keeps to the operator's limits; empty ones do not happen."""
        for rows in batch:
            draft_rows = len(rows.tokens) - rows.first_selected - 1
            if not rows.tokens or draft_rows > settings.max_draft_rows:
                self.violations.append(f"{rows.session_id}: {draft_rows} draft rows in a step")
            if rows.start + len(rows.tokens) > settings.context_length + settings.max_draft_rows:
                self.violations.append(f"{rows.session_id}: a step beyond the context")
        prefill_rows = sum(rows.first_selected for rows in batch)
        self.visits["prefill:shared"] += sum(rows.first_selected > 0 for rows in batch) > 1
        if prefill_rows > chunk_tokens:
            self.violations.append(f"a prefill of {prefill_rows} rows in one step, {chunk_tokens} allowed")

    def held(self, table: SessionTable, is_stepping: bool, now: float) -> None:
        """A verifier that could step and does not waits for drafts, not longer than for a slow link's answer."""
        for session in table.sessions:
            if not is_stepping and session.held_until is not None and session.held_until > now:
                self.visits["hold"] += 1
                if session.held_until > now + LONGEST_HOLD_S:
                    self.violations.append(
                        f"verifier at {now:.3f} s: holds until {session.held_until:.3f} s: {session!r}"
                    )

    def rests(self, table: SessionTable, now: float) -> None:
        """A verifier with nothing to do sleeps until a time to come."""
        wakes_at = table.wake_at()
        if wakes_at is not None and wakes_at <= now:
            self.violations.append(f"verifier at {now:.3f} s: a timer is due and nothing is done: {table!r}")

    def caches_hold(self, table: SessionTable, target: ToyTarget) -> None:
        """The target's caches are prefixes of what is committed, of the length that the sessions believe.

        And the table's books agree with what the target holds.
        """
        self.visits["evicted"] = max(self.visits["evicted"], table.ledger.num_evicted)
        table.ledger.check_integrity()
        target.blocks.check_integrity()
        used = target.blocks.num_blocks - target.blocks.num_free
        if table.ledger.used_blocks != used:
            self.violations.append(f"the target holds {used} blocks, {table.ledger.used_blocks} in the books")
        for session in table.sessions:
            cache = target.caches.get(session.key, TokenLog())
            if session.is_stepping:
                continue
            if len(cache) > len(session.log) - 1 or len(cache) != session.cached_len:
                self.violations.append(f"cache rule: {len(cache)} cached of {session!r}")
            elif not session.log.has_prefix(len(cache), cache.hash_at(len(cache))):
                self.violations.append(f"cache rule: the cache is no prefix of {session!r}")
