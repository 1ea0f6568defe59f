"""What the graph passes of `edge-agent prepare` have in common: a graph whose nodes and constants are replaced.

A model's weights in float32 may be larger than a device's memory. So they stay in files beside the graphs: one is
mapped while it is made small, and what comes of it is appended to the new graph's file at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_DOMAIN = "com.microsoft"
_CONTRIBUTED = frozenset({  # of that domain
    "GatherBlockQuantized", "GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits",
    "SkipSimplifiedLayerNormalization",
})  # fmt: skip
_OPSET, _IR_VERSION = 21, 10
_SMALL_BYTES = 256  # smaller tensors stay in the graph's own file
_WRITTEN_BYTES = 1 << 24  # at once
_ALIGNED_BYTES = 64


class GraphRewrite:
    """One graph while it is rewritten; its constants by name in `_tensors`.

    `file` is where the graph is saved in the end, `source` where the one came from that it begins as.
    """

    def __init__(self, graph: "GraphProto", file: Path, source: Path | None = None) -> None:
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._file = file
        self._source = source or file
        self._new = set[str]()  # constants that are not the source's
        self._data = file.with_name(f"{file.name}.data").open("wb")

    def array(self, name: str) -> "NDArray[np.generic]":
        """The source's constant of that name; a large one is mapped, not read."""
        from onnx import helper, numpy_helper

        tensor = self._tensors[name]
        if not tensor.external_data:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self._source.with_name(where["location"])
        return np.memmap(file, kind, "r", int(where.get("offset", 0)), tuple(tensor.dims))

    def _keep(self, nodes: "Sequence[NodeProto]") -> None:
        """The graph's nodes from now on are those of these that lead to an output; its constants what they read."""
        read, kept = {output.name for output in self._graph.output}, list["NodeProto"]()
        for node in reversed(nodes):
            if not read.isdisjoint(node.output):
                kept.append(node)
                read.update(node.input)
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(reversed(kept))
        self._graph.initializer.extend(tensor for name, tensor in self._tensors.items() if name in read)

    def _constant(self, name: str, array: "NDArray[np.generic] | np.generic") -> str:
        """Have this constant, by a name that always means the same numbers; a large one is in the weights file now."""
        from onnx import TensorProto, helper, numpy_helper

        if name in self._new:
            return name
        array = np.asarray(array)
        self._new.add(name)
        if array.nbytes < _SMALL_BYTES:
            self._tensors[name] = numpy_helper.from_array(array, name)
            return name
        self._data.write(bytes(-self._data.tell() % _ALIGNED_BYTES))
        place = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": array.nbytes}
        at_once = max(1, _WRITTEN_BYTES * len(array) // array.nbytes)  # it may be a view that is laid out otherwise
        for first in range(0, len(array), at_once):
            self._data.write(np.ascontiguousarray(array[first : first + at_once]).data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor
        return name

    def save(self, model: "ModelProto") -> None:
        """Write the graph, which is this model's; what it still has of the source's constants is copied first."""
        import onnx

        names = [tensor.name for tensor in self._graph.initializer]
        for name in names:
            if name not in self._new:
                self._constant(name, self.array(name))
        del self._graph.initializer[:]
        self._graph.initializer.extend(self._tensors[name] for name in names)
        self._data.close()
        onnx.save(model, self._file)

    def _node(self, kind: str, inputs: list[str], *outputs: str, **settings: Any) -> "NodeProto":
        from onnx import helper

        domain = _DOMAIN if kind in _CONTRIBUTED else ""
        return helper.make_node(kind, inputs, outputs, f"{outputs[0]}/{kind}", domain=domain, **settings)


def new_model(graph: "GraphProto") -> "ModelProto":
    """A model of this graph, by the operators that onnxruntime-genai's builder uses."""
    from onnx import helper

    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
