"""Where a tensor's work is done. A tensor without data is worked on where the plan that traces it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_planned: ContextVar[tuple[int, int] | None] = ContextVar("planned", default=None)


@contextmanager
def planned_for(capability: tuple[int, int] | None) -> Iterator[None]:
    """Inside, tensors of the meta device stand for those of a GPU of this compute capability; None: of a CPU."""
    token = _planned.set(capability)
    try:
        yield
    finally:
        _planned.reset(token)


def on_gpu(x: Tensor) -> bool:
    """Whether `x` lies on a CUDA GPU, or stands for a tensor that will."""
    return x.is_cuda or (x.is_meta and _planned.get() is not None)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the GPU of `x`, for which `on_gpu` holds."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else _planned.get() or (0, 0)


def launch(kernel: str, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs a kernel of `jit.py`, unless there are no rows, or no data."""
    if grid[0] and not x.is_meta:
        getattr(import_module("luthier.kernels.jit"), kernel)[grid](x, *arguments, **options)
