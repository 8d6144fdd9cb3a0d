"""`flash_attention_2` for transformers without flash-attn: the same kernels, as PyTorch builds them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_seen: tuple[Any, Any] = (None, None)


def install(model: Any) -> None:
    """Gives the name `flash_attention_2` to these kernels, and `model` that attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("flash_attention_2", attend)
    model.config._attn_implementation = "flash_attention_2"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [1, heads, T, D] to [1, T, heads, D]; segments begin where positions are 0."""
    if attention_mask is not None or dropout or position_ids is None:
        raise NotImplementedError("packed rows without a mask or dropout alone")
    bounds, longest = _segments(position_ids)
    parts = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return _Attention.apply(*parts, bounds, longest, scaling)[None], None  # type: ignore[no-untyped-call]


def _segments(positions: Tensor) -> tuple[Tensor, int]:
    """int32 bounds of the segments, and the longest; found once a batch, whose layers all pass the same tensor."""
    global _seen
    if _seen[0] is not positions:
        starts = (positions.flatten() == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([positions.numel()])]).int()
        _seen = (positions, (bounds, int(bounds.diff().max())))
    found: tuple[Tensor, int] = _seen[1]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
        lengths = (bounds, bounds, longest, longest)
        out, *rest, _ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, bounds, *rest)
        ctx.longest, ctx.scale = longest, scale
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, out, bounds, logsumexp, *random = ctx.saved_tensors
        lengths = (bounds, bounds, ctx.longest, ctx.longest)
        found = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(), q, k, v, out, logsumexp, *lengths, 0.0, True, *random, scale=ctx.scale
        )
        return *found, None, None, None
