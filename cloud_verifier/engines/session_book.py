"""What every target engine keeps of its sessions beside their caches, and the rules that it holds its caller to.

The book knows the tokens in each session's cache in row order, the rows of its last forward, and the blocks that they
take. Every call that breaks a rule of `TargetEngine` raises `LocalProtocolError` before anything changes; an engine
asks the book first and touches its cache then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks, num_blocks
from shared.core.messages import Sampling
from shared.core.selection import Logits, select
from shared.engine import EngineError, Rows

_DEFAULT_CONTEXTS, _DEFAULT_KV_BYTES = 16, 1 << 30


@dataclass(slots=True)
class _Session:
    """The tokens in a session's cache and the rows of its last forward."""

    tokens: list[int] = field(default_factory=list)
    last_start: int = 0
    last_parents: tuple[int, ...] = ()

    @property
    def branched(self) -> bool:
        """The cache ends with a tree: `keep` or `truncate` must come first."""
        return not is_chain(self.last_parents)

    def stand(self) -> None:
        """What is cached is a plain text."""
        self.last_start, self.last_parents = len(self.tokens), ()


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of the logits whose token is not simply the largest: number `row` of all selected rows of the batch."""

    row: int
    sampling: Sampling
    position: int
    context: list[int]
    prompt_len: int

    def select(self, logits: Logits) -> int:
        """Its token, by the reference."""
        return select(logits, self.sampling, self.position, self.context, self.prompt_len)


class SessionBook:
    """The sessions of one engine with a vocabulary of `size` tokens. Pure."""

    def __init__(self, blocks: KvBlocks, size: int, max_context: int) -> None:
        self._blocks = blocks
        self._size = size
        self._max_context = max_context
        self._sessions: dict[str, _Session] = {}

    def __repr__(self) -> str:
        return f"{len(self._sessions)} sessions, {sum(len(one.tokens) for one in self._sessions.values())} tokens"

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._sessions

    def check(self, batch: Sequence[Rows]) -> None:
        """Raise for a wrong `start`, a session twice, a tree not kept, malformed rows, ids and positions beyond bounds.

        And where the cache has too few blocks.
        """
        if len({rows.session_id for rows in batch}) != len(batch):
            raise LocalProtocolError("a session is twice in one batch")
        for rows in batch:
            session = self._sessions.get(rows.session_id)
            cached = len(session.tokens) if session else 0
            where = f"session {rows.session_id}: {len(rows.tokens)} rows from {rows.start}"
            if rows.start != cached:
                raise LocalProtocolError(f"{where}, but {cached} tokens are cached")
            if session and session.branched:
                raise LocalProtocolError(f"{where} on a tree of which no path was kept")
            if not rows.tokens or len(rows.parents) != len(rows.tokens):
                raise LocalProtocolError(f"{where}, {len(rows.parents)} parents: one for each row, and a row at least")
            if not all(-1 <= parent < row for row, parent in enumerate(rows.parents)):
                raise LocalProtocolError(f"{where}: a parent does not precede its child in {rows.parents}")
            if not 0 <= min(rows.tokens) <= max(rows.tokens) < self._size:
                raise LocalProtocolError(f"{where}: token ids outside of the vocabulary of {self._size}")
            if rows.start + max(depths(rows.parents)) >= self._max_context:
                raise LocalProtocolError(f"{where} go beyond the context of {self._max_context} tokens")
        blocks = self._blocks
        missing = sum(num_blocks(rows.start + len(rows.tokens)) - len(blocks.blocks(rows.session_id)) for rows in batch)
        if missing > blocks.num_free:
            raise LocalProtocolError(f"a step needs {missing} more blocks, but {blocks!r}")

    def forwarded(self, batch: Sequence[Rows]) -> None:
        """The caches hold these rows now."""
        for rows in batch:
            session = self._sessions.setdefault(rows.session_id, _Session())
            session.tokens += rows.tokens
            session.last_start, session.last_parents = rows.start, rows.parents

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """Cut a session by the rules of `TargetEngine.keep`. Raises where `rows` is not a path of the last forward."""
        session = self._sessions.get(session_id)
        if session is None or start != session.last_start or len(session.tokens) != start + len(session.last_parents):
            raise LocalProtocolError(f"session {session_id}: no forward from {start} to keep rows of")
        parents = session.last_parents
        inside = all(0 <= row < len(parents) for row in rows)
        if not inside or [parents[row] for row in rows] != [-1, *rows][: len(rows)]:
            raise LocalProtocolError(f"session {session_id}: rows {list(rows)} are not a path in the tree {parents}")
        session.tokens[start:] = [session.tokens[start + row] for row in rows]
        session.stand()

    def truncate(self, session_id: str, length: int) -> bool:
        """Cut a session to `length` tokens; False where that is no change.

        Raises for more than is cached and for a cut in a tree.
        """
        session = self._sessions.get(session_id)
        cached = len(session.tokens) if session else 0
        if not 0 <= length <= cached:
            raise LocalProtocolError(f"session {session_id}: truncate to {length}, but {cached} tokens are cached")
        if session is None or length == cached:
            return False
        if session.branched and length > session.last_start:
            raise LocalProtocolError(f"session {session_id}: truncate to {length} cuts a tree; keep a path of it first")
        del session.tokens[length:]
        session.stand()
        return True

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """Let a new session begin with the source's blocks, too. Raises where it is not new or the source has less."""
        source = self._sessions.get(source_id)
        stands = 0 if source is None else source.last_start if source.branched else len(source.tokens)
        if source is None or stands < length or length % BLOCK_TOKENS:
            raise LocalProtocolError(f"session {session_id}: cannot share {length} tokens of {source_id}")
        self._blocks.share(session_id, source_id, length)
        session = self._sessions[session_id] = _Session(source.tokens[:length])
        session.stand()

    def release(self, session_id: str) -> None:
        """Forget a session and its blocks; unknown ones are ignored."""
        self._sessions.pop(session_id, None)
        self._blocks.release(session_id)

    def sampled_rows(self, batch: Sequence[Rows]) -> Iterator[SampledRow]:
        """The selected rows of a batch that `forwarded` has seen which greedy selection alone does not settle."""
        row = 0
        for rows in batch:
            sampling = rows.sampling
            if sampling.temperature > 0 or sampling.has_penalties:
                above = depths(rows.parents)
                cached = self._sessions[rows.session_id].tokens[: rows.start] if sampling.has_penalties else []
                for number, index in enumerate(range(rows.first_selected, len(rows.tokens)), start=row):
                    context = cached + _path_tokens(rows, index) if sampling.has_penalties else []
                    yield SampledRow(number, sampling, rows.start + above[index] + 1, context, rows.prompt_len)
            row += len(rows.tokens) - rows.first_selected


