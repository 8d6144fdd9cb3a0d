"""What a training step of our own decoder block takes on a CPU, from a config's sizes: pure arithmetic, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.adapters.targets import check_patterns, select, value
from luthier.errors import ModelError
from luthier.kernels.sizes import power_of_2
from luthier.recipe import Lora

_TILE, _KEPT = 128, 512  # as BLOCK and KEEP of kernels/attention.py, which needs torch


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, read from its config. `linear` counts the weights of a layer's linear modules."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def linear(self) -> int:
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.linear + 2 * self.hidden) + embeddings + self.hidden

    def adapter(self, settings: Lora) -> int:
        """Trainable parameters of plain LoRA. Raises AdapterError if its targets, ranks or alphas match no layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "self_attn.q_proj": self.hidden + q,
            "self_attn.k_proj": self.hidden + kv,
            "self_attn.v_proj": self.hidden + kv,
            "self_attn.o_proj": q + self.hidden,
            "mlp.gate_proj": self.hidden + self.intermediate,
            "mlp.up_proj": self.hidden + self.intermediate,
            "mlp.down_proj": self.intermediate + self.hidden,
        }
        named = {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in sizes.items()}
        chosen = select(list(named), settings.targets)
        check_patterns(settings.ranks, chosen, "adapter.ranks")
        check_patterns(settings.alphas, chosen, "adapter.alphas")
        return sum(value(settings.ranks, name, settings.rank) * named[name] for name in chosen)

    def token_bytes(self, size: int, longest: int, rank: int, whole: int = 0, gate_up: int = 0) -> int:
        """Bytes a token of a micro-batch holds at the peak, in values of `size` bytes.

        A layer keeps x, q, k, v, attention's output and probabilities, the middle residual, gate|up, and the adapters'
        inner products. The first `whole` layers keep x alone, `gate_up` more all but gate|up, and make the rest again
        one at a time. The backward pass of one layer adds about as much again, once.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        probabilities = math.ceil(self.heads * kept_keys(longest))
        layer = size * (2 * self.hidden + 2 * q + 2 * kv + 2 * self.intermediate + 7 * rank + probabilities) + 16
        backward = size * (4 * self.hidden + 4 * self.intermediate + 2 * self.heads * min(longest, _TILE))
        product = size * 2 * (self.intermediate + rank)
        kept, moments = 0, []
        for count, again in (
            (whole, layer - size * self.hidden),
            (gate_up, product),
            (self.layers - whole - gate_up, 0),
        ):
            kept += count * (layer - again)
            moments.append(kept + again if count else 0)
        return max(moments) + backward

    def token_flops(self, adapter: int, mean: float, supervised: float, whole: int = 0, gate_up: int = 0) -> float:
        """Forward and backward FLOPs of a token: 4 per frozen weight, 6 per adapter weight, attention 2·d·s forward and
        2.5 times that backward (causal half), and the head on the supervised share; a third of a layer's once more
        where it makes `whole` layers again, and gate|up's two products where it makes these."""
        attention = 3.5 * 2 * self.heads * self.head_dim * mean * self.layers
        layers = 4 * self.linear * self.layers + 6 * adapter + attention
        head = 4 * self.hidden * self.vocab * supervised
        again = whole / self.layers * layers / 3 + gate_up * 4 * self.hidden * self.intermediate
        return layers + head + again


def blocks_of(recompute: bool | int, blocks: int) -> int:
    """How many of so many blocks, the first ones, `run.recompute` means: True all, False none."""
    return blocks if recompute is True else min(int(recompute), blocks)


def padded_tokens(count: int) -> int:
    """Tokens that a micro-batch of `count` is padded to where its step is recorded: see `pack.shape`."""
    step = 512 if count <= 512 else max(1024, power_of_2(count) // 16)
    return -(-count // step) * step


def kept_keys(longest: int) -> float:
    """Probabilities a head that a token of so long a row keeps, on average: a tile of rows sees the keys up to its last
    row, and is computed again where these are many (kernels/attention.py)."""
    tiles = [(low, min(low + _TILE, longest)) for low in range(0, longest, _TILE)]
    return sum((end - low) * end for low, end in tiles if end <= _KEPT) / longest


def shape(config: dict[str, Any]) -> Shape:
    """The sizes in a Llama-family `config.json`. Raises ModelError naming the architecture if it is another one."""
    try:
        heads = int(config["num_attention_heads"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError) as error:
        kind = config.get("model_type", "unknown")
        raise ModelError(f"the config of a '{kind}' model lacks {error}", fix="fetch the model again") from error
