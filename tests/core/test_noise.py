import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.noise import gumbel, philox4x32, uniform

EULER_GAMMA = 0.5772156649015329
MAX_64 = 2**64 - 1

# Random123's kat_vectors, "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def word_of(noise: float) -> int:
    """The 32-bit word behind a Gumbel value."""
    return round(math.exp(-math.exp(-noise)) * 2**32 - 0.5)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_meets_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    rows = np.array([counter, counter], dtype=np.uint32)
    words = philox4x32(rows, np.array(key, dtype=np.uint32))
    assert words.dtype == np.uint32
    assert words.tolist() == [list(expected)] * 2


def test_philox_of_many_rows_is_that_of_each() -> None:
    counter = np.random.default_rng(1).integers(0, 2**32, (10_000, 4), dtype=np.uint32)
    key = np.array((7, 9), dtype=np.uint32)
    words = philox4x32(counter, key)
    for row in (0, 4095, 4096, 8191, 9_999):
        assert (words[row] == philox4x32(counter[row : row + 1], key)[0]).all()


def test_gumbel_reads_the_word_that_the_contract_names() -> None:
    seed, position, token = 0xA1B2C3D4_00000005, (3 << 32) | 77, 1234
    counter = np.array([(token >> 2, 77, 3, 0)], dtype=np.uint32)
    word = int(philox4x32(counter, np.array((5, 0xA1B2C3D4), dtype=np.uint32))[0, token & 3])
    expected = -np.log(-np.log((word + 0.5) * 2.0**-32))
    assert gumbel(seed, position, np.array([token]))[0] == expected


@given(
    st.integers(0, MAX_64),
    st.integers(0, MAX_64),
    st.lists(st.integers(0, 300), min_size=1, max_size=80) | st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
def test_noise_of_an_id_does_not_depend_on_its_company(seed: int, position: int, ids: list[int]) -> None:
    together = gumbel(seed, position, np.array(ids))
    assert together.tolist() == [gumbel(seed, position, np.array([token]))[0] for token in ids]


def test_gumbel_has_its_mean_variance_and_range() -> None:
    noise = gumbel(11, 5, np.arange(400_000))
    assert abs(noise.mean() - EULER_GAMMA) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    assert noise.min() > -3.14
    assert noise.max() < 22.9


@pytest.mark.parametrize(
    "other", [gumbel(2, 5, np.arange(1000)), gumbel(1 << 32, 5, np.arange(1000)), gumbel(1, 6, np.arange(1000)),
              gumbel(1, 5 + (1 << 32), np.arange(1000)), gumbel(1, 5, np.arange(1000) + 1000)]
)  # fmt: skip
def test_seed_position_and_id_each_change_the_noise(other: np.ndarray) -> None:
    noise = gumbel(1, 5, np.arange(1000))
    assert not (noise == other).any()
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.15


def test_uniform_is_uniform_and_of_another_stream() -> None:
    values = np.array([uniform(9, index) for index in range(4_000)])
    assert ((values > 0) & (values < 1)).all()
    assert np.abs(np.histogram(values, bins=10, range=(0, 1))[0] - 400).max() < 100
    assert uniform(9, 3) == values[3]
    assert uniform(9, 3 + (1 << 32)) != values[3]
    # Block 0 at position 0 is the nearest that the Gumbel stream comes to it.
    gumbel_words = {word_of(value) for value in gumbel(9, 0, np.arange(4))}
    assert round(uniform(9, 0) * 2**32 - 0.5) not in gumbel_words
