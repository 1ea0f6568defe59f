"""Tiny models of random weights and rows to put through them: what the tests of the target engines have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType, TokenType
from transformers import AutoConfig, AutoModelForCausalLM

from shared.core.messages import Sampling
from shared.engine import Rows
from shared.runtimes.huggingface import CausalLM
from shared.vocabulary import Vocabulary

GREEDY = Sampling()
TREE = (-1, 0, 0, 1, 2, 2)
SIZE = 93  # real tokens; the model's tables are padded to 96
TEXT = tuple((7 * n * n + 3 * n) % SIZE for n in range(60))
_PADDED, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS, _CONTEXT = 96, 48, 6, 2, 8, 2, 256


def tiny_config(architecture: str = "llama", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": _PADDED,
        "hidden_size": _HIDDEN,
        "intermediate_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": _CONTEXT,
        "initializer_range": 0.4,  # large, so that every token of the context matters
        "pad_token_id": None,
        "eos_token_id": 1,
        "sliding_window": None,
    }
    return AutoConfig.for_model(architecture, **settings | options)


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # zero after initialization, which would hide a lost bias
    vocabulary = Vocabulary(tuple(b"%d" % token for token in range(SIZE)) + (b"",) * 3)
    return CausalLM("tiny", model, vocabulary, frozenset({1}), max_context=_CONTEXT)


def write_tiny_gguf(
    file: Path,
    output_scale: Sequence[float] = (),
    layers: int = _LAYERS,
    head_dim: int = _HEAD_DIM,
    tokenizer: str = "llama",
    changed: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, Sequence[float]] = MappingProxyType({}),
    architecture: str = "llama",
    file_type: LlamaFileType = LlamaFileType.ALL_F32,
) -> Path:
    """A llama of the same width in float32; row n of its output layer is multiplied by `output_scale[n]`.

    `tokenizer`: SentencePiece's (llama) or byte-level BPE (gpt2). `changed` and `tensors` are further metadata and
    vectors, those that another `architecture` has among them; `file_type` is what the file says of its weights.
    """
    heads = _HIDDEN // head_dim
    kv_heads = heads * _KV_HEADS // _HEADS
    chance = np.random.default_rng(0)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model(tokenizer)
    if tokenizer == "gpt2":
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*(chr(ord("!") + token) for token in range(SIZE - 1)), "ab", "Ā", "Ġ", "Ċ"])
        writer.add_token_merges(["a b"])
    else:
        writer.add_token_list([f"{token}" for token in range(_PADDED)])
    writer.add_token_scores([0.0] * _PADDED)
    writer.add_token_types([TokenType.NORMAL] * SIZE + [TokenType.UNUSED] * (_PADDED - SIZE))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in changed.items():
        writer.add_string(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, np.float32))

    def add(name: str, *shape: int) -> None:
        weights = chance.normal(0, 0.4, shape).astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
        if name == "output":
            weights[: len(output_scale)] *= np.array(output_scale, np.float32)[:, None]
        writer.add_tensor(f"{name}.weight", weights)

    add("token_embd", _PADDED, _HIDDEN)
    add("output_norm", _HIDDEN)
    add("output", _PADDED, _HIDDEN)
    for layer in range(layers):
        for name, size in (("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)):
            add(f"blk.{layer}.{name}", size * head_dim, _HIDDEN)
        add(f"blk.{layer}.attn_output", _HIDDEN, heads * head_dim)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            add(f"blk.{layer}.{name}", _HIDDEN, _HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", _HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rows(
    session: str,
    start: int,
    tokens: Sequence[int],
    parents: Sequence[int] | None = None,
    first_selected: int = 0,
    sampling: Sampling = GREEDY,
) -> Rows:
    chain = range(-1, len(tokens) - 1)
    return Rows(
        session, start, tuple(tokens), tuple(chain if parents is None else parents), first_selected, sampling, 2
    )
