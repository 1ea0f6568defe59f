"""Weights on huge pages (Linux): a draft reads all of them for every token; 4 KB pages cost it a tenth of that time.

A runtime allocates its weights with malloc, which takes the kernel's usual pages unless the whole process was started
otherwise. What a load has allocated is therefore moved to pages of 2 MB once it is there (`madvise`, MADV_COLLAPSE,
Linux 6.1; older kernels do it later, in the background, or not at all). Elsewhere, and where the kernel refuses, all
stays as it was: this is speed, not function.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HUGEPAGE, _COLLAPSE = 14, 25  # of <asm-generic/mman-common.h>
_PAGE = 2 << 20
_LEAST = 2 * _PAGE  # smaller mappings are not a model
_ANONYMOUS = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0\s*(?:\[heap\])?$", re.MULTILINE)
_MAPS = Path("/proc/self/maps")


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move what is allocated meanwhile, and is as large as weights are, to huge pages at the end."""
    if sys.platform != "linux" or not _MAPS.exists():
        yield
        return
    before = _mappings()
    yield
    advise = ctypes.CDLL(None).madvise
    for start, stop in _mappings() - before:
        start_page, stop_page = -(-start // _PAGE), stop // _PAGE
        where = ctypes.c_void_p(start_page * _PAGE), ctypes.c_size_t((stop_page - start_page) * _PAGE)
        for advice in (_HUGEPAGE, _COLLAPSE):
            advise(*where, advice)


def _mappings() -> set[tuple[int, int]]:
    """First address and end of each large part of this process's memory that no file backs."""
    found = ((int(start, 16), int(stop, 16)) for start, stop in _ANONYMOUS.findall(_MAPS.read_bytes()))
    return {(start, stop) for start, stop in found if stop - start >= _LEAST}
