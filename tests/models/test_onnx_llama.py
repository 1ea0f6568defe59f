"""The float32 graph that is written of a GGUF file: the same model as llama.cpp's, and the same text side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from edge_agent.engines.gguf_tokenizer import can_write_tokenizer, write_tokenizer
from edge_agent.engines.llama_cpp import LlamaCppDraft
from edge_agent.engines.onnx import OnnxDraft
from edge_agent.engines.onnx_builder import build
from edge_agent.engines.onnx_folder import OnnxFolder
from edge_agent.engines.onnx_llama import can_write_llama, write_llama
from edge_agent.texts import TEXTS
from shared.engine import EngineError
from shared.runtimes.gguf_file import GgufFile
from shared.runtimes.huggingface import no_progress
from shared.runtimes.llama_cpp import LlamaModel
from tests.models.tiny import SIZE, TEXT, write_tiny_gguf

BYTE_LEVEL: Any = {"tokenizer": "gpt2", "head_dim": 16}
Array = NDArray[np.float32]
FACTORS = {"rope_freqs.weight": (1.0, 1.0, 2.0, 2.0, 4.0, 8.0, 8.0, 8.0)}
LAYERS, SIZES = range(2), {"attn_q": 48, "attn_k": 16, "attn_v": 16}
UNEVEN = np.random.default_rng(1).normal(1, 0.7, 48)
BIASES = {f"blk.{layer}.{name}.bias": UNEVEN[:size] for layer in LAYERS for name, size in SIZES.items()}
NORMS = {
    f"blk.{layer}.attn_{name}_norm.weight": UNEVEN[at : at + 16]
    for layer in LAYERS
    for name, at in (("q", 0), ("k", 9))
}
HARD_TEXTS = (
    *TEXTS.values(),
    "naïve café 😀 <|im_end|>x <|im_start|>system\nYou are",
    "In 2019 sales rose by 12.5 % to $3,480,000\n\n\n  ok\t\tx \r\n end  ",
    "١٢٣ ½ Ⅷ 三 3三 I'll you'RE they'VE it'S don't",
    "    def f(x):\n        return x**2  # ok",
)


def onnx_logits(file: Path, folder: Path, tokens: Sequence[int]) -> Array:
    """Of each row, from a folder that is made here; in two forwards, so that the cache counts."""
    write_llama(GgufFile(file), folder)
    draft = OnnxDraft(folder)
    first = draft._evaluate(tokens[:20], 0, 20).copy()
    second = draft._evaluate(tokens[20:], 20, len(tokens) - 20).copy()
    draft.close()
    logits: Array = np.concatenate((first, second))[:, :SIZE]
    return logits


def llama_cpp_logits(file: Path, tokens: Sequence[int]) -> Array:
    draft = LlamaCppDraft(file)
    logits: Array = draft._evaluate(tokens, 0, len(tokens)).copy()[:, :SIZE]
    draft.close()
    return logits


@pytest.mark.parametrize(
    ("architecture", "tensors"), [("llama", {}), ("llama", FACTORS), ("qwen2", BIASES), ("qwen3", NORMS)]
)
def test_the_graph_is_the_model_that_llama_cpp_runs(
    tmp_path: Path, architecture: str, tensors: Mapping[str, Sequence[float]]
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL, tensors=tensors, architecture=architecture)
    assert can_write_llama(GgufFile(file))
    ours, theirs = onnx_logits(file, tmp_path / "folder", TEXT), llama_cpp_logits(file, TEXT)
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max(), "llama.cpp's cache is in float16"
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.95
    for name in tensors:  # each of them counts
        even = {**tensors, name: [0.0 if name.endswith("bias") else 1.0] * len(tensors[name])}
        other = write_tiny_gguf(tmp_path / "even.gguf", **BYTE_LEVEL, tensors=even, architecture=architecture)
        assert np.abs(ours - llama_cpp_logits(other, TEXT)).max() > 0.1 * np.abs(theirs).max(), name


@pytest.mark.parametrize(("architecture", "tensors"), [("qwen2", BIASES), ("qwen3", NORMS)])
def test_small_weights_are_made_of_either(
    tmp_path: Path, architecture: str, tensors: Mapping[str, Sequence[float]]
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL, tensors=tensors, architecture=architecture)
    small, full = (OnnxDraft(folder) for folder in build(file, tmp_path, no_progress))
    drafted = [draft._evaluate(TEXT, 0, len(TEXT)).copy()[:, :SIZE] for draft in (small, full)]
    for draft in (small, full):
        draft.close()
    assert np.corrcoef([logits.ravel() for logits in drafted])[0, 1] > 0.99
    assert (drafted[0].argmax(axis=1) == drafted[1].argmax(axis=1)).mean() > 0.8, "the output layer is rough"


def test_a_folder_says_what_the_file_says(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL, changed={"tokenizer.chat_template": "{{ x }}"})
    write_llama(GgufFile(file), tmp_path / "folder")
    folder, model = OnnxFolder(tmp_path / "folder"), LlamaModel(file, vocabulary_only=True)
    assert folder.vocabulary == model.vocabulary
    assert folder.eog_ids == model.eog_ids == {1}
    assert (folder.context_tokens, folder.head_size, folder.shares_buffers) == (256, 16, True)
    assert folder.tokenize("cabab") == model.tokenize("cabab") == [66, 92, 92]
    assert (folder.chat_template, folder.bos_text, folder.eos_text) == ("{{ x }}", "!", '"')


@pytest.mark.parametrize(
    ("changed", "tensors"),
    [
        ({"llama.rope.scaling.type": "linear"}, {}),
        ({"tokenizer.ggml.pre": "falcon"}, {}),
        ({}, {"blk.0.attn_q.bias": [0.0] * 48}),
    ],
)
def test_what_the_graph_would_leave_out_is_not_written(
    tmp_path: Path, changed: dict[str, str], tensors: dict[str, list[float]]
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL, tensors=tensors)
    described = GgufFile(rewritten(file, tmp_path / "changed.gguf", changed, tensors=True))
    assert not can_write_llama(described)


@pytest.mark.parametrize("architecture", ["phi3", "qwen2", "qwen3"])
def test_another_architecture_is_not_written(tmp_path: Path, architecture: str) -> None:
    """Its settings have other names: one that is asked for is not there, and was taken for a number."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL)
    other = rewritten(file, tmp_path / "other.gguf", {}, tensors=True, architecture=architecture)
    assert not can_write_llama(GgufFile(other))


