"""Memory of a training on the CPU: kept from step to step, and taken in huge pages.

glibc gives the top of its heap back to the system whenever enough of it is free. Whether that happens in each
step depends on what chances to lie there; where it does, the step takes the same memory anew, 4 KB at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
HEAP = 2**31 - 1  # bytes, the greatest number that mallopt takes
LARGE = 2**25  # bytes: glibc's own limit, from which on each piece is given back as soon as it is freed
HUGE = 2**21  # bytes of a huge page; where it has another size, the kernel takes what lies within
OWN_VARIABLES = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"}


@cache
def keep() -> None:
    """Has this process keep what it frees, and take its first 2 GB in huge pages.

    At once only addresses are taken, no memory; where a limit on those is too low, there are no huge pages.
    Nothing is changed where the environment sets glibc's own variables for its heap, or where there is
    another libc. Sources: mallopt(3), madvise(2).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or OWN_VARIABLES & set(os.environ):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_MMAP_THRESHOLD, HEAP)
    top = libc.malloc(HEAP - HUGE)  # so the heap grows by that, and keeps it
    if top:
        libc.madvise(-(-top // HUGE) * HUGE, HEAP - 2 * HUGE, mmap.MADV_HUGEPAGE)
        libc.free(top)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE)
