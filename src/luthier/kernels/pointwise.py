"""The parts of a decoder block between its matrix products: norms, rotary embedding, gated activation.

These are the eager forms, written for few passes over memory, in place where an input is no longer needed. `native`
has the same parts in C++, one pass each. Norms accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight for rows of x [T, H], and 1 / rms(x) as fp32 [T, 1]."""
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt_()
    return (x.float() * scale).to(x.dtype) * weight, scale


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + update, its norm and its 1 / rms. `update` is overwritten by the sum."""
    total = update.add_(x)
    return total, *rms_norm(total, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, plus `residual`; and the norm's output again, for the adapters that read it.

    With g = dy · weight and n = x · scale: dx = scale · (g - n · mean(g · n)). `dy` may be overwritten.
    """
    normed = x.float() * scale
    gradient = (dy * weight).float()
    inner = (gradient * normed).mean(-1, keepdim=True)
    dx = gradient.sub_(normed * inner).mul_(scale).add_(residual)
    return dx.to(x.dtype), normed.to(x.dtype) * weight


def rotate(x_TGRD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form, laid out for attention: [T, G, R, D] to [G, T, R, D]; cos and sin [T, D/2]."""
    groups = x_TGRD.transpose(0, 1)
    out = torch.empty(groups.shape, dtype=x_TGRD.dtype, device=x_TGRD.device)
    _turn(groups, out, cos, sin)
    return out


def unrotate(dy_GTRD: Tensor, cos: Tensor, sin: Tensor, out_TGRD: Tensor) -> None:
    """The gradient of `rotate`, written to `out`: the rotation the other way round."""
    _turn(dy_GTRD, out_TGRD.transpose(0, 1), cos, -sin)


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    c, s = cos[None, :, None, :], sin[None, :, None, :]
    (a, b), (a_out, b_out) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, c, out=a_out)
    a_out.addcmul_(b, s, value=-1)
    torch.mul(b, c, out=b_out)
    b_out.addcmul_(a, s)


def turn(x_THD: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotary embedding in place, [T, H, D] with heads side by side; `back` is the other way round, the gradient."""
    _turn(x_THD.clone()[None], x_THD[None], cos, -sin if back else sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for [T, 2F] holding gate and up side by side."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate|up, and `swiglu(gate_up)` again. Both inputs are overwritten."""
    gate, up = gate_up.chunk(2, -1)
    act = F.silu(gate)
    hidden = act * up
    torch.mul(dh, up, out=up)  # d silu(gate)
    torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
    torch.mul(dh, act, out=up)
    return gate_up, hidden


def softmax(scores_GQRK: Tensor, seen: Tensor) -> Tensor:
    """Softmax over keys, where query row q sees its first seen[q] keys (int64 [Q]). `scores` is overwritten."""
    hidden = torch.arange(scores_GQRK.shape[-1], device=seen.device) >= seen[:, None]
    scores_GQRK.masked_fill_(hidden[None, :, None], float("-inf"))
    return torch.softmax(scores_GQRK, -1)


def softmax_backward(dp_GQK: Tensor, p_GQK: Tensor, delta_GQ: Tensor) -> Tensor:
    """d scores = P · (dP - delta), with delta = rowsum(dP · P), known as rowsum(dO · O). `dp` is overwritten."""
    return dp_GQK.sub_(delta_GQ[..., None].to(dp_GQK.dtype)).mul_(p_GQK)


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - max) of each row of [S, V], that maximum and the sum, both fp32 [S, 1]. `logits` may be overwritten."""
    largest = logits.amax(1, keepdim=True)
    weights = logits.float().sub_(largest).exp_()
    return weights.to(logits.dtype), largest.float(), weights.sum(1, keepdim=True)


@dataclass(frozen=True)
class Pointwise:
    """All of the above as one value: a block takes either these or their counterparts in `native`."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]] = add_rms_norm
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rms_norm_backward
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    unrotate: Callable[[Tensor, Tensor, Tensor, Tensor], None] = unrotate
    turn: Callable[[Tensor, Tensor, Tensor, bool], None] = turn
    swiglu: Callable[[Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = swiglu_backward
    softmax: Callable[[Tensor, Tensor], Tensor] = softmax
    softmax_backward: Callable[[Tensor, Tensor, Tensor], Tensor] = softmax_backward
    exponentials: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = exponentials
    logit_rows: int = 256
    """Rows of logits held at once. The head is read twice a chunk: fewer rows cost reads, more of them memory."""


EAGER = Pointwise()
