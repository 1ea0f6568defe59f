"""The noise that both sides compute alike: Philox4x32-10, a counter-based generator, in numpy.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and their Random123
library, whose published test vectors hold here. A counter-based generator has no state: the noise of one token id at
one position is a function of (seed, position, id), so both sides agree on it with no message, for the ids they need.

The counter is (block, low 32 bits, high 32 bits, stream); the streams keep the uses below independent of each other.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_ROUNDS = 10
_CHUNK = 4096  # rows at a time: the working set stays in a core's cache
_SHIFT = np.uint64(32)
_LOW = np.uint64(_MASK)

_STREAM_GUMBEL = 0
_STREAM_UNIFORM = 1


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 on each row of `counter` (n, 4) under `key` (2,); four random words a row, (n, 4)."""
    words = np.empty(counter.shape, dtype=np.uint32)
    keys = (key.astype(np.uint64) + np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _WEYL) & _LOW
    for start in range(0, len(counter), _CHUNK):
        rows = slice(start, start + _CHUNK)
        # Words 0 and 2 of each row, and 1 and 3: (2, n). A call for both takes as long as for one where n is small.
        even, odd = (np.ascontiguousarray(counter[rows, word::2].T, dtype=np.uint64) for word in (0, 1))
        for round_key in keys[..., None]:
            products = (even * _MULTIPLIERS)[::-1]
            even, odd = (products >> _SHIFT) ^ odd ^ round_key, products & _LOW
        words[rows, 0::2], words[rows, 1::2] = even.T, odd.T
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
        word = _words(seed, position, blocks, _STREAM_GUMBEL)[np.arange(len(ids)), ids & 3]
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
