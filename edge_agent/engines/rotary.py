"""Rotary position embedding (Su et al., arXiv 2104.09864): cached keys moved to other positions.

A key's pairs of numbers are turned by position x angle, each pair by an angle of its own. Turning it back by the
distance that it moves makes it the key of the other position. `prepare` notes the angles in the graph's metadata,
where onnxruntime can read them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto

METADATA = "outrider_rotary"
ATTENTION = "GroupQueryAttention"
_COS, _SIN = 7, 8  # among its inputs


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angle of each pair, radians, and whether pairs are neighbours or half of the turned part apart."""

    angles: tuple[float, ...]
    interleaved: bool

    def moved(self, keys: NDArray[np.float32], positions: int) -> NDArray[np.float32]:
        """Keys (..., D) as if they were so many positions later; numbers behind the last pair are not turned."""
        turn = np.exp(1j * np.multiply(self.angles, positions))
        pairs = len(self.angles)
        first, second = (
            (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if self.interleaved
            else (slice(0, pairs), slice(pairs, 2 * pairs))
        )  # fmt: skip
        turned = (keys[..., first] + 1j * keys[..., second]) * turn
        result: NDArray[np.float32] = keys.copy()
        result[..., first], result[..., second] = turned.real, turned.imag
        return result


def note_rotary(model: "ModelProto", array: Callable[[str], NDArray[np.generic]]) -> None:
    """Write the angles into the metadata of a graph of onnxruntime-genai's builder, if its attention rotates.

    `array` reads a constant by its name.
    """
    node = next((node for node in model.graph.node if node.op_type == ATTENTION), None)
    tables = {tensor.name for tensor in model.graph.initializer}
    if node is None or len(node.input) <= _SIN or not {node.input[_COS], node.input[_SIN]} <= tables:
        return
    cos, sin = (array(node.input[index])[1] for index in (_COS, _SIN))  # at position 1
    interleaved = any(field.name == "rotary_interleaved" and field.i for field in node.attribute)
    noted = model.metadata_props.add()
    noted.key = METADATA
    noted.value = json.dumps({"angles": np.arctan2(sin, cos).tolist(), "interleaved": interleaved})


def read_rotary(metadata: Mapping[str, str]) -> Rotary | None:
    """What `note_rotary` wrote; None where it did not."""
    if METADATA not in metadata:
        return None
    noted = json.loads(metadata[METADATA])
    return Rotary(tuple(noted["angles"]), noted["interleaved"])
