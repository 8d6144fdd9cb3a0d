"""Where a tensor's work is done. A tensor without data is worked on where the plan that traces it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Notice = Callable[[str, Sequence[Tensor]], None]

_planned: ContextVar[tuple[int, int] | None] = ContextVar("planned", default=None)
_notice: ContextVar[Notice | None] = ContextVar("notice", default=None)


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


@contextmanager
def noticing(notice: Notice) -> Iterator[None]:
    """Inside, a launch on tensors without data tells its kernel and its tensors."""
    token = _notice.set(notice)
    try:
        yield
    finally:
        _notice.reset(token)


def launch(kernel: str, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs a kernel of `jit.py`, unless there are no rows, or no data."""
    if x.is_meta:
        if notice := _notice.get():
            notice(kernel, [y for y in (x, *arguments) if isinstance(y, Tensor)])
    elif grid[0]:
        getattr(import_module("luthier.kernels.jit"), kernel)[grid](x, *arguments, **options)