def test_an_architecture_whose_layers_differ_is_not_written(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "openelm")
    writer.add_head_count([12, 16])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert not can_write_llama(GgufFile(tmp_path / "other.gguf"))


@pytest.mark.parametrize("options", [{"head_dim": 16}, {"tokenizer": "gpt2"}])
def test_other_tokenizers_and_heads_that_onnxruntime_refuses_are_not_written(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    assert not can_write_llama(GgufFile(write_tiny_gguf(tmp_path / "tiny.gguf", **options)))


def test_a_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", **BYTE_LEVEL)
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(EngineError, match=r"half.gguf: damaged \(.*\); fetch the model again"):
        GgufFile(tmp_path / "half.gguf")


@pytest.mark.models
@pytest.mark.parametrize("words", ["smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("begins", [True, False, None])
def test_texts_are_cut_as_llama_cpp_cuts_them(
    default_model_path: Path, tmp_path: Path, words: str, begins: bool | None
) -> None:
    changed: dict[str, str | bool | None] = {"tokenizer.ggml.pre": words, "tokenizer.ggml.add_bos_token": begins}
    file = rewritten(default_model_path, tmp_path / "vocabulary.gguf", changed)
    described, model = GgufFile(file), LlamaModel(file, vocabulary_only=True)
    assert can_write_tokenizer(described)
    (tmp_path / "model.onnx").touch()
    (tmp_path / "genai_config.json").write_text("{}")
    write_tokenizer(described, tmp_path)
    ours = OnnxFolder(tmp_path)
    for text in HARD_TEXTS:
        for special in (True, False):
            expected = model.tokenize(text, parse_special=special, add_special=True)
            assert ours.tokenize(text, parse_special=special, add_special=True) == expected, text
            assert b"".join(map(ours.token_piece, expected)) == b"".join(map(model.token_piece, expected))
    begun = ours.tokenize("a", add_special=True)[0] == described.get("tokenizer.ggml.bos_token_id")
    assert begun is (words == "llama-bpe" if begins is None else begins)
    assert ours.vocabulary.fingerprint == model.vocabulary.fingerprint


def rewritten(
    source: Path,
    out: Path,
    changed: Mapping[str, str | bool | None],
    tensors: bool = False,
    architecture: str = "llama",
) -> Path:
    """The file with other metadata (None: without it), and without its tensors unless they are asked for."""
    reader, writer = GGUFReader(source), GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind is GGUFValueType.ARRAY else None
        if contents := field.contents() if kind is GGUFValueType.ARRAY else [field.contents()]:
            name = name.replace("llama.", f"{architecture}.", 1)
            writer.add_key_value(name, contents if sub_type else contents[0], kind, sub_type=sub_type)
    for name, value in changed.items():
        if value is not None:
            writer.add_bool(name, value) if isinstance(value, bool) else writer.add_string(name, value)
    for tensor in reader.tensors if tensors else ():
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
