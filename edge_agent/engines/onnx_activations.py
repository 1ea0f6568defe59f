"""How large the numbers get that a float32 graph multiplies with weights: seen on a few texts.

Activations are rounded to 8 bits, several with one scale, so one that is far larger than the others costs all of them
their precision. Most such numbers are large in the same way for every token: one or two of SmolLM2's 576 are 10 to 20
times as large as the rest, and always of one sign. They need not be rounded at all:

    W x = W (x - c) + W c

with `c` what they are on average. W c is a constant of the product, computed in float32 once (channel-wise shifting:
Outlier Suppression+, Wei et al., arXiv 2304.09145, section 4.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.cached_draft import SINK_TOKENS
from edge_agent.engines.onnx_folder import MODEL_FILE, PAST, PRESENT, OnnxFolder
from edge_agent.engines.weight_blocks import BLOCK, Floats

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_WATCHED_FILE = "watched.onnx"
_WORTH_CENTRING = 0.8  # of the mean square of what blocks are scaled by: a subtraction takes a little time
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


@dataclass(frozen=True, slots=True)
class Activations:
    """One input (K numbers) of products: what to take off it, and how far it then gets from 0; (K) each.

    `centre` is None where it would not help.
    """

    centre: Floats | None
    largest: Floats

    @classmethod
    def between(cls, low: Floats, mean: Floats, high: Floats) -> "Activations":
        """Of numbers between `low` and `high` that are `mean` on average; (K) each."""
        largest, centred = np.maximum(high, -low), np.maximum(high - mean, mean - low)
        is_worth = _squared_scales(centred) < _WORTH_CENTRING * _squared_scales(largest)
        return cls(mean, centred) if is_worth else cls(None, largest)


def products(graph: "GraphProto") -> "dict[str, list[NodeProto]]":
    """The nodes that multiply with constants, by the name of their input."""
    constants = {tensor.name for tensor in graph.initializer}
    found = dict[str, list["NodeProto"]]()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            found.setdefault(node.input[0], []).append(node)
    return found


class FullGraph:
    """The graph of a float32 folder, which runs one text at a time and tells what its products multiply."""

    def __init__(self, folder: Path) -> None:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper

        self.model = OnnxFolder(folder)
        graph = onnx.load(folder / MODEL_FILE, load_external_data=False)
        self.inputs = list(products(graph.graph))
        self.caches = [value.name for value in graph.graph.output if value.name.startswith(PRESENT)]
        graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.inputs)
        file = folder / _WATCHED_FILE
        onnx.save(graph, file)  # beside the weights that it refers to
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")  # or it copies all weights into memory
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        file.unlink()

    def run(self, tokens: Sequence[int], names: Sequence[str]) -> "list[NDArray[np.float32]]":
        """What these inputs (rows, K) or caches (heads, rows, D) are for a text."""
        pasts = (one for one in self._session.get_inputs() if one.name.startswith(PAST))
        empty = {one.name: np.zeros((1, one.shape[1], len(tokens), self.model.head_size), np.float32) for one in pasts}
        ids = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        return [found for (found,) in self._session.run(list(names), empty | ids)]


def watch(full: FullGraph, texts: Sequence[str] = TEXTS) -> dict[str, Activations]:
    """The activations of each product on these texts, by the name of its input.

    A text's first tokens do not count: a language model's are hundreds of times as large as all that follow.
    """
    seen = {name: list[tuple[Floats, Floats, Floats]]() for name in full.inputs}
    count = 0
    for text in texts:
        tokens = full.model.tokenize(text, add_special=True)
        for name, rows in zip(full.inputs, full.run(tokens, full.inputs), strict=True):
            rows = rows[SINK_TOKENS:]
            seen[name].append((rows.min(axis=0), rows.sum(axis=0), rows.max(axis=0)))
        count += len(tokens[SINK_TOKENS:])
    found = dict[str, Activations]()
    for name, parts in seen.items():
        low, total, high = zip(*parts, strict=True)
        found[name] = Activations.between(np.min(low, axis=0), np.sum(total, axis=0) / count, np.max(high, axis=0))
    return found


def _squared_scales(largest: Floats) -> float:
    """The mean square of what blocks of such numbers are scaled by."""
    blocks = np.pad(largest, (0, -len(largest) % BLOCK)).reshape(-1, BLOCK)
    return float((blocks.max(axis=1) ** 2).mean())
