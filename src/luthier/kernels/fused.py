"""The parts of a decoder block between its matrix products, for GPUs: each is one pass over memory, in Triton.

The twins are in `pointwise.py`; `tests/contract/test_fused.py` holds these to them, through Triton's interpreter. On
tensors without data they allocate what they allocate with data, and compute nothing: so a plan sees what they take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.kernels.place import launch
from luthier.kernels.pointwise import Pointwise


def parts() -> Pointwise:
    """These, and torch's own operations for what is left."""
    return Pointwise(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rms_norm_backward=rms_norm_backward,
        turn=turn,
        swiglu=swiglu,
        swiglu_backward=swiglu_backward,
        exponentials=exponentials,
        logit_rows=1024,  # a GPU's products want more rows, and there is no copy in fp32
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight for rows of x [T, H], and 1 / rms(x) as fp32 [T, 1]."""
    out, scales = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows("rms_norm", x, x, x, weight, out, scales, x.shape[1], eps, ADD=False)
    return out, scales


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + update, its norm and its 1 / rms. `update` is overwritten by the sum."""
    out, scales = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows("rms_norm", x, x, update, weight, out, scales, x.shape[1], eps, ADD=True)
    return update, out, scales


def rms_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], plus `residual`; and the norm's output again, for the adapters that read it."""
    dx, out = torch.empty_like(x), torch.empty_like(x)
    _rows("rms_norm_backward", x, dy, x, scale, weight, residual, dx, out, x.shape[1])
    return dx, out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for [T, 2F] holding gate and up side by side."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _tiles("swiglu", out, gate_up, out)
    return out


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate|up, and `swiglu(gate_up)` again. They take the places of `gate_up` and of `dh`."""
    _tiles("swiglu_backward", dh, dh, gate_up)
    return gate_up, dh


def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotary embedding in place, x [T, H, D] with heads side by side, perhaps part of a wider buffer; cos and sin
    [T, D/2]. `back` is the other way round, the gradient."""
    tokens, heads, size = x.shape
    half = cos.shape[1]
    assert x.stride()[1:] == (size, 1), "heads must lie side by side"
    block = _power_of_2(half)
    options = {"SIZE": size, "HALF": half, "BACK": back, "BLOCK": block, "num_warps": 1}
    launch("turn", (tokens, heads), x, cos, sin, x.stride(0), **options)


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max) of each row of [S, V], in the place of `logits`; that maximum and the sum, both fp32 [S, 1]."""
    largest, mass = logits.new_empty(2, len(logits), 1, dtype=torch.float32)
    launch("exponentials", (len(logits),), logits, largest, mass, WIDTH=logits.shape[1], BLOCK=4096, num_warps=8)
    return logits, largest, mass


def _rows(kernel: str, like: Tensor, *arguments: Any, **options: Any) -> None:
    """One program a row of `like` [T, H]."""
    block = _power_of_2(like.shape[1])
    launch(kernel, (len(like),), *arguments, **options, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _tiles(kernel: str, like: Tensor, *arguments: Any) -> None:
    """One program for each 1,024 columns of each row of `like` [T, F]."""
    width = like.shape[1]
    launch(kernel, (len(like), -(-width // 1024)), *arguments, width, BLOCK=1024, num_warps=4)


def _power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()
