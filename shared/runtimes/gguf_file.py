"""A GGUF file without a runtime: its settings, its weights as floats, and what its token ids mean.

Needs the package `gguf`, imported with the first file. Reading takes a second or two for a table of 50,000 tokens.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.engine import EngineError
from shared.runtimes.hub import check_is_gguf
from shared.vocabulary import Vocabulary, token_bytes

_ROWS = 4096  # that are dequantized at once: what is computed on the way takes several times their memory
_UNUSED_TOKEN = 5  # GGUF token type, llama.cpp `LLAMA_TOKEN_TYPE_UNUSED`
_BYTE_LEVEL = {"gpt2": True, "llama": False, "t5": False}
_STOP_KEYS = ("eos", "eot", "eom")
_DAMAGED = (ValueError, LookupError, OverflowError, MemoryError)  # what its package raises for a file that breaks off


class GgufFile:
    """What the file says; weights are read and made float32 when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises `EngineError` where it is not there, not GGUF or damaged."""
        check_is_gguf(path)
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise EngineError(f"{path}: needs the Python package {error.name!r}; pip install gguf") from error
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except _DAMAGED as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise EngineError(f"{path}: damaged ({reason}); fetch the model again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def __repr__(self) -> str:
        return f"<GgufFile {self.path.name}, {len(self._tensors)} tensors>"

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or `default` where there is none."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    @property
    def tensor_names(self) -> frozenset[str]:
        """Every tensor that the file holds."""
        return frozenset(self._tensors)

    def weights(self, name: str) -> NDArray[np.float32]:
        """A tensor as floats, dequantized: a matrix is (N, K), one row for each output. Raises `EngineError`."""
        from gguf import dequantize

        tensor = self._tensors[name]
        values = np.empty(tuple(tensor.shape)[::-1], np.float32)
        try:
            for at in range(0, len(values), _ROWS):
                values[at : at + _ROWS] = dequantize(tensor.data[at : at + _ROWS], tensor.tensor_type)
        except NotImplementedError as error:  # what its package raises for a type of weights that it does not know
            raise EngineError(f"{self.path}: weights in {tensor.tensor_type.name} cannot be read ({name})") from error
        return values

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id, from its own token table. Raises `EngineError`."""
        kind = self.get("tokenizer.ggml.model")
        if kind not in _BYTE_LEVEL:
            raise EngineError(f"{self.path}: its tokenizer is of kind {kind!r}; supported are {', '.join(_BYTE_LEVEL)}")
        pairs = zip(self.token_texts, self.token_types, strict=True)
        return Vocabulary(
            tuple(b"" if type_ == _UNUSED_TOKEN else token_bytes(text, _BYTE_LEVEL[kind]) for text, type_ in pairs)
        )

    @cached_property
    def token_texts(self) -> list[str]:
        """How each token id is spelled in the table."""
        return list(self.get("tokenizer.ggml.tokens", ()))

    @property
    def token_types(self) -> list[int]:
        """What each token id is, by llama.cpp's `llama_token_type`."""
        return list(self.get("tokenizer.ggml.token_type") or [1] * len(self.token_texts))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text."""
        found = (self.get(f"tokenizer.ggml.{name}_token_id") for name in _STOP_KEYS)
        return frozenset(int(token) for token in found if token is not None)
