"""The llama.cpp target engine: a GGUF model on the CPU.

Every session is a sequence of one context with a unified cache, where a cell may belong to several sequences: what a
session shares with another is kept once. A tree is a sequence for each leaf: the first leaf goes on in the session's
own, each other in a branch that begins as a copy of what is cached, and a row belongs to every sequence whose path goes
through it. `keep` moves the kept path into the session's own sequence and drops the branches.

llama.cpp has a fixed number of sequences. Half of them are for sessions. The other half are branches; that is also the
most rows of a forward, so that whatever trees it holds there is a branch for each leaf.

In float32 keys and values are float32 too and attention is the plain one, which gives the text of the model alone. Else
they are float16, whatever the weights: finer than bfloat16, and llama.cpp's fast attention passes over the cells of
other sessions quickest there. A step of 8 sessions with 512 tokens each took 73 ms so, 89 in bfloat16, 111 with plain
attention (SmolLM2-135M in bfloat16, one core). It does not come free: 4096 cells of others cost a row 4 ms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.engines.cost import CostCurve, measure_cost, num_cpus
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.session_book import SessionBook, count_blocks, depths, is_chain, path
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks, num_blocks
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, EngineError, Rows, TargetEngine, TargetLimits
from shared.runtimes.hub import default_cache_dir
from shared.runtimes.huggingface import Progress, no_progress
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel, max_sequences, with_weights
from shared.vocabulary import Vocabulary

Dtype = Literal["stored", "bfloat16", "float32"]


@dataclass(slots=True)
class _Sequences:
    """A session's own sequence; if its cache ends with a tree, the rows of that along each sequence, its own first."""

    own: int
    paths: dict[int, list[int]] = field(default_factory=dict)

    @property
    def branches(self) -> list[int]:
        """The sequences that are only for leaves."""
        return list(self.paths)[1:]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked batch, laid out for one decode."""

    tokens: list[int]
    positions: list[int]
    sequences: list[Sequence[int]]
    selected: list[int]


class LlamaCppTarget:
    """A `TargetEngine` on llama.cpp. Not thread-safe. `load` is the way to a checked and measured one; then `close` it.

    `exact` computes attention in float32. `threads` 0 takes all CPUs, `context_tokens` caps the model's own context
    length, `kv_cache_mb` is the memory for the keys and values of all sessions (0: some). Raises `EngineError` where
    the file cannot be loaded, its cache not rolled back, or the memory does not hold one session.
    """

    def __init__(
        self, file: Path, *, exact: bool, threads: int = 0, context_tokens: int = 0, kv_cache_mb: int = 0
    ) -> None:
        self._model = LlamaModel(file, gpu_layers=0)
        if self._model.is_recurrent:
            self._model.close()
            raise EngineError(f"model {file.name} cannot roll back its cache (recurrent state); use another model")
        sequences = max_sequences()
        self._max_sessions = self._max_rows = sequences // 2
        try:
            trained = self._model.trained_context_tokens
            self._max_context = min(trained, context_tokens or trained)
            token_bytes = self._model.cached_values_per_token * (4 if exact else 2)
            # What so many sessions can fill: llama.cpp's own buffers grow with the cells, used or not.
            most = self._max_sessions * num_blocks(self._max_context + self._max_rows)
            self._blocks = KvBlocks(min(count_blocks(token_bytes, self._max_context, kv_cache_mb), most))
            self._context = LlamaContext(
                self._model,
                context_tokens=self._blocks.num_blocks * BLOCK_TOKENS,
                threads=threads or num_cpus(),
                batch_tokens=self._max_rows,
                max_sequences=sequences,
                exact=exact,
            )
        except EngineError:
            self._model.close()
            raise
        self._exact = exact
        self._free = list(range(sequences))[::-1]
        self._sequences: dict[str, _Sequences] = {}
        self._book = SessionBook(self._blocks, self.fingerprint.size, self._max_context)
        self.cost: CostCurve | None = None

    @classmethod
    def load(
        cls,
        file: Path,
        *,
        dtype: Dtype,
        device: str = "cpu",
        threads: int = 0,
        context_tokens: int = 0,
        kv_cache_mb: int = 0,
        cache_dir: Path | None = None,
        progress: Progress = no_progress,
        cost_of: Callable[[TargetEngine], CostCurve] = measure_cost,
    ) -> "LlamaCppTarget":
        """Load a GGUF file with its weights converted to `dtype`, check (`selftest`) and measure (`cost_of`) it.

        Converted copies are kept in `cache_dir`. Raises `EngineError`.
        """
        if device != "cpu":
            raise EngineError(f"device {device!r}: the llama.cpp target runs on the cpu; engine torch takes GPUs")
        if file.is_dir():
            raise EngineError(f"{file}: engine llama_cpp takes a GGUF file; engine torch takes folders")
        progress(f"preparing {file.name}", None)
        if dtype != "stored":
            file = with_weights(file, dtype, cache_dir or default_cache_dir())
        progress("loading the weights", None)
        engine = cls(
            file,
            exact=dtype == "float32",
            threads=threads,
            context_tokens=context_tokens,
            kv_cache_mb=kv_cache_mb,
        )
        try:
            progress("checking the engine", None)
            check_target(engine)
            progress("measuring the cost of a step", None)
            engine.cost = cost_of(engine)
        except BaseException:
            engine.close()
            raise
        return engine

    def __repr__(self) -> str:
        return f"<LlamaCppTarget {self._model.path.name}: {self._book!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """Trees and rollback, always: models that could not are refused at load."""
        return Capabilities(can_rollback=True, can_tree=True, max_context=self._max_context)

    @property
    def limits(self) -> TargetLimits:
        """Half of llama.cpp's sequences are for sessions; rows are as many as there are branches."""
        count = self._blocks.num_blocks
        return TargetLimits(
            max_rows=self._max_rows,
            cache_tokens=count * BLOCK_TOKENS,
            cache_sessions=min(count, self._max_sessions),
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to; ids behind its size are never selected."""
        return self.vocabulary.fingerprint

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id."""
        return self._model.vocabulary

    @property
    def near_tie(self) -> float:
        """How far two logits may lie apart and still change places with the shape of the batch; 0 in float32.

        Over 300 positions of SmolLM2-135M, in pieces of 2 to 64 rows against one by one, the logit that moved most did
        so by 0.00003 in float32 and 0.43 in bfloat16, where 2 tokens flipped at margins up to 0.01. With the stored
        Q4_1 weights none moved in pieces up to 16; in pieces of 64 one did by 1.4, and 8 flipped, at up to 0.17.
        """
        return 0.0 if self._exact else 1.0

    def cost_ms(self, rows: int) -> float:
        """Expected duration of a forward of this many rows, ms. Raises `LocalProtocolError` before it was measured."""
        if self.cost is None:
            raise LocalProtocolError("the cost of a forward is asked before it was measured")
        return self.cost(rows)

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """See `TargetEngine.forward`. A tree must be followed by `keep` or `truncate` before the session's next rows.

        Raises `LocalProtocolError`, before anything changes, for what `SessionBook.check` refuses and for more rows or
        sessions than the limits; after it, for logits that are not finite. Raises `EngineError` where llama.cpp fails;
        then the caches are as before.
        """
        logits = self._evaluate(batch)
        greedy = logits.argmax(axis=1)  # of equal logits the first, as `select` does; a NaN is the largest
        if not np.isfinite(logits[np.arange(len(logits)), greedy]).all():
            raise LocalProtocolError("the target's logits are not finite numbers")
        selected: list[int] = greedy.tolist()
        for one in self._book.sampled_rows(batch):
            selected[one.row] = one.select(logits[one.row])
        tokens = iter(selected)
        return [tuple(next(tokens) for _ in rows.tokens[rows.first_selected :]) for rows in batch]

    def logits(self, batch: Sequence[Rows]) -> list[NDArray[np.float32]]:
        """As `forward`, but the logits (rows, vocabulary) that the tokens are selected from. For checks."""
        counts = [len(rows.tokens) - rows.first_selected for rows in batch]
        return np.split(self._evaluate(batch), np.cumsum(counts)[:-1]) if batch else []

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine.keep`. Raises `LocalProtocolError` where `rows` is not a path of the last forward."""
        self._book.keep(session_id, start, rows)
        sequences, length = self._sequences[session_id], start + len(rows)
        if sequences.paths:
            holder = next(key for key, along in sequences.paths.items() if along[: len(rows)] == list(rows))
            if holder != sequences.own:
                self._remove(sequences.own, start)
                self._context.copy(holder, sequences.own, start, length)
        self._cut(session_id, length)

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine.truncate`. Raises `LocalProtocolError` for more than is cached and for a cut in a tree."""
        if self._book.truncate(session_id, length):
            self._cut(session_id, length)

    def release(self, session_id: str) -> None:
        """Free the session's cache; unknown sessions are ignored."""
        self._book.release(session_id)
        sequences = self._sequences.pop(session_id, None)
        if sequences is not None:
            for sequence in (sequences.own, *sequences.branches):
                self._drop(sequence)

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine.share`. Raises `LocalProtocolError` where the session has a cache or the source less."""
        if len(self._sequences) == self._max_sessions:
            raise LocalProtocolError(
                f"session {session_id}: {self._max_sessions} sessions are cached, the most there can be"
            )
        self._book.share(session_id, source_id, length)
        own = self._free.pop()
        self._sequences[session_id] = _Sequences(own)
        self._context.copy(self._sequences[source_id].own, own, 0, length)

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._context.close()
        self._model.close()

    def _evaluate(self, batch: Sequence[Rows]) -> NDArray[np.float32]:
        """Logits (selected rows, real vocabulary) of one decode, which the caches then hold."""
        self._book.check(batch)
        self._check_limits(batch)
        if not batch:
            return np.empty((0, self.fingerprint.size), dtype=np.float32)
        plan = self._plan(batch)
        try:
            logits = self._context.decode(plan.tokens, plan.positions, plan.sequences, plan.selected)
        except EngineError:
            for rows in batch:
                if rows.session_id in self._book:
                    self._cut(rows.session_id, rows.start)
                else:
                    self.release(rows.session_id)
            raise
        self._book.forwarded(batch)
        return logits[:, : self.fingerprint.size]

    def _check_limits(self, batch: Sequence[Rows]) -> None:
        count = sum(len(rows.tokens) for rows in batch)
        if count > self._max_rows:
            raise LocalProtocolError(f"{count} rows in a forward, {self._max_rows} are the most")
        sessions = len(self._sequences.keys() | {rows.session_id for rows in batch})
        if sessions > self._max_sessions:
            raise LocalProtocolError(f"{sessions} sessions in the cache, {self._max_sessions} are the most")
        leaves = sum(len(rows.tokens) - len(set(rows.parents) - {-1}) for rows in batch)
        held = sum(len(one.branches) for one in self._sequences.values())
        branches = leaves - len(batch) + held
        if branches > self._max_rows:
            raise LocalProtocolError(
                f"{branches} branches in the cache, {self._max_rows} are the most: keep a path first"
            )

    def _plan(self, batch: Sequence[Rows]) -> _Plan:
        """Give each session and each branch its sequence and each session its blocks."""
        plan = _Plan([], [], [], [])
        for rows in batch:
            if rows.session_id not in self._sequences:
                self._sequences[rows.session_id] = _Sequences(self._free.pop())
            sequences = self._sequences[rows.session_id]
            self._blocks.resize(rows.session_id, rows.start + len(rows.tokens))
            if is_chain(rows.parents):
                plan.sequences.extend([(sequences.own,)] * len(rows.tokens))
            else:
                plan.sequences.extend(self._branch(sequences, rows))
            first = len(plan.tokens)
            plan.tokens.extend(rows.tokens)
            plan.positions.extend(rows.start + depth for depth in depths(rows.parents))
            plan.selected.extend(range(first + rows.first_selected, len(plan.tokens)))
        return plan

    def _branch(self, sequences: _Sequences, rows: Rows) -> list[list[int]]:
        """Give each leaf of a tree a sequence; those of each row."""
        members: list[list[int]] = [[] for _ in rows.tokens]
        for leaf in sorted(set(range(len(rows.tokens))) - set(rows.parents)):
            sequence = sequences.own
            if sequences.paths:
                sequence = self._free.pop()
                self._context.copy(sequences.own, sequence, 0, rows.start)
            sequences.paths[sequence] = path(rows.parents, leaf)
            for row in sequences.paths[sequence]:
                members[row].append(sequence)
        return members

    def _cut(self, session_id: str, length: int) -> None:
        """Cut the session's own sequence to `length` tokens and drop the branches."""
        sequences = self._sequences[session_id]
        self._blocks.resize(session_id, length)
        self._remove(sequences.own, length)
        for branch in sequences.branches:
            self._drop(branch)
        sequences.paths.clear()

    def _drop(self, sequence: int) -> None:
        self._remove(sequence, 0)
        self._free.append(sequence)

    def _remove(self, sequence: int, start: int) -> None:
        if not self._context.remove(sequence, start):
            raise EngineError(f"model {self._model.path.name} cannot roll back its cache; use another model")
