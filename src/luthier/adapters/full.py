"""Full fine-tuning: the model's own weights are trained, all of them or those of its last blocks.

They are kept in float32 and cast to the model's dtype where they are used, so that small updates are not lost
(Micikevicius et al. 2018, arXiv:1710.03740, section 3.1). A trained value takes 16 bytes with AdamW: itself, its
gradient and two moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.blocks import blocks
from luthier.adapters.method import Noise
from luthier.adapters.tensors import Masters, copy_in, places
from luthier.errors import AdapterError

KIND = "LUTHIER_FULL"


class Full:
    """The trained weights of a model, under the model's own names."""

    dropout = 0.0
    foldable = False

    def __init__(self, masters: Masters, settings: recipe.Full, noise: Noise) -> None:
        self.masters, self.settings, self.noise = masters, settings, noise

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.masters.parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.masters.parameters.values()

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors in float32, under the names that the model's own checkpoint has. They share memory with
        the parameters."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_in(self.state_dict(), state)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model is the base model: see `Masters.disabled` for the memory that takes."""
        return self.masters.disabled()

    def config(self) -> dict[str, Any]:
        """PEFT has no such method: its readers refuse the file by this type."""
        return {"peft_type": KIND, "blocks": self.settings.blocks}


def attach(module: nn.Module, settings: recipe.Full, seed: int) -> Full:
    """Makes the weights that `settings` means trainable, and freezes all others.

    Raises AdapterError if one of them is quantised, or the model has no blocks to count.
    """
    module.requires_grad_(False)
    chosen = None if settings.blocks == "all" else set(_last(module, settings.blocks))
    _refuse_quantised(module, chosen)
    weights = {name: where for name, where in places(module).items() if chosen is None or name in chosen}
    return Full(Masters(weights), settings, Noise(seed))


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> recipe.Full:
    """The settings that adapter_config.json means; `path` is for messages."""
    count = config.get("blocks")
    if count != "all" and not (isinstance(count, int) and count > 0):
        raise AdapterError("'blocks' should be 'all' or a positive number", where=str(path), fix="restore the file")
    return recipe.Full(kind="none", blocks=count)


def _last(module: nn.Module, count: int) -> list[str]:
    """Names of the weights of the last `count` blocks, of the final norm and of an untied head."""
    name, layers = blocks(module)
    if count > len(layers):
        raise AdapterError(f"the model has {len(layers)} blocks, not {count}", where="adapter.blocks", fix="lower it")
    last = tuple(f"{name}.{index}." for index in range(len(layers) - count, len(layers)))
    parts = (*last, *(f"{norm}." for norm in _final_norms(module, name)), *_untied_head(module))
    return [weight for weight in places(module) if weight.startswith(parts)]


def _final_norms(module: nn.Module, blocks_name: str) -> list[str]:
    """Norms beside the list of blocks: modules of vectors alone. The norm of the embedding is not a final one."""
    parent = blocks_name.rpartition(".")[0]
    children = module.get_submodule(parent).named_children()
    prefix = f"{parent}." if parent else ""
    return [prefix + name for name, child in children if "emb" not in name and _is_norm(child)]


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return bool(weights) and all(weight.dim() == 1 for weight in weights)


def _untied_head(module: nn.Module) -> list[str]:
    head, embedding = _ask(module, "get_output_embeddings"), _ask(module, "get_input_embeddings")
    if head is None or (embedding is not None and head.weight is embedding.weight):
        return []
    return [f"{name}." for name, child in module.named_modules() if child is head]


def _ask(module: nn.Module, method: str) -> Any:
    ask = getattr(module, method, None)  # transformers' names
    return ask() if callable(ask) else None


def _refuse_quantised(module: nn.Module, chosen: set[str] | None) -> None:
    for prefix, holder in module.named_modules():
        for attribute, tensor in {**holder._parameters, **holder._buffers}.items():
            name = f"{prefix}.{attribute}"
            packed = tensor is not None and tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
            if packed and (chosen is None or any(one.startswith(f"{prefix}.") for one in chosen)):
                raise AdapterError(
                    f"{name} is quantised, and packed weights cannot be trained",
                    where="adapter.kind",
                    fix="leave model.quantize out, or train an adapter beside the weights (kind: lora)",
                )
