"""Bottleneck adapters: x + W₂ a(W₁ x), after attention and after the MLP of each block, before the residual is added
(Houlsby et al. 2019, arXiv:1902.00751, figure 2). The norms stay frozen, which the paper trains too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.blocks import blocks
from luthier.adapters.linears import features, is_linear
from luthier.adapters.lora import generator
from luthier.adapters.method import Noise
from luthier.adapters.tensors import copy_in
from luthier.errors import AdapterError

KIND = "LUTHIER_BOTTLENECK"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

# What the families of transformers call the parts of a block (a piece of the name), and their last linear layers.
_ATTENTION = ("att", "mixer", "mamba", "temporal")
_MLP = ("mlp", "ffn", "feed_forward", "ffwd", "ff", "moe", "output")
_OUT = {
    "o_proj",
    "out_proj",
    "c_proj",
    "wo",
    "dense",
    "down_proj",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "w2",
    "lin2",
    "proj_out",
    "output_linear",
}


class BottleneckLayer(nn.Module):
    """x + W₂ a(W₁ x + b₁) + b₂ with fp32 parameters, cast to the dtype of `x`; `index` selects its dropout masks."""

    def __init__(self, width: int, settings: recipe.Bottleneck, *, index: int, noise: Noise, device: Any) -> None:
        super().__init__()
        self.activation, self.dropout = _ACTIVATIONS[settings.activation], settings.dropout
        self.index, self.noise, self.enabled = index, noise, True
        place = {"dtype": torch.float32, "device": device}
        self.down = nn.ParameterList([torch.zeros(settings.size, width, **place), torch.zeros(settings.size, **place)])
        self.up = nn.ParameterList([torch.zeros(width, settings.size, **place), torch.zeros(width, **place)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to the same, in the dtype of `x`."""
        if not self.enabled:
            return x
        inner = self.activation(_linear(self.noise.drop(x, self.index, self.dropout), self.down))
        return x + _linear(inner, self.up)

    def reset(self, generator: torch.Generator) -> None:
        """W₂ = 0, so that training starts from the base model; W₁ uniform as nn.Linear's."""
        weight = self.down[0]
        bound = 1 / math.sqrt(weight.shape[1])
        with torch.no_grad():
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def tensors(self) -> dict[str, nn.Parameter]:
        (W1, b1), (W2, b2) = self.down, self.up
        return {"down.weight": W1, "down.bias": b1, "up.weight": W2, "up.bias": b2}


def _linear(x: Tensor, layer: nn.ParameterList) -> Tensor:
    weight, bias = layer
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


class Bottlenecks:
    """The bottlenecks of one model, by the dotted name of the module that each comes after."""

    foldable = False

    def __init__(self, layers: dict[str, BottleneckLayer], settings: recipe.Bottleneck, noise: Noise) -> None:
        self.layers, self.settings, self.noise = layers, settings, noise

    @property
    def dropout(self) -> float:
        return self.settings.dropout

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            for part, parameter in layer.tensors().items():
                yield f"{name}.bottleneck.{part}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_in(self.state_dict(), state)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = [layer.enabled for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
                layer.enabled = enabled

    def config(self) -> dict[str, Any]:
        """PEFT has no such method: its readers refuse the file by this type."""
        settings = self.settings
        return {
            "peft_type": KIND,
            "size": settings.size,
            "activation": settings.activation,
            "dropout": settings.dropout,
        }


def attach(module: nn.Module, settings: recipe.Bottleneck, seed: int) -> Bottlenecks:
    """Freezes `module` and lets the output of attention and of the MLP of each block go through a bottleneck.

    The start values depend on `seed` and the name of the place alone. Raises AdapterError if a block has neither.
    """
    module.requires_grad_(False)
    noise, layers = Noise(seed), {}
    for index, name in enumerate(_places(module)):
        place = module.get_submodule(name)
        device = next(place.parameters()).device
        layer = BottleneckLayer(_width(module, place), settings, index=index, noise=noise, device=device)
        layer.reset(generator(seed, name))
        place.add_module("bottleneck", layer)
        # A hook leaves the module itself, its names and its weights as they are.
        place.register_forward_hook(_through(layer))
        layers[name] = layer
    return Bottlenecks(layers, settings, noise)


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> recipe.Bottleneck:
    """The settings that adapter_config.json means; `path` is for messages."""
    chosen = {key: config[key] for key in ("size", "activation", "dropout") if key in config}
    try:
        return recipe.Bottleneck(kind="bottleneck", **chosen)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise AdapterError(
            f"'{key}' cannot be {config[str(key)]!r}", where=str(path), fix="restore the file"
        ) from error


def _through(layer: BottleneckLayer) -> Callable[[nn.Module, Any, Any], Any]:
    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        # Some mixtures of experts give the choices of their router beside the result.
        return (layer(output[0]), *output[1:]) if isinstance(output, tuple) else layer(output)

    return after


def _places(module: nn.Module) -> list[str]:
    """Dotted names of the modules whose output is added to the residual stream, in the order of the model."""
    name, layers = blocks(module)
    found = []
    for index, block in enumerate(layers):
        inside = _attention(block) + _mlp(block)
        if not inside:
            parts = ", ".join(part for part, _ in block.named_children())
            raise AdapterError(
                f"no attention or MLP is recognised in {name}.{index} ({parts})",
                where="adapter.kind",
                fix="train a LoRA instead (kind: lora)",
            )
        found += [f"{name}.{index}.{place}" for place in inside]
    return found


def _attention(block: nn.Module) -> list[str]:
    parts = [name for name, _ in block.named_children() if any(word in name for word in _ATTENTION)]
    return [place for name in parts for place in _outputs(block, name)[-1:]]


def _mlp(block: nn.Module) -> list[str]:
    """The MLP's last linear layer; of a mixture of experts, the whole of it."""
    for name, part in block.named_children():
        if any(word in name for word in _MLP) and not _is_norm(part):
            inner = [inside for inside, _ in part.named_modules()]
            return [name] if any("expert" in one for one in inner) else _outputs(block, name)[-1:]
    return [name for name, part in block.named_children() if name in _OUT and is_linear(part)]


def _outputs(block: nn.Module, part: str) -> list[str]:
    """Dotted names within `block` of the last linear layers of its part."""
    layers = block.get_submodule(part).named_modules(prefix=part)
    return [name for name, layer in layers if is_linear(layer) and name.rpartition(".")[2] in _OUT]


def _is_norm(part: nn.Module) -> bool:
    return all(weight.dim() == 1 for weight in part.parameters())


def _width(module: Any, place: nn.Module) -> int:
    if is_linear(place):
        return features(place)[1]
    width: int = module.config.get_text_config().hidden_size
    return width
