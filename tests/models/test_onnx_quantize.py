"""The graph pass alone, on graphs of one or two matrices, run by onnxruntime."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edge_agent.engines.onnx_activations import Activations
from edge_agent.engines.onnx_quantize import quantize_graph
from edge_agent.engines.weight_blocks import symmetric8
from tests.models.tiny_onnx import unwatched

Array = NDArray[np.float32]
IDS = 96


def saved(folder: Path, nodes: list[NodeProto], tensors: Mapping[str, NDArray[Any]]) -> Path:
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "rows"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "rows", IDS])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "full.onnx")
    return folder / "full.onnx"


def tied(folder: Path) -> tuple[Path, Array]:
    """A look-up and an output layer that share one random table (V, H), kept transposed as the builder does."""
    table = np.random.default_rng(0).normal(size=(IDS, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["weights"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "weights"], ["logits"]),
    ]
    return saved(folder, nodes, {"weights": np.ascontiguousarray(table.T)}), table


def small(file: Path, activations: Mapping[str, Activations] | None = None) -> onnxruntime.InferenceSession:
    destination = file.with_name("small.onnx")
    quantize_graph(file, destination, activations or unwatched(file), lambda _: None)
    return onnxruntime.InferenceSession(str(destination), providers=["CPUExecutionProvider"])


def exact_logits(folder: Path, hidden: Array) -> Array:
    """Of all ids, from the folder's 8 bits."""
    places = json.loads((folder / "output.json").read_text())
    values, scales = (
        np.memmap(folder / "small.onnx.data", kind, "r", places[name]["offset"], tuple(places[name]["shape"]))
        for name, kind in (("values", np.uint8), ("scales", np.float32))
    )
    weights = (values - np.float32(128)) * scales[..., None]
    logits: Array = hidden @ weights.reshape(len(scales), -1).T
    return logits


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_logits_of_the_wanted_rows_are_rough_and_exact_ones_can_be_had(tmp_path: Path, is_tied: bool) -> None:
    file, table = tied(tmp_path)
    output = table
    if not is_tied:
        output = np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
            helper.make_node("MatMul", ["embedded", "weights"], ["logits"]),
        ]
        file = saved(tmp_path, nodes, {"table": table, "weights": np.ascontiguousarray(output.T)})
    ids = np.array([[3, 14, 15, 92]])
    rough, hidden = small(file).run(["logits", "hidden"], {"input_ids": ids, "logits_rows": np.array([1, 3])})
    expected = (table[ids[0]] @ output.T)[[1, 3]]
    assert rough.shape == (1, 2, IDS)
    assert 0.02 < np.abs(rough[0] - expected).max() / np.abs(expected).max() < 0.2
    assert np.abs(exact_logits(tmp_path, hidden[0]) - expected).max() < 0.02 * np.abs(expected).max()


def test_embedding_and_output_layer_keep_one_table(tmp_path: Path) -> None:
    file, table = tied(tmp_path)
    small(file)
    kept = onnx.load(tmp_path / "small.onnx").graph.initializer
    sizes = [np.prod(tensor.dims) for tensor in kept if tensor.data_type == TensorProto.UINT8]
    assert sorted(sizes) == [table.size // 2, table.size], "in 4 bits and in 8"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.4])  # 0: by the head's size
def test_the_queries_projection_takes_over_the_attention_scale(tmp_path: Path, packed: bool, scale: float) -> None:
    heads, kv_heads, size, hidden = 4, 2, 16, 64
    chance = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {
        name: chance.normal(size=shape).astype(np.float32) * 0.3
        for name, shape in {
            "table": (IDS, hidden), "q": (hidden, heads * size), "k": (hidden, kv_heads * size),
            "v": (hidden, kv_heads * size), "out": (heads * size, IDS),
        }.items()
    }  # fmt: skip
    if packed:
        tensors["qkv"] = np.concatenate([tensors.pop(name) for name in "qkv"], axis=1)
    products = ["qkv"] if packed else ["q", "k", "v"]
    none = np.zeros((1, kv_heads, 0, size), np.float32)
    tensors |= {"past_key": none, "past_value": none}
    counts = {"last": np.array([3], np.int32), "total": np.array([4], np.int32)}
    rows = [f"{name}_rows" for name in products] + [""] * (3 - len(products))
    attention = helper.make_node(
        "GroupQueryAttention", [*rows, "past_key", "past_value", "last", "total"],
        ["attended", "present_key", "present_value"], domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads, scale=scale,
    )  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        *(helper.make_node("MatMul", ["embedded", name], [f"{name}_rows"]) for name in products),
        attention,
        helper.make_node("MatMul", ["attended", "out"], ["logits"]),
    ]
    file = saved(tmp_path, nodes, tensors | counts)
    ids = {"input_ids": np.array([[3, 14, 15, 92]])}
    (exact,) = onnxruntime.InferenceSession(str(file)).run(["logits"], ids)
    (hidden,) = small(file).run(["hidden"], ids | {"logits_rows": np.arange(4)})
    logits = exact_logits(tmp_path, hidden)
    quantized = onnx.load(tmp_path / "small.onnx").graph
    (ours,) = (node for node in quantized.node if node.op_type == attention.op_type)
    assert {field.name: helper.get_attribute_value(field) for field in ours.attribute}["scale"] == 1
    assert np.abs(logits - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_an_input_is_on_average_is_not_rounded(tmp_path: Path, bits: int) -> None:
    chance = np.random.default_rng(3)
    table = chance.normal(size=(IDS, 64)).astype(np.float32)
    table[:, [5, 40]] += [300, -200]
    weights = chance.integers(-7, 8, (64, IDS)).astype(np.float32) if bits == 4 else chance.normal(size=(64, IDS))
    weights = weights.astype(np.float32)
    names = ["first", "second"]  # both read the same input
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["found"]),
        helper.make_node("Mul", ["found", "factors"], ["embedded"]),  # or blocks of the table were blocks of the input
        *(helper.make_node("MatMul", ["embedded", name], [f"{name}_rows"]) for name in names),
        helper.make_node("Sum", [f"{name}_rows" for name in names], ["sum"]),
        helper.make_node("MatMul", ["sum", "out"], ["logits"]),
    ]
    tensors = {"table": table, "first": weights, "second": -2 * weights, "out": np.eye(IDS, dtype=np.float32)}
    tensors["factors"] = factors = chance.uniform(0.5, 2, 64).astype(np.float32)
    file = saved(tmp_path, nodes, tensors)
    ids = np.arange(IDS)[None]
    embedded = symmetric8(table).weights() * factors
    exact, largest = -embedded @ weights, np.abs(embedded).max(axis=0)
    errors = list[float]()
    for centre in (None, embedded.mean(axis=0)):
        activations = unwatched(file) | {"embedded": Activations(centre, largest)}
        (hidden,) = small(file, activations).run(["hidden"], {"input_ids": ids, "logits_rows": np.arange(IDS)})
        errors.append(float(np.abs(hidden - exact).mean() / np.abs(exact).mean()))
    kinds = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert kinds.count("Sub") == 1, "once for all products of the input"
    assert errors[1] < errors[0] / 2, errors
