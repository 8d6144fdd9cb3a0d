"""Segment-isolating attention for transformers' modules, through its public attention interface.

A module whose attention is `NAME` (known to transformers once this is imported) takes `bounds` as a keyword of its
forward: the tokens of one row are then independent causal segments, and no mask is built. Without `bounds` it is plain
SDPA, so the same module generates with a cache and padding masks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.errors import ModelError
from luthier.kernels.attention import segment_attention

NAME = "luthier_packed"


def packed_arguments(positions: Tensor, bounds: tuple[int, ...]) -> dict[str, Any]:
    """Keywords for the forward of a module under `NAME`, beside its `input_ids` [1, T]."""
    # A mask with four dimensions is taken for one that is ready, so transformers builds none.
    ready = positions.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    return {"position_ids": positions[None], "attention_mask": ready, "bounds": bounds, "use_cache": False}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hk, T, D] to [1, T, Hq, D] and no weights."""
    bounds = options.pop("bounds", None)
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    if window is not None and max(e - s for s, e in pairwise(bounds)) > window:
        raise ModelError(
            f"a row is longer than the model's attention window of {window} tokens", fix="lower data.length"
        )
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return segment_attention(q_THD, k_THD, v_THD, bounds, scale).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
