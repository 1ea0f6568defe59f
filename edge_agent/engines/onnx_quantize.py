"""The graph pass of `edge-agent prepare`: a float32 graph of onnxruntime-genai's builder, its weights made small.

A matrix whose weights lie on a 4-bit grid (they came from a GGUF file) goes on in these 4 bits, exactly; any other in
8 bits by blocks of 32. Embedding and output layer are in 8 bits: they decide between near-equal tokens. All of it is
`MatMulNBits` with 8-bit activations, the fast path of onnxruntime on a CPU.

What the grid's zero points leave over (see `weight_blocks`) multiplies the means of the input over each block of 32:

    input (K) -> AveragePool (B) -> Mul by 1/16 (B) -> Concat of the three (K + 2 B) -> MatMulNBits
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.onnx_folder import LOGITS_ROWS
from edge_agent.engines.rotary import note_rotary
from edge_agent.engines.weight_blocks import BLOCK, LOW_DIGIT, Blocks, Floats, affine4, joined, sum_blocks, symmetric8

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_DOMAIN = "com.microsoft"
_ACCURACY_LEVEL = 4  # of MatMulNBits: activations in 8 bits
_SMALL_BYTES = 1024  # smaller tensors stay in the graph's own file
_NEGLIGIBLE = 1e-3  # of a step: a rest that is only rounding (Q4_0)

Progress = Callable[[float], None]
"""Told how much is done, 0 to 1."""


def quantize_graph(source: Path, destination: Path, progress: Progress) -> dict[int, int]:
    """Write the graph at `source` with small weights; how many matrices went to 4 bits and how many to 8."""
    import onnx

    model = onnx.load(source)
    rewrite = _Rewrite(model.graph)
    rewrite.run(progress)
    note_rotary(model)
    onnx.save(
        model, destination, save_as_external_data=True, location=f"{destination.name}.data", size_threshold=_SMALL_BYTES
    )
    destination.with_name(f"{destination.name}.data").chmod(destination.stat().st_mode)  # it comes for the owner alone
    return rewrite.num_matrices


class _Rewrite:
    """One graph while it is rewritten."""

    def __init__(self, graph: "GraphProto") -> None:
        self.num_matrices = {4: 0, 8: 0}
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._transposed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
        self._outputs = {value.name for value in graph.output}
        self._with_means = dict[str, str]()  # an input's name: that of the input and its block means

    def run(self, progress: Progress) -> None:
        """Replace every node whose weights can be small, and drop what nothing reads any more."""
        nodes = list["NodeProto"]()
        for index, node in enumerate(self._graph.node):
            progress(index / len(self._graph.node))
            nodes += self._replaced(node)
        read = self._outputs.union(*(node.input for node in nodes))
        nodes = [node for node in nodes if not read.isdisjoint(node.output)]  # not the Transpose of a replaced table
        read = set[str]().union(*(node.input for node in nodes))
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend(tensor for name, tensor in self._tensors.items() if name in read)

    def _replaced(self, node: "NodeProto") -> "Iterator[NodeProto]":
        if node.op_type == "MatMul" and (weights := self._matrix(node.input[1])) is not None:
            yield from self._matmul(node, np.ascontiguousarray(weights.T))
        elif node.op_type == "Gather" and (table := self._table(node.input[0])) is not None:
            yield from self._gather(node, *table)
        else:
            yield node

    def _matmul(self, node: "NodeProto", weights: Floats) -> "Iterator[NodeProto]":
        """`weights` are (N, K), one row for each output."""
        columns, name, source = weights.shape[1], node.input[1], node.input[0]
        found = None
        if node.output[0] in self._outputs:
            rows = f"{source}_rows"
            yield self._node("Gather", [source, self._rows_input()], rows, domain="", axis=1)
            source = rows
        else:
            found = affine4(weights)
        if found is None:
            inputs = self._in_8_bits(name, weights)
            bits = 8
        else:
            blocks, rest = found
            if np.abs(rest).max() > _NEGLIGIBLE * blocks.scales.max():
                blocks = joined(blocks, sum_blocks(rest * BLOCK))
                source, added = self._means(source)
                yield from added
                columns += 2 * rest.shape[1]
            inputs = [
                *self._stored(name, blocks),
                self._constant(f"{name}_zeros", blocks.packed_zeros().reshape(-1)),
            ]
            bits = 4
        self.num_matrices[bits] += 1
        yield self._node(
            "MatMulNBits", [source, *inputs], node.output[0],
            K=columns, N=len(weights), bits=bits, block_size=BLOCK, accuracy_level=_ACCURACY_LEVEL,
        )  # fmt: skip

    def _gather(self, node: "NodeProto", name: str, table: Floats) -> "Iterator[NodeProto]":
        """A look-up of rows of `table` (V, H); an output layer of the same name shares its blocks."""
        values, scales = self._in_8_bits(name, table)
        shape = self._constant(f"{name}_shape", np.array(table.shape, np.int64))
        flat = f"{name}_flat"
        yield self._node("Reshape", [values, shape], flat, domain="")
        yield self._node(
            "GatherBlockQuantized", [flat, node.input[1], scales], node.output[0],
            bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _means(self, source: str) -> "tuple[str, list[NodeProto]]":
        """The name of this input and its block means in two digits, with the nodes that make it where it is new."""
        if source in self._with_means:
            return self._with_means[source], []
        means, low, whole = [f"{source}_{what}" for what in ("means", "low_means", "with_means")]
        self._with_means[source] = whole
        digit = self._constant("low_digit", np.array([LOW_DIGIT], np.float32))
        return whole, [
            self._node("AveragePool", [source], means, domain="", kernel_shape=[BLOCK], strides=[BLOCK]),
            self._node("Mul", [means, digit], low, domain=""),
            self._node("Concat", [source, means, low], whole, domain="", axis=-1),
        ]

    def _rows_input(self) -> str:
        """The input that names the rows whose logits are wanted: an output layer is a fifth of a small model."""
        from onnx import TensorProto, helper

        self._graph.input.append(helper.make_tensor_value_info(LOGITS_ROWS, TensorProto.INT64, ["num_logits"]))
        return LOGITS_ROWS

    def _in_8_bits(self, name: str, weights: Floats) -> list[str]:
        if f"{name}_values" in self._tensors:
            return [f"{name}_values", f"{name}_scales"]
        return self._stored(name, symmetric8(weights))

    def _stored(self, name: str, blocks: Blocks) -> list[str]:
        return [
            self._constant(f"{name}_values", blocks.packed()),
            self._constant(f"{name}_scales", blocks.scales),
        ]

    def _matrix(self, name: str) -> Floats | None:
        """The weights (K, N) of that name, if their K can be cut into blocks."""
        from onnx import TensorProto, numpy_helper

        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.dims[0] % BLOCK:
            return None
        return np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)

    def _table(self, name: str) -> tuple[str, Floats] | None:
        """The name and the rows (V, H) of a look-up table, which may be the output layer's weights transposed."""
        from onnx import numpy_helper

        if name in self._transposed and (weights := self._matrix(self._transposed[name])) is not None:
            return self._transposed[name], np.ascontiguousarray(weights.T)
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor.dims) != 2 or tensor.dims[1] % BLOCK:
            return None
        return name, np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)

    def _constant(self, name: str, array: NDArray[np.generic]) -> str:
        from onnx import numpy_helper

        self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def _node(
        self, kind: str, inputs: list[str], output: str, domain: str = _DOMAIN, **settings: int | list[int]
    ) -> "NodeProto":
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], f"{output}/{kind}", domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in settings.items())
        return node
