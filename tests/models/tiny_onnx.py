"""The tiny model of random weights as ONNX folders, through the real builder; and what is known of no graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from edge_agent.engines.onnx_activations import Activations, products
from edge_agent.engines.onnx_builder import build
from shared.runtimes.huggingface import no_progress
from tests.models.tiny import SIZE, tiny_model

HIDDEN = 64  # blocks are of 32; the builder takes a matrix with as many rows as tokens (96) for the output layer
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def write_tiny_hf(folder: Path, **options: Any) -> "PreTrainedModel":
    """A Hugging Face folder of the model, one token a letter; id 1 ends a text."""
    model = tiny_model(hidden_size=HIDDEN, intermediate_size=128, num_attention_heads=4, head_dim=16, **options).model
    model.save_pretrained(folder)
    letters = {chr(ord("!") + index): index + 2 for index in range(SIZE - 2)}
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "<eos>": 1, **letters}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return model


def build_tiny(folder: Path, **options: Any) -> tuple[Path, Path, "PreTrainedModel"]:
    """ONNX folders with small weights and in float32, and the model that they were made of."""
    model = write_tiny_hf(folder / "hf", **options)
    work = folder / "work"
    work.mkdir()
    return *build(folder / "hf", work, no_progress), model


def unwatched(file: Path) -> dict[str, Activations]:
    """Activations of this graph's products that are all alike."""
    names = products(onnx.load(file, load_external_data=False).graph)
    return dict.fromkeys(names, Activations(None, np.ones(1, np.float32)))
