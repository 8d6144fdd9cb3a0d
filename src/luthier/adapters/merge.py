"""Updates folded into the weights of the base: for good, as an export wants it, or for a while, to answer without the
adapter's extra products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from luthier.adapters.linears import set_dense_weight
from luthier.adapters.lora import Lora, put, take


def merge(module: nn.Module, lora: Lora) -> dict[str, float]:
    """Makes of `module` an ordinary model that computes what it did with `lora`.

    Returns, for each layer, what rounding to the weight's dtype or quantising it again lost: the norm of the difference
    as a share of the weight's norm.
    """
    losses = {name: set_dense_weight(layer.base, layer.merged()) for name, layer in lora.layers.items()}
    take(module, lora)
    return losses


@contextmanager
def merged(module: nn.Module, lora: Lora) -> Iterator[dict[str, float]]:
    """Inside, what `merge` makes; then layers and weights are again what they were, bit for bit. Takes a copy of the
    adapted weights."""
    kept = {
        name: {key: tensor.clone() for key, tensor in layer.base.state_dict().items()}
        for name, layer in lora.layers.items()
    }
    try:
        yield merge(module, lora)
    finally:
        put(module, lora)
        for name, layer in lora.layers.items():
            layer.base.load_state_dict(kept[name])
