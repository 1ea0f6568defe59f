"""A GGUF file of the Llama architecture or one close to it (SmolLM, Qwen) as an ONNX folder with a float32 graph.

The graph is what onnxruntime-genai's builder makes of such a model, written without it, torch or transformers, in a
fraction of the time; `onnx_quantize` and `onnx_prefill` go on from either. For each layer:

      hidden -> norm -> q, k, v in one product -> GroupQueryAttention (rotary, cache) -> product
      + hidden -> norm -> gate and up in one product -> silu(gate) x up -> product -> + hidden

Qwen 2 adds a bias to q, k and v; Qwen 3 has a norm for each head of q and of k instead.

GGUF keeps the rows of a Llama's q and k in the order that llama.cpp rotates, neighbours in a pair; here a pair's
numbers are half a head apart, as in the model that the file was made of, and as Qwen's files have them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_agent.engines.gguf_tokenizer import can_write_tokenizer, write_tokenizer
from edge_agent.engines.onnx_folder import CONFIG_FILE, MODEL_FILE
from edge_agent.engines.onnx_graph import GraphRewrite, new_model
from edge_agent.engines.weight_blocks import Floats
from shared.runtimes.gguf_file import GgufFile

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

_HEADS = ("attn_q", "attn_k", "attn_v")
_LAYER = tuple(
    f"{name}.weight" for name in ("attn_norm", *_HEADS, "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
)
_BIASES, _NORMS = tuple(f"{name}.bias" for name in _HEADS), ("attn_q_norm.weight", "attn_k_norm.weight")
_ARCHITECTURES = {"llama": _LAYER, "qwen2": (*_LAYER, *_BIASES), "qwen3": (*_LAYER, *_NORMS)}  # a layer's tensors
_EMBEDDING, _NORM, _OUTPUT, _ROPE_FACTORS = "token_embd", "output_norm", "output", "rope_freqs"
_INT32 = 6  # ONNX's number of the type
_HEAD_UNIT = 16  # numbers; onnxruntime rotates no other heads
_TRAINED_BASE = 10_000.0  # of the angles, where the file says none


def can_write_llama(file: GgufFile) -> bool:
    """Whether the file holds such a model and nothing that the graph would leave out."""
    names = _ARCHITECTURES.get(file.get("general.architecture"))
    if names is None:  # its settings may have other names, and be lists
        return False
    settings = _Settings(file)
    needed = {f"{_EMBEDDING}.weight", f"{_NORM}.weight"}
    needed |= {f"blk.{layer}.{name}" for layer in range(settings.layers) for name in names}
    found = file.tensor_names
    return (
        needed <= found <= needed | {f"{_OUTPUT}.weight", f"{_ROPE_FACTORS}.weight"}
        and settings.head_size % _HEAD_UNIT == 0
        and settings.get("rope.dimension_count", settings.head_size) == settings.head_size
        and settings.get("rope.scaling.type", "none") == "none"
        and can_write_tokenizer(file)
    )


def write_llama(file: GgufFile, folder: Path) -> None:
    """Write graph, weights, configuration and tokenizer into a new folder."""
    folder.mkdir()
    settings = _Settings(file)
    _Graph(file, settings, folder / MODEL_FILE).write()
    config = {
        "model": {
            "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
            "context_length": int(settings.get("context_length")),
            "decoder": {"head_size": settings.head_size},
            "type": settings.architecture,
        },
        "search": {"past_present_share_buffer": True},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(file, folder)


class _Settings:
    """What the file says of the model's shape, by its architecture's names."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.architecture = str(file.get("general.architecture"))
        self.layers = int(self.get("block_count", 0))
        self.heads = int(self.get("attention.head_count", 0))
        self.kv_heads = int(self.get("attention.head_count_kv", self.heads))

    @property
    def head_size(self) -> int:
        """Numbers in a key of one head."""
        return int(self.get("attention.key_length") or int(self.get("embedding_length")) // self.heads)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of this architecture, or `default` where there is none."""
        return self._file.get(f"{self.architecture}.{key}", default)


class _Graph(GraphRewrite):
    """The graph while it is written, node by node."""

    def __init__(self, model: GgufFile, settings: _Settings, file: Path) -> None:
        from onnx import GraphProto

        self._model = new_model(GraphProto(name=model.path.stem))
        super().__init__(self._model.graph, file)
        self._gguf, self._settings = model, settings
        self._epsilon = float(settings.get("attention.layer_norm_rms_epsilon"))
        self._nodes = list["NodeProto"]()

    def write(self) -> None:
        """Save the whole graph, its weights beside it."""
        lengths = self._lengths()
        hidden, change = self._embedded(), ""
        for layer in range(self._settings.layers):
            normed, hidden = self._norm(f"blk.{layer}.attn_norm", hidden, change)
            change = self._attention(layer, normed, lengths)
            normed, hidden = self._norm(f"blk.{layer}.ffn_norm", hidden, change)
            change = self._feed_forward(layer, normed)
        normed, _ = self._norm(_NORM, hidden, change)
        self._add("MatMul", [normed, "output_layer"], "logits")
        self._declare()
        self._keep(self._nodes)
        self.save(self._model)

    def _lengths(self) -> tuple[str, str]:
        """Of the attention mask: the last token's position, and how many tokens there are."""
        last = self._constant("mask_axis", np.array([1], np.int64))
        count = self._add("ReduceSum", ["attention_mask", last], "mask_tokens", keepdims=0)
        position = self._add("Sub", [count, self._constant("mask_one", np.array([1], np.int64))], "mask_position")
        shape = self._add("Shape", ["attention_mask"], "mask_shape")
        total = self._add(
            "Gather", [shape, self._constant("mask_columns", np.array(1, np.int64))], "mask_total", axis=0
        )
        return (
            self._add("Cast", [position], "last_position", to=_INT32),
            self._add("Cast", [total], "total_tokens", to=_INT32),
        )

    def _embedded(self) -> str:
        """The rows of the input's tokens; the table is the output layer where the file has no other."""
        table = self._gguf.weights(f"{_EMBEDDING}.weight")
        if f"{_OUTPUT}.weight" in self._gguf.tensor_names:
            self._constant("output_layer", self._gguf.weights(f"{_OUTPUT}.weight").T)
            name = self._constant("embedding", table)
        else:
            weights = self._constant("output_layer", table.T)
            name = self._add("Transpose", [weights], "embedding", perm=[1, 0])
        return self._add("Gather", [name, "input_ids"], "embedded")

    def _norm(self, name: str, hidden: str, change: str) -> tuple[str, str]:
        """The sum of `hidden` and `change`, if there is one, after this norm and before it."""
        weights, normed = self._constant(name, self._gguf.weights(f"{name}.weight")), f"{name}_out"
        if not change:
            self._add("SimplifiedLayerNormalization", [hidden, weights], normed, axis=-1, epsilon=self._epsilon)
            return normed, hidden
        kind, total = "SkipSimplifiedLayerNormalization", f"{name}_sum"
        self._add(kind, [hidden, change, weights], normed, "", "", total, epsilon=self._epsilon)
        return normed, total

    def _attention(self, layer: int, source: str, lengths: tuple[str, str]) -> str:
        """What attention adds to the hidden state."""
        settings, prefix = self._settings, f"blk.{layer}"
        past = [f"past_key_values.{layer}.{what}" for what in ("key", "value")]
        present = [f"present.{layer}.{what}" for what in ("key", "value")]
        mixed = self._add(
            "GroupQueryAttention",
            [*self._queries_keys_values(prefix, source), *past, *lengths, *self._rotation()],
            f"{prefix}.attn_mixed", *present,
            num_heads=settings.heads, kv_num_heads=settings.kv_heads, scale=1.0, do_rotary=1,
        )  # fmt: skip
        return self._product(f"{prefix}.attn_output", mixed, [self._weights(f"{prefix}.attn_output")])

    def _queries_keys_values(self, prefix: str, source: str) -> tuple[str, str, str]:
        """Attention's inputs, all in the first one unless they are normed; the queries over the root of their size."""
        names, settings = _ARCHITECTURES[self._settings.architecture], self._settings
        scale = np.float32(settings.head_size**-0.5)
        queries, keys, values = (self._weights(f"{prefix}.{name}") for name in _HEADS)
        sizes = [len(part) for part in (queries, keys, values)]
        if settings.architecture == "llama":
            queries, keys = _rotated_by_halves(queries, settings.heads), _rotated_by_halves(keys, settings.kv_heads)
        if _NORMS[0] in names:
            packed = self._product(f"{prefix}.attn_qkv", source, [queries, keys, values])
            parts = [f"{prefix}.{name}_part" for name in _HEADS]
            self._add("Split", [packed, self._constant("qkv_sizes", np.array(sizes, np.int64))], *parts, axis=-1)
            queries_norm, keys_norm = (self._gguf.weights(f"{prefix}.{name}") for name in _NORMS)
            normed = self._normed_heads(parts[0], settings.heads, queries_norm * scale)
            return normed, self._normed_heads(parts[1], settings.kv_heads, keys_norm), parts[2]
        packed = self._product(f"{prefix}.attn_qkv", source, [queries * scale, keys, values])
        if _BIASES[0] in names:
            biases = [self._gguf.weights(f"{prefix}.{name}") for name in _BIASES]
            biases[0] = biases[0] * scale
            bias = self._constant(f"{prefix}.attn_qkv_bias", np.concatenate(biases))
            packed = self._add("Add", [packed, bias], f"{prefix}.attn_qkv_biased")
        return packed, "", ""

    def _normed_heads(self, source: str, heads: int, weights: Floats) -> str:
        """Each head of `source` (heads x D) by itself after a norm with these weights (D)."""
        apart = self._constant(f"apart_{heads}", np.array([0, 0, heads, -1], np.int64))
        joined = self._constant("joined", np.array([0, 0, -1], np.int64))
        cut = self._add("Reshape", [source, apart], f"{source}_heads")
        inputs = [cut, self._constant(f"{source}_norm", weights)]
        self._add("SimplifiedLayerNormalization", inputs, f"{source}_normed", axis=-1, epsilon=self._epsilon)
        return self._add("Reshape", [f"{source}_normed", joined], f"{source}_out")

    def _feed_forward(self, layer: int, source: str) -> str:
        """What the layer's second half adds to the hidden state."""
        prefix = f"blk.{layer}.ffn"
        both = self._product(
            f"{prefix}_gate_up", source, [self._weights(f"{prefix}_gate"), self._weights(f"{prefix}_up")]
        )
        gate, up = f"{prefix}_gate", f"{prefix}_up"
        self._add("Split", [both], gate, up, axis=-1, num_outputs=2)
        slope = self._add("Sigmoid", [gate], f"{prefix}_slope")
        active = self._add("Mul", [gate, slope], f"{prefix}_active")
        return self._product(
            f"{prefix}_down", self._add("Mul", [active, up], f"{prefix}_inner"), [self._weights(f"{prefix}_down")]
        )

    def _rotation(self) -> tuple[str, str]:
        """Cosine and sine of each pair's turn (positions, pairs), computed in float32 as a torch target does."""
        if "cos" not in self._tensors:
            size, base = self._settings.head_size, self._settings.get("rope.freq_base", _TRAINED_BASE)
            angles = np.float32(1) / (base ** (np.arange(0, size, 2) / size)).astype(np.float32)
            if f"{_ROPE_FACTORS}.weight" in self._gguf.tensor_names:
                angles /= self._gguf.weights(f"{_ROPE_FACTORS}.weight")
            turns = np.outer(np.arange(int(self._settings.get("context_length")), dtype=np.float32), angles)
            self._constant("cos", np.cos(turns))
            self._constant("sin", np.sin(turns))
        return "cos", "sin"

    def _declare(self) -> None:
        """The graph's inputs and outputs, by the builder's names."""
        inputs = [_tensor(name, np.int64, ["batch", columns]) for name, columns in (
            ("input_ids", "rows"), ("attention_mask", "total_rows"),
        )]  # fmt: skip
        width = self._tensors["output_layer"].dims[1]
        outputs = [_tensor("logits", np.float32, ["batch", "rows", width])]
        for layer in range(self._settings.layers):
            for what in ("key", "value"):
                cache: list[int | str] = ["batch", self._settings.kv_heads]
                inputs.append(_tensor(f"past_key_values.{layer}.{what}", np.float32, [*cache, "past_rows", "cache"]))
                outputs.append(_tensor(f"present.{layer}.{what}", np.float32, [*cache, "total_rows", "cache"]))
        self._graph.input.extend(inputs)
        self._graph.output.extend(outputs)

    def _product(self, name: str, source: str, parts: Sequence[Floats]) -> str:
        """`source` times these weights (N, K), one below the other."""
        weights = self._constant(f"{name}_weights", np.concatenate(parts).T)
        return self._add("MatMul", [source, weights], f"{name}_product")

    def _weights(self, name: str) -> Floats:
        return self._gguf.weights(f"{name}.weight")

    def _add(self, kind: str, inputs: list[str], *outputs: str, **settings: Any) -> str:
        self._nodes.append(self._node(kind, inputs, *outputs, **settings))
        return outputs[0]


def _rotated_by_halves(weights: Floats, heads: int) -> Floats:
    """Rows (heads x D, K) that are rotated with their neighbours, in the order where the partner is D / 2 away."""
    pairs = weights.reshape(heads, -1, 2, weights.shape[1])
    halves: Floats = pairs.swapaxes(1, 2).reshape(weights.shape)
    return halves


def _tensor(name: str, kind: "type[np.generic]", shape: "Sequence[int | str]") -> "ValueInfoProto":
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
