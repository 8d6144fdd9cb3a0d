"""LoRA: y = W x + (alpha / rank) · B A x, with W frozen (Hu et al., 2021, arXiv:2106.09685). Rank-stabilised, the
factor is alpha / √rank (Kalajdzievski, 2023, arXiv:2312.03732)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import recipe
from luthier.errors import AdapterError
from luthier.kernels.dropout import dropout_mask
from luthier.registry import nearest

_PREFIX = "base_model.model."  # PEFT's name of the model it wraps


@dataclass
class Noise:
    """What dropout depends on besides the module and the feature. One object is shared by all layers of a `Lora`.

    `samples` and `positions` are int64 [T]: for each token, its sample's identity and its place in the sample.
    Without them (evaluation, generation) nothing is dropped.
    """

    seed: int
    step: int = 0
    samples: Tensor | None = None
    positions: Tensor | None = None

    def at(self, rows: Tensor) -> Noise:
        """The same for some of the tokens."""
        if self.samples is None or self.positions is None:
            return self
        return replace(self, samples=self.samples[rows], positions=self.positions[rows])

    def mask(self, module: int, features: int, p: float, dtype: torch.dtype) -> Tensor | None:
        """[T, features] of 0 and 1/(1-p), or None where nothing is dropped."""
        if not p or self.samples is None or self.positions is None:
            return None
        return dropout_mask(self.seed, self.step, self.samples, self.positions, module, features, p, dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it.

    `base` is the nn.Linear it replaces; `A` [rank, in] and `B` [out, rank] are fp32 parameters, cast to the input's
    dtype for the products; `index` numbers the layer within its model and selects its dropout masks.
    """

    def __init__(self, base: nn.Linear, adapter: recipe.Adapter, *, index: int, noise: Noise) -> None:
        super().__init__()
        self.base, self.rank, self.dropout = base, adapter.rank, adapter.dropout
        self.scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
        self.index, self.noise, self.enabled = index, noise, True
        device = base.weight.device
        self.A = nn.Parameter(torch.zeros(self.rank, base.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, self.rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        # Generation and evaluation keep no gradient, and drop nothing.
        mask = self.noise.mask(self.index, x.shape[-1], self.dropout, x.dtype) if torch.is_grad_enabled() else None
        kept = x if mask is None else x * mask
        return y + F.linear(F.linear(kept, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def reset(self, generator: torch.Generator) -> None:
        """B = 0, so that training starts from the base model; A uniform as PEFT's default (Kaiming, a = √5)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()


class Lora:
    """All the LoRA layers of one model, by their dotted names, and the settings they were attached with."""

    def __init__(
        self, layers: dict[str, LoraLinear], adapter: recipe.Adapter, targets: list[str], noise: Noise
    ) -> None:
        self.layers, self.adapter, self.targets, self.noise = layers, adapter, targets, noise

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters under the names PEFT writes."""
        for name, layer in self.layers.items():
            yield f"{_PREFIX}{name}.lora_A.weight", layer.A
            yield f"{_PREFIX}{name}.lora_B.weight", layer.B

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    @property
    def count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors under the names PEFT writes. They share memory with the parameters."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in. Raises AdapterError, and changes nothing, unless names and shapes are exactly ours."""
        mine = self.state_dict()
        if odd := sorted(mine.keys() ^ state.keys()):
            which = "lacks" if odd[0] in mine else "has a layer that this model or its targets lack:"
            raise AdapterError(
                f"the adapter {which} {odd[0]} ({len(odd)} such)", fix="use the base model it was trained on"
            )
        for name, tensor in state.items():
            if tensor.shape != mine[name].shape:
                shapes = f"{list(tensor.shape)} where the model needs {list(mine[name].shape)}"
                raise AdapterError(f"{name} has shape {shapes}", fix="use the base model and rank it was trained with")
        for name, tensor in state.items():
            mine[name].copy_(tensor)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]


def attach(module: nn.Module, adapter: recipe.Adapter, seed: int) -> Lora:
    """Freezes `module` and puts a LoraLinear in the place of each linear layer that `adapter.targets` names.

    `all-linear` means every nn.Linear but the output head. A name in a list matches a layer's whole dotted name or its
    last parts, as in PEFT. The start values depend on `seed` and the layer's name alone.

    Raises AdapterError if a name matches no linear layer.
    """
    module.requires_grad_(False)
    noise = Noise(seed)
    layers = {}
    for index, name in enumerate(_matches(module, adapter.targets)):
        parent, _, child = name.rpartition(".")
        holder = module.get_submodule(parent)
        layer = LoraLinear(getattr(holder, child), adapter, index=index, noise=noise)
        layer.reset(_generator(seed, name))
        setattr(holder, child, layer)
        layers[name] = layer
    return Lora(layers, adapter, _targets(list(layers), linear_names(module)), noise)


def linear_names(module: nn.Module) -> list[str]:
    """Dotted names of the linear layers that can be adapted: all but the output head."""
    output = getattr(module, "get_output_embeddings", None)  # transformers' name for the head
    head = output() if callable(output) else None
    return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _matches(module: nn.Module, targets: str | list[str]) -> list[str]:
    names = linear_names(module)
    if targets == "all-linear":
        return names
    for target in targets:
        if not any(_names(target, name) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise AdapterError(
                f"no linear layer is called '{target}'", where="adapter.targets", fix=nearest(target, known)
            )
    return [name for name in names if any(_names(target, name) for target in targets)]


def _targets(adapted: list[str], frozen: list[str]) -> list[str]:
    """The shortest list of names that means `adapted` in PEFT's file: last parts, unless they match `frozen` too."""
    short = sorted({name.rpartition(".")[2] for name in adapted})
    unwanted = any(_names(target, name) for target in short for name in frozen)
    return adapted if unwanted else short


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
