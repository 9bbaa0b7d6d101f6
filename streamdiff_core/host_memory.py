"""Freed memory kept for the next chunk, in place of giving it back to the system after each.

A chunk's pictures and features take some megabytes, and the C library returns blocks of that size as soon as they are
free. The next chunk then gets them page by page, each zeroed by the kernel; in a virtual machine a page can cost ten
microseconds (measured in ``docs/LOG.md``). Only glibc has these switches; elsewhere nothing is done.
Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 256 << 20
"""Unused memory at the end of the heap beyond which it is given back after all."""
AHEAD_BYTES = 64 << 20
"""Asked for at a time; not occupied before it is written to. A thread's heap of that size is not given up either."""
LARGEST_BYTES = 32 << 20
"""Largest block that comes from the heap: glibc's own limit."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user decides instead."""


def keep_freed_memory() -> bool:
    """Make this process keep what it frees, up to ``KEPT_BYTES``; whether it does.

    Left alone where the environment has settings of its own (``SETTINGS``), and by other C libraries.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wishes = {M_MMAP_THRESHOLD: LARGEST_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: AHEAD_BYTES}
    return mallopt is not None and all([mallopt(name, size) == 1 for name, size in wishes.items()])
