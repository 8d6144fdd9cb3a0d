"""LoRA: y = W x + s · B A x, with W frozen and s = alpha / rank (Hu et al., 2021, arXiv:2106.09685). Rank-stabilised,
s = alpha / √rank (Kalajdzievski, 2023, arXiv:2312.03732)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters import targets, whole
from luthier.adapters.linears import dense_weight, features, linear_names, multiplies
from luthier.adapters.method import Noise
from luthier.adapters.start import Original, start
from luthier.adapters.whole import Whole
from luthier.errors import AdapterError

PREFIX = "base_model.model."  # PEFT's name of the model it wraps


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it.

    `base` is the layer it replaces; `A` [rank, in] and `B` [out, rank] are fp32 parameters, cast to the input's dtype
    for the products; `start_A` and `start_B` are what they began with if the update is the difference from that;
    `index` numbers the layer within its model and selects its dropout masks.
    """

    base: nn.Linear  # or what `linears` says is as good
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float, index: int, noise: Noise) -> None:
        super().__init__()
        self.base, self.rank, self.scale, self.dropout = cast(nn.Linear, base), rank, scale, dropout
        self.index, self.noise, self.enabled = index, noise, True
        (inside, outside), device = features(base), self.base.weight.device
        self.A = nn.Parameter(torch.zeros(rank, inside, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(outside, rank, dtype=torch.float32, device=device))
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        y: Tensor = self.base(x)
        return y + self.update(self.noise.drop(x, self.index, self.dropout)) if self.enabled else y

    def update(self, x: Tensor) -> Tensor:
        """What is added to W x."""
        A, B = self.pair()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * self.scale

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the update; with a start subtracted, which doubles the rank: [A; A₀] and [B, -B₀]."""
        if self.start_A is None or self.start_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.start_A]), torch.cat([self.B, -self.start_B], dim=1)

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, by the last part of PEFT's name."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def state(self) -> dict[str, Tensor]:
        """What makes the base layer the tuned one."""
        A, B = self.pair()
        return self.tensors() | {"lora_A.weight": A, "lora_B.weight": B}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave; or, where there is a start, A and B alone, which then began there."""
        A, B = state["lora_A.weight"], state["lora_B.weight"]
        self.A.data.copy_(A[: self.rank])
        self.B.data.copy_(B[:, : self.rank])
        if self.start_A is not None and len(A) > self.rank:
            self.start_A.copy_(A[self.rank :])
        if self.start_B is not None and B.shape[1] > self.rank:
            self.start_B.copy_(-B[:, self.rank :])

    def began(self) -> None:
        """Called once A and B have their start values."""

    @torch.no_grad()
    def merged(self) -> Tensor:
        """fp32 [out, in]: the weight of a linear layer that does the same."""
        A, B = self.pair()
        return torch.addmm(dense_weight(self.base).float(), B, A, alpha=self.scale)


class Lora:
    """All the LoRA layers of one model, by their dotted names, and the settings they were attached with. `targets` are
    names that mean these layers and no others of the model; `whole` is what is trained beside them."""

    whole: Whole | None = None

    def __init__(self, layers: dict[str, LoraLinear], settings: recipe.Lora, targets: list[str], noise: Noise) -> None:
        self.layers, self.settings, self.targets, self.noise = layers, settings, targets, noise

    @property
    def dropout(self) -> float:
        """The largest share of inputs that any layer drops in training."""
        return max((layer.dropout for layer in self.layers.values()), default=0.0)

    @property
    def plain(self) -> bool:
        """Whether it is low-rank updates beside linear layers, and nothing else."""
        layers = self.layers.values()
        return self.whole is None and all(type(layer) is LoraLinear and layer.start_A is None for layer in layers)

    @property
    def foldable(self) -> bool:
        """Whether our decoder block can compute it: plain low-rank updates of layers that multiply, nothing else."""
        return self.plain and all(multiplies(layer.base) for layer in self.layers.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters under the names PEFT writes."""
        for name, layer in self.layers.items():
            for part, parameter in layer.tensors().items():
                yield f"{PREFIX}{name}.{part}", parameter
        if self.whole is not None:
            yield from self.whole.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """What makes the base model the tuned one, under the names PEFT writes. It shares memory with the parameters,
        but where a start is subtracted: then PEFT, too, finds all it needs, in twice the rank."""
        beside = {} if self.whole is None else {name: p.detach() for name, p in self.whole.named_parameters()}
        return {
            f"{PREFIX}{name}.{part}": tensor.detach()
            for name, layer in self.layers.items()
            for part, tensor in layer.state().items()
        } | beside

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in. Raises AdapterError, and changes nothing, unless names and shapes are exactly ours."""
        mine, trained = self.state_dict(), dict(self.named_parameters())
        if odd := sorted(mine.keys() ^ state.keys()):
            which = "lacks" if odd[0] in mine else "has a layer that this model or its targets lack:"
            raise AdapterError(
                f"the adapter {which} {odd[0]} ({len(odd)} such)", fix="use the base model it was trained on"
            )
        for name, tensor in state.items():
            if tensor.shape not in (mine[name].shape, trained[name].shape):
                shapes = f"{list(tensor.shape)} where the model needs {list(mine[name].shape)}"
                raise AdapterError(f"{name} has shape {shapes}", fix="use the base model and rank it was trained with")
        for name, layer in self.layers.items():
            layer.load({part: state[f"{PREFIX}{name}.{part}"] for part in layer.tensors()})
        for name, parameter in self.whole.named_parameters() if self.whole is not None else ():
            parameter.data.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.enabled = False
            with nullcontext() if self.whole is None else self.whole.disabled():
                yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]

    def config(self) -> dict[str, Any]:
        """PEFT's LoraConfig, see `lora_config`."""
        from luthier.adapters.lora_config import write

        return write(self)


def attach(
    module: nn.Module,
    settings: recipe.Lora,
    seed: int,
    original: Original | None = None,
    tokens: Sequence[int] | None = None,
) -> Lora:
    """Freezes `module` and puts a LoraLinear in the place of each linear layer that `settings.targets` names.

    `all-linear` means every linear layer but the output head. The start values depend on `seed` and the layer's name
    alone, and with some inits on its weight: `original` gives LoftQ what that was before it was quantised. `tokens` are
    the ids of `settings.new_tokens`.

    Raises AdapterError if a name matches no linear layer, or a start cannot be had.
    """
    module.requires_grad_(False)
    names = targets.select(linear_names(module), settings.targets)
    targets.check_patterns(settings.ranks, names, "adapter.ranks")
    targets.check_patterns(settings.alphas, names, "adapter.alphas")
    others = {name for name, _ in module.named_modules()}.difference(names)
    noise = Noise(seed)
    layers = {}
    for index, name in enumerate(names):
        layer = _layer(module.get_submodule(name), settings, name, index=index, noise=noise)
        start(layer, name, settings.init, generator(seed, name), original)
        layer.began()
        layers[name] = layer
    lora = Lora(layers, settings, targets.shortest(names, others), noise)
    lora.whole = whole.attach(module, settings, names, tokens)
    put(module, lora)
    return lora


def put(module: nn.Module, lora: Lora) -> None:
    """Puts the layers of `lora` in the place of their bases."""
    for name, layer in lora.layers.items():
        module.set_submodule(name, layer)


def take(module: nn.Module, lora: Lora) -> None:
    """Undoes `put`."""
    for name, layer in lora.layers.items():
        module.set_submodule(name, layer.base)


def _layer(base: nn.Module, settings: recipe.Lora, name: str, *, index: int, noise: Noise) -> LoraLinear:
    from luthier.adapters.dora import DoraLinear

    rank = targets.value(settings.ranks, name, settings.rank)
    alpha = targets.value(settings.alphas, name, settings.alpha)
    scale = alpha / (math.sqrt(rank) if settings.rslora else rank)
    kind = DoraLinear if settings.dora else LoraLinear
    return kind(base, rank=rank, scale=scale, dropout=settings.dropout, index=index, noise=noise)


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
