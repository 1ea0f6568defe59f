"""The graph pass of `edge-agent prepare`: a float32 graph of onnxruntime-genai's builder, its weights made small.

A matrix whose weights lie on a 4-bit grid (they came from a GGUF file) goes on in these 4 bits, exactly; any other in
8 bits. All of it is `MatMulNBits` with 8-bit activations, the fast path of onnxruntime on a CPU. A token's time is that
of reading these weights, and of hundreds of nodes that do little:

- What a grid's zero points leave over (see `weight_blocks`) multiplies the means of the input over each block of 32.
  These nodes are the fewest and fastest found:

      input (K) -> Reshape (B, 32) -> ReduceMean (B) -> Concat of the input and n copies (K + n B) -> MatMulNBits

- What an input is on average comes off it before all that, where that makes its numbers smaller (`onnx_activations`),
  and comes back as the product's bias.
- Attention divides its scores by the root of a head's size. Here the projection of the queries does: onnxruntime's fast
  product of one row with a matrix knows no factor.
- The output layer is a fifth of a small model, and nearly all of its logits are far from the largest. It is read in 4
  bits, for the rows whose logits are wanted; those of the few best ids are then computed again, in 8 bits (a preview of
  the softmax as in SVD-softmax, Shim et al. 2017, with fewer bits instead of a lower rank). These 8 bits are the
  embedding's, too, where both have one table.
"""

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_agent.engines.onnx_activations import Activations
from edge_agent.engines.onnx_folder import HIDDEN, LOGITS_ROWS, OUTPUT_FILE, OUTPUT_PARTS
from edge_agent.engines.onnx_graph import GraphRewrite
from edge_agent.engines.rotary import ATTENTION, note_rotary
from edge_agent.engines.weight_blocks import (
    BLOCK,
    Blocks,
    Floats,
    affine4,
    joined,
    sum_blocks,
    sum_copies,
    symmetric4,
    symmetric8,
)

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_ACCURACY_LEVEL = 4  # of MatMulNBits: activations in 8 bits
_NEGLIGIBLE = 1e-3  # of a step: a rest that is only rounding (Q4_0)
_PLAIN_INPUTS = 12  # of attention; behind them come some that could change the queries

_ROUGH_BLOCK = 64  # of the output layer

Progress = Callable[[float], None]
"""Told how much is done, 0 to 1."""


