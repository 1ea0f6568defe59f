"""What the graph passes of `edge-agent prepare` have in common: a graph whose nodes and constants are replaced."""

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


class GraphRewrite:
    """One graph while it is rewritten; its constants by name in `_tensors`."""

    def __init__(self, graph: "GraphProto") -> None:
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

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
        from onnx import numpy_helper

        self._tensors[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def _node(self, kind: str, inputs: list[str], *outputs: str, **settings: Any) -> "NodeProto":
        from onnx import helper

        domain = _DOMAIN if kind in _CONTRIBUTED else ""
        return helper.make_node(kind, inputs, outputs, f"{outputs[0]}/{kind}", domain=domain, **settings)


def new_model(graph: "GraphProto") -> "ModelProto":
    """A model of this graph, by the operators that onnxruntime-genai's builder uses."""
    from onnx import helper

    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def save_graph(model: "ModelProto", file: Path) -> None:
    """Write the graph to `file`, its weights beside it."""
    import onnx

    data = file.with_name(f"{file.name}.data")
    onnx.save(model, file, save_as_external_data=True, location=data.name, size_threshold=_SMALL_BYTES)
    data.chmod(file.stat().st_mode)  # it comes for the owner alone
