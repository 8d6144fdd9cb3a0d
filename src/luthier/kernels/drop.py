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
    def forward(ctx: Any, x: Tensor, key: int, samples: Tensor, positions: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(samples, positions)
        ctx.key, ctx.p = key, p
        return _run(x, key, samples, positions, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        samples, positions = ctx.saved_tensors
        return _run(gradients[0], ctx.key, samples, positions, ctx.p), None, None, None, None


def drop(x: Tensor, key: int, samples: Tensor, positions: Tensor, p: float) -> Tensor:
    """`x` [..., features] of T tokens times `dropout_mask`, where `key` is `dropout.mask_key` of seed, step and module;
    samples and positions are int64 [T]."""
    return _Drop.apply(x, key, samples, positions, p)  # type: ignore[no-any-return, no-untyped-call]


def _run(x: Tensor, key: int, samples: Tensor, positions: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    factor = float(torch.tensor(1 / (1 - p), device="cpu").to(x.dtype))  # as the twin's mask holds it
    grid, least = (len(samples), -(-width // _BLOCK)), round(p * 65536)
    launch("drop", grid, x, out, samples, positions, key, width, least, factor, BLOCK=_BLOCK, num_warps=4)
    return out
