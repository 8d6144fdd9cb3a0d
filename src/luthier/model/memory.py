"""Running out of memory: how it is told from other errors, and what a smaller try needs before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from luthier.allocator import give_back

_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
_Result = TypeVar("_Result")


def out_of_memory(error: BaseException) -> bool:
    """Torch raises a RuntimeError of no kind of its own where a CPU allocation fails, and where the driver, Triton,
    cuBLAS or cuDNN find no memory, which do not ask its allocator."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def attempt(work: Callable[[], _Result]) -> _Result | None:
    """What `work` returns, or None where memory ran out. To be followed by `release` before a smaller try: only when
    this has returned, and its handler is left, has the traceback let go of what `work` held."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    return None


def release() -> None:
    """Gives back what nothing needs: tensors that only a circle holds, as an error and its frames do, and cached
    blocks, so that smaller tensors are not kept out by larger holes."""
    gc.collect()
    give_back()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
