"""llama.cpp through its C interface, wrapped once for both sides: a model file, and a context that evaluates rows.

The high-level `Llama` class of llama-cpp-python holds one sequence and hides rollback, so this uses the C functions.
Their rules, kept here: positions of a sequence follow each other without gap or overlap, so what is evaluated again
must be removed first; a rollback can be refused and says so; logits live until the next decode, so they are copied.
A context is used from one thread at a time. The library is imported at the first load, not with this module.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import structlog
from numpy.typing import NDArray

from shared.core.errors import LocalProtocolError
from shared.engine import EngineError
from shared.runtimes.hub import cached_copy, check_is_gguf
from shared.vocabulary import Vocabulary, token_bytes

log = structlog.get_logger(__name__)

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h; the table in the Python package is older and says 3
_GUESSED = 1024  # LLAMA_FTYPE_GUESSED: the file does not say, its tensors do
# Of a build for processors with AMX. Its kernels can end the process, as a compiler may remove the tile configuration
# that they load (llama.cpp, pull request 26954; gcc 12 did). Only repacked weights come to them.
_AMX = b"AMX_INT8 = 1"
_DECODE_ERRORS = {1: "the cache is full", 2: "it was aborted", -1: "the batch is invalid"}

_error_lines: list[str] = []
_callbacks: list[object] = []  # llama.cpp keeps bare pointers: these keep the objects alive


Weights = Literal["q4_0", "q8_0", "bfloat16", "float32"]
"""What a model file can be converted to."""


@cache
def _library() -> ModuleType:
    try:
        import llama_cpp
    except ImportError as error:
        raise EngineError(
            f"llama.cpp is not usable here ({error}); pip install 'outrider[edge]', or on a verifier"
            " 'outrider[cloud-llama]'"
        ) from error

    def log(level: int, text: bytes, _user_data: object) -> None:
        if level == _LOG_ERROR:
            _error_lines.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(log)
    _callbacks.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _complaint() -> str:
    """What llama.cpp complained of first since the last look: the later lines only repeat that it failed."""
    line = _error_lines[0] if _error_lines else "llama.cpp gave no reason"
    _error_lines.clear()
    return line


def max_sequences() -> int:
    """Most sequences that one context can have, as llama.cpp was built: 256. Raises `EngineError` without llama.cpp."""
    return int(_library().llama_max_parallel_sequences())


def has_gpu() -> bool:
    """Whether a GPU can compute with a model's weights. Raises `EngineError` without llama.cpp."""
    return bool(_library().llama_supports_gpu_offload())


def _file_type(weights: Weights) -> int:
    library = _library()
    return int(
        {
            "q4_0": library.LLAMA_FTYPE_MOSTLY_Q4_0,
            "q8_0": library.LLAMA_FTYPE_MOSTLY_Q8_0,
            "bfloat16": library.LLAMA_FTYPE_MOSTLY_BF16,
            "float32": library.LLAMA_FTYPE_ALL_F32,
        }[weights]
    )


def quantize(path: Path, to: Weights, destination: Path) -> None:
    """Write the GGUF model at `path` once more with its weights as `to`. Raises `EngineError`."""
    library = _library()
    check_is_gguf(path)
    params = library.llama_model_quantize_default_params()
    params.ftype = _file_type(to)
    params.allow_requantize = True
    if library.llama_model_quantize(bytes(path), bytes(destination), ctypes.byref(params)):
        raise EngineError(f"model file {path} cannot be quantized to {to}: {_complaint()}")


def with_weights(path: Path, weights: Weights, cache_dir: Path) -> Path:
    """The file itself where its weights are of this type already, else the copy of it that `cache_dir` keeps.

    The copy is made first where it is not there yet, and appears at once when it is complete. Raises `EngineError`.
    """
    check_is_gguf(path)
    copy = cached_copy(path, cache_dir, weights, f".{weights}.gguf")
    if copy.exists():
        return copy
    model = LlamaModel(path, gpu_layers=0)
    is_same = model.file_type == _file_type(weights)
    model.close()
    if is_same:
        return path
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(f".{os.getpid()}.partial")
    try:
        quantize(path, weights, partial)
        partial.rename(copy)
    finally:
        partial.unlink(missing_ok=True)
    return copy


