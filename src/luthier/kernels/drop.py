"""Dropout on a GPU, in Triton: the masks of `dropout.py`, drawn where they are used and drawn again for the gradient.

The twin is `dropout.dropout_mask`; `tests/contract/test_fused.py` holds this to it, through Triton's interpreter.
Without data nothing is drawn, and all is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.kernels.place import launch

_BLOCK = 1024


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, samples: Tensor, positions: Tensor, module: int, p: float) -> Tensor:
        ctx.save_for_backward(key, samples, positions)
        ctx.module, ctx.p = module, p
        return _run(x, key, samples, positions, module, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        key, samples, positions = ctx.saved_tensors
        dx = _run(gradients[0], key, samples, positions, ctx.module, ctx.p)
        return dx, None, None, None, None, None


def drop(x: Tensor, key: Tensor, samples: Tensor, positions: Tensor, module: int, p: float) -> Tensor:
    """`x` [..., features] of T tokens times `dropout_mask`. `key` is `dropout.mask_key` of seed and step, int64 [1] on
    the GPU, so that a recorded step reads its own each time; samples and positions are int64 [T]."""
    return _Drop.apply(x, key, samples, positions, module, p)  # type: ignore[no-any-return, no-untyped-call]


def _run(x: Tensor, key: Tensor, samples: Tensor, positions: Tensor, module: int, p: float) -> Tensor:
    rows = x.flatten(0, -2)  # which may lie apart
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out, width = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1]
    factor = float(torch.tensor(1 / (1 - p), device="cpu").to(x.dtype))  # as the twin's mask holds it
    grid, least = (len(samples), -(-width // _BLOCK)), round(p * 65536)
    numbers = module, width, rows.stride(0), least, factor
    launch("drop", grid, rows, out, samples, positions, key, *numbers, BLOCK=_BLOCK, num_warps=4)
    return out
