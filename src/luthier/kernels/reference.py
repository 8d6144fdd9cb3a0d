"""Plain twins of the kernels: what they compute, in the fewest lines, with autograd's own backward.

Tests hold every kernel to its twin, forward and gradients. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.loss import Head
from luthier.kernels.pointwise import Activation


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Twin of `kernels.loss.linear_cross_entropy`: all logits at once, in fp32."""
    assert head.weight is not None
    bias = None if head.bias is None else head.bias.float()
    logits = F.linear(hidden.float(), head.weight.float(), bias) * head.scale
    capped = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(capped, targets, reduction="sum")


def segment_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """Twin of `kernels.attention.segment_attention`: softmax(scale · q kᵀ) v, causal, a segment at a time."""
    pieces = []
    for start, end in pairwise(bounds):
        q_HLD, k_HLD, v_HLD = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        o_HLD = F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, is_causal=True, scale=scale, enable_gqa=True)
        pieces.append(o_HLD[0].transpose(0, 1))
    return torch.cat(pieces)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Twin of `kernels.pointwise.rms_norm` and, through autograd, of its backward."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Twin of `kernels.pointwise.layer_norm` and, through autograd, of its backward."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rotate(x_TGRD: Tensor, cos: Tensor, sin: Tensor, scale: float, neighbours: bool) -> Tensor:
    """Twin of `kernels.pointwise.rotate`: each pair turned by its angle, to [G, T, R, D]."""
    size, (c, s) = 2 * cos.shape[1], (table[:, None, None] for table in (cos, sin))
    places = torch.arange(size)
    first, second = (places[0::2], places[1::2]) if neighbours else places.chunk(2)
    out = x_TGRD.clone()
    a, b = x_TGRD[..., first], x_TGRD[..., second]
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return scale * out.transpose(0, 1)


def activate(x: Tensor, act: Activation, gated: bool) -> Tensor:
    """Twin of `kernels.pointwise.activate`."""
    gate, up = x.chunk(2, -1) if gated else (x, torch.ones_like(x))
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def softmax(scores_GQRK: Tensor, seen: Tensor) -> Tensor:
    """Twin of `kernels.pointwise.softmax`."""
    unseen = torch.arange(scores_GQRK.shape[-1]) >= seen[:, None, None]
    return scores_GQRK.masked_fill(unseen, float("-inf")).softmax(-1)


def dropped(seed: int, step: int, sample: int, position: int, module: int, feature: int, p: float) -> bool:
    """Twin of `kernels.dropout.dropout_mask`, for one value."""
    key = 0
    for part in (seed, step, module):
        key = _splitmix64(key + part)
    key = _splitmix64(_splitmix64(key + sample) + position)
    draws = _splitmix64(key + (feature // 4) * 0x9E3779B97F4A7C15)
    lane = draws >> (16 * (feature % 4)) & 0xFFFF
    return (lane ^ 0x8000) < round(p * 65536)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
