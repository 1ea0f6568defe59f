"""The verifier's state machine for one session.

Theory of operation
-------------------
A session is a committed `TokenLog` and a `DraftTree` of pending drafts on its end. The worker asks `plan` for the rows
of the next target step, runs the forward and hands the selected tokens to `stepped`. Committed tokens that the cache
does not hold yet always come first, so prefill, verification and self-decode are one case that differs in its rows:

    rows                          kind          gives
    a chunk of uncached tokens    prefill       nothing yet
    the uncached rest, no drafts  self-decode   next_token
    the uncached rest + drafts    verify        accepted drafts + next_token

Row i's selected token is the target's own token after row i. Starting from the last committed row, a child row whose
token equals the selected one is accepted and judged next; the first selected token without such a child is next_token.
So what is committed is the target stream whatever the drafts were (Daliri et al. 2408.07978 with the target's choice
fixed by the seed): drafts only change when it is known.

Cache rule: after a committing step the target's cache holds exactly committed_len - 1 tokens; the last committed token
is the next input. `stepped` returns the rows to keep so that this holds.

When no drafts are pending, `self_decode` decides: `always` decodes, `idle` decodes when the worker has spare capacity,
`off` waits for drafts. After `starved_after_ms` without a draft, and until one arrives, the session
decodes: an edge that cannot draft (its context is full) must not starve beside busy ones. A session never runs more
than `window_tokens` past what the edge has acknowledged: a dead or slow reader costs no forwards.
"""

from dataclasses import dataclass

