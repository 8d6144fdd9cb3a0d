"""Causal attention inside each segment of a packed row of tokens, for CUDA: torch's flash attention on packed rows."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

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

    Returns [T, Hq, D]. Differentiable once.
    """
    from torch.nn.attention.varlen import varlen_attn

    repeats = q.shape[1] // k.shape[1]
    if repeats > 1 and not _shares_keys():
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    shared: dict[str, Any] = {"enable_gqa": True} if _shares_keys() else {}
    left = -1 if window is None else window - 1
    key_edges, most = keys or (edges, longest)
    out = varlen_attn(q, k, v, edges, key_edges, longest, most, scale=scale, window_size=(left, 0), **shared)
    assert isinstance(out, Tensor)
    return out


@cache
def _shares_keys() -> bool:
    """Whether this torch lets several query heads share a key head; before 2.13 they must be as many."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
