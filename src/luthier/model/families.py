"""Where the parts of a decoder are found, for the families that our own block can run. A family is a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names inside a transformers module: of the decoder's own parts, then of a layer's.

    The block they describe: x += out(attention(rotary(qkv(norm(x))))); x += down(act(gate(norm(x))) · up(norm(x))),
    with RMS norms, half-split rotary embedding and silu. Linear layers may have biases.
    """

    layers: str = "layers"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    eps: str = "rms_norm_eps"  # of the config


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family()}


def find(config: Any) -> Family | None:
    """The family of a transformers config, or None if our block does not compute what that model does."""
    family = FAMILIES.get(config.model_type)
    if family is None or config.hidden_act != "silu":
        return None
    return family


def window(config: Any) -> int | None:
    """The most tokens a row may have before some layer stops seeing its start; None: all of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
