import numpy as np
import pytest
from numpy.typing import NDArray

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


def grid(rows: int, blocks: int, seed: int = 0, steps: int = 16) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Q4_1 blocks: integers (N, B, 32), and the float16 step and minimum (N, B) of each."""
    chance = np.random.default_rng(seed)
    values = chance.integers(0, steps, (rows, blocks, BLOCK))
    step = chance.uniform(0.01, 0.1, (rows, blocks)).astype(np.float16).astype(np.float32)
    low = chance.uniform(-1.2, 0.0, (rows, blocks)).astype(np.float16).astype(np.float32)
    return values, step, low


def dequantized(values: NDArray[np.int64], step: Floats, low: Floats) -> Floats:
    return (values * step[..., None] + low[..., None]).astype(np.float32).reshape(len(values), -1)


@pytest.mark.parametrize("steps", [16, 15, 9, 2])
def test_the_grid_of_a_4_bit_file_is_found_again(steps: int) -> None:
    weights = dequantized(*grid(8, 5, steps=steps))
    found = affine4(weights)
    assert found is not None
    blocks, rest = found
    np.testing.assert_allclose(blocks.weights() + np.repeat(rest, BLOCK, axis=1), weights, atol=2e-5)
    assert blocks.values.max() <= 15
    assert blocks.zeros.max() <= 15


def test_what_the_zero_points_leave_is_less_than_half_a_step_for_blocks_around_zero() -> None:
    values, step, _ = grid(8, 5)
    found = affine4(dequantized(values, step, -7.3 * step))
    assert found is not None
    assert (np.abs(found[1]) <= 0.501 * found[0].scales).all()


def test_a_symmetric_grid_leaves_nothing() -> None:
    values, step, _ = grid(8, 5)
    found = affine4(dequantized(values, step, -8 * step))  # Q4_0
    assert found is not None
    assert np.abs(found[1]).max() < 1e-6


def test_one_block_off_the_grid_is_enough_to_say_no() -> None:
    weights = dequantized(*grid(4, 3))
    weights[2, 40:60] += np.random.default_rng(1).uniform(0, 0.05, 20).astype(np.float32)
    assert affine4(weights) is None
    assert affine4(np.random.default_rng(2).normal(size=(4, 96)).astype(np.float32)) is None


def test_constant_blocks_are_on_a_grid() -> None:
    weights = dequantized(*grid(2, 3))
    weights[0, :BLOCK] = 0
    weights[1, BLOCK : 2 * BLOCK] = 0.25
    found = affine4(weights)
    assert found is not None
    blocks, rest = found
    np.testing.assert_allclose(blocks.weights() + np.repeat(rest, BLOCK, axis=1), weights, atol=2e-5)


def test_8_bit_blocks_are_exact_for_an_8_bit_file_and_near_for_others() -> None:
    chance = np.random.default_rng(0)
    values = chance.integers(-127, 128, (4, 3, BLOCK))
    values[..., 0] = 127
    scales = chance.uniform(0.001, 0.01, (4, 3, 1)).astype(np.float16).astype(np.float32)
    weights = (values * scales).astype(np.float32).reshape(4, -1)  # Q8_0
    np.testing.assert_allclose(symmetric8(weights).weights(), weights, atol=1e-6)


@pytest.mark.parametrize(("columns", "block"), [(128, 64), (96, 32)])
def test_rough_4_bit_blocks_are_off_by_a_step_at_most_and_exact_for_the_largest(columns: int, block: int) -> None:
    weights = np.random.default_rng(0).normal(size=(3, columns)).astype(np.float32)
    weights[0, :block] = 0
    rough = symmetric4(weights, 64)
    assert rough.values.shape == (3, columns // block, block)
    assert rough.is_symmetric
    off = np.abs(rough.weights() - weights).reshape(rough.values.shape)
    assert (off <= np.abs(rough.scales)[..., None] * 1.0001).all()
    largest = np.abs(weights).reshape(rough.values.shape).argmax(axis=-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(off, largest, axis=-1), 0, atol=1e-6)


def test_other_weights_are_off_by_half_a_step_at_most() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 192)).astype(np.float32)
    blocks = symmetric8(weights)
    assert blocks.is_symmetric
    step = np.repeat(np.abs(weights.reshape(4, -1, BLOCK)).max(axis=-1) / 127, BLOCK, axis=1)
    assert (np.abs(blocks.weights() - weights) <= step / 2 * 1.001).all()
    assert (symmetric8(np.zeros((1, BLOCK), np.float32)).weights() == 0).all()


@pytest.mark.parametrize(("count", "added"), [(18, 2), (20, 2), (32, 2), (48, 5), (64, 4), (100, 10)])
def test_the_rest_becomes_columns_of_repeated_block_sums_in_two_digits(count: int, added: int) -> None:
    weights = dequantized(*grid(8, count))
    found = affine4(weights)
    assert found is not None
    blocks, rest = found
    columns = sum_blocks(rest)
    assert columns.values.shape == (8, added, BLOCK)
    x = np.random.default_rng(3).normal(size=count * BLOCK).astype(np.float32)
    sums = np.tile(x.reshape(count, BLOCK).sum(axis=1), sum_copies(count))
    padding = np.zeros(columns.values.shape[1] * BLOCK - len(sums), np.float32)
    assert len(padding) < BLOCK
    assert not columns.weights()[:, len(sums) :].any()
    # What each sum is multiplied by, over all its columns, is the rest to a 16th of a first digit's step.
    worth = columns.weights()[:, : len(sums)].reshape(8, -1, count).sum(axis=1)
    step = np.abs(rest).max(axis=1, keepdims=True) / 7
    assert (np.abs(worth - rest) <= step / 16 * 1.001).all()
    exact = weights @ x
    ours = joined(blocks, columns).weights() @ np.concatenate((x, sums, padding))
    assert np.abs(ours - exact).max() < np.abs(blocks.weights() @ x - exact).max() / 50
    assert not sum_blocks(np.zeros((8, count), np.float32)).weights().any()


def test_packed_4_bit_values_come_two_to_a_byte_and_zeros_by_row() -> None:
    values = np.arange(3 * BLOCK, dtype=np.uint8).reshape(1, 3, BLOCK) % 16
    blocks = Blocks(values, np.ones((1, 3), np.float32), np.array([[1, 2, 3]], np.uint8), 4)
    assert blocks.packed().shape == (1, 3, 16)
    assert blocks.packed()[0, 0, :2].tolist() == [0x10, 0x32]
    assert blocks.packed_zeros().tolist() == [[0x21, 0x03]]


def test_many_rows_are_rounded_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dequantized(*grid(10, 4))
    off_the_grid = np.random.default_rng(4).normal(size=(10, 128)).astype(np.float32)
    whole = affine4(weights), symmetric8(off_the_grid), symmetric4(off_the_grid, 64)
    monkeypatch.setattr("edge_agent.engines.weight_blocks._ROWS", 3)
    in_groups = affine4(weights), symmetric8(off_the_grid), symmetric4(off_the_grid, 64)
    assert whole[0] is not None
    assert in_groups[0] is not None
    np.testing.assert_array_equal(in_groups[0][1], whole[0][1])
    for ours, theirs in zip((in_groups[0][0], *in_groups[1:]), (whole[0][0], *whole[1:]), strict=True):
        for part in ("values", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
    assert affine4(np.concatenate((weights, off_the_grid))) is None
