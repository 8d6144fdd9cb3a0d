"""Running out of memory: what a smaller try needs before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from luthier.allocator import give_back, out_of_memory

_Result = TypeVar("_Result")


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
