"""A weight matrix as blocks of 32 small integers, for onnxruntime's `MatMulNBits`.

A GGUF file in 4 bits was dequantized to float32 on its way here, but its grid is still in the numbers: the 32 values of
a block lie on sixteen evenly spaced ones. `affine4` finds that grid again, so nothing is rounded a second time (which
would cost a quarter of the acceptance), whatever the architecture and however its projections were fused. Source of the
formats: llama.cpp `ggml-common.h` (Q4_0, Q4_1, Q4_K, Q8_0).

`MatMulNBits` is fast only with zero points that are whole numbers of the grid, and those of Q4_1 and Q4_K are not. Of a
block's constant, a fraction of a step is therefore left over; `sum_blocks` makes it further columns of the matrix that
multiply the sums of the input over each block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_TOLERANCE = 0.02  # of a step: float16 scales times small integers, rounded to float32, are off by much less
_STEPS4 = 15
_LOW_DIGIT = 1 / 16  # what a step of the second digit is worth, in steps of the first
_ZERO = 8  # of the digits
_ROWS = 4096  # that are rounded at once: what is computed on the way takes several times their memory

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

    @property
    def is_symmetric(self) -> bool:
        """Whether the zeros are what `MatMulNBits` takes where none are given."""
        return bool((self.zeros == 1 << self.bits - 1).all())

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

    def rounded(rows: Floats) -> Blocks:
        blocks = _blocks(rows)
        scales = _no_zero(np.abs(blocks).max(axis=-1) / 127)
        values = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
        return Blocks(values, scales, np.full(scales.shape, 128, np.uint8), 8)

    return _stacked([rounded(rows) for rows in _row_groups(weights)])


def symmetric4(weights: Floats, block: int) -> Blocks:
    """Round (N, K) weights to 4 bits, with the scales of Q4_0: the largest number of a block is -8 steps.

    Blocks are of `block` numbers where K can be cut into such, else of half as many, and so on.
    """
    while weights.shape[1] % block:
        block //= 2

    def rounded(rows: Floats) -> Blocks:
        blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(len(rows), -1, block)
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        scales = np.where(largest == 0, np.float32(1), largest / -_ZERO).astype(np.float32)
        values = np.clip(np.rint(blocks / scales[..., None]) + _ZERO, 0, _STEPS4).astype(np.uint8)
        return Blocks(values, scales, np.full(scales.shape, _ZERO, np.uint8), 4)

    return _stacked([rounded(rows) for rows in _row_groups(weights)])


def affine4(weights: Floats) -> tuple[Blocks, Floats] | None:
    """The 4-bit grid that (N, 32 B) weights lie on, and the rest (N, B) to add to every weight of a block.

    The rest is at most half a step unless a block lies far from zero. None where any block lies on no such grid.
    """
    found = list[tuple[Blocks, Floats]]()
    for rows in _row_groups(weights):
        if (group := _affine4(rows)) is None:
            return None
        found.append(group)
    blocks, rests = zip(*found, strict=True)
    return _stacked(blocks), np.concatenate(rests)


def _affine4(rows: Floats) -> tuple[Blocks, Floats] | None:
    blocks = _blocks(rows)
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


def sum_copies(blocks: int) -> int:
    """How often the sums over the input's blocks are repeated for the columns of `sum_blocks`."""
    return -(-(_low_start(blocks) + blocks) // blocks)


def sum_blocks(rest: Floats) -> Blocks:
    """The rest (N, B) as further columns for `sum_copies(B)` copies of the B sums; zeros where none is needed.

    Two digits to the base 16: one alone would round the rest to a 15th, and of the default draft's wrong tokens a fifth
    to a third came of that. Scales tell them apart, so the second ones begin with a block of their own. That is amid
    the copies; but any B columns in a row meet every sum once.
    """
    blocks, start = rest.shape[1], _low_start(rest.shape[1])
    scales = _no_zero(np.abs(rest).max(axis=1, keepdims=True) / 7)
    digits = rest / scales
    high = np.rint(digits)
    low = np.clip(np.rint((digits - high) / _LOW_DIGIT), -_ZERO, _ZERO - 1)
    columns = -(-sum_copies(blocks) * blocks // BLOCK) * BLOCK
    values = np.full((len(rest), columns), _ZERO, np.int8)
    values[:, :blocks] += high.astype(np.int8)
    values[:, start : start + blocks] += np.roll(low, -start, axis=1).astype(np.int8)
    worth = np.where(np.arange(columns // BLOCK) < start // BLOCK, np.float32(1), np.float32(_LOW_DIGIT))
    zeros = np.full((len(rest), len(worth)), _ZERO, np.uint8)
    return Blocks(values.astype(np.uint8).reshape(len(rest), -1, BLOCK), scales * worth, zeros, 4)


def joined(left: Blocks, right: Blocks) -> Blocks:
    """The columns of both."""
    return Blocks(
        np.concatenate((left.values, right.values), axis=1),
        np.concatenate((left.scales, right.scales), axis=1),
        np.concatenate((left.zeros, right.zeros), axis=1),
        left.bits,
    )


def _row_groups(weights: Floats) -> list[Floats]:
    return [weights[at : at + _ROWS] for at in range(0, len(weights), _ROWS)]


def _stacked(parts: Sequence[Blocks]) -> Blocks:
    """The rows of all."""
    columns = zip(*((part.values, part.scales, part.zeros) for part in parts), strict=True)
    values, scales, zeros = map(np.concatenate, columns)
    return Blocks(values, scales, zeros, parts[0].bits)


def _low_start(blocks: int) -> int:
    """The first column of a block that no first digit is in."""
    return -(-blocks // BLOCK) * BLOCK


def _blocks(weights: Floats) -> Floats:
    return np.ascontiguousarray(weights, dtype=np.float32).reshape(len(weights), -1, BLOCK)


def _no_zero(scales: Floats) -> Floats:
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def _paired(values: Bytes) -> Bytes:
    return (values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8)
