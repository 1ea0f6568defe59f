"""Constants of a graph that is rewritten: in files beside it, not in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper

from edge_agent.engines.onnx_graph import GraphRewrite, new_model

LARGE = np.arange(4096, dtype=np.float32).reshape(64, 64)
SMALL = np.array([1, -1], np.int64)


def written(folder: Path, constants: Mapping[str, NDArray[Any]], *, inline: bool = False) -> Path:
    """A graph that adds up these constants, its large ones in a file of their own unless they are to be `inline`."""
    folder.mkdir(exist_ok=True)
    graph = GraphProto(name="graph")
    graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))
    graph.node.append(helper.make_node("Sum", list(constants), ["sum"]))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(
        new_model(graph), folder / "source.onnx",
        save_as_external_data=not inline, location="source.data", size_threshold=0,
    )  # fmt: skip
    return folder / "source.onnx"


class Rewrite(GraphRewrite):
    """What a pass does, as the test wants it."""

    def change(self, name: str, array: NDArray[Any]) -> None:
        self._constant(name, array)
        for node in self._graph.node:
            node.input.append(name)
        self._keep(list(self._graph.node))

    def weight_bytes(self, name: str) -> int:
        """Of the numbers that are in memory."""
        return len(self._tensors[name].raw_data)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_kept_is_copied_and_what_is_new_is_beside_it(tmp_path: Path, inline: bool, apart: bool) -> None:
    source = written(tmp_path / "source", {"large": LARGE, "small": SMALL}, inline=inline)
    file = (tmp_path / "new" if apart else source.parent) / "new.onnx"
    file.parent.mkdir(exist_ok=True)
    model = onnx.load(source, load_external_data=False)
    rewrite = Rewrite(model.graph, file, source)
    np.testing.assert_array_equal(rewrite.array("large"), LARGE)
    rewrite.change("turned", LARGE.T)
    rewrite.save(model)
    for left in source.parent.glob("source.*"):
        left.unlink()
    saved = onnx.load(file)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in saved.graph.initializer}
    assert list(arrays) == ["large", "small", "turned"]
    for name, expected in (("large", LARGE), ("small", SMALL), ("turned", LARGE.T)):
        np.testing.assert_array_equal(arrays[name], expected)
    assert file.stat().st_size < 1000 < file.with_name("new.onnx.data").stat().st_size


def test_large_constants_are_not_held_in_memory(tmp_path: Path) -> None:
    source = written(tmp_path, {"large": LARGE, "small": SMALL})
    model = onnx.load(source, load_external_data=False)
    rewrite = Rewrite(model.graph, tmp_path / "new.onnx", source)
    rewrite.change("new", LARGE + 1)
    assert rewrite.weight_bytes("large") == rewrite.weight_bytes("new") == 0
    assert isinstance(rewrite.array("large"), np.memmap)
    rewrite.save(model)


def test_the_same_constant_is_written_once(tmp_path: Path) -> None:
    model = new_model(GraphProto(name="graph"))
    rewrite = Rewrite(model.graph, tmp_path / "new.onnx")
    for _ in range(3):
        rewrite.change("table", LARGE)
    rewrite.save(model)
    assert (tmp_path / "new.onnx.data").stat().st_size == LARGE.nbytes


def test_a_constant_larger_than_what_is_written_at_once_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.engines.onnx_graph._WRITTEN_BYTES", 3 * 64 * 4 + 1)
    source = written(tmp_path, {"large": LARGE})
    model = onnx.load(source, load_external_data=False)
    rewrite = Rewrite(model.graph, tmp_path / "new.onnx", source)
    rewrite.change("turned", LARGE.T)
    rewrite.save(model)
    arrays = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "new.onnx").graph.initializer
    }
    np.testing.assert_array_equal(arrays["turned"], LARGE.T)
    np.testing.assert_array_equal(arrays["large"], LARGE)
