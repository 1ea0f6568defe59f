"""The second graph of `edge-agent prepare`: it reads prompts, with weights and activations in 8 bits.

A token is drafted by a graph with 4-bit weights: its time is that of reading them. A prompt has so many rows that the
time is that of multiplying, and there products of long rows of 8-bit integers take less than half as long as such that
scale each block of 32. Both graphs write the same cache, so a draft goes on behind what the other one has read.

One scale for many activations is coarse where a few are far larger than the others. Two things make good for it, so
that drafts are as often right as behind a prompt that was read in 4 bits:

- What gets large is made smaller, and the weights behind it larger, half of the difference each (SmoothQuant: Xiao et
  al., arXiv 2211.10438, equation 4, alpha 0.5). How large it gets is seen on a few texts.
- A row is cut into parts of some hundred numbers, each with a scale of its own:

      input -> Mul (smooth) -> Split -> for each part: Abs, ReduceMax, Clip (its size) -> Div -> DynamicQuantizeLinear
            -> MatMulIntegerToFloat -> Mul by its size -> Sum of the parts
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_agent.engines.cached_draft import SINK_TOKENS
from edge_agent.engines.onnx_folder import MODEL_FILE, PREFILL_FILE, OnnxFolder
from edge_agent.engines.onnx_graph import GraphRewrite
from edge_agent.engines.weight_blocks import Floats

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_LARGEST = 127
_PART = 384  # numbers with one scale, at most; half as many take a seventh longer and gain nothing
_LEAST = np.float32(1e-4)  # of the largest input, or weight: what never is larger counts as this
_NO_ZERO = np.float32(1e-20)  # a row's largest, before it is divided by
_LOGITS = "logits"
_WATCHED = "watched.onnx"
# What prompts are made of: chat, prose, code, figures, other languages. `prepare` measures on other texts.
TEXTS = (
    "You are a helpful assistant. What should I pack for a weekend in the mountains in October?",
    "The old harbour lay silent under the fog. Nobody had seen the ferry since Tuesday, and the mayor's patience was "
    "wearing thin; still, the lamps were lit each evening at six, as they had been for a hundred years.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "In 2019 sales rose by 12.5 % to $3,480,000; in 2020 they fell to 2.9 million (-16.7 %).",
    "Pouvez-vous m'expliquer la différence entre ces deux contrats ? Wie viel kostet die Fahrt nach Wien?",
    "1. Preheat the oven to 180 °C.\n2. Mix 200 g of flour, 3 eggs and a pinch of salt.\n3. Bake for 40 minutes.",
)


def write_prefill(full: Path, small: Path) -> None:
    """Add a reading graph to the folder `small`, which `onnx_quantize` has made of the float32 folder `full`."""
    import onnx

    model, tokenizer = onnx.load(full / MODEL_FILE, load_external_data=False), OnnxFolder(full)
    rewrite = _Rewrite(model.graph, small / PREFILL_FILE, full / MODEL_FILE)
    texts = [tokenizer.tokenize(text, add_special=True) for text in TEXTS]
    largest = _largest_inputs(full, tokenizer.head_size, list(rewrite.products), texts)
    rewrite.run(largest, onnx.load(small / MODEL_FILE, load_external_data=False).graph)
    rewrite.save(model)


class _Rewrite(GraphRewrite):
    """A float32 graph while it is made a reading graph.

    `products`: by the name of an input, the nodes that multiply it with weights.
    """

    def __init__(self, graph: "GraphProto", file: Path, source: Path) -> None:
        super().__init__(graph, file, source)
        kept = [output for output in graph.output if output.name != _LOGITS]
        del graph.output[:]
        graph.output.extend(kept)
        self._keep(list(graph.node))
        self.products = dict[str, list["NodeProto"]]()
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in self._tensors:
                self.products.setdefault(node.input[0], []).append(node)

    def run(self, largest: Mapping[str, Floats], small: "GraphProto") -> None:
        """Replace every product, by how large its inputs get (K each), and the embedding by that of the small graph."""
        self._constant("last_axis", np.array([-1], np.int64))
        self._constant("no_zero", _NO_ZERO)
        replaced = dict[str, list["NodeProto"]]()
        for source, nodes in self.products.items():
            weights = {node.output[0]: self._weights(node.input[1]) for node in nodes}
            smooth = _smoothing(largest[source], np.max([np.abs(one).max(axis=1) for one in weights.values()], axis=0))
            made = list(self._quantized(source, np.float32(1) / smooth))
            for output, one in weights.items():
                replaced[output] = [*made, *self._product(source, output, one * smooth[:, None])]
                made = []
        tables = {node.output[0]: node for node in small.node if node.op_type == "GatherBlockQuantized"}
        for output in tables.keys() & {node.output[0] for node in self._graph.node}:
            replaced[output] = self._taken(small, tables[output])
        new = (replaced.get(node.output[0], [node]) for node in self._graph.node)
        self._keep([node for nodes in new for node in nodes])

    def _quantized(self, source: str, factors: Floats) -> "Iterator[NodeProto]":
        """`source` (rows, K) times `factors` (K), in parts: 8-bit integers, their scale and zero, each row's size."""
        smooth, parts = f"{source}_smooth", _parts(source, len(factors))
        yield self._node("Mul", [source, self._constant(f"{source}_factors", factors)], smooth)
        yield self._node("Split", [smooth], *parts, axis=-1, num_outputs=len(parts))
        for part in parts:
            yield self._node("Abs", [part], f"{part}_sizes")
            yield self._node("ReduceMax", [f"{part}_sizes", "last_axis"], f"{part}_largest", keepdims=1)
            yield self._node("Clip", [f"{part}_largest", "no_zero"], f"{part}_size")
            yield self._node("Div", [part, f"{part}_size"], f"{part}_unit")
            outputs = [f"{part}_{what}" for what in ("integers", "scale", "zero")]
            yield self._node("DynamicQuantizeLinear", [f"{part}_unit"], *outputs)

    def _product(self, source: str, output: str, weights: Floats) -> "Iterator[NodeProto]":
        """The quantized `source` (rows, K) times `weights` (K, N), which have a scale for each part of each column."""
        parts, terms = _parts(source, len(weights)), list[str]()
        for number, (part, rows) in enumerate(zip(parts, np.split(weights, len(parts)), strict=True)):
            scales = np.maximum(np.abs(rows).max(axis=0) / _LARGEST, _NO_ZERO)
            values = self._constant(f"{output}_values{number}", np.rint(rows / scales).astype(np.int8))
            inputs = [f"{part}_integers", values, f"{part}_scale", self._constant(f"{output}_scales{number}", scales)]
            unit, term = f"{output}_unit{number}", f"{output}_term{number}"
            yield self._node("MatMulIntegerToFloat", [*inputs, f"{part}_zero"], unit)
            yield self._node("Mul", [unit, f"{part}_size"], term)
            terms.append(term)
        yield self._node("Sum", terms, output)

    def _taken(self, small: "GraphProto", node: "NodeProto") -> "list[NodeProto]":
        """This node of the small graph with all before it; their constants stay in that graph's file."""
        producers = {output: one for one in small.node for output in one.output}
        constants = {tensor.name: tensor for tensor in small.initializer}
        before = list["NodeProto"]()
        for name in node.input:
            if name in constants:
                self._tensors[name] = constants[name]
                self._new.add(name)
            elif name in producers:
                before += self._taken(small, producers[name])
        return [*before, node]

    def _weights(self, name: str) -> Floats:
        return np.asarray(self.array(name), np.float32)


