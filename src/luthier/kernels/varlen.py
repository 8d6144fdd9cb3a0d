"""Causal attention inside each segment of a packed row of tokens, for CUDA: torch's flash attention on packed rows, and
where they are faster cuDNN's forward pass (`cudnn.py`) and a backward pass of our own (`varlen_backward.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels import cudnn, varlen_backward
from luthier.kernels.place import capability, on_gpu

LARGEST = 256  # head size


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `varlen_attention` computes these: 16-bit, of one head size that is a multiple of 8, on a GPU since
    Ampere."""
    size = q.shape[-1]
    return (
        on_gpu(q)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and size == k.shape[-1] == v.shape[-1]
        and size % 8 == 0
        and size <= LARGEST
        and capability(q) >= (8, 0)
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    *,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, causal inside each segment.

    Args:
        q: [T, Hq, D]; k and v: [T, Hk, D], or [S, Hk, D] with `keys`, with Hq a multiple of Hk; see `takes`.
        edges: int32 [n + 1], the segment boundaries from 0 to T, on the same device.
        longest: tokens of the longest segment.
        window: how many tokens a token sees, itself among them; None: all before it.
        keys: `edges` and `longest` of k and v where segments have more keys than queries, which are then the last ones.

    Returns [T, Hq, D]. Differentiable once; with `keys` not at all, and for no `window`.
    """
    if keys is not None:
        ends = (edges, keys[0], longest, keys[1])
        found = torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, True, False, scale=scale)
        return found[0]  # type: ignore[no-any-return]
    return _Varlen.apply(q, k, v, edges, longest, scale, window)  # type: ignore[no-any-return, no-untyped-call]


class _Varlen(torch.autograd.Function):
    """Torch's operators themselves: before torch 2.13, `torch.nn.attention.varlen` wants as many key heads as query
    heads, and keys that are repeated for that are copied, kept and summed."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        options, causal = {"scale": scale, **_window(window)}, window is None
        o, sums = (cudnn.forward(q, k, v, edges, longest, scale) if causal else None) or _flash(
            q, k, v, edges, longest, causal, options
        )
        ctx.save_for_backward(q, k, v, edges, o, sums)
        ctx.longest, ctx.causal, ctx.scale, ctx.options = longest, causal, scale, options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, edges, o, sums = ctx.saved_tensors
        if ctx.causal and varlen_backward.takes(q, k, v, ctx.longest):
            dy = varlen_backward.gradients(do, q, k, v, o, sums, edges, ctx.longest, ctx.scale)
            return *torch.split(dy, [q.shape[1], k.shape[1], v.shape[1]], 1), None, None, None, None
        seed = offset = edges.new_empty(0)  # of a dropout that there is not
        ends = (edges, edges, ctx.longest, ctx.longest)
        found = torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, sums, *ends, 0.0, ctx.causal, seed, offset, **ctx.options
        )
        return *found, None, None, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, causal: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """[T, Hq, D], and the fp32 logarithms [Hq, T] of the sums of exponentials."""
    ends = (edges, edges, longest, longest)
    o, sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, causal, False, **options)
    return o, sums


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
