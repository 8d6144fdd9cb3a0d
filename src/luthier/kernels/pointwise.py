"""The parts of a decoder block between its matrix products: norms, rotary embedding, activation.

These are the eager forms, written for few passes over memory, in place where an input is no longer needed. `native`
has the same parts in C++, and `fused` in Triton, one pass each. Norms accumulate in fp32. `spare`: so many columns are
left free behind each row of what a product reads next (see `spare.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import adapted
from luthier.kernels.rectangles import Copies, one_by_one
from luthier.kernels.spare import empty

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""x · sigmoid(x); x · Φ(x); and Φ by its approximation through tanh (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""

ActivateBackward = Callable[[Tensor, Tensor, Activation, bool], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight for rows of x [T, H], in the dtype of x, and 1 / rms(x) as fp32 [T, 1].

    A weight [H] that is finer than x is multiplied before anything is rounded.
    """
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt_()
    return _placed(_weighted(x.float() * scale, weight), x, spare), scale


def add_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + update, its norm and its 1 / rms. `update` is overwritten by the sum."""
    total = update.add_(x)
    return total, *rms_norm(total, weight, eps, spare)


def rms_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradient of x, plus `residual`; and the norm's output again, for the adapters that read it.

    With g = dy · weight and n = x · scale: dx = scale · (g - n · mean(g · n)).
    """
    normed = x.float() * scale
    gradient = (dy * weight).float()
    inner = (gradient * normed).mean(-1, keepdim=True)
    dx = gradient.sub_(normed * inner).mul_(scale)
    dx = dx if residual is None else dx.add_(residual)
    return _placed(dx, x, spare), _weighted(normed, weight).to(x.dtype)


def _weighted(normed: Tensor, weight: Tensor) -> Tensor:
    return normed.to(weight.dtype) * weight