def _parts(source: str, numbers: int) -> list[str]:
    """The names of a row's parts: equally long ones, as few as may be."""
    count = next(count for count in range(1, numbers + 1) if numbers % count == 0 and numbers // count <= _PART)
    return [f"{source}_part{number}" for number in range(count)]


def _smoothing(inputs: Floats, weights: Floats) -> Floats:
    """By what to divide inputs, and multiply weights, that get as large as these (K each)."""
    inputs, weights = (np.maximum(sizes, _LEAST * sizes.max(initial=_NO_ZERO)) for sizes in (inputs, weights))
    factors = np.sqrt(inputs / weights)
    result: Floats = factors / np.exp(np.log(factors).mean())
    return result


def _largest_inputs(full: Path, head_size: int, names: Sequence[str], texts: Sequence[list[int]]) -> dict[str, Floats]:
    """How large each number of these inputs (K each) gets on the texts, but for their first tokens."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    model = onnx.load(full / MODEL_FILE, load_external_data=False)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    onnx.save(model, full / _WATCHED)  # beside the weights that it refers to
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # or it copies all weights into memory
    session = onnxruntime.InferenceSession(str(full / _WATCHED), options, providers=["CPUExecutionProvider"])
    caches = [tensor for tensor in session.get_inputs() if tensor.name.startswith("past_key_values.")]
    largest = dict[str, Floats]()
    for tokens in texts:
        empty = {one.name: np.zeros((1, one.shape[1], len(tokens), head_size), np.float32) for one in caches}
        ids = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        for name, (rows,) in zip(names, session.run(names, empty | ids), strict=True):
            sizes = np.abs(rows[SINK_TOKENS:]).max(axis=0)
            largest[name] = np.maximum(sizes, largest.get(name, sizes))
    (full / _WATCHED).unlink()
    return largest
