"""Which processor this is, where a kernel's speed or faults depend on it."""

import platform


def is_x86() -> bool:
    """Whether programs for x86 with 64 bits run here."""
    return platform.machine() in ("x86_64", "AMD64")