def quantize_graph(
    source: Path, destination: Path, activations: Mapping[str, Activations], progress: Progress
) -> dict[int, int]:
    """Write the graph at `source` with small weights; how many matrices went to 4 bits and how many to 8.

    `activations` are those of its products, by the names of their inputs.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    rewrite = _Rewrite(model.graph, destination, source, activations)
    rewrite.run(progress)
    note_rotary(model, rewrite.array)
    rewrite.save(model)
    return rewrite.num_matrices


class _Rewrite(GraphRewrite):
    """A float32 graph while its weights are made small."""

    def __init__(self, graph: "GraphProto", file: Path, source: Path, activations: Mapping[str, Activations]) -> None:
        super().__init__(graph, file, source)
        self.num_matrices = {4: 0, 8: 0}
        self._activations = activations
        self._transposed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
        self._outputs = {value.name for value in graph.output}
        self._attention = {  # by what its queries come from
            node.input[0]: node
            for node in graph.node if node.op_type == ATTENTION and not any(node.input[_PLAIN_INPUTS:])
        }  # fmt: skip
        self._exact = list[str]()  # the tensors of the output layer in 8 bits: values, scales
        self._made = set[str]()  # what is computed of an input, once for all of its products

    def run(self, progress: Progress) -> None:
        """Replace every node whose weights can be small, and drop what nothing reads any more."""
        nodes = list["NodeProto"]()
        for index, node in enumerate(self._graph.node):
            progress(index / len(self._graph.node))
            nodes += self._replaced(node)
        self._keep(nodes)
        kept = {tensor.name for tensor in self._graph.initializer}
        self._graph.initializer.extend(self._tensors[name] for name in self._exact if name not in kept)

    def save(self, model: "ModelProto") -> None:
        """Write the graph, which is this model's, and where in its weights the output layer is in 8 bits."""
        super().save(model)
        tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        places = {}
        for what, name in zip(OUTPUT_PARTS, self._exact, strict=False):
            (offset,) = (int(entry.value) for entry in tensors[name].external_data if entry.key == "offset")
            places[what] = {"offset": offset, "shape": list(tensors[name].dims)}
        if places:
            self._file.with_name(OUTPUT_FILE).write_text(json.dumps(places), encoding="utf-8")

    def _replaced(self, node: "NodeProto") -> "Iterator[NodeProto]":
        if node.op_type == "MatMul" and (weights := self._matrix(node.input[1])) is not None:
            make = self._output_layer if node.output[0] in self._outputs else self._matmul
            yield from make(node, np.ascontiguousarray(weights.T))
        elif node.op_type == "Gather" and (table := self._table(node.input[0])) is not None:
            yield from self._look_up(*table, node.input[1], node.output[0])
        else:
            yield node

    def _matmul(self, node: "NodeProto", weights: Floats) -> "Iterator[NodeProto]":
        """`weights` are (N, K), one row for each output."""
        columns, name, source = weights.shape[1], node.input[1], node.input[0]
        if node.output[0] in self._attention:
            weights = _scaled_queries(self._attention[node.output[0]], weights)
        centre, bias = self._activations[source].centre, ""
        if centre is not None:
            bias = self._constant(f"{name}_bias", weights @ centre)
            source = yield from self._centred(source, centre)
        if (found := affine4(weights)) is None:
            yield self._product(source, name, symmetric8(weights), columns, node.output[0], bias)
            return
        blocks, rest = found
        if np.abs(rest).max() > _NEGLIGIBLE * blocks.scales.max():
            blocks = joined(blocks, sum_blocks(rest * BLOCK))
            source = yield from self._with_means(source, rest.shape[1])
            columns += sum_copies(rest.shape[1]) * rest.shape[1]
        yield self._product(source, name, blocks, columns, node.output[0], bias)

    def _output_layer(self, node: "NodeProto", weights: Floats) -> "Iterator[NodeProto]":
        """Rough logits of the rows that are wanted, and these rows; `weights` are (V, K)."""
        from onnx import TensorProto, helper

        name, columns = node.input[1], weights.shape[1]
        self._exact = self._stored(name, symmetric8(weights))
        self._graph.output.append(
            helper.make_tensor_value_info(HIDDEN, TensorProto.FLOAT, ["batch", "num_logits", columns])
        )
        yield self._node("Gather", [node.input[0], self._rows_input()], HIDDEN, axis=1)
        yield self._product(HIDDEN, f"{name}_rough", symmetric4(weights, _ROUGH_BLOCK), columns, node.output[0])

    def _product(
        self, source: str, name: str, blocks: Blocks, columns: int, output: str, bias: str = ""
    ) -> "NodeProto":
        """`source` (K) times the blocks' weights (N, K), which are kept under `name`, and a constant `bias` (N)."""
        self.num_matrices[blocks.bits] += 1
        zeros = "" if blocks.is_symmetric else f"{name}_zeros"
        if zeros:
            self._constant(zeros, blocks.packed_zeros().reshape(-1))
        inputs = [source, *self._stored(name, blocks), zeros, "", bias]  # amid them the columns' order
        while not inputs[-1]:
            inputs.pop()
        return self._node(
            "MatMulNBits", inputs, output,
            K=columns, N=len(blocks.values), bits=blocks.bits, block_size=blocks.values.shape[-1],
            accuracy_level=_ACCURACY_LEVEL,
        )  # fmt: skip

    def _look_up(self, name: str, table: Floats, numbers: str, output: str) -> "Iterator[NodeProto]":
        """Rows of `table` (V, H) by their numbers; an output layer of the same name has the same blocks."""
        values, scales = self._stored(name, symmetric8(table))
        shape = self._constant(f"{name}_shape", np.array(table.shape, np.int64))
        flat = f"{name}_flat"
        yield self._node("Reshape", [values, shape], flat)
        yield self._node(
            "GatherBlockQuantized", [flat, numbers, scales], output,
            bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _centred(self, source: str, centre: Floats) -> "Generator[NodeProto, None, str]":
        """The name of this input less its centre; gives the node that makes it where it is new."""
        centred = f"{source}_centred"
        if centred not in self._made:
            self._made.add(centred)
            yield self._node("Sub", [source, self._constant(f"{source}_centre", centre)], centred)
        return centred

    def _with_means(self, source: str, blocks: int) -> "Generator[NodeProto, None, str]":
        """The name of this input with copies of its block means; gives the nodes that make it where it is new."""
        cut, means, whole = [f"{source}_{what}" for what in ("blocks", "means", "with_means")]
        if whole not in self._made:
            self._made.add(whole)
            shape = self._constant("blocks_shape", np.array([0, 0, -1, BLOCK], np.int64))
            last = self._constant("last_axis", np.array([-1], np.int64))
            yield self._node("Reshape", [source, shape], cut)
            yield self._node("ReduceMean", [cut, last], means, keepdims=0)
            yield self._node("Concat", [source, *[means] * sum_copies(blocks)], whole, axis=-1)
        return whole

    def _rows_input(self) -> str:
        """The input that names the rows whose logits are wanted: an output layer is a fifth of a small model."""
        from onnx import TensorProto, helper

        self._graph.input.append(helper.make_tensor_value_info(LOGITS_ROWS, TensorProto.INT64, ["num_logits"]))
        return LOGITS_ROWS

    def _stored(self, name: str, blocks: Blocks) -> list[str]:
        return [
            self._constant(f"{name}_values", blocks.packed()),
            self._constant(f"{name}_scales", blocks.scales),
        ]

    def _matrix(self, name: str) -> Floats | None:
        """The weights (K, N) of that name, if their K can be cut into blocks."""
        from onnx import TensorProto

        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.dims[0] % BLOCK:
            return None
        return np.asarray(self.array(name), dtype=np.float32)

    def _table(self, name: str) -> tuple[str, Floats] | None:
        """The name and the rows (V, H) of a look-up table, which may be the output layer's weights transposed."""
        if name in self._transposed and (weights := self._matrix(self._transposed[name])) is not None:
            return self._transposed[name], np.ascontiguousarray(weights.T)
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor.dims) != 2 or tensor.dims[1] % BLOCK:
            return None
        return name, np.asarray(self.array(name), dtype=np.float32)


def _scaled_queries(attention: "NodeProto", weights: Floats) -> Floats:
    """The rows of `weights` (N, K) that give the queries, times the factor of this attention, which becomes 1."""
    from onnx import helper

    fields = {field.name: helper.get_attribute_value(field) for field in attention.attribute}
    heads, is_packed = fields["num_heads"], not attention.input[1]
    head_size = len(weights) // (heads + 2 * fields["kv_num_heads"] if is_packed else heads)
    weights = weights.copy()
    weights[: heads * head_size] *= fields.get("scale") or 1 / math.sqrt(head_size)
    del attention.attribute[:]
    attention.attribute.extend(helper.make_attribute(name, value) for name, value in (fields | {"scale": 1.0}).items())
    return weights
