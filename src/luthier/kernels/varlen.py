"""Causal attention inside each segment of a packed row of tokens, for CUDA: torch's flash attention on packed rows, and
where they are faster cuDNN's forward pass (`cudnn.py`), or one of our own (`varlen_forward.py`), and a backward pass of
our own (`varlen_backward.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels import cudnn, varlen_backward, varlen_forward
from luthier.kernels.ends import Ends
from luthier.kernels.place import capability, on_gpu
from luthier.kernels.spare import empty
from luthier.kernels.varlen_backward import Parts, Turn

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
    q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, window: int | None = None, *, keys: Ends | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v, causal inside each segment.

    Args:
        q: [T, Hq, D]; k and v: [T, Hk, D], or [S, Hk, D] with `keys`, with Hq a multiple of Hk; see `takes`.
        ends: of the segments.
        window: how many tokens a token sees, itself among them; None: all before it.
        keys: the ends of k and v where segments have more keys than queries, which are then the last ones.

    Returns [T, Hq, D]. Differentiable once; with `keys` not at all, and for no `window`.
    """
    if keys is not None:
        return _flash(q, k, v, ends, keys, scale, None)[0]
    return _Varlen.apply(q, k, v, ends, scale, window)  # type: ignore[no-any-return, no-untyped-call]


def forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, window: int | None = None, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` [T, Hq, D], with `spare` more values behind each token, and what its gradient needs besides:
    the fp32 logarithms [Hq, T] of the sums of exponentials."""
    if window is None and varlen_forward.takes(q, k, v, ends.longest):
        return varlen_forward.forward(q, k, v, ends, scale, spare)
    found = cudnn.forward(q, k, v, ends, scale, spare) if window is None else None
    o, sums = found or _flash(q, k, v, ends, ends, scale, window)
    width = q.shape[1] * q.shape[2]
    if o.stride(0) != width + spare:  # neither flash attention nor torch's cuDNN can be told where to write
        o = empty(o, len(o), width, spare).view(o.shape).copy_(o)
    return o, sums


def backward(
    do: Tensor, o: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, into: Parts,
    turn: Turn | None = None,
) -> bool:  # fmt: skip
    """Writes the gradients of q, k and v.

    Args:
        do: [T, Hq, D].
        o, sums: what `forward` returned, without a window.
        into: tensors of the shapes of q, k and v, which lie in each token as those do.
        turn: cos and sin [T, D / 2] of the rotary embedding that q and k came from, by halves of a head.

    Returns whether they are the gradients of what was turned; those of what came out of it otherwise.
    """
    if varlen_backward.takes(q, k, v, ends.longest):
        varlen_backward.gradients(do, o, sums, q, k, v, ends, scale, into, turn)
        return turn is not None
    put(_flash_backward(do, o, sums, q, k, v, ends, scale, None), into)
    return False


def put(found: Parts, into: Parts) -> None:
    """Copies each tensor to its place: what made them cannot be told where to write."""
    for place, tensor in zip(into, found, strict=True):
        place.copy_(tensor)


class _Varlen(torch.autograd.Function):
    """Torch's operators themselves: before torch 2.13, `torch.nn.attention.varlen` wants as many key heads as query
    heads, and keys that are repeated for that are copied, kept and summed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, window: int | None) -> Tensor:
        o, sums = forward(q, k, v, ends, scale, window)
        ctx.save_for_backward(o, sums, q, k, v)
        ctx.ends, ctx.scale, ctx.window = ends, scale, window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        o, sums, q, k, v = ctx.saved_tensors
        if ctx.window is not None or not varlen_backward.takes(q, k, v, ctx.ends.longest):
            return *_flash_backward(do, o, sums, q, k, v, ctx.ends, ctx.scale, ctx.window), None, None, None
        heads = [x.shape[1] for x in (q, k, v)]
        into = torch.split(q.new_empty(len(q), sum(heads), q.shape[2]), heads, 1)
        varlen_backward.gradients(do, o, sums, q, k, v, ctx.ends, ctx.scale, into)
        return *into, None, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, ends: Ends, keys: Ends, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """[T, Hq, D], and the fp32 logarithms [Hq, T] of the sums of exponentials."""
    places = (ends.edges, keys.edges, ends.longest, keys.longest, 0.0, window is None)
    o, sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *places, False, scale=scale, **_window(window))
    return o, sums


def _flash_backward(
    do: Tensor, o: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, window: int | None
) -> Parts:
    places = (ends.edges, ends.edges, ends.longest, ends.longest, 0.0, window is None)
    none = ends.edges.new_empty(0)  # of the seed and the offset of a dropout that there is not
    options = {"scale": scale, **_window(window)}
    sums = sums.contiguous()
    found = torch.ops.aten._flash_attention_backward(do, q, k, v, o, sums, *places, none, none, **options)
    return found  # type: ignore[no-any-return]


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
