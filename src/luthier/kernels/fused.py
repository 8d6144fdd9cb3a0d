"""The parts of a decoder block between its matrix products, for GPUs: each is one pass over memory, in Triton.

The twins are in `pointwise.py`; `tests/contract/test_fused.py` holds these to them, through Triton's interpreter.
Sums are taken in fp32, and a value is rounded to the tensors' dtype where the twin stores it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.pointwise import Pointwise


@triton.jit
def _rms_norm(x, update, weight, out, scales, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(update + row * width + at, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(update + row * width + at, value, inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32) * tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, normed, inside)
    tl.store(scales + row, scale)


@triton.jit
def _rms_norm_backward(dy, x, scales, weight, residual, dx, out, width, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, inside, 0.0)
    scale = tl.load(scales + row)
    normed = value.to(tl.float32) * scale
    factor = tl.load(weight + at, inside, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + at, inside, 0.0).to(tl.float32) * factor
    inner = tl.sum(gradient * normed) / width
    more = tl.load(residual + row * width + at, inside, 0.0).to(tl.float32)
    tl.store(dx + row * width + at, (gradient - normed * inner) * scale + more, inside)
    tl.store(out + row * width + at, normed.to(value.dtype).to(tl.float32) * factor, inside)


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(dh, gate_up, width, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    start = gate_up + row * 2 * width
    gate = tl.load(start + at, inside, 0.0).to(tl.float32)
    up = tl.load(start + width + at, inside, 0.0).to(tl.float32)
    gradient = tl.load(dh + row * width + at, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    act = gate * share
    tl.store(start + at, gradient * up * share * (1 + gate - act), inside)
    tl.store(start + width + at, gradient * act, inside)
    tl.store(dh + row * width + at, act * up, inside)


@triton.jit
def _turn(x, cos, sin, stride, SIZE: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    start = x + token * stride + head * SIZE
    a = tl.load(start + at, inside, 0.0).to(tl.float32)
    b = tl.load(start + HALF + at, inside, 0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + at, inside, 0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + at, inside, 0.0).to(tl.float32)
    if BACK:
        s = -s
    tl.store(start + at, a * c - b * s, inside)
    tl.store(start + HALF + at, b * c + a * s, inside)


def parts() -> Pointwise:
    """These, and torch's own operations for what is left."""
    return Pointwise(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rms_norm_backward=rms_norm_backward,
        turn=turn,
        swiglu=swiglu,
        swiglu_backward=swiglu_backward,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight for rows of x [T, H], and 1 / rms(x) as fp32 [T, 1]."""
    out, scales = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows(_rms_norm, x, x, x, weight, out, scales, x.shape[1], eps, ADD=False)
    return out, scales


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + update, its norm and its 1 / rms. `update` is overwritten by the sum."""
    out, scales = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows(_rms_norm, x, x, update, weight, out, scales, x.shape[1], eps, ADD=True)
    return update, out, scales


def rms_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], plus `residual`; and the norm's output again, for the adapters that read it."""
    dx, out = torch.empty_like(x), torch.empty_like(x)
    _rows(_rms_norm_backward, x, dy, x, scale, weight, residual, dx, out, x.shape[1])
    return dx, out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for [T, 2F] holding gate and up side by side."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _tiles(_swiglu, out, gate_up, out)
    return out


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate|up, and `swiglu(gate_up)` again. They take the places of `gate_up` and of `dh`."""
    _tiles(_swiglu_backward, dh, dh, gate_up)
    return gate_up, dh


def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotary embedding in place, x [T, H, D] with heads side by side, perhaps part of a wider buffer; cos and sin
    [T, D/2]. `back` is the other way round, the gradient."""
    tokens, heads, size = x.shape
    half = cos.shape[1]
    assert x.stride()[1:] == (size, 1), "heads must lie side by side"
    if tokens:
        grid = (tokens, heads)
        block = triton.next_power_of_2(half)
        _turn[grid](x, cos, sin, x.stride(0), SIZE=size, HALF=half, BACK=back, BLOCK=block, num_warps=1)


def _rows(kernel: Any, like: Tensor, *arguments: Any, **options: Any) -> None:
    """One program a row of `like` [T, H]."""
    block = triton.next_power_of_2(like.shape[1])
    if len(like):
        kernel[(len(like),)](*arguments, **options, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _tiles(kernel: Any, like: Tensor, *arguments: Any) -> None:
    """One program for each 1,024 columns of each row of `like` [T, F]."""
    if len(like):
        kernel[(len(like), triton.cdiv(like.shape[1], 1024))](*arguments, like.shape[1], BLOCK=1024, num_warps=4)
