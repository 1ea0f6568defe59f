"""The torch target engine: any supported Hugging Face or GGUF model, on a CPU or a GPU.

One forward runs the rows of all sessions packed along one axis; `kv_store` attends each session's rows over its own
cache. Results depend on the rows of a session alone, up to the rounding of the kernels, which differ by shape:
about 1e-5 in a logit in float32, enough to flip near-ties in bfloat16 (see `near_tie`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud_verifier.engines.cost import CostCurve, measure_cost
from cloud_verifier.engines.kv_store import (
    ATTENTION,
    KvCache,
    KvPool,
    KvShape,
    Segment,
    count_blocks,
    is_chain,
    segment,
)
from cloud_verifier.engines.packed_linear import can_pack, pack_linears
from cloud_verifier.engines.selftest import check_target
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, num_blocks
from shared.core.messages import Fingerprint, Sampling
from shared.core.selection import select
from shared.engine import Capabilities, EngineError, Rows, TargetEngine, TargetLimits
from shared.runtimes.hub import resolve_model
from shared.runtimes.huggingface import CausalLM, Progress, load_causal_lm, no_progress
from shared.vocabulary import Vocabulary

# oneDNN is slower at one or two rows than at four: 50 and 59 ms a forward against 43 in float32, 31 and 35 against 30
# in bfloat16 (SmolLM2-135M, Zen 4). So fewer rows are padded.
_MIN_PACKED_ROWS = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAX_ROWS = 2048  # of float32 logits over 150,000 tokens that is 1.2 GB


@dataclass(slots=True)
class _Session:
    """A session's cache, the tokens in it in row order, and the rows of its last forward."""

    cache: KvCache
    tokens: list[int] = field(default_factory=list)
    last_start: int = 0
    last_parents: tuple[int, ...] = ()
    branched: bool = False  # the cache ends with a tree: `keep` or `truncate` must come first


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked batch, laid out for one forward."""

    token_ids: list[int]
    positions: list[int]
    segments: list[Segment]
    selected: list[int]  # packed rows that get a token


class TorchTarget:
    """A `TargetEngine` on torch. Not thread-safe. `load` is the way to a checked and measured one.

    `threads` (0: torch's choice) holds for the whole process. `context_tokens` caps the model's own context length.
    `kv_cache_mb` is the memory for the keys and values of all sessions. Raises `EngineError` where the device is not
    there or the memory does not hold one session.
    """

    def __init__(
        self,
        causal_lm: CausalLM,
        device: str = "cpu",
        threads: int = 0,
        context_tokens: int = 0,
        kv_cache_mb: int = 0,
    ) -> None:
        self._device = _device(device)
        if threads:
            torch.set_num_threads(threads)
        self._model = causal_lm.model.to(self._device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
        self._model.set_attn_implementation(ATTENTION)
        self._shape = KvShape.of(self._model.config)
        self._groups = self._model.config.num_attention_heads // self._shape.num_kv_heads
        self._name = causal_lm.name
        self._vocabulary = causal_lm.vocabulary
        self._stop_ids = causal_lm.stop_ids
        self._max_context = min(causal_lm.max_context, context_tokens or causal_lm.max_context)
        count = count_blocks(self._shape, self._model.dtype, self._max_context, kv_cache_mb)
        self._pool = KvPool(self._shape, self._model.dtype, self._device, count)
        self._sessions: dict[str, _Session] = {}
        self.cost: CostCurve | None = None
        self._min_rows = 1
        if self._device.type == "cpu" and can_pack():
            pack_linears(self._model)
            self._min_rows = _MIN_PACKED_ROWS

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 0,
        context_tokens: int = 0,
        kv_cache_mb: int = 0,
        cache_dir: Path | None = None,
        progress: Progress = no_progress,
        cost_of: Callable[[TargetEngine], CostCurve] = measure_cost,
    ) -> "TorchTarget":
        """Resolve, load, check (`selftest`) and measure (`cost_of`) a model. Raises `EngineError`."""
        if dtype not in _DTYPES:
            raise EngineError(f"dtype {dtype!r}: the torch target runs in {' or '.join(_DTYPES)}")
        _device(device)  # before minutes of loading
        if threads:
            torch.set_num_threads(threads)
        path = resolve_model(name, "target model")
        engine = cls(load_causal_lm(path, dtype, cache_dir, progress), device, threads, context_tokens, kv_cache_mb)
        progress("checking the engine", None)
        check_target(engine)
        progress("measuring the cost of a step", None)
        engine.cost = cost_of(engine)
        return engine

    def __repr__(self) -> str:
        cached = sum(session.cache.length for session in self._sessions.values())
        dtype = str(self._model.dtype).removeprefix("torch.")
        return f"<TorchTarget {self._name} {dtype} on {self._device}: {len(self._sessions)} sessions, {cached} tokens>"

    @property
    def capabilities(self) -> Capabilities:
        """Trees and rollback, always: architectures that could not are refused at load."""
        return Capabilities(can_rollback=True, can_tree=True, max_context=self._max_context)

    @property
    def limits(self) -> TargetLimits:
        """What the pool holds, in whole blocks; a session takes one at least."""
        count = self._pool.blocks.num_blocks
        return TargetLimits(max_rows=_MAX_ROWS, cache_tokens=count * BLOCK_TOKENS, cache_sessions=count)

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to; ids behind its size are never selected."""
        return self._vocabulary.fingerprint

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id."""
        return self._vocabulary

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's own files."""
        return self._stop_ids

    @property
    def near_tie(self) -> float:
        """How far two logits may lie apart and still change places with the shape of the batch; 0 in float32.

        In bfloat16 logits of 16 to 32 are 0.125 apart. Over 300 positions of SmolLM2-135M the logit that moved most did
        so by 1.1, and 1 or 2 tokens flipped, at margins up to 0.125.
        """
        return 0.0 if self._model.dtype == torch.float32 else 1.0

    def cost_ms(self, rows: int) -> float:
        """Expected duration of a forward of this many rows, ms. Raises `LocalProtocolError` before it was measured."""
        if self.cost is None:
            raise LocalProtocolError("the cost of a forward is asked before it was measured")
        return self.cost(rows)

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """See `TargetEngine.forward`. A tree must be followed by `keep` or `truncate` before the session's next rows.

        Raises `LocalProtocolError`, before anything changes, for a wrong `start`, a session twice, rows that are empty,
        malformed or beyond `max_context`, and ids outside of the vocabulary; after it, for logits that are not finite.
        """
        logits = self._evaluate(batch)
        tokens = iter(self._select(logits, batch))
        return [tuple(next(tokens) for _ in rows.tokens[rows.first_selected :]) for rows in batch]

    def logits(self, batch: Sequence[Rows]) -> list[NDArray[np.float32]]:
        """As `forward`, but the logits (rows, vocabulary) that the tokens are selected from. For checks."""
        logits = self._evaluate(batch).float().cpu()
        counts = [len(rows.tokens) - rows.first_selected for rows in batch]
        return [part.numpy() for part in logits.split(counts)]

    @torch.inference_mode()
    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine.keep`. Raises `LocalProtocolError` where `rows` is not a path of the last forward."""
        session = self._sessions.get(session_id)
        if session is None or start != session.last_start or session.cache.length != start + len(session.last_parents):
            raise LocalProtocolError(f"session {session_id}: no forward from {start} to keep rows of")
        parents = session.last_parents
        inside = all(0 <= row < len(parents) for row in rows)
        if not inside or [parents[row] for row in rows] != [-1, *rows][: len(rows)]:
            raise LocalProtocolError(f"session {session_id}: rows {list(rows)} are not a path in the tree {parents}")
        session.cache.keep(start, rows)
        session.tokens[start:] = [session.tokens[start + row] for row in rows]
        session.last_start, session.last_parents, session.branched = session.cache.length, (), False

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine.truncate`. Raises `LocalProtocolError` for more than is cached and for a cut in a tree."""
        session = self._sessions.get(session_id)
        cached = session.cache.length if session else 0
        if not 0 <= length <= cached:
            raise LocalProtocolError(f"session {session_id}: truncate to {length}, but {cached} tokens are cached")
        if session is None or length == cached:
            return
        if session.branched and length > session.last_start:
            raise LocalProtocolError(f"session {session_id}: truncate to {length} cuts a tree; keep a path of it first")
        session.cache.cut(length)
        del session.tokens[length:]
        session.last_start, session.last_parents, session.branched = length, (), False

    def release(self, session_id: str) -> None:
        """Free the session's cache; unknown sessions are ignored."""
        self._sessions.pop(session_id, None)
        self._pool.blocks.release(session_id)

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine.share`. Raises `LocalProtocolError` where the session has a cache or the source less."""
        source = self._sessions.get(source_id)
        if source is None or source.cache.length < length or length % BLOCK_TOKENS:
            raise LocalProtocolError(f"session {session_id}: cannot share {length} tokens of {source_id}")
        self._pool.blocks.share(session_id, source_id, length)
        cache = KvCache(self._pool, session_id, length)
        self._sessions[session_id] = _Session(cache, source.tokens[:length], length)

    @torch.inference_mode()
    def _evaluate(self, batch: Sequence[Rows]) -> Tensor:
        """Logits (selected rows, real vocabulary) of a packed forward, which the caches then hold."""
        self._check(batch)
        if not batch:
            return torch.empty(0, self.fingerprint.size)
        plan = self._plan(batch)
        padding = [0] * (self._min_rows - len(plan.token_ids))
        inputs = {
            "input_ids": torch.tensor([plan.token_ids + padding], device=self._device),
            "position_ids": torch.tensor([plan.positions + padding], device=self._device),
            "use_cache": False,
            "segments": plan.segments,
        }
        if plan.selected:
            count, missing = len(plan.selected), self._min_rows - len(plan.selected)
            rows = torch.tensor(plan.selected + plan.selected[:1] * missing, device=self._device)
            logits = self._model(**inputs, logits_to_keep=rows).logits[0, :count, : self.fingerprint.size]
        else:  # a part of a prompt: the output layer would be for nothing
            self._model.base_model(**inputs)
            logits = torch.empty(0, self.fingerprint.size)
        for rows_ in batch:
            session = self._sessions[rows_.session_id]
            session.last_start, session.last_parents = rows_.start, rows_.parents
            session.branched = not is_chain(rows_.parents)
            session.cache.length = rows_.start + len(rows_.tokens)
            session.tokens += rows_.tokens
        result: Tensor = logits
        return result

    def _check(self, batch: Sequence[Rows]) -> None:
        if len({rows.session_id for rows in batch}) != len(batch):
            raise LocalProtocolError("a session is twice in one batch")
        for rows in batch:
            session = self._sessions.get(rows.session_id)
            cached = session.cache.length if session else 0
            where = f"session {rows.session_id}: {len(rows.tokens)} rows from {rows.start}"
            if rows.start != cached:
                raise LocalProtocolError(f"{where}, but {cached} tokens are cached")
            if session and session.branched:
                raise LocalProtocolError(f"{where} on a tree of which no path was kept")
            if not rows.tokens or len(rows.parents) != len(rows.tokens):
                raise LocalProtocolError(f"{where}, {len(rows.parents)} parents: one for each row, and a row at least")
            if not all(-1 <= parent < row for row, parent in enumerate(rows.parents)):
                raise LocalProtocolError(f"{where}: a parent does not precede its child in {rows.parents}")
            if not 0 <= min(rows.tokens) <= max(rows.tokens) < self.fingerprint.size:
                raise LocalProtocolError(f"{where}: token ids outside of the vocabulary of {self.fingerprint.size}")
            if rows.start + max(_depths(rows.parents)) >= self._max_context:
                raise LocalProtocolError(f"{where} go beyond the context of {self._max_context} tokens")
        blocks = self._pool.blocks
        missing = sum(num_blocks(rows.start + len(rows.tokens)) - len(blocks.blocks(rows.session_id)) for rows in batch)
        if missing > blocks.num_free:
            raise LocalProtocolError(f"a step needs {missing} more blocks, but {blocks!r}")

    def _plan(self, batch: Sequence[Rows]) -> _Plan:
        plan = _Plan([], [], [], [])
        for rows in batch:
            if rows.session_id not in self._sessions:
                self._sessions[rows.session_id] = _Session(KvCache(self._pool, rows.session_id))
            cache = self._sessions[rows.session_id].cache
            cache.reserve(rows.start + len(rows.tokens))
            first = len(plan.token_ids)
            plan.segments.append(segment(cache, first, rows.parents, self._groups, self._model.dtype))
            plan.token_ids.extend(rows.tokens)
            plan.positions.extend(rows.start + depth for depth in _depths(rows.parents))
            plan.selected.extend(range(first + rows.first_selected, len(plan.token_ids)))
        return plan

    def _select(self, logits: Tensor, batch: Sequence[Rows]) -> list[int]:
        """One token for each row of the logits (rows, vocabulary): on the device where greedy is all there is to do."""
        if not len(logits):
            return []
        # Of equal logits `max` takes the first, as `select` does; a NaN is the largest.
        peaks, greedy = logits.max(dim=-1)
        if not bool(peaks.isfinite().all()):
            raise LocalProtocolError("the target's logits are not finite numbers")
        tokens: list[int] = greedy.tolist()
        sampled = [job for job in self._selections(batch) if job.sampling.temperature > 0 or job.sampling.has_penalties]
        if sampled:
            index = torch.tensor([job.row for job in sampled], device=logits.device)
            host: NDArray[np.float32] = logits[index].float().cpu().numpy()
            for job, row in zip(sampled, host, strict=True):
                tokens[job.row] = select(row, job.sampling, job.position, job.context, job.prompt_len)
        return tokens

    def _selections(self, batch: Sequence[Rows]) -> "Iterator[_Selection]":
        """What `select` needs for each selected row of the batch, in order."""
        row = 0
        for rows in batch:
            depths = _depths(rows.parents)
            cached = self._sessions[rows.session_id].tokens[: rows.start] if rows.sampling.has_penalties else []
            for index in range(rows.first_selected, len(rows.tokens)):
                context = cached + _path(rows, index) if rows.sampling.has_penalties else []
                yield _Selection(row, rows.sampling, rows.start + depths[index] + 1, context, rows.prompt_len)
                row += 1


@dataclass(frozen=True, slots=True)
class _Selection:
    """The arguments of `select` for one row of the logits."""

    row: int
    sampling: Sampling
    position: int
    context: list[int]
    prompt_len: int


def _depths(parents: Sequence[int]) -> Sequence[int]:
    """How many rows lie above each row."""
    if is_chain(parents):
        return range(len(parents))
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def _path(rows: Rows, index: int) -> list[int]:
    """The tokens from the cached prefix down to this row."""
    path: list[int] = []
    while index >= 0:
        path.append(rows.tokens[index])
        index = rows.parents[index]
    return path[::-1]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r}: not a device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise EngineError(f"device {name!r}: {count} CUDA devices are available here; use cpu or another index")
    elif device.type != "cpu":
        raise EngineError(f"device {name!r}: the torch target runs on cpu, cuda or cuda:N")
    return device
