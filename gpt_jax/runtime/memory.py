"""The C library's allocator, which supplies the memory of arrays on CPUs. Without glibc, these functions have no effect."""

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # names of the parameters in glibc's malloc.h
KEPT_BYTES = (1 << 31) - 1  # the greatest value of a parameter


def keep_freed_memory() -> None:
    """Lets this process keep up to 2 GiB of freed memory for its next arrays, instead of returning it to the system.

    By default, glibc returns each large block when it is freed, and the system clears the pages of the next one, one by one. This
    took up to a sixth of a step's time (docs/benchmarks.md). All threads share one arena, because only the first one can hold
    large blocks, so call this before JAX starts its threads.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(ARENA_MAX, 1)
        mallopt(MMAP_THRESHOLD, KEPT_BYTES) or mallopt(MMAP_THRESHOLD, 32 << 20)  # the limit of earlier versions
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Returns the memory that is free now to the system, once. Call it where large arrays will not be needed again."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
