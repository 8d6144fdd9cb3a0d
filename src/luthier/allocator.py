"""How this process's allocators, the C library's and CUDA's, treat what torch frees, and how they say that there is no
memory."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h; the threshold is the largest that a heap can serve.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_NEVER, _LARGEST, _TENSOR = 2**31 - 1, 32 << 20, 64 << 10
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory. Torch raises a RuntimeError of no kind of its own where a CPU allocation
    fails, and where the driver, Triton, cuBLAS or cuDNN find no memory, which do not ask its allocator."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def grow_segments() -> None:
    """On a GPU, segments that grow leave fewer holes than many of fixed sizes, and the plan follows them. Torch reads
    the variable at its first allocation there; a value that is set already stays."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Keeps freed memory for the next tensor, in one heap for all threads.

    A step asks for the tensors of the step before again. As it comes, glibc returns large ones to the system, which
    clears every page before it lends it out again, and gives the thread of the backward pass a heap of its own, so that
    the holes of two heaps add up. What this changed: docs/log.md. Other C libraries are left as they are.

    On a GPU, segments that grow leave fewer holes than many of fixed sizes, and the plan follows them. Torch reads the
    variable at its first allocation there; a value that is set already stays.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    _tell_malloc((_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST), (_ARENA_MAX, 1))


def return_freed_memory() -> None:
    """Gives each tensor pages of its own, which go back when it is freed, so that memory is what tensors take.

    Autograd of a transformers module puts its small records between large tensors: in one heap they pin holes that no
    other tensor fits into, and a step takes up to 1.8 times as much (docs/log.md). Our block keeps few records.
    """
    grow_segments()
    _tell_malloc((_TRIM_THRESHOLD, _TENSOR), (_MMAP_THRESHOLD, _TENSOR))


def give_back() -> None:
    """Returns what is free in the heap to the system: steps of other lengths leave holes that the next does not fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _tell_malloc(*options: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options:
            mallopt(ctypes.c_int(option), ctypes.c_int(value))
