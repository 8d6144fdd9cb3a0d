"""4-bit weights back to their values on a GPU, in Triton: indices and scales are read once, values written once.

The twin is `quantize.dequantize_4bit`; `tests/contract/test_quantize.py` holds this to it, on a CPU through Triton's
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.quantize import BLOCK, NESTED, NestedScales, levels

_BLOCKS = 64  # blocks of 64 values a program: 16 values a thread


@triton.jit
def _dequantize(  # type: ignore
    packed, absmax, nested, offset, code, values, out, count,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(absmax + block, block * BLOCK < count, 0)
    if DOUBLE:
        # As int32: an 8-bit offset would be taken for a signed one.
        scale = tl.load(code + scale.to(tl.int32)) * tl.load(nested + block // NESTED, block * BLOCK < count, 0.0)
        scale += tl.load(offset)
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(packed + pair, pair * 2 < count, 0).to(tl.int32)
    both = tl.join(tl.load(values + (byte >> 4)), tl.load(values + (byte & 15)))
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, (tl.reshape(both, (BLOCKS, BLOCK)) * scale[:, None]).to(out.dtype.element_ty), place < count)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor | NestedScales, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`quantize.dequantize_4bit`, to the bit."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    double = isinstance(absmax, NestedScales)
    scales = absmax if isinstance(absmax, NestedScales) else (absmax,) * 4  # those not read stand for themselves
    grid = (triton.cdiv(out.numel(), _BLOCKS * BLOCK),)
    # Without fusion a product and a sum are rounded one after the other, as the twin does.
    _dequantize[grid](
        packed, *scales, levels(kind, packed.device), out, out.numel(),
        DOUBLE=double, BLOCKS=_BLOCKS, BLOCK=BLOCK, NESTED=NESTED, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out
