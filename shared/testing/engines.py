"""Toy models and engines: the real interfaces, no runtime, a microsecond a token.

A `ToyModel` answers one question: which token does it select after this prefix. `HashModel` is a pure function of the
prefix hash, so the whole context matters and a wrong context shows at once. `TableModel` has logits per last token and
goes through the real `select`, for tests of the sampled law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks
from shared.core.messages import Fingerprint, Sampling
from shared.core.selection import select
from shared.core.siblings import Siblings
from shared.core.tokens import TokenLog, next_hash
from shared.engine import Capabilities, DraftEngine, Proposal, TargetLimits

TOY_VOCABULARY = Fingerprint(size=1000, digest=b"toy")
_MIX = 0x9E37_79B9_7F4A_7C15


def _mix(value: int, salt: int) -> int:
    """A well-mixed 64-bit function of two ints (the finalizer of SplitMix64)."""
    value = (value + salt * _MIX) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & 0xFFFF_FFFF_FFFF_FFFF
    return value ^ (value >> 31)


class ToyModel(Protocol):
    """Which token follows a prefix."""

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        """The selected token at `position`, after a prefix with this hash and last token."""
        ...


@dataclass(frozen=True, slots=True)
class HashModel:
    """Token = hash of the prefix; id 0 (the stop token of the tests) comes with probability `stop_rate`.

    At a fraction `habit` of the positions it is a hash of the position alone: a text comes back to a path it has left.
    Or of the place in a `period` of so many tokens: a text repeats itself.
    """

    salt: int
    stop_rate: float = 0.0
    vocabulary: int = 1000
    habit: float = 0.0
    period: int = 0

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        """See `ToyModel`."""
        mixed = _mix(position % self.period if self.period else position, self.salt) if self.habit else 0
        if (mixed >> 40) / (1 << 24) >= self.habit:
            mixed = _mix(prefix_hash, self.salt)
        if (mixed >> 40) / (1 << 24) < self.stop_rate:
            return 0
        return 1 + mixed % (self.vocabulary - 1)


@dataclass(frozen=True, slots=True)
class NoisyModel:
    """A draft of `target` that agrees with it on a fraction `acceptance` of the prefixes; 0 is garbage.

    Where it does not, its second choice is right on a fraction `second_chance`, its third on as much of the rest.
    """

    target: ToyModel
    acceptance: float
    salt: int
    second_chance: float = 0.0

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        """See `ToyModel`."""
        return self.ranked(prefix_hash, last, position, sampling)[0]

    def ranked(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> tuple[int, int, int]:
        """Its first choice for the token, its second and its third."""
        right = self.target.token(prefix_hash, last, position, sampling)
        ranked = [right + 1, *((right + 2, right + 3) if right < 900 else (right - 1, right - 2))]
        mixed = _mix(prefix_hash, self.salt)
        lucks = (mixed >> 40) / (1 << 24), (mixed >> 20) % (1 << 20) / (1 << 20), mixed % (1 << 20) / (1 << 20)
        for rank, chance in enumerate((self.acceptance, self.second_chance, self.second_chance)):
            if lucks[rank] < chance:
                ranked[rank] = right
                break
        return ranked[0], ranked[1], ranked[2]


@dataclass(frozen=True, slots=True)
class TableModel:
    """Logits by last token, float32 of shape (vocabulary, vocabulary), selected by the reference `select`."""

    logits: NDArray[np.float32]

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        """See `ToyModel`."""
        return select(self.logits[last], sampling, position)


class ToyDraft:
    """A `DraftEngine` over a toy model."""

    def __init__(self, model: ToyModel, max_context: int = 1 << 20) -> None:
        self.log = TokenLog()
        self.model = model
        self._sampling = Sampling()
        self._max_context = max_context

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(can_rollback=True, can_tree=False, max_context=self._max_context)

    @property
    def fingerprint(self) -> Fingerprint:
        """The toy vocabulary."""
        return TOY_VOCABULARY

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        self.log, self._sampling = TokenLog(tokens), sampling

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self.log.extend(tokens)

    def propose(self, n: int) -> Proposal:
        """See `DraftEngine`."""
        n = min(n, self._max_context - len(self.log))
        drafted: list[int] = []
        siblings: list[Siblings] = []
        for _ in range(n):
            position = len(self.log)
            prefix = self.log.hash_at(position), self.log[position - 1], position, self._sampling
            if isinstance(self.model, NoisyModel) and self.model.second_chance:
                token, second, third = self.model.ranked(*prefix)
                siblings.append(((second, 0.5), (third, 0.3)))
            else:
                token = self.model.token(*prefix)
            self.log.extend((token,))
            drafted.append(token)
        return Proposal(tuple(drafted), (0.8,) * n, siblings=tuple(siblings))

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        if length > len(self.log):
            raise LocalProtocolError(f"rollback to {length} of a draft engine with {len(self.log)} tokens")
        self.log.truncate(length)

    def close(self) -> None:
        """See `DraftEngine`."""
        self.log = TokenLog()


class ToyTarget:
    """A `TargetEngine` over a toy model, trees included; it checks the cache rule on every forward."""

    def __init__(
        self, model: ToyModel, base_ms: float = 30.0, row_ms: float = 1.0, cache_tokens: int = 1 << 16
    ) -> None:
        self.caches: dict[str, TokenLog] = {}
        self.blocks = KvBlocks(cache_tokens // BLOCK_TOKENS)
        self._model = model
        self._base_ms = base_ms
        self._row_ms = row_ms
        self._forwarded: dict[str, Rows] = {}

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(can_rollback=True, can_tree=True, max_context=1 << 20)

    @property
    def limits(self) -> TargetLimits:
        """What its blocks take."""
        return TargetLimits(max_rows=2048, cache_tokens=self.blocks.num_blocks * BLOCK_TOKENS, cache_sessions=1 << 20)

    @property
    def fingerprint(self) -> Fingerprint:
        """The toy vocabulary."""
        return TOY_VOCABULARY

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """See `TargetEngine`."""
        return [self._forward(rows) for rows in batch]

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine`."""
        forwarded, cache = self._forwarded.pop(session_id), self.caches[session_id]
        path = [-1, *rows]
        if any(forwarded.parents[row] != parent for parent, row in zip(path, rows, strict=False)):
            raise LocalProtocolError(f"rows {tuple(rows)} are no path in {forwarded.parents}")
        cache.truncate(start)
        cache.extend(forwarded.tokens[row] for row in rows)
        self.blocks.cut(session_id, len(cache))

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine`."""
        if self.blocks.cut(session_id, length) != length:
            raise LocalProtocolError(f"{session_id}: truncated to {length}, inside of a shared block")
        self.caches[session_id].truncate(length)

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine`."""
        if self.blocks.share(session_id, source_id, length) != length:
            raise LocalProtocolError(f"{session_id}: shares {length} tokens, which are no whole blocks")
        self.caches[session_id] = TokenLog(self.caches[source_id].tokens(0, length))

    def release(self, session_id: str) -> None:
        """See `TargetEngine`."""
        self.caches.pop(session_id, None)
        self.blocks.release(session_id)

    def restart(self) -> None:
        """Every cache is lost."""
        self.caches.clear()
        self.blocks = KvBlocks(self.blocks.num_blocks)

    def cost_ms(self, rows: int) -> float:
        """Linear."""
        return self._base_ms + self._row_ms * rows

    def _forward(self, rows: Rows) -> tuple[int, ...]:
        cache = self.caches.setdefault(rows.session_id, TokenLog())
        if rows.start != len(cache):
            raise LocalProtocolError(f"{rows.session_id}: rows start at {rows.start}, the cache holds {len(cache)}")
        if not self.blocks.resize(rows.session_id, rows.start + len(rows.tokens)):
            raise LocalProtocolError(f"{rows.session_id}: no blocks for {len(rows.tokens)} rows")
        self._forwarded[rows.session_id] = rows
        hashes: list[int] = []
        positions: list[int] = []
        selected = []
        for row, (token, parent) in enumerate(zip(rows.tokens, rows.parents, strict=True)):
            hashes.append(next_hash(cache.hash_at(rows.start) if parent < 0 else hashes[parent], token))
            positions.append(rows.start if parent < 0 else positions[parent] + 1)
            if row >= rows.first_selected:
                selected.append(self._model.token(hashes[row], token, positions[row] + 1, rows.sampling))
        return tuple(selected)


class GarbageDraft:
    """Any draft engine at its own speed, with every proposed token replaced by its neighbour: nothing is ever right."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self._length = 0

    @property
    def capabilities(self) -> Capabilities:
        """The engine's."""
        return self._engine.capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The engine's."""
        return self._engine.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        self._engine.reset(tokens, sampling, prompt_len)
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self._engine.extend(tokens)
        self._length += len(tokens)

    def propose(self, n: int) -> Proposal:
        """What the engine proposes, each id moved by one."""
        proposal = self._engine.propose(n)
        garbage = tuple((token + 1) % self.fingerprint.size for token in proposal.tokens)
        self._engine.rollback(self._length)
        self.extend(garbage)
        return Proposal(garbage, proposal.confidence)

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        self._engine.rollback(length)
        self._length = length

    def close(self) -> None:
        """See `DraftEngine`."""
        self._engine.close()
