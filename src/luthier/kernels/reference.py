"""Plain twins of the kernels: what they compute, in the fewest lines, with autograd's own backward.

Tests hold every kernel to its twin, forward and gradients. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Twin of `kernels.loss.linear_cross_entropy`."""
    return F.cross_entropy(F.linear(hidden.float(), head.float()), targets, reduction="sum")


def segment_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """Twin of `kernels.attention.segment_attention`: softmax(scale · q kᵀ) v, causal, a segment at a time."""
    pieces = []
    for start, end in pairwise(bounds):
        q_HLD, k_HLD, v_HLD = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        o_HLD = F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, is_causal=True, scale=scale, enable_gqa=True)
        pieces.append(o_HLD[0].transpose(0, 1))
    return torch.cat(pieces)
