"""The second graph of `edge-agent prepare`: it reads prompts, with weights and activations in 8 bits.

A token is drafted by a graph with 4-bit weights: its time is that of reading them. A prompt has so many rows that the
time is that of multiplying, and there products of long rows of 8-bit integers take less than half as long as such that
scale each block of 32. Both graphs write the same cache, so a draft goes on behind what the other one has read.

One scale for many activations is coarse where a few are far larger than the others. Three things make good for it, so
that drafts are as often right as behind a prompt that was read in 4 bits:

- What is large in the same way for all tokens is taken off (`onnx_activations`).
- What gets large is made smaller, and the weights behind it larger, half of the difference each (SmoothQuant: Xiao et
  al., arXiv 2211.10438, equation 4, alpha 0.5).
- A row is cut into parts of some hundred numbers, each with a scale of its own:

      input -> Sub (centre) -> Mul (smooth) -> Split -> for each part:
            Abs, ReduceMax, Clip (its size) -> Div -> DynamicQuantizeLinear -> MatMulIntegerToFloat -> Mul by its size
            -> Sum of the parts and of what the centre's product is
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_agent.engines.onnx_activations import Activations, products
from edge_agent.engines.onnx_folder import MODEL_FILE, PREFILL_FILE
from edge_agent.engines.onnx_graph import GraphRewrite
from edge_agent.engines.weight_blocks import Floats

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_LARGEST = 127
_PART = 192  # numbers with one scale, at most; twice as many are read in 7/8 of the time and diverge 1.4 times as far
_LEAST = np.float32(1e-4)  # of the largest input, or weight: what never is larger counts as this
_NO_ZERO = np.float32(1e-20)  # a row's largest, before it is divided by
_LOGITS = "logits"


def write_prefill(full: Path, small: Path, activations: Mapping[str, Activations]) -> None:
    """Add a reading graph to the folder `small`, which `onnx_quantize` has made of the float32 folder `full`.

    `activations` are those of the products, by the names of their inputs.
    """
    import onnx

    model = onnx.load(full / MODEL_FILE, load_external_data=False)
    rewrite = _Rewrite(model.graph, small / PREFILL_FILE, full / MODEL_FILE)
    rewrite.run(activations, onnx.load(small / MODEL_FILE, load_external_data=False).graph)
    rewrite.save(model)


class _Rewrite(GraphRewrite):
    """A float32 graph while it is made a reading graph."""

    def __init__(self, graph: "GraphProto", file: Path, source: Path) -> None:
        super().__init__(graph, file, source)
        kept = [output for output in graph.output if output.name != _LOGITS]
        del graph.output[:]
        graph.output.extend(kept)
        self._keep(list(graph.node))

    def run(self, activations: Mapping[str, Activations], small: "GraphProto") -> None:
        """Replace every product, by its input's activations, and the embedding by that of the small graph.

        What else both have alike, such as the angles of rotation, stays in that graph's file, too.
        """
        for tensor in small.initializer:
            if tensor.external_data and tensor.name in self._tensors:
                self._share(tensor)
        self._constant("last_axis", np.array([-1], np.int64))
        self._constant("no_zero", _NO_ZERO)
        replaced = dict[str, list["NodeProto"]]()
        for source, nodes in products(self._graph).items():
            seen, weights = activations[source], {node.output[0]: self._weights(node.input[1]) for node in nodes}
            smooth = _smoothing(seen.largest, np.max([np.abs(one).max(axis=1) for one in weights.values()], axis=0))
            made = list(self._quantized(source, seen.centre, np.float32(1) / smooth))
            for output, one in weights.items():
                constant = None if seen.centre is None else seen.centre @ one
                made += self._product(source, output, one * smooth[:, None], constant)
                replaced[output], made = made, []
        tables = {node.output[0]: node for node in small.node if node.op_type == "GatherBlockQuantized"}
        for output in tables.keys() & {node.output[0] for node in self._graph.node}:
            replaced[output] = self._taken(small, tables[output])
        new = (replaced.get(node.output[0], [node]) for node in self._graph.node)
        self._keep([node for nodes in new for node in nodes])

    def _quantized(self, source: str, centre: Floats | None, factors: Floats) -> "Iterator[NodeProto]":
        """`source` (rows, K) less its centre (K), if it has one, times `factors` (K), in parts.

        Of each: 8-bit integers, their scale and zero, each row's size.
        """
        smooth, parts, centred = f"{source}_smooth", _parts(source, len(factors)), source
        if centre is not None:
            centred = f"{source}_centred"
            yield self._node("Sub", [source, self._constant(f"{source}_centre", centre)], centred)
        yield self._node("Mul", [centred, self._constant(f"{source}_factors", factors)], smooth)
        yield self._node("Split", [smooth], *parts, axis=-1, num_outputs=len(parts))
        for part in parts:
            yield self._node("Abs", [part], f"{part}_sizes")
            yield self._node("ReduceMax", [f"{part}_sizes", "last_axis"], f"{part}_largest", keepdims=1)
            yield self._node("Clip", [f"{part}_largest", "no_zero"], f"{part}_size")
            yield self._node("Div", [part, f"{part}_size"], f"{part}_unit")
            outputs = [f"{part}_{what}" for what in ("integers", "scale", "zero")]
            yield self._node("DynamicQuantizeLinear", [f"{part}_unit"], *outputs)

    def _product(self, source: str, output: str, weights: Floats, constant: Floats | None) -> "Iterator[NodeProto]":
        """The quantized `source` (rows, K) times `weights` (K, N), and a constant (N) if there is one.

        The weights have a scale for each part of each column.
        """
        parts, terms = _parts(source, len(weights)), list[str]()
        for number, (part, rows) in enumerate(zip(parts, np.split(weights, len(parts)), strict=True)):
            scales = np.maximum(np.abs(rows).max(axis=0) / _LARGEST, _NO_ZERO)
            values = self._constant(f"{output}_values{number}", np.rint(rows / scales).astype(np.int8))
            inputs = [f"{part}_integers", values, f"{part}_scale", self._constant(f"{output}_scales{number}", scales)]
            unit, term = f"{output}_unit{number}", f"{output}_term{number}"
            yield self._node("MatMulIntegerToFloat", [*inputs, f"{part}_zero"], unit)
            yield self._node("Mul", [unit, f"{part}_size"], term)
            terms.append(term)
        if constant is not None:
            terms.append(self._constant(f"{output}_constant", constant))
        yield self._node("Sum", terms, output)

    def _taken(self, small: "GraphProto", node: "NodeProto") -> "list[NodeProto]":
        """This node of the small graph with all before it; their constants stay in that graph's file."""
        producers = {output: one for one in small.node for output in one.output}
        constants = {tensor.name: tensor for tensor in small.initializer}
        before = list["NodeProto"]()
        for name in node.input:
            if name in constants:
                self._share(constants[name])
            elif name in producers:
                before += self._taken(small, producers[name])
        return [*before, node]

    def _share(self, tensor: "TensorProto") -> None:
        """Have this constant of the small graph where it is."""
        self._tensors[tensor.name] = tensor
        self._new.add(tensor.name)

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