def count_blocks(token_bytes: int, context_tokens: int, kv_cache_mb: int) -> int:
    """Blocks for a budget of memory; without one (0) for some contexts, up to a gigabyte. A token takes `token_bytes`.

    Raises `EngineError` where the budget does not hold one session of `context_tokens`.
    """
    context = num_blocks(context_tokens)
    if not kv_cache_mb:
        return max(min(_DEFAULT_CONTEXTS * context, _DEFAULT_KV_BYTES // (token_bytes * BLOCK_TOKENS)), context)
    count = kv_cache_mb * 2**20 // (token_bytes * BLOCK_TOKENS)
    if count < context:
        needed_mb = -(-context * BLOCK_TOKENS * token_bytes // 2**20)
        raise EngineError(
            f"target.kv_cache_mb {kv_cache_mb} does not hold one session of {context_tokens} tokens: set it to"
            f" {needed_mb} or more, or target.context_tokens to {count * BLOCK_TOKENS} or less"
        )
    return count


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each row's parent is the row before it."""
    return tuple(parents) == tuple(range(-1, len(parents) - 1))


def depths(parents: Sequence[int]) -> Sequence[int]:
    """How many rows lie above each row."""
    if is_chain(parents):
        return range(len(parents))
    above: list[int] = []
    for parent in parents:
        above.append(above[parent] + 1 if parent >= 0 else 0)
    return above


def path(parents: Sequence[int], row: int) -> list[int]:
    """The rows from a root down to this one."""
    rows: list[int] = []
    while row >= 0:
        rows.append(row)
        row = parents[row]
    return rows[::-1]


def _path_tokens(rows: Rows, row: int) -> list[int]:
    """The tokens from the cached prefix down to this row."""
    return [rows.tokens[index] for index in path(rows.parents, row)]
