"""A run on CPU keeps the memory that a step frees for the next one."""

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""mallopt's names for them (glibc's malloc.h)."""
_LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no more."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Have malloc hand out again what was freed, but for tensors of more than 32 MB; return whether it will.

    glibc gives large blocks, and the free end of its heap, back to the system, which clears each page that it hands out
    anew: 3 % of a bf16 step of benchmarks/train_step.py, a tenth beside other processes. What is held is then what was
    needed most, 3 to 8 % more there. Another libc, or one that the environment has set, is left as it is.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