def _placed(values: Tensor, like: Tensor, spare: int) -> Tensor:
    """`values` [T, H] in the dtype of `like`, with `spare` columns behind each row."""
    return empty(like, len(values), values.shape[1], spare).copy_(values) if spare else values.to(like.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """(x - mean(x)) / std(x) · weight + bias for rows of x [T, H], rounded once, to the dtype of x; and 1 / std(x)
    beside mean(x), fp32 [T, 2]."""
    y, mean, scale = torch.native_layer_norm(x.float(), x.shape[1:], weight.float(), bias.float(), eps)
    return _placed(y, x, spare), torch.cat([scale, mean], 1)


def layer_norm_backward(
    dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_backward`; with n = (x - mean) · scale: dx = scale · (g - mean(g) - n · mean(g · n))."""
    scale, mean = moments[:, :1], moments[:, 1:]
    normed = (x.float() - mean).mul_(scale)
    gradient = dy.float() * weight
    inner = (gradient * normed).mean(-1, keepdim=True)
    dx = gradient.sub_(gradient.mean(-1, keepdim=True)).sub_(normed * inner).mul_(scale).add_(residual)
    return _placed(dx, x, spare), normed.mul_(weight).add_(bias).to(x.dtype)


def rotate(x_TGRD: Tensor, cos: Tensor, sin: Tensor, scale: float, neighbours: bool) -> Tensor:
    """scale · rotary embedding, laid out for attention: [T, G, R, D] to [G, T, R, D]; cos and sin [T, n], of which the
    first 2n features are turned and the rest only scaled. Pairs are feature i and i + n, or with `neighbours` 2i and
    2i + 1."""
    groups = x_TGRD.transpose(0, 1)
    out = torch.empty(groups.shape, dtype=x_TGRD.dtype, device=x_TGRD.device)
    _turn(groups, out, cos * scale, sin * scale, scale, neighbours)
    return out


def unrotate(dy_GTRD: Tensor, cos: Tensor, sin: Tensor, out_TGRD: Tensor, scale: float, neighbours: bool) -> None:
    """The gradient of `rotate`, written to `out`: the rotation the other way round."""
    _turn(dy_GTRD, out_TGRD.transpose(0, 1), cos * scale, sin * -scale, scale, neighbours)


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, scale: float, neighbours: bool) -> None:
    c, s, turned = cos[None, :, None, :], sin[None, :, None, :], 2 * cos.shape[1]
    (a, b), (a_out, b_out) = (_pairs(t[..., :turned], neighbours) for t in (x, out))
    torch.mul(a, c, out=a_out)
    a_out.addcmul_(b, s, value=-1)
    torch.mul(b, c, out=b_out)
    b_out.addcmul_(a, s)
    if turned < x.shape[-1]:
        torch.mul(x[..., turned:], scale, out=out[..., turned:])


def _pairs(x: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    return a, b


def turn(x_THD: Tensor, cos: Tensor, sin: Tensor, back: bool, neighbours: bool) -> None:
    """`rotate` in place, [T, H, D]; `back` is the other way round, the gradient."""
    _turn(x_THD.clone()[None], x_THD[None], cos, -sin if back else sin, 1.0, neighbours)


def activate(x: Tensor, act: Activation, gated: bool, spare: int = 0) -> Tensor:
    """act(x) for x [T, F]; with `gated`, act(gate) · up for x [T, 2F] holding gate and up side by side."""
    if not gated:
        return _placed(_act(x, act), x, spare)
    gate, up = x.chunk(2, -1)
    return _placed(_act(gate, act).mul_(up), x, spare)


def activate_backward(dh: Tensor, x: Tensor, act: Activation, gated: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and `activate(x)` again. Both inputs are overwritten."""
    if not gated:
        hidden = _act(x, act)
        _act_backward(dh, x, act)
        return x, hidden
    gate, up = x.chunk(2, -1)
    value = _act(gate, act)
    hidden = value * up
    torch.mul(dh, up, out=up)  # d act(gate)
    _act_backward(up, gate, act)
    torch.mul(dh, value, out=up)
    return x, hidden


def activate_backward_dA(
    dh: Tensor,
    x: Tensor,
    act: Activation,
    gated: bool,
    dinner: Tensor,
    dA: Tensor,
    backward: ActivateBackward = activate_backward,
) -> Tensor:
    """The gradient of x, as `backward` gives it; and that of the A [P, F] which reads the hidden values goes to `dA`,
    dinnerᵀ · activate(x). `dh` is overwritten.

    Args:
        dinner: [T, S], the gradient of the inner values, of which the first P columns are A's.
    """
    dx, hidden = backward(dh, x, act, gated)
    torch.mm(dinner[:, : len(dA)].t(), hidden, out=dA)
    return dx


def _act(x: Tensor, act: Activation) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _act_backward(dy: Tensor, x: Tensor, act: Activation) -> None:
    """The gradient, in the place of `x`."""
    if act == "silu":
        torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=x)
    else:
        kind = "tanh" if act == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=kind, grad_input=x)


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
    """All of the above as one value: a block takes these, or their counterparts in `native` or `fused`."""

    rms_norm: Callable[..., tuple[Tensor, Tensor]] = rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = add_rms_norm
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor]] = rms_norm_backward
    layer_norm: Callable[..., tuple[Tensor, Tensor]] = layer_norm
    layer_norm_backward: Callable[..., tuple[Tensor, Tensor]] = layer_norm_backward
    rotate: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor] = rotate
    unrotate: Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], None] = unrotate
    turn: Callable[[Tensor, Tensor, Tensor, bool, bool], None] = turn
    activate: Callable[..., Tensor] = activate
    activate_backward: ActivateBackward = activate_backward
    activate_backward_dA: Callable[..., Tensor] = activate_backward_dA
    softmax: Callable[[Tensor, Tensor], Tensor] = softmax
    softmax_backward: Callable[[Tensor, Tensor, Tensor], Tensor] = softmax_backward
    exponentials: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = exponentials
    copies: Callable[..., Copies] = one_by_one
    adapted_backward: Callable[..., None] = adapted.one_by_one
    logit_rows: int = 256
    """Rows of logits held at once. The head is read twice a chunk: fewer rows cost reads, more of them memory."""


EAGER = Pointwise()
