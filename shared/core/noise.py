"""The noise that both sides compute alike: Philox4x32-10, a counter-based generator, in numpy.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and their Random123
library, whose published test vectors hold here. A counter-based generator has no state: the noise of one token id at
one position is a function of (seed, position, id), so both sides agree on it with no message, for the ids they need.

The counter is (block, low 32 bits, high 32 bits, stream); the streams keep the uses below independent of each other.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 4096  # rows at a time: the working set stays in a core's cache
_SHIFT = np.uint64(32)
_LOW = np.uint64(_MASK)

_STREAM_GUMBEL = 0
_STREAM_UNIFORM = 1


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 on each row of `counter` (n, 4) under `key` (2,); four random words a row, (n, 4)."""
    words = np.empty(counter.shape, dtype=np.uint32)
    for start in range(0, len(counter), _CHUNK):
        rows = slice(start, start + _CHUNK)
        c0, c1, c2, c3 = np.ascontiguousarray(counter[rows].T, dtype=np.uint64)
        k0, k1 = int(key[0]), int(key[1])
        for _ in range(_ROUNDS):
            product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0), product1 & _LOW
            c2, c3 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1), product0 & _LOW
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        for column, values in enumerate((c0, c1, c2, c3)):
            words[rows, column] = values
    return words


def gumbel(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise of each token id at this position, float64 of the shape of `ids` (n,), n at least 1.

    `seed` and `position` are 64-bit unsigned, ids below 2^34 in any order. Each id has its own word, whatever other ids
    are asked for with it. The values lie in -3.14 to 22.9: the word is 32 bits and never maps to 0 or 1.
    """
    blocks = ids >> 2  # four ids share a block, computed once
    first, count = int(blocks.min()), int(blocks.max() - blocks.min()) + 1
    if count <= len(ids):
        words = _words(seed, position, np.arange(first, first + count), _STREAM_GUMBEL)
        word = np.take(words.reshape(-1), ids - 4 * first)
    else:
        sparse, index = np.unique(blocks, return_inverse=True)
        word = _words(seed, position, sparse, _STREAM_GUMBEL)[index, ids & 3]
    noise = _unit(word)
    for _ in range(2):  # in place: with 100k ids new arrays cost more than the logarithms
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


def uniform(seed: int, index: int) -> float:
    """Number `index` of the seed's uniform sequence, strictly between 0 and 1; independent of the selection noise."""
    return float(_unit(_words(seed, index, np.zeros(1, dtype=np.int64), _STREAM_UNIFORM))[0, 0])


def _words(seed: int, index: int, blocks: NDArray[np.int64], stream: int) -> NDArray[np.uint32]:
    counter = np.empty((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks
    counter[:, 1:] = (index & _MASK, (index >> 32) & _MASK, stream)
    return philox4x32(counter, np.array((seed & _MASK, (seed >> 32) & _MASK), dtype=np.uint32))


def _unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    values = words.astype(np.float64)
    values += 0.5
    values *= 2.0**-32
    return values
