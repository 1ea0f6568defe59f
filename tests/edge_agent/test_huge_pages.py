import mmap
from pathlib import Path

import numpy as np
import pytest

from edge_agent.engines.huge_pages import huge_pages

_MB = 1 << 20


def huge_mb() -> float:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages")) / 1024


def test_what_is_allocated_meanwhile_lies_on_huge_pages_and_is_what_it_was() -> None:
    before = huge_mb() if Path("/proc/self/smaps_rollup").exists() else 0.0
    with huge_pages():
        block = mmap.mmap(-1, 32 * _MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        numbers = np.frombuffer(block, np.uint32)
        numbers[:] = np.arange(len(numbers))
    assert (numbers == np.arange(len(numbers))).all()
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages to give")
    assert huge_mb() - before > 20


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(KeyError), huge_pages():
        raise KeyError
