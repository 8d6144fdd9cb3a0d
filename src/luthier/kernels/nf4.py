"""4-bit weights back to their values on a GPU, in Triton: indices and scales are read once, values written once.

The twin is `quantize.dequantize_4bit`; `tests/contract/test_quantize.py` holds this to it, on a CPU through Triton's
interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kernels.place import launch
from luthier.kernels.quantize import BLOCK, NESTED, NestedScales, levels

_BLOCKS = 128  # blocks of 64 values a program: 32 values a thread


def dequantize_4bit(
    packed: Tensor, absmax: Tensor | NestedScales, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`quantize.dequantize_4bit`, to the bit."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    write_4bit(packed, absmax, kind, out)
    return out


def write_4bit(packed: Tensor, absmax: Tensor | NestedScales, kind: str, out: Tensor) -> None:
    """`dequantize_4bit` into a tensor [out, in], whose rows may lie apart."""
    assert out.stride(1) == 1, out.stride()
    double = isinstance(absmax, NestedScales)
    scales = absmax if isinstance(absmax, NestedScales) else (absmax,) * 4  # those not read stand for themselves
    grid, width = (-(-out.numel() // (_BLOCKS * BLOCK)),), out.shape[1]
    # Without fusion a product and a sum are rounded one after the other, as the twin does.
    options = {"DOUBLE": double, "BLOCKS": _BLOCKS, "BLOCK": BLOCK, "NESTED": NESTED}
    where = (*scales, levels(kind, packed.device), out, out.numel(), width, out.stride(0))
    whole = width % BLOCK == 0
    launch("dequantize", grid, packed, *where, **options, WHOLE=whole, num_warps=8, enable_fp_fusion=False)