class LlamaModel:
    """A GGUF file: weights, metadata and vocabulary. Close every context of it before it."""

    def __init__(self, path: Path, *, gpu_layers: int = -1, vocabulary_only: bool = False) -> None:
        """Load the file, with `gpu_layers` layers on the GPU if there is one (-1: all). Raises `EngineError`.

        With `vocabulary_only` no weights are read; it then is a tokenizer and no more.
        """
        check_is_gguf(path)
        self.path = path
        self._lib = _library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = _AMX not in self._lib.llama_print_system_info()
        if not (params.use_extra_bufts or vocabulary_only):
            log.info("llama.cpp was built for AMX, so its fast kernels are not used; README has a build without it")
        _error_lines.clear()
        self.handle = self._lib.llama_model_load_from_file(bytes(path), params)
        if not self.handle:
            raise EngineError(
                f"model file {path} cannot be loaded: {_complaint()}; check that the download is complete"
            )
        self._vocab = self._lib.llama_model_get_vocab(self.handle)
        self.on_gpu = gpu_layers != 0
        self.vocabulary_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.trained_context_tokens = int(self._lib.llama_model_n_ctx_train(self.handle))
        self.is_recurrent = bool(
            self._lib.llama_model_is_recurrent(self.handle) or self._lib.llama_model_is_hybrid(self.handle)
        )
        self.bos_id = int(self._lib.llama_vocab_bos(self._vocab))  # -1 where there is none, as for eos
        self.eos_id = int(self._lib.llama_vocab_eos(self._vocab))

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def chat_template(self) -> str:
        """The model's Jinja template; empty where it has none."""
        return self.metadata("tokenizer.chat_template")

    @property
    def bos_text(self) -> str:
        """How the token that begins a text is spelled; empty where there is none."""
        return self.token_text(self.bos_id)

    @property
    def eos_text(self) -> str:
        """How the token that ends a text is spelled; empty where there is none."""
        return self.token_text(self.eos_id)

    @property
    def file_type(self) -> int:
        """What most of its weights are: a `LLAMA_FTYPE` of llama.cpp."""
        return int(self._lib.llama_model_ftype(self.handle)) & ~_GUESSED

    @property
    def is_q4_1(self) -> bool:
        """Whether most of its weights are Q4_1."""
        return self.file_type == int(self._lib.LLAMA_FTYPE_MOSTLY_Q4_1)

    @property
    def cached_values_per_token(self) -> int:
        """Numbers that the keys and values of one token are, in all layers; each layer is taken to be as the first."""
        heads = self._lib.llama_model_n_head_kv(self.handle)
        usual = self._lib.llama_model_n_embd(self.handle) // self._lib.llama_model_n_head(self.handle)
        name = self.metadata("general.architecture")
        sizes = (self.metadata(f"{name}.attention.{part}_length") for part in ("key", "value"))
        return int(self._lib.llama_model_n_layer(self.handle) * heads * sum(int(size or usual) for size in sizes))

    def __repr__(self) -> str:
        return f"<LlamaModel {self.path.name}, {self.vocabulary_size} token ids>"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id; b"" for those that the file marks as unused (padding)."""
        lib, byte_level = self._lib, self.metadata("tokenizer.ggml.model") == "gpt2"

        def meaning(token: int) -> bytes:
            if lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_UNUSED:
                return b""
            return token_bytes(lib.llama_vocab_get_text(self._vocab, token).decode(errors="replace"), byte_level)

        return Vocabulary(tuple(meaning(token) for token in range(self.vocabulary_size)))

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Every id that ends a generation: end of text, end of turn."""
        ids = range(self.vocabulary_size)
        return frozenset(token for token in ids if self._lib.llama_vocab_is_eog(self._vocab, token))

    def metadata(self, key: str) -> str:
        """A metadata value of the file as text, such as `tokenizer.chat_template`; empty where there is none."""
        size = self._lib.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return ""
        buffer = ctypes.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def tokenize(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of a text.

        With `parse_special` the spelling of a special token is that token, as rendered chat templates need. With
        `add_special` the model's own begin and end tokens are added.
        """
        data = text.encode()
        size = len(data) // 2 + 8  # enough for most texts; else llama.cpp names the size
        while True:
            buffer = (ctypes.c_int32 * size)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            size = -count

    def token_text(self, token: int) -> str:
        """How the file spells a token, special ones too; empty for id -1."""
        return "" if token < 0 else str(self._lib.llama_vocab_get_text(self._vocab, token).decode(errors="replace"))

    def token_piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character; none for special tokens."""
        size = 16
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def close(self) -> None:
        """Free the weights; safe to call twice."""
        if self.handle:
            self._lib.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A cache of one or more sequences over a model, and the forward that fills it."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        context_tokens: int,
        threads: int,
        batch_tokens: int = 512,
        max_sequences: int = 1,
        unified: bool = True,
        exact: bool = False,
    ) -> None:
        """Make room for `context_tokens`, shared by all sequences if `unified`, else in equal parts.

        Rows that belong to several sequences (trees) need `unified`. A decode takes up to `batch_tokens` rows. Keys and
        values are float16, or float32 if `exact`, with plain attention then. Raises `EngineError` where memory is short
        or the model keeps no cache.
        """
        lib = self._lib = model._lib
        self.model = model
        self.batch_tokens = batch_tokens
        params = lib.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_ubatch = batch_tokens
        params.n_batch = max(batch_tokens, max_sequences)  # fewer than the sequences, and llama.cpp ends the process
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = max_sequences
        params.kv_unified = unified
        params.op_offload = params.offload_kqv = model.on_gpu
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True  # a sliding window's cache keeps everything: rollback must not reach past what is kept
        _error_lines.clear()
        self._handle = lib.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise EngineError(
                f"no context of {context_tokens} tokens for {model.path}: {_complaint()}; try fewer context tokens"
            )
        self._memory = lib.llama_get_memory(self._handle)
        if not self._memory:
            lib.llama_free(self._handle)
            raise EngineError(f"model file {model.path} is not a generative model: it keeps no cache; use another one")
        self._batch = lib.llama_batch_init(batch_tokens, 0, max_sequences)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[int],
    ) -> NDArray[np.float32]:
        """Evaluate n rows, at most `batch_tokens`; a copy of the `wanted` (ascending) rows' logits, (len(wanted), V).

        Row i is `tokens[i]` at `positions[i]`, entered in each of `sequences[i]`; it attends to what these hold before
        it. Raises `EngineError` where llama.cpp fails; if the cache was full, it is as before.
        """
        if not 0 < len(tokens) <= self.batch_tokens:
            raise LocalProtocolError(f"a decode takes 1 to {self.batch_tokens} rows, not {len(tokens)}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, (token, position, members) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, 0
            batch.n_seq_id[row] = len(members)
            for index, sequence in enumerate(members):
                batch.seq_id[row][index] = sequence
        for row in wanted:
            batch.logits[row] = 1
        _error_lines.clear()
        code = self._lib.llama_decode(self._handle, batch)
        if code != 0:
            reason = _DECODE_ERRORS.get(code, f"code {code}")
            raise EngineError(f"llama.cpp cannot evaluate {len(tokens)} tokens: {reason}; {_complaint()}")
        shape = (len(wanted), self.model.vocabulary_size)
        if not wanted:
            return np.empty(shape, dtype=np.float32)
        # The wanted rows lie together, in the order of the batch.
        logits: NDArray[np.float32] = np.ctypeslib.as_array(self._lib.llama_get_logits(self._handle), shape=shape)
        return np.array(logits)

    def remove(self, sequence: int, start: int) -> bool:
        """Drop a sequence's cache from position `start` on; False, and nothing changed, if this model cannot.

        (Recurrent state cannot go back.) Dropping everything, `start` 0, always works.
        """
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1))

    @property
    def can_shift(self) -> bool:
        """Whether what is cached can be moved to other positions."""
        return bool(self._lib.llama_memory_can_shift(self._memory))

    def shift(self, sequence: int, start: int, count: int) -> None:
        """Drop `count` positions of a sequence from `start` on; what lies behind moves into their place."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, start, start + count)
        self._lib.llama_memory_seq_add(self._memory, sequence, start + count, -1, -count)

    def copy(self, source: int, destination: int, start: int, stop: int) -> None:
        """Let `destination` share positions `start` to `stop` (exclusive) of `source`; for a unified cache only."""
        self._lib.llama_memory_seq_cp(self._memory, source, destination, start, stop)

    def close(self) -> None:
        """Free the cache; safe to call twice."""
        if self._handle:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._handle)
            self._handle = None
