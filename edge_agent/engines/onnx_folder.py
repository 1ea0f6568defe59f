"""A model folder as onnxruntime-genai's builder makes it: what its files say, and its tokenizer, without torch.

    model.onnx, model.onnx.data   the graph and its weights
    prefill.onnx, prefill.onnx.data   a second graph that reads prompts faster (`onnx_prefill`); may be missing
    first_token.npz               what a text's first token leaves in the cache (`onnx_first_token`); may be missing
    output.json                   where among the weights the output layer is in 8 bits, for graphs whose own is rough
    genai_config.json             context length, and whether past and present share a buffer
    tokenizer.json                the text side, for the package `tokenizers`
    chat_template.jinja           or `chat_template` in tokenizer_config.json
    tokenizer_config.json         how the begin and end tokens are spelled
    outrider_vocabulary.json      the bytes of each token id as the GGUF file has them, where the model came from one

`onnx_builder` makes one; folders that onnxruntime-genai's builder made by itself are read too.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.engine import EngineError
from shared.runtimes.huggingface import read_vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = f"{MODEL_FILE}.data"
PREFILL_FILE = "prefill.onnx"
FIRST_ENTRIES_FILE = "first_token.npz"
OUTPUT_FILE = "output.json"
OUTPUT_PARTS = {"values": "uint8", "scales": "float32"}  # (V, B, 32) and (V, B)
HIDDEN = "hidden"  # output (1, n, H) of graphs made by `prepare`: what the output layer reads of each of these rows
LOGITS_ROWS = "logits_rows"  # input (n) of graphs made by `prepare`: which rows the output layer reads
PAST, PRESENT = "past_key_values.", "present."  # a cache's two names, as input and output; behind them `0.key`
CONFIG_FILE = "genai_config.json"
# Special tokens that end a generation whatever the files say, by llama.cpp's list (`llama-vocab.cpp`).
_END_SPELLINGS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "</s>", "<reponame>", "<|repo_name|>",
})  # fmt: skip
INSTALL = "install it with: pip install 'outrider[edge-onnx]'"


class OnnxFolder:
    """What is in the folder beside the graph; a `Tokenizer`."""

    def __init__(self, folder: Path) -> None:
        """Read it. Raises `EngineError` where a file is not there or damaged."""
        try:
            import tokenizers
        except ImportError as error:
            raise EngineError(f"an ONNX model needs the package tokenizers; {INSTALL}") from error
        for name in (MODEL_FILE, CONFIG_FILE, "tokenizer.json"):
            if not (folder / name).is_file():
                raise EngineError(f"{folder}: no {name}, so it is not an ONNX model folder; make one with: "
                                  "edge-agent prepare MODEL --format onnx --out DIR")  # fmt: skip
        self.folder = folder
        self.vocabulary, self._stop_ids = read_vocabulary(folder)
        self._config = _read_json(folder / CONFIG_FILE)
        self._settings = _read_json(folder / "tokenizer_config.json")
        try:
            self._tokenizer: Tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises nothing narrower
            raise EngineError(f"{folder / 'tokenizer.json'}: {' '.join(str(error).split())}") from error

    def __repr__(self) -> str:
        return f"<OnnxFolder {self.name}, {len(self.vocabulary.tokens)} token ids>"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def context_tokens(self) -> int:
        """What the model was trained for."""
        return int(self._get("model", "context_length"))

    @property
    def head_size(self) -> int:
        """Numbers in a key or a value of one head."""
        return int(self._get("model", "decoder", "head_size"))

    @property
    def shares_buffers(self) -> bool:
        """Whether the graph writes a cache in place, behind as many tokens as the mask says."""
        return bool(self._get("search", "past_present_share_buffer"))

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Every id that ends a generation: by any of the files, or by its spelling."""
        eos = self._get("model", "eos_token_id")
        spelled = (id_ for id_, added in self._added if added.special and added.content in _END_SPELLINGS)
        return self._stop_ids.union(eos if isinstance(eos, list) else [] if eos is None else [eos], spelled)

    @cached_property
    def chat_template(self) -> str:
        """The model's Jinja template; empty where it has none."""
        file = self.folder / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else str(self._settings.get("chat_template") or "")

    @property
    def bos_text(self) -> str:
        """How the token that begins a text is spelled; empty where there is none."""
        return self._spelling("bos_token")

    @property
    def eos_text(self) -> str:
        """How the token that ends a text is spelled; empty where there is none."""
        return self._spelling("eos_token")

    def tokenize(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """See `Tokenizer`."""
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)

    def token_piece(self, token: int) -> bytes:
        """See `Tokenizer`."""
        return b"" if token in self._special_ids else self.vocabulary.tokens[token]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id_ for id_, added in self._added if added.special)

    @cached_property
    def _added(self) -> "list[tuple[int, AddedToken]]":
        return list(self._tokenizer.get_added_tokens_decoder().items())

    def _get(self, *keys: str) -> Any:
        value: Any = self._config
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise EngineError(f"{self.folder / CONFIG_FILE}: no {'.'.join(keys)}; make the folder again")
            value = value[key]
        return value

    def _spelling(self, key: str) -> str:
        token = self._settings.get(key) or ""
        return str(token["content"] if isinstance(token, dict) else token)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"{file}: not JSON ({error}); make the folder again") from error
    return content if isinstance(content, dict) else {}
