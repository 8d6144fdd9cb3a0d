"""Weights in fewer bits, in plain torch: what each quantiser computes, on any device and with no other library.

Four bits: blocks of 64 values share a scale, their largest absolute value ("absmax"), and each value becomes the index
of the nearest of 16 levels (Dettmers et al., 2023, QLoRA, arXiv:2305.14314). Double quantisation keeps the scales, less
their mean, as 8-bit indices of a dynamic code, 256 to a scale of their own. Indices, scales and byte order are
bitsandbytes' to the bit, so that files go both ways; a test holds them to it.

Eight bits: a row has one scale (Dettmers et al., 2022, LLM.int8(), arXiv:2208.07339).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.place import capability, on_gpu

BLOCK = 64  # weights to a scale
NESTED = 256  # scales to a scale of theirs
_PIECE = 1 << 20  # values handled at a time: temporaries stay in the cache, and small beside the weight

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# A sign bit, two bits of exponent and one of mantissa, in the order of bitsandbytes' bit patterns, over the largest.
_FP4_POSITIVE = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
_FP4 = [*(value / 12 for value in _FP4_POSITIVE), *(-value / 12 for value in _FP4_POSITIVE)]
_LEVELS = {"nf4": _NF4, "fp4": _FP4}
FLOAT8 = torch.float8_e4m3fn
_GRID = 65535
_TINY = 1e-38  # below every scale that is not zero, so that a block of zeros divides


class NestedScales(NamedTuple):
    """Scales of 4-bit blocks, themselves in 8 bits: scale i is code[absmax[i]] · nested[i // 256] + offset."""

    absmax: Tensor
    """uint8 [blocks]"""
    nested: Tensor
    """fp32 [⌈blocks / 256⌉]"""
    offset: Tensor
    """fp32 scalar, the mean of the scales"""
    code: Tensor
    """fp32 [256], ascending"""


# Four bits.


def levels(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [16]: the value of each index of `nf4` or `fp4`, before the block's scale."""
    return _levels(kind, torch.device(device))


@cache
def _levels(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(_LEVELS[kind], dtype=torch.float32, device=device)


@cache
def _bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels, fp32 [15], and the indices in ascending order of their levels, [16]."""
    ascending, order = levels(kind, device).sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


def quantize_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`weight` (any shape, n values, fp32, bf16 or fp16), read row after row, as 4-bit indices and scales.

    Returns uint8 [⌈n/2⌉, 1], the earlier value in the high bits of a byte, and fp32 [⌈n/64⌉].
    """
    pieces = [_quantize_piece(piece, kind) for piece in torch.split(weight.detach().reshape(-1), _PIECE)]
    return torch.cat([packed for packed, _ in pieces])[:, None], torch.cat([absmax for _, absmax in pieces])


def _quantize_piece(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    whole = values.numel() // BLOCK * BLOCK
    blocks, rest = values[:whole].float().view(-1, BLOCK), values[whole:].float()
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).view(-1)
    if rest.numel():
        # bitsandbytes divides here and multiplies by the reciprocal above, which rounds otherwise.
        last = rest.abs().amax().clamp(min=_TINY)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    bounds, order = _bounds(kind, scaled.device)
    indices = order[torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True)]
    return indices[::2] << 4 | indices[1::2], absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor | NestedScales, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """What `quantize_4bit` kept of a weight of `shape`: level times scale in fp32, rounded once to `dtype`."""
    if isinstance(absmax, NestedScales):
        absmax = dequantize_scales(absmax)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    parts = ((out.view(-1), _PIECE), (packed.view(-1), _PIECE // 2), (absmax, _PIECE // BLOCK))
    for values, pairs, scales in zip(*(torch.split(tensor, size) for tensor, size in parts), strict=True):
        values.copy_(_dequantize_piece(pairs, scales, kind)[: values.numel()])
    return out


def _dequantize_piece(packed: Tensor, absmax: Tensor, kind: str) -> Tensor:
    values = _pairs(kind, packed.device)[packed.int()].view(torch.float32)
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    if whole < values.numel():
        values[whole:] *= absmax[-1]
    return values


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """[256]: the two levels that a byte stands for, as the eight bytes of one 64-bit number: one look-up for both."""
    of = levels(kind, device)
    byte = torch.arange(256, device=device)
    return torch.stack([of[byte >> 4], of[byte & 15]], 1).view(torch.int64).view(-1)


# The scales of 4-bit blocks in 8 bits.


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """fp32 [256], ascending from -0.993 to 1: the 8-bit dynamic code (Dettmers, 2016, arXiv:1511.04561): a sign, a
    decimal exponent told by leading zeros, and a linear fraction in the bits that are left."""
    positive = torch.cat([10.0 ** (i - 6) * _fractions(2**i) for i in range(7)])
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat([-positive, ends, positive]).sort().values.to(device)


def _fractions(count: int) -> Tensor:
    """Middles of `count` equal parts of [0.1, 1]."""
    edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device="cpu")
    return (edges[:-1] + edges[1:]) / 2


def quantize_scales(absmax: Tensor) -> NestedScales:
    """fp32 [blocks] in 8 bits."""
    offset, code, count = absmax.mean(), dynamic_code(absmax.device), absmax.numel()
    groups = torch.nn.functional.pad(absmax - offset, (0, -count % NESTED)).view(-1, NESTED)
    nested = groups.abs().amax(1)
    scaled = (groups * (1.0 / nested)[:, None]).clamp_(-1, 1)
    if not scaled.is_cuda:
        # bitsandbytes finds the index through a table of 2¹⁶ values on a CPU, and exactly on a GPU.
        scaled = ((scaled + 1) * 0.5 * _GRID + 0.5).floor() / _GRID * 2 - 1
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    index.masked_fill_(nested[:, None] == 0, 0)  # a group without spread
    return NestedScales(index.view(-1)[:count].to(torch.uint8), nested, offset, code)


def dequantize_scales(scales: NestedScales) -> Tensor:
    """fp32 [blocks]."""
    nested = scales.nested.repeat_interleave(NESTED)[: scales.absmax.numel()]
    return scales.code[scales.absmax.int()] * nested + scales.offset


# Eight bits: a scale for each row.

_ROWS = 2048  # that `int8_linear` multiplies at a time


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] as int8 in [-127, 127] and the largest absolute value of each row, fp32 [rows]."""
    absmax = rows.abs().amax(1).float()
    return torch.round(rows * (127 / absmax.clamp(min=_TINY))[:, None]).to(torch.int8), absmax


def dequantize_int8(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: packed · absmax / 127, rounded once to `dtype`."""
    return torch.mul(packed, (absmax / 127)[:, None], out=torch.empty(packed.shape, dtype=dtype, device=packed.device))


def int8_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, threshold: float, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """LLM.int8(): `x` [T, in] times the weight [out, in] that `quantize_int8` made, plus the bias, as `dtype` [T, out].
    `packed` may hold its integers in fp32.

    Columns of `x` that hold an absolute value of `threshold` or more are multiplied in `x`'s dtype with the dequantised
    weight; the others as integers, each row of `x` scaled by its largest value. `threshold` 0: all as integers. Sums
    are fp32 and rounded once, some rows at a time: those of all rows would take more memory than what is kept of them.
    """
    outliers = (x.abs() >= threshold).any(0).nonzero()[:, 0] if threshold else x.new_empty(0, dtype=torch.int64)
    weight = dequantize_int8(packed[:, outliers], absmax, x.dtype).T if outliers.numel() else None
    out = torch.empty(len(x), len(packed), dtype=dtype, device=x.device)
    for part, y in zip(torch.split(x, _ROWS), torch.split(out, _ROWS), strict=True):
        rows, scale = quantize_int8(part.index_fill(1, outliers, 0))
        total = int8_matmul(rows, packed).float().mul_((scale / 127)[:, None]).mul_(absmax / 127)
        if weight is not None:
            total += part[:, outliers] @ weight
        if bias is not None:
            total += bias
        y.copy_(total)
    return out


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [m, k] times the transpose of int8 [n, k]: int32 [m, n], exact.

    On a GPU since Turing cuBLAS multiplies integers where its shapes allow. Elsewhere fp32 products of 1,024 columns at
    a time are exact too, since 1024 · 127² < 2²⁴.
    """
    if on_gpu(a) and capability(a) >= (7, 5) and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        missing = max(0, 17 - len(a))  # cuBLAS takes no fewer rows
        return torch._int_mm(F.pad(a, (0, 0, 0, missing)) if missing else a, b.T)[: len(a)]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(torch.split(a, 1024, 1), torch.split(b, 1024, 1), strict=True):
        total += (left.float() @ right.float().T).int()
    return total


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] as float8 e4m3, whose largest number is 448, and a factor for each row, fp32 [rows]."""
    largest = torch.finfo(FLOAT8).max
    scale = (weight.abs().amax(1).float() / largest).clamp(min=_TINY)
    return (weight / scale[:, None]).clamp_(-largest, largest).to(FLOAT8), scale


def dequantize_float8(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: packed · scale, rounded once to `dtype`."""
    # e4m3 is exact in 16 bits; torch multiplies no float8 itself.
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    return torch.mul(packed.to(torch.bfloat16), scale[:, None], out=out)


# References of the two simplest schemes, one scale for all values: the guide explains the others by them. No layer is
# packed so, and tests alone call them.


def absmax_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the fp32 scale that gives the values back as int8 · scale: symmetric, so half the range is lost on
    values of one sign."""
    scale = values.abs().amax().float() / 127
    return torch.round(values / scale).to(torch.int8), scale


def zeropoint_int8(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8, fp32 scale and integer zero point z: the values are (int8 - z) · scale. The whole range is used."""
    low, high = values.amin().float().clamp(max=0), values.amax().float().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    return torch.round(values / scale + zero).clamp(-128, 127).to(torch.int8), scale, zero
