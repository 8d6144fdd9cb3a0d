"""The shapes that pass between the loop and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.adapters.method import Adapter
from luthier.data.stream import Micro
from luthier.model.pack import Coming

Event = dict[str, Any]


class Model(Protocol):
    """What the loop needs of a `CausalModel`."""

    adapter: Adapter | None
    dtype: torch.dtype  # of the products

    def ready(self, micro: Micro, /) -> Micro:
        """The same for the other methods, which have less to do with it: made while a GPU works on another one."""

    def loss(self, micro: Micro, /) -> Tensor:
        """fp32 scalar: the sum of the losses of `micro.targets`, differentiable in the adapter."""

    def accumulate(self, micro: Micro, scale: float, /) -> Tensor:
        """Adds the gradient of that loss times `scale` to the `.grad` of the adapter's parameters; returns the loss,
        without gradient."""

    def expect(self, coming: Callable[[], Coming], /) -> None:
        """Tells what micro-batches are to come, so that it can make ready for them."""

    def keep_less(self, free: Collection[str], /) -> bool:
        """Takes less memory for the same gradients, in more time, if it can by what is `free` of the recipe's settings;
        returns whether it could."""


@dataclass(frozen=True)
class Step:
    """What one update did. `step` counts from 1; tokens, targets, bytes and micro-batches are over all processes."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    targets: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    micro_batches: int