from shared.core.acceptance import Acceptance
from shared.core.draft_tree import DraftTree, Grafted, Node
from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.messages import Commit, Draft, Finish, Open, Want
from shared.core.policies import StepPolicy
from shared.core.settings import CloudSettings, SelfDecode
from shared.core.tokens import TokenLog


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight: it feeds `fed` committed tokens, then the draft nodes; `partial`: a prefill chunk, no nodes."""

    fed: int
    nodes: tuple[Node, ...]
    partial: bool
    queue_ms: float


@dataclass(frozen=True, slots=True)
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
        self.draft_ms = 0.0
        self.stale_tokens = 0
        self._settings = settings
        self._limit = min(opened.prompt_len + opened.max_new_tokens, settings.context_length)
        self._tree = DraftTree(log, settings.max_pending_tokens)
        self._acceptance = Acceptance()
        self._acked_len = len(log)
        self._is_starved = False
        self._step: _Step | None = None
        self._ready_at = now

    def __repr__(self) -> str:
        state = self.finish.name if self.finish is not Finish.NONE else "stepping" if self._step else "ready"
        return (
            f"<CloudSession {self.key} {state}: {len(self.log)} committed, {self.cached_len} cached, "
            f"{self._acked_len} acknowledged, {self._tree!r}, "
            f"acceptance {self._acceptance!r} at {self.draft_ms:.0f} ms>"
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
    def _is_ready(self) -> bool:
        has_window = len(self.log) - self._acked_len < self._settings.window_tokens
        return has_window and self.finish is Finish.NONE and not self.is_stepping

    def acknowledged(self, committed_len: int, draft_ms: float) -> None:
        """The edge has seen this many committed tokens. Raises `RemoteProtocolError` for more than there are."""
        if committed_len > len(self.log):
            raise RemoteProtocolError(f"acknowledged {committed_len} tokens of {len(self.log)} committed")
        self._acked_len = max(self._acked_len, committed_len)
        self.draft_ms = draft_ms

    def drafted(self, draft: Draft, now: float) -> Grafted:
        """Pending drafts arrived; a session that asked for a plain stream has no use for them."""
        if not len(self._tree):
            self._ready_at = now
        self._is_starved = False
        if self.opened.want is Want.STREAM or self.finish is not Finish.NONE:
            grafted = Grafted(0, len(draft.tokens), 0)
        else:
            grafted = self._tree.graft(draft)
        self.stale_tokens += grafted.stale
        return grafted

    def wake_at(self) -> float | None:
        """When `plan` may say yes although nothing has arrived since it said no."""
        return self._ready_at + self._settings.starved_after_ms / 1000 if self._is_ready else None

    def plan(self, policy: StepPolicy, spare: bool, now: float) -> Rows | None:
        """Rows for the next step, or None: finished, stepping, waiting for an acknowledgement or for drafts."""
        if not self._is_ready:
            return None
        uncached = self.log.tokens(self.cached_len)
        queue_ms = (now - self._ready_at) * 1000
        if len(uncached) > self._settings.prefill_chunk_tokens:
            chunk = uncached[: self._settings.prefill_chunk_tokens]
            self._step = _Step(len(chunk), (), True, queue_ms)
            return self._rows(chunk, (), len(chunk))
        may_decode = len(uncached) > 1 or self._may_decode(spare, now)
        nodes = self._tree.best(self._limit - 2)[: self._settings.max_draft_rows]
        if nodes:
            worth = [self._acceptance.rate ** (node.position + 1 - len(self.log)) for node in nodes]
            nodes = nodes[: max(policy.draft_rows(len(uncached), worth), 0 if may_decode else 1)]
        elif not may_decode:
            return None
        self._step = _Step(len(uncached), tuple(nodes), False, queue_ms)
        return self._rows(uncached, tuple(nodes), len(uncached) - 1)

    def stepped(self, selected: tuple[int, ...], verify_ms: float, now: float) -> Stepped:
        """The step's selected tokens are here: commit. Raises `LocalProtocolError` without a step in flight."""
        step, self._step = self._step, None
        if step is None:
            raise LocalProtocolError("stepped without a plan")
        start, self._ready_at = self.cached_len, now
        if step.partial:
            self.cached_len += step.fed
            return Stepped(None, start, tuple(range(step.fed)))
        accepted, tokens = self._judge(step, selected)
        self.log.extend(tokens)
        judged = self._tree.advance(tokens)
        self._acceptance.observe(judged.matched, judged.failed)
        self.finish = self._finish_of(tokens[-1])
        self.cached_len = len(self.log) - 1
        rows = (*range(step.fed), *(step.fed + index for index in accepted))[: self.cached_len - start]
        commit = Commit(
            start=len(self.log) - len(tokens),
            tokens=tokens,
            num_drafted=len(step.nodes),
            num_accepted=len(accepted),
            finish=self.finish,
            queue_ms=step.queue_ms,
            verify_ms=verify_ms,
            max_ahead=self._settings.max_pending_tokens,
        )
        return Stepped(commit, start, rows)

    def _may_decode(self, spare: bool, now: float) -> bool:
        """May the step be a plain decode step? A session that drafts nothing is always served."""
        mode = self._settings.self_decode
        if self.opened.want is Want.STREAM or mode is SelfDecode.ALWAYS or (mode is SelfDecode.IDLE and spare):
            return True
        self._is_starved |= now >= self._ready_at + self._settings.starved_after_ms / 1000
        return self._is_starved

    def _rows(self, fed: tuple[int, ...], nodes: tuple[Node, ...], first_selected: int) -> Rows:
        row_of = {id(node): len(fed) + index for index, node in enumerate(nodes)}
        last_fed = len(fed) - 1
        parents = [*range(-1, last_fed), *(row_of.get(id(node.parent), last_fed) for node in nodes)]
        return Rows(
            session_id=self.key,
            start=self.cached_len,
            tokens=fed + tuple(node.token for node in nodes),
            parents=tuple(parents),
            first_selected=first_selected,
            sampling=self.opened.sampling,
            prompt_len=self.opened.prompt_len,
        )

    def _judge(self, step: _Step, selected: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        """Indices of the accepted nodes, and the tokens that the step commits (up to a stop token)."""
        accepted: list[int] = []
        tokens = [selected[0]]
        children = {(id(node.parent), node.token): index for index, node in enumerate(step.nodes)}
        parent = id(step.nodes[0].parent) if step.nodes else 0  # the first node hangs on the root
        while tokens[-1] not in self.opened.stop_ids:
            index = children.get((parent, tokens[-1]))
            if index is None:
                break
            accepted.append(index)
            parent = id(step.nodes[index])
            tokens.append(selected[1 + index])
        else:
            # A stop token ends the text; if it was itself drafted it counts as accepted and nothing follows it.
            index = children.get((parent, tokens[-1]))
            accepted.extend([] if index is None else [index])
        return accepted, tuple(tokens)

    def _finish_of(self, last: int) -> Finish:
        if last in self.opened.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.log) >= self._limit else Finish.NONE
