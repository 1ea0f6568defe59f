"""A weight matrix as blocks of 32 small integers, for onnxruntime's `MatMulNBits`.

A GGUF file in 4 bits was dequantized to float32 on its way here, but its grid is still in the numbers: the 32 values of
a block lie on sixteen evenly spaced ones. `affine4` finds that grid again, so nothing is rounded a second time (which
would cost a quarter of the acceptance), whatever the architecture and however its projections were fused. Source of the
formats: llama.cpp `ggml-common.h` (Q4_0, Q4_1, Q4_K, Q8_0).

`MatMulNBits` is fast only with zero points that are whole numbers of the grid, and those of Q4_1 and Q4_K are not. Of a
block's constant, a fraction of a step is therefore left over; `sum_blocks` makes it further columns of the matrix that
multiply the sums of the input over each block, in two digits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_TOLERANCE = 0.02  # of a step: float16 scales times small integers, rounded to float32, are off by much less
_STEPS4 = 15
LOW_DIGIT = 1 / 16  # what a step of the second digit is worth, in steps of the first

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """N rows of B blocks of 32: weight = (value - zero) * scale.

    `values` (N, B, 32), `scales` and `zeros` (N, B); `bits` is 4 or 8.
    """

    values: Bytes
    scales: Floats
    zeros: Bytes
    bits: int

    def weights(self) -> Floats:
        """What the blocks stand for, (N, 32 B)."""
        centred = self.values.astype(np.float32) - self.zeros[..., None]
        return (centred * self.scales[..., None]).reshape(len(self.values), -1)

    def packed(self) -> Bytes:
        """The values as `MatMulNBits` stores them: two to a byte in 4 bits, the earlier one low."""
        return _paired(self.values) if self.bits == 4 else self.values

    def packed_zeros(self) -> Bytes:
        """The zero points likewise, each row padded to whole bytes."""
        return _paired(np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))) if self.bits == 4 else self.zeros


def symmetric8(weights: Floats) -> Blocks:
    """Round (N, 32 B) weights to 8 bits; Q8_0 blocks come out as they were."""
    blocks = _blocks(weights)
    scales = _no_zero(np.abs(blocks).max(axis=-1) / 127)
    values = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    return Blocks(values, scales, np.full(scales.shape, 128, np.uint8), 8)


def affine4(weights: Floats) -> tuple[Blocks, Floats] | None:
    """The 4-bit grid that (N, 32 B) weights lie on, and the rest (N, B) to add to every weight of a block.

    The rest is at most half a step unless a block lies far from zero. None where any block lies on no such grid.
    """
    blocks = _blocks(weights)
    low = blocks.min(axis=-1)
    span = blocks.max(axis=-1) - low
    scales = np.zeros_like(low)
    values = np.zeros(blocks.shape, np.uint8)
    missing = np.ones(low.shape, bool)
    for steps in range(_STEPS4, 0, -1):  # nearly every block uses the whole grid
        at = np.nonzero(missing)
        step = _no_zero(span[at] / steps)
        steps_up = (blocks[at] - low[at][:, None]) / step[:, None]
        nearest = np.rint(steps_up)
        fits = np.abs(steps_up - nearest).max(axis=-1, initial=0) < _TOLERANCE
        found = tuple(index[fits] for index in at)
        values[found], scales[found], missing[found] = nearest[fits], step[fits], False
        if not missing.any():
            break
    if missing.any():
        return None
    zeros = np.clip(np.rint(-low / scales), 0, _STEPS4).astype(np.uint8)
    return Blocks(values, scales, zeros, 4), low + zeros * scales


def sum_blocks(rest: Floats) -> Blocks:
    """The rest (N, B) as 2 B further columns, padded with zeros to whole blocks: two digits to the base 16.

    The first B columns are for the sums themselves, the others for `LOW_DIGIT` of them. One digit alone would round the
    rest to a 15th, and of the default draft's wrong tokens a fifth to a third came of that.
    """
    scales = _no_zero(np.abs(rest).max(axis=1, keepdims=True) / 7)
    digits = rest / scales
    high = np.rint(digits)
    low = np.clip(np.rint((digits - high) / LOW_DIGIT), -8, 7)
    values = np.pad(
        np.concatenate((high, low), axis=1) + 8, ((0, 0), (0, -2 * rest.shape[1] % BLOCK)), constant_values=8
    )
    blocks = values.astype(np.uint8).reshape(len(rest), -1, BLOCK)
    shape = blocks.shape[:2]
    return Blocks(blocks, np.broadcast_to(scales, shape), np.full(shape, 8, np.uint8), 4)


def joined(left: Blocks, right: Blocks) -> Blocks:
    """The columns of both."""
    return Blocks(
        np.concatenate((left.values, right.values), axis=1),
        np.concatenate((left.scales, right.scales), axis=1),
        np.concatenate((left.zeros, right.zeros), axis=1),
        left.bits,
    )


def _blocks(weights: Floats) -> Floats:
    return np.ascontiguousarray(weights, dtype=np.float32).reshape(len(weights), -1, BLOCK)


def _no_zero(scales: Floats) -> Floats:
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def _paired(values: Bytes) -> Bytes:
    return (values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8)
