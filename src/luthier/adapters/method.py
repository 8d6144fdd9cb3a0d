"""What every adapter method is to the rest: something attached to a frozen model, with trained tensors by name.

To add one: a function `(module, settings, seed) -> Adapter` with a line in METHODS, a function that reads its settings
back from a file with a line in READERS, and a row in `tests/contract/test_adapters.py`, which runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.errors import AdapterError
from luthier.kernels.dropout import dropout_mask, mask_key
from luthier.kernels.place import on_gpu
from luthier.registry import Registry

METHODS = Registry(
    "adapter method",
    {
        "lora": "luthier.adapters.lora:attach",
        "bottleneck": "luthier.adapters.bottleneck:attach",
        "none": "luthier.adapters.full:attach",
        "peft": "luthier.adapters.peft:attach",
    },
)

# By the `peft_type` of adapter_config.json: (config, tensors, path) -> the recipe's adapter section. `path` is for
# messages. Types that are not listed are PEFT's own, and read by OTHER.
READERS = Registry(
    "adapter file",
    {
        "LORA": "luthier.adapters.lora_config:read",
        "LUTHIER_BOTTLENECK": "luthier.adapters.bottleneck:read",
        "LUTHIER_FULL": "luthier.adapters.full:read",
    },
)
OTHER = "luthier.adapters.peft:read"


@dataclass
class Noise:
    """What dropout depends on besides the module and the feature. One object is shared by all layers of an adapter.

    `samples` and `positions` are int64 [T]: for each token, its sample's identity and its place in the sample.
    Without them (evaluation, generation) nothing is dropped. `key`, int64 [1], is the `mask_key` of seed and step where
    a GPU reads it: what is recorded there takes the step from it.
    """

    seed: int
    step: int = 0
    samples: Tensor | None = None
    positions: Tensor | None = None
    key: Tensor | None = None

    def at(self, rows: Tensor) -> Noise:
        """The same for some of the tokens."""
        if self.samples is None or self.positions is None:
            return self
        return replace(self, samples=self.samples[rows], positions=self.positions[rows])

    def drop(self, x: Tensor, module: int, p: float) -> Tensor:
        """`x` [..., features] with its mask applied, in whatever shape its T tokens come; `x` itself where nothing is
        dropped: generation and evaluation keep no gradient.

        Raises AdapterError where a layer sees only some of the tokens, which then cannot be told apart.
        """
        if not p or self.samples is None or self.positions is None or not torch.is_grad_enabled():
            return x
        tokens = len(self.samples)
        if tokens * x.shape[-1] != x.numel():
            seen = f"an adapted layer sees {x.numel() // x.shape[-1]} of {tokens} tokens"
            raise AdapterError(f"{seen}, so its dropout has no fixed masks", fix="set adapter.dropout=0")
        return self.dropped(x, module, p)

    def dropped(self, x: Tensor, module: int, p: float) -> Tensor:
        """`x` [..., features] of these tokens, each value times 0 or 1/(1-p)."""
        assert self.samples is not None
        assert self.positions is not None
        if on_gpu(x) and (x.is_meta or find_spec("triton")):
            drop = import_module("luthier.kernels.drop").drop
            key = x.new_full((1,), mask_key(self.seed, self.step), dtype=torch.int64) if self.key is None else self.key
            return drop(x, key, self.samples, self.positions, module, p)  # type: ignore[no-any-return]
        mask = dropout_mask(self.seed, self.step, self.samples, self.positions, module, x.shape[-1], p, x.dtype)
        return x * mask.view(x.shape)


class Adapter(Protocol):
    """What is trained of a model. Its tensors have one name each, the same in memory, in checkpoints and on disk."""

    settings: Any
    """The recipe's `adapter` section."""
    noise: Noise

    @property
    def dropout(self) -> float:
        """The largest share of inputs that is dropped in training."""

    @property
    def foldable(self) -> bool:
        """Whether our decoder block can compute it: plain low-rank updates of linear layers, and nothing else."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters under the names that go to disk, in an order that is always the same."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that make the base model the tuned one. They share memory with the parameters."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in. Raises AdapterError, and changes nothing, unless names and shapes are exactly ours."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model is the base model."""

    def config(self) -> dict[str, Any]:
        """What adapter_config.json says, JSON values under PEFT's keys, so that it can be attached again; `peft_type`
        is among them, the base model and its revision are not."""


def attach(module: nn.Module, settings: recipe.Adapter, seed: int, **options: Any) -> Adapter:
    """Freezes `module` and attaches what `settings` asks for. Start values depend on `seed` and names alone.
    `options` are a method's own, such as LoRA's `original`.

    Raises AdapterError if the model lacks what the settings name.
    """
    adapter: Adapter = METHODS.get(settings.kind)(module, settings, seed, **options)
    return adapter
