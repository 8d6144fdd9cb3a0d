"""Dropout on a GPU, in Triton: the masks of `dropout.py`, drawn where they are used and drawn again for the gradient.

The twin is `dropout.dropout_mask`; `tests/contract/test_fused.py` holds this to it, through Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _shift(x, BITS: tl.constexpr):  # type: ignore
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(x):  # type: ignore
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


@triton.jit
def _drop(x, out, samples, positions, key, width, least, factor, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    token = _mix(_mix(key + tl.load(samples + row)) + tl.load(positions + row))
    drawn = _mix(token + (at // 4).to(tl.int64) * -0x61C8864680B583EB)
    lane = (drawn >> ((at % 4) * 16).to(tl.int64)) & 0xFFFF
    kept = ((lane + 32768) & 0xFFFF) >= least  # the lane as a signed number, moved to begin at 0
    value = tl.load(x + row * width + at, inside, 0.0)
    tl.store(out + row * width + at, tl.where(kept, value.to(tl.float32) * factor, 0.0), inside)


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
    if x.numel():
        factor = float(torch.tensor(1 / (1 - p)).to(x.dtype))  # as the twin's mask holds it
        grid = (x.numel() // width, triton.cdiv(width, _BLOCK))
        least = round(p * 65536)
        _drop[grid](x, out, samples, positions, key, width, least, factor, BLOCK=_BLOCK, num_warps=4)
    return out
