"""The parts of a decoder block between its matrix products, for GPUs: each is one pass over memory, in Triton.

The twins are in `pointwise.py`; `tests/contract/test_fused.py` holds these to them, through Triton's interpreter. On
tensors without data they allocate what they allocate with data, and compute nothing: so a plan sees what they take.
`spare`: so many columns are left free behind each row of what a product reads next (see `spare.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.kernels import activated, adapted, pointwise
from luthier.kernels.place import launch
from luthier.kernels.pointwise import Activation, Pointwise
from luthier.kernels.rectangles import at_once
from luthier.kernels.sizes import power_of_2
from luthier.kernels.spare import empty


def parts() -> Pointwise:
    """These, and torch's own operations for what is left."""
    return Pointwise(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rms_norm_backward=rms_norm_backward,
        layer_norm=layer_norm,
        layer_norm_backward=layer_norm_backward,
        turn=turn,
        activate=activate,
        activate_backward=activate_backward,
        activate_backward_dA=activate_backward_dA,
        exponentials=exponentials,
        copies=at_once,
        adapted_backward=adapted.at_once,
        logit_rows=1024,  # a GPU's products want more rows, and there is no copy in fp32
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight for rows of x [T, H], and 1 / rms(x) as fp32 [T, 1]."""
    out, scales = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows("rms_norm", [x], x, x, weight, out, scales, x.shape[1], out.stride(0), eps, ADD=False)
    return out, scales


def add_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + update, its norm and its 1 / rms. `update` is overwritten by the sum."""
    out, scales = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 1, dtype=torch.float32)
    _rows("rms_norm", [x, update], x, update, weight, out, scales, x.shape[1], out.stride(0), eps, ADD=True)
    return update, out, scales


def rms_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], plus `residual`; and the norm's output again, for the adapters that read it."""
    dx, out, add = empty(x, len(x), x.shape[1], spare), torch.empty_like(x), residual is not None
    more = x if residual is None else residual
    strides = x.shape[1], more.stride(0), dx.stride(0)
    _rows("rms_norm_backward", [x, dy], dy, x, scale, weight, more, dx, out, *strides, ADD=add)
    return dx, out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """(x - mean(x)) / std(x) · weight + bias for rows of x [T, H], and 1 / std(x) beside mean(x), fp32 [T, 2]."""
    out, moments = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 2, dtype=torch.float32)
    _rows("layer_norm", [x], x, weight, bias, out, moments, x.shape[1], out.stride(0), eps)
    return out, moments


def layer_norm_backward(
    dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], plus `residual`; and the norm's output again, for the adapters that read it."""
    dx, out = empty(x, len(x), x.shape[1], spare), torch.empty_like(x)
    strides = x.shape[1], residual.stride(0), dx.stride(0)
    _rows("layer_norm_backward", [x, dy], dy, x, moments, weight, bias, residual, dx, out, *strides)
    return dx, out


def activate(x: Tensor, act: Activation, gated: bool, spare: int = 0) -> Tensor:
    """act(x) for x [T, F]; with `gated`, act(gate) · up for x [T, 2F] holding gate and up side by side."""
    out = empty(x, len(x), x.shape[1] // 2 if gated else x.shape[1], spare)
    _tiles("activate", out, x, out, x.stride(0), out.stride(0), ACT=act, GATED=gated)
    return out


def activate_backward(dh: Tensor, x: Tensor, act: Activation, gated: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and `activate(x)` again. They take the places of `x` and of `dh`."""
    assert dh.is_contiguous()
    _tiles("activate_backward", dh, dh, x, x.stride(0), ACT=act, GATED=gated)
    return x, dh


def activate_backward_dA(dh: Tensor, x: Tensor, act: Activation, gated: bool, dinner: Tensor, dA: Tensor) -> Tensor:
    """The gradient of x, in its place; dinnerᵀ · activate(x) goes to `dA`: in one pass if `activated` takes these."""
    if activated.takes(dh, x, dinner, dA):
        return activated.launched(dh, x, act, gated, dinner, dA, activated.BLOCKS)
    return pointwise.activate_backward_dA(dh, x, act, gated, dinner, dA, activate_backward)


def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool, neighbours: bool) -> None:
    """Rotary embedding in place, x [T, H, D], perhaps part of a wider buffer; cos and sin [T, n]: the first 2n features
    of a head are turned. `back` is the other way round, the gradient; `neighbours`: which features are pairs."""
    (tokens, heads, _), half = x.shape, cos.shape[1]
    assert x.stride(2) == 1, "the features of a head must lie side by side"
    blocks = {"HEADS": power_of_2(heads), "BLOCK": power_of_2(half)}  # one program turns all heads of a token
    warps = min(16, max(1, blocks["HEADS"] * blocks["BLOCK"] // 512))
    options = {"HALF": half, "BACK": back, "NEIGHBOURS": neighbours, **blocks, "num_warps": warps}
    launch("turn", (tokens,), x, cos, sin, heads, x.stride(0), x.stride(1), **options)


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max) of each row of [S, V], in the place of `logits`; that maximum and the sum, both fp32 [S, 1]."""
    largest, mass = logits.new_empty(2, len(logits), 1, dtype=torch.float32)
    launch("exponentials", (len(logits),), logits, largest, mass, WIDTH=logits.shape[1], BLOCK=8192, num_warps=16)
    return logits, largest, mass


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of `table` [V, H], which may lie in pinned host memory: [*ids.shape, H] where the int64 `ids` are."""
    width = table.shape[1]
    out = torch.empty(*ids.shape, width, dtype=table.dtype, device=ids.device)
    launch("gather", (ids.numel(), -(-width // 1024)), ids.contiguous(), table, out, width, BLOCK=1024, num_warps=4)
    return out


def _rows(kernel: str, rows: Sequence[Tensor], *arguments: Any, **options: Any) -> None:
    """One program for each of the `rows` [T, H], of one tensor or more: kernels take nothing to lie between them."""
    assert all(x.is_contiguous() for x in rows)
    block = power_of_2(rows[0].shape[1])
    launch(kernel, (len(rows[0]),), *arguments, **options, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _tiles(kernel: str, like: Tensor, *arguments: Any, **options: Any) -> None:
    """One program for each 1,024 columns of each row of `like` [T, F]."""
    width = like.shape[1]
    launch(kernel, (len(like), -(-width // 1024)), *arguments, width, **options, BLOCK=1024, num_warps=4)
