"""The draft engine on plain onnxruntime: a folder that onnxruntime-genai's builder or `edge-agent prepare` made.

Its graphs keep the cache with GroupQueryAttention: past and present are one buffer of full length, allocated once, and
the attention mask's length tells how much of it counts. So a token copies no cache, and a rollback is a shorter mask.
A second graph may read prompts into the same buffers (`onnx_prefill`). The package is imported at the first load, not
with this module.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.cached_draft import SINK_TOKENS, CachedDraft, context_room
from edge_agent.engines.huge_pages import huge_pages
from edge_agent.engines.onnx_first_token import FirstTokens, read_first_tokens
from edge_agent.engines.onnx_folder import (
    HIDDEN,
    INSTALL,
    LOGITS_ROWS,
    MODEL_FILE,
    OUTPUT_FILE,
    OUTPUT_PARTS,
    PAST,
    PREFILL_FILE,
    PRESENT,
    WEIGHTS_FILE,
    OnnxFolder,
)
from edge_agent.engines.rotary import read_rotary
from shared.core.messages import Fingerprint
from shared.core.selection import Ids, Logits
from shared.engine import Capabilities, EngineError
from shared.processor import is_x86

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

    _Bound = tuple[InferenceSession, IOBinding]
    _Buffer = tuple[NDArray[np.generic], OrtValue]

_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"
_ZERO = np.float32(128)  # of the output layer's values
_KEY = ".key"
# Of its two kernels for attention the tiled one, its first choice, is made for long prompts; a token takes it longer.
_UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"
# On x86 without VNNI, sums of products with signed weights overflow unless onnxruntime makes the weights unsigned.
_NO_OVERFLOW = "session.x64quantprecision", "1"
_CPU_FLAGS = Path("/proc/cpuinfo")
_FEWEST_READ = 12  # rows; below, a forward more is not worth it
_TIMED_ROWS, _TRIES = 32, 2
_FATAL = 4  # severity of onnxruntime's own log: what fails is raised, too
CPU = "CPUExecutionProvider"
_GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")  # their cache must lie on the GPU
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDraft(CachedDraft):
    """`DraftEngine` over an ONNX folder; one session for its whole life."""

    def __init__(
        self,
        folder: Path,
        *,
        context_tokens: int = 0,
        window_tokens: int = 0,
        threads: int = 1,
        batch_tokens: int = 128,
        provider: str = CPU,
    ) -> None:
        """Load the model, for texts of `context_tokens` (0: what it was trained for), `window_tokens` of them cached.

        `provider` is onnxruntime's name of what computes; the processor takes the nodes that it cannot. Raises
        `EngineError`.
        """
        library = _library()
        if provider not in library.get_available_providers():
            raise EngineError(
                f"draft.provider {provider!r} is not in this onnxruntime; it has "
                f"{', '.join(library.get_available_providers())}"
            )
        self.model = OnnxFolder(folder)
        if not self.model.shares_buffers:
            raise EngineError(f"{folder}: past and present are separate buffers; make it with edge-agent prepare")
        with huge_pages():
            self._session = _load(library, folder / MODEL_FILE, threads, provider)
        max_context, room = context_room(context_tokens, window_tokens, self.model.context_tokens)
        self._rotary = read_rotary(self._session.get_modelmeta().custom_metadata_map)
        if window_tokens and self._rotary is None:
            raise EngineError(f"{folder}: the graph does not say how it rotates keys, so it has no window; set "
                              "draft.window_tokens: 0 or make it again with edge-agent prepare")  # fmt: skip
        device = "cuda" if provider in _GPU_PROVIDERS else "cpu"
        self._caches: dict[str, _Buffer] = {}
        self._first_tokens: FirstTokens = read_first_tokens(folder) if device == "cpu" else {}
        self._binding = self._bind(library, self._session, room, device)
        self._selects_rows = LOGITS_ROWS in {tensor.name for tensor in self._session.get_inputs()}
        self._buffers: dict[tuple[str, int], _Buffer] = {}  # by rows, each buffer allocated once
        self._hidden: NDArray[np.generic] | None = None  # (1, n, H), where the last forward's logits are rough
        self._output_layer = self._map_output_layer()
        self._mask = np.ones((1, room), dtype=np.int64)
        capabilities = Capabilities(True, can_tree=False, max_context=max_context)
        super().__init__(folder.name, batch_tokens, capabilities, room)
        self._prefill: _Bound | None = None
        if provider == CPU and (folder / PREFILL_FILE).is_file():
            session = _load(library, folder / PREFILL_FILE, threads, provider)
            self._prefill = self._if_faster((session, self._bind(library, session, room, "cpu")))

    @property
    def can_check(self) -> bool:
        """Other exports may give the last row's only."""
        return self._selects_rows

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self.model.vocabulary.fingerprint

    def close(self) -> None:
        """Free the model; no other call may follow."""
        del self._binding, self._session, self._prefill, self._output_layer, self._caches, self._buffers

    def _bind(self, library: ModuleType, session: "InferenceSession", room: int, device: str) -> "IOBinding":
        """Give the session the cache, each buffer both past and present; the first one allocates it."""
        binding = session.io_binding()
        for tensor in session.get_inputs():
            if tensor.name in (_IDS, _MASK, LOGITS_ROWS):
                continue
            if not tensor.name.startswith(PAST) or tensor.type not in _TYPES or len(tensor.shape) != 4:
                raise EngineError(f"{self.model.folder}: the graph has an input {tensor.name!r}, which is not known "
                                  "here; make it with edge-agent prepare")  # fmt: skip
            if tensor.name not in self._caches:
                zeros = np.zeros([1, tensor.shape[1], room, self.model.head_size], _TYPES[tensor.type])
                self._caches[tensor.name] = zeros, library.OrtValue.ortvalue_from_numpy(zeros, device, 0)
            _, cache = self._caches[tensor.name]
            binding.bind_ortvalue_input(tensor.name, cache)
            binding.bind_ortvalue_output(PRESENT + tensor.name.removeprefix(PAST), cache)
        return binding

    def _if_faster(self, graph: "_Bound") -> "_Bound | None":
        """This reading graph, unless the other one reads as fast on this machine."""
        rows, took_s = [0] * min(_TIMED_ROWS, self._mask.shape[1]), list[tuple[float, float]]()
        for _ in range(_TRIES):
            began_s = time.perf_counter()
            self._run(graph, rows, 0)
            between_s = time.perf_counter()
            self._evaluate(rows, 0, 0)
            took_s.append((between_s - began_s, time.perf_counter() - between_s))
        ours, others = map(min, zip(*took_s, strict=True))
        return graph if ours < others else None

    def _read_ahead(self, tokens: Sequence[int], start: int) -> int:
        if self._prefill is None or len(tokens) < _FEWEST_READ:
            return 0
        if self._tokens[0] in self._first_tokens:
            read = 0 if start else int(self._put_first(tokens[0]))
        else:
            read = max(0, SINK_TOKENS - start)  # what others attend to is read exactly
            if read:
                self._evaluate(tokens[:read], start, 0)
        for at in range(read, len(tokens), self._batch_tokens):
            self._run(self._prefill, tokens[at : at + self._batch_tokens], start + at)
        return len(tokens)

    def _evaluate(self, tokens: Sequence[int], start: int, num_logits: int) -> NDArray[np.float32]:
        is_known = not start and self._put_first(tokens[0])
        if is_known and len(tokens) > max(num_logits, 1):
            tokens, start = tokens[1:], 1
        binding, buffer = self._binding, None
        if self._selects_rows:
            wanted = range(len(tokens) - max(num_logits, 1), len(tokens))  # none would be an empty matrix product
            binding.bind_cpu_input(LOGITS_ROWS, np.array(wanted, dtype=np.int64))
            buffer, output = self._buffer(_LOGITS, len(wanted))
            binding.bind_ortvalue_output(_LOGITS, output)
            if self._output_layer is not None:
                self._hidden, output = self._buffer(HIDDEN, len(wanted))
                binding.bind_ortvalue_output(HIDDEN, output)
        else:
            binding.bind_output(_LOGITS)
        self._run((self._session, binding), tokens, start)
        if is_known and not start:
            self._put_first(tokens[0])  # over what the forward has written there
        # Asking for outputs wraps each of the cache's, too: a fortieth of a small model's forward.
        logits: NDArray[np.generic] = (binding.get_outputs()[-1].numpy() if buffer is None else buffer)[0]
        if len(logits) < num_logits:
            raise EngineError(f"{self.model.folder}: the graph gives the last row's logits only, so it cannot check "
                              "copies; make it again with edge-agent prepare")  # fmt: skip
        return logits[len(logits) - num_logits :].astype(np.float32, copy=False)

    def _put_first(self, token: int) -> bool:
        """Write what a text's first token leaves in the cache, if that is known; whether it is."""
        for name, entry in self._first_tokens.get(token, {}).items():
            self._caches[name][0][0, :, 0] = entry
        return token in self._first_tokens

    def _run(self, graph: "_Bound", tokens: Sequence[int], start: int) -> None:
        """Evaluate tokens at the cache's positions from `start` on. Raises `EngineError`."""
        session, binding = graph
        binding.bind_cpu_input(_IDS, np.array([tokens], dtype=np.int64))
        binding.bind_cpu_input(_MASK, self._mask[:, : start + len(tokens)])
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # its classes share no base of their own
            raise EngineError(f"onnxruntime cannot evaluate {len(tokens)} token(s): {_one_line(error)}") from error

    def _map_output_layer(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """The exact output layer, for graphs whose own is rough: values (V, B, 32) and scales (V, B), not read yet."""
        if HIDDEN not in {tensor.name for tensor in self._session.get_outputs()}:
            return None
        file = self.model.folder / OUTPUT_FILE
        try:
            places = json.loads(file.read_text(encoding="utf-8"))
            values, scales = (
                np.memmap(file.with_name(WEIGHTS_FILE), kind, "r", places[what]["offset"], tuple(places[what]["shape"]))
                for what, kind in OUTPUT_PARTS.items()
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EngineError(f"{file}: {_one_line(error)}; make the folder again") from error
        return values, scales

    def _exact(self, row: int) -> Callable[[Ids], Logits] | None:
        if self._output_layer is None or self._hidden is None:
            return None
        values, scales = self._output_layer
        hidden = self._hidden[0, row]

        def logits(ids: Ids) -> Logits:
            weights = (values[ids] - _ZERO) * scales[ids][..., None]
            found: Logits = weights.reshape(len(ids), -1) @ hidden
            return found

        return logits

    def _buffer(self, name: str, rows: int) -> "_Buffer":
        """Where this output (1, rows, n) goes; what is there is overwritten by the next forward with as many rows."""
        if (name, rows) not in self._buffers:
            (output,) = (tensor for tensor in self._session.get_outputs() if tensor.name == name)
            array = np.empty((1, rows, output.shape[-1]), _TYPES[output.type])
            self._buffers[name, rows] = array, _library().OrtValue.ortvalue_from_numpy(array)
        return self._buffers[name, rows]

    def _remove(self, length: int) -> bool:
        return True  # what lies behind the mask does not count

    def _shift(self, start: int, count: int, length: int) -> None:
        assert self._rotary is not None, "a window without it is refused"
        for name, (_, cache) in self._caches.items():
            entries = cache.numpy().copy()
            moved = entries[:, :, start + count : length]
            if name.endswith(_KEY):
                moved = self._rotary.moved(moved, -count)
            entries[:, :, start : length - count] = moved
            cache.update_inplace(entries)


def _library() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise EngineError(f"onnxruntime is not usable here ({error}); {INSTALL}") from error


def _load(library: ModuleType, file: Path, threads: int, provider: str) -> "InferenceSession":
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    if is_x86() and not (_CPU_FLAGS.exists() and "vnni" in _CPU_FLAGS.read_text()):
        options.add_session_config_entry(*_NO_OVERFLOW)
    os.environ.setdefault(_UNTILED, "1")  # read when a session is made
    providers = list(dict.fromkeys((provider, CPU)))
    try:
        session: InferenceSession = library.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its classes share no base of their own
        raise EngineError(f"model file {file} cannot be loaded: {_one_line(error)}") from error
    return session


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
