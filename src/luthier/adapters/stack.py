"""Several LoRA adapters on one base model, of which one at a time, or none, is in its place."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.lora import PREFIX, Lora, LoraLinear, attach, put, take
from luthier.errors import AdapterError
from luthier.registry import nearest

Weighted = list[tuple[float, LoraLinear]]


class Stack:
    """`module` is the base model; adding or switching moves modules and copies no weight of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.adapters = module, dict[str, Lora]()
        self.active: str | None = None

    def add(self, name: str, settings: recipe.Adapter, tensors: dict[str, Tensor]) -> None:
        """Adds what `files.load` gave. Raises AdapterError, and changes nothing, if it is no LoRA, is not of this base,
        trains more than its updates, or the name is taken."""
        if name in self.adapters:
            raise AdapterError(f"there is an adapter '{name}'", fix="remove it first, or choose another name")
        if not isinstance(settings, recipe.Lora):
            raise AdapterError(f"'{name}' has {settings.title}, which cannot be switched", fix="load it by itself")
        if settings.bias != "none" or settings.modules_to_save or settings.new_tokens:
            raise AdapterError(f"'{name}' trains weights of the base too", fix="load it by itself")
        self.adapters[name] = self._attached(settings, tensors)

    def use(self, name: str | None) -> None:
        """Puts the adapter in place; None: the base model."""
        chosen = self._find(name) if name is not None else None
        if self.active is not None:
            take(self.module, self.adapters[self.active])
        if chosen is not None:
            put(self.module, chosen)
        self.active = name

    def remove(self, name: str) -> None:
        self._find(name)
        if self.active == name:
            self.use(None)
        del self.adapters[name]

    def combine(self, name: str, weights: dict[str, float], how: Literal["cat", "linear"] = "cat") -> None:
        """Adds the weighted combination of some adapters as one more.

        `cat`: the sum of their updates, each times its weight; the ranks add up. `linear`: A and B are summed apart,
        each times the square root of the weight (its sign on A), so that the rank stays and products of one adapter's A
        with another's B come in. Both as PEFT's `add_weighted_adapter`.

        Raises AdapterError for a DoRA, whose update is no product of A and B, and for `linear` with unequal ranks.
        """
        parts = [(weight, self._find(one)) for one, weight in weights.items()]
        if any(lora.settings.dora for _, lora in parts):
            raise AdapterError("a DoRA adapter cannot be combined", fix="merge it into the base")
        pairs = {layer: _PAIRS[how](_of(layer, parts), layer) for layer in _layers(parts)}
        self.add(name, _settings(pairs), _tensors(pairs))

    def _find(self, name: str) -> Lora:
        if name not in self.adapters:
            raise AdapterError(f"there is no adapter '{name}'", fix=nearest(name, list(self.adapters)))
        return self.adapters[name]

    def _attached(self, settings: recipe.Lora, tensors: dict[str, Tensor]) -> Lora:
        before = self.active
        self.use(None)
        try:
            lora = attach(self.module, settings, seed=0)
            take(self.module, lora)
            lora.load_state_dict(tensors)
        finally:
            self.use(before)
        return lora


def _layers(parts: list[tuple[float, Lora]]) -> list[str]:
    """Layers that any of the adapters has, each once."""
    return list(dict.fromkeys(name for _, lora in parts for name in lora.layers))


def _of(name: str, parts: list[tuple[float, Lora]]) -> Weighted:
    return [(weight, lora.layers[name]) for weight, lora in parts if name in lora.layers]


def _cat(parts: Weighted, name: str) -> tuple[Tensor, Tensor]:
    A = [layer.pair()[0] * (weight * layer.scale) for weight, layer in parts]
    return torch.cat(A), torch.cat([layer.pair()[1] for _, layer in parts], dim=1)


def _linear(parts: Weighted, name: str) -> tuple[Tensor, Tensor]:
    pairs, factors = [layer.pair() for _, layer in parts], [weight * layer.scale for weight, layer in parts]
    if len({len(A) for A, _ in pairs}) > 1:
        raise AdapterError(f"the adapters have different ranks at {name}", fix="combine them with `cat`")
    roots = [math.sqrt(abs(factor)) for factor in factors]
    A = torch.stack([A * math.copysign(root, f) for (A, _), root, f in zip(pairs, roots, factors, strict=True)])
    B = torch.stack([B * root for (_, B), root in zip(pairs, roots, strict=True)])
    return A.sum(dim=0), B.sum(dim=0)


_PAIRS = {"cat": _cat, "linear": _linear}


def _settings(pairs: dict[str, tuple[Tensor, Tensor]]) -> recipe.Lora:
    """Of these layers, each of its own rank, and a scale of 1."""
    ranks = {re.escape(name): len(A) for name, (A, _) in pairs.items()}
    most = max(ranks.values())
    fewer = {name: rank for name, rank in ranks.items() if rank < most}
    return recipe.Lora(rank=most, alpha=most, ranks=fewer, alphas=fewer, targets=list(pairs))


def _tensors(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A.detach(), f"{PREFIX}{name}.lora_B.weight": B.detach()}
    return tensors
