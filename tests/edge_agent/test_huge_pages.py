import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.engines.huge_pages import huge_pages

_MB = 1 << 20
_COLLAPSE = 25


def allocated(megabytes: int) -> NDArray[np.uint32]:
    """Numbers in memory of their own, each page of it written to."""
    numbers = np.frombuffer(mmap.mmap(-1, megabytes * _MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    numbers[:] = np.arange(len(numbers))
    return numbers


def kernel_can() -> bool:
    """Whether it moves memory to huge pages when asked (Linux 6.1)."""
    memory = allocated(8)
    page = -(-memory.ctypes.data // (2 * _MB)) * 2 * _MB
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(2 * _MB), _COLLAPSE)


def huge_mb() -> float:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages")) / 1024


def test_what_is_allocated_meanwhile_stays_what_it_was() -> None:
    with huge_pages():
        numbers = allocated(32)
    assert (numbers == np.arange(len(numbers))).all()


def test_it_lies_on_huge_pages_just_where_the_kernel_has_them() -> None:
    expected, before = kernel_can(), huge_mb()
    with huge_pages():
        numbers = allocated(32)
    assert (huge_mb() - before > 20) is expected
    assert numbers[-1] == len(numbers) - 1


def test_what_was_there_before_is_left_alone() -> None:
    numbers = allocated(32)
    before = huge_mb()
    with huge_pages():
        pass
    assert huge_mb() == before
    assert numbers[0] == 0


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(KeyError), huge_pages():
        raise KeyError
