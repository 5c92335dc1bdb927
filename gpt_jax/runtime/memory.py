"""The C library's allocator, which supplies the memory of arrays on CPUs."""

import ctypes
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of the parameters in glibc's malloc.h
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Lets this process keep up to a GiB of freed memory for its next arrays, instead of returning it to the system.

    By default, glibc returns each large block when it is freed, and the system clears the pages of the next one. With the demo's
    model, this made a step take 1.39 times as long (docs/benchmarks.md). Blocks of 64 MiB or more that XLA's own threads allocate
    are still returned, so large models gain nothing. There is no effect if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
