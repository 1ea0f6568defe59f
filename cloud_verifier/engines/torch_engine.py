"""The torch target engine: any supported Hugging Face or GGUF model, on a CPU or a GPU.

One forward runs the rows of all sessions packed along one axis; `kv_store` attends each session's rows over its own
cache. Results depend on the rows of a session alone, up to the rounding of the kernels, which differ by shape:
about 1e-5 in a logit in float32, enough to flip near-ties in bfloat16 (see `near_tie`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    segment,
)
from cloud_verifier.engines.output_layer import OutputLayer
from cloud_verifier.engines.packed_linear import can_pack, pack_linears
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.session_book import SessionBook, count_blocks, depths
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, EngineError, Rows, TargetEngine, TargetLimits
from shared.runtimes.hub import resolve_model
from shared.runtimes.huggingface import CausalLM, Progress, load_causal_lm, no_progress
from shared.vocabulary import Vocabulary

# oneDNN is slower at one or two rows than at four: 50 and 59 ms a forward against 43 in float32, 31 and 35 against 30
# in bfloat16 (SmolLM2-135M, Zen 4). So fewer rows are padded.
_MIN_PACKED_ROWS = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAX_ROWS = 2048  # of float32 logits over 150,000 tokens that is 1.2 GB


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
        count = count_blocks(self._shape.token_bytes(self._model.dtype), self._max_context, kv_cache_mb)
        self._pool = KvPool(self._shape, self._model.dtype, self._device, count)
        self._caches: dict[str, KvCache] = {}
        self._book = SessionBook(self._pool.blocks, self.fingerprint.size, self._max_context)
        self.cost: CostCurve | None = None
        self._min_rows = 1
        self._output_layer = OutputLayer(self._model, self.fingerprint.size)
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
        dtype = str(self._model.dtype).removeprefix("torch.")
        return f"<TorchTarget {self._name} {dtype} on {self._device}: {self._book!r}>"

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

        Over 1,612 positions of SmolLM2-135M in bfloat16, in steps of 8 rows against one by one, the logit that moved
        most did so by 1.3, and 11 tokens flipped, at margins up to 0.24.
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
        logits = self._evaluate(batch).cpu()
        counts = [len(rows.tokens) - rows.first_selected for rows in batch]
        return [part.numpy() for part in logits.split(counts)]

    @torch.inference_mode()
    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine.keep`. Raises `LocalProtocolError` where `rows` is not a path of the last forward."""
        self._book.keep(session_id, start, rows)
        self._caches[session_id].keep(start, rows)

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine.truncate`. Raises `LocalProtocolError` for more than is cached and for a cut in a tree."""
        if self._book.truncate(session_id, length):
            self._caches[session_id].cut(length)

    def release(self, session_id: str) -> None:
        """Free the session's cache; unknown sessions are ignored."""
        self._book.release(session_id)
        self._caches.pop(session_id, None)

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine.share`. Raises `LocalProtocolError` where the session has a cache or the source less."""
        self._book.share(session_id, source_id, length)
        self._caches[session_id] = KvCache(self._pool, session_id, length)

    @torch.inference_mode()
    def _evaluate(self, batch: Sequence[Rows]) -> Tensor:
        """Logits (selected rows, real vocabulary) of a packed forward, which the caches then hold."""
        self._book.check(batch)
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
        hidden = self._model.base_model(**inputs).last_hidden_state[0]
        logits = torch.empty(0, self.fingerprint.size)
        if plan.selected:  # none in a part of a prompt
            count, missing = len(plan.selected), self._min_rows - len(plan.selected)
            rows = torch.tensor(plan.selected + plan.selected[:1] * missing, device=self._device)
            logits = self._output_layer(hidden[rows], count)
        for rows_ in batch:
            self._caches[rows_.session_id].length = rows_.start + len(rows_.tokens)
        self._book.forwarded(batch)
        return logits

    def _plan(self, batch: Sequence[Rows]) -> _Plan:
        plan = _Plan([], [], [], [])
        for rows in batch:
            if rows.session_id not in self._caches:
                self._caches[rows.session_id] = KvCache(self._pool, rows.session_id)
            cache = self._caches[rows.session_id]
            cache.reserve(rows.start + len(rows.tokens))
            first = len(plan.token_ids)
            plan.segments.append(segment(cache, first, rows.parents, self._groups, self._model.dtype))
            plan.token_ids.extend(rows.tokens)
            plan.positions.extend(rows.start + depth for depth in depths(rows.parents))
            plan.selected.extend(range(first + rows.first_selected, len(plan.token_ids)))
        return plan

    def _select(self, logits: Tensor, batch: Sequence[Rows]) -> list[int]:
        """One token for each row of the logits (rows, vocabulary): on the device where greedy is all there is to do."""
        if not len(logits):
            return []
        # Of equal logits both take the first, as `select` does; a NaN is the largest. numpy takes a quarter as long.
        on_cpu = self._device.type == "cpu"
        greedy = torch.from_numpy(logits.numpy().argmax(axis=-1)) if on_cpu else logits.max(dim=-1).indices
        if not bool(logits.gather(1, greedy[:, None]).isfinite().all()):
            raise LocalProtocolError("the target's logits are not finite numbers")
        tokens: list[int] = greedy.tolist()
        sampled = list(self._book.sampled_rows(batch))
        if sampled:
            index = torch.tensor([one.row for one in sampled], device=logits.device)
            host: NDArray[np.float32] = logits[index].cpu().numpy()
            for one, row in zip(sampled, host, strict=True):
                tokens[one.row] = one.select(row)
        return tokens


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
