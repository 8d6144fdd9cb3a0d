"""How this process's C allocator treats what torch frees."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h; the threshold is the largest that a heap can serve.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER, _LARGEST = 2**31 - 1, 32 << 20


def keep_freed_memory() -> None:
    """Keeps freed memory for the next tensor, in one heap for all threads.

    A step asks for the tensors of the step before again. As it comes, glibc returns large ones to the system, which
    clears every page before it lends it out again, and gives the thread of the backward pass a heap of its own, so that
    the holes of two heaps add up. What this changed: docs/log.md. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST), (_ARENA_MAX, 1)):
            mallopt(ctypes.c_int(option), ctypes.c_int(value))
