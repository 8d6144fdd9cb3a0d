"""The LoRA updates of all layers as the products take them, and the gradients that backward passes leave.

Each is one piece of memory in the dtype of the products: every A, then every B, in the order of the layers. So
`train/optim.py` lays out the parameters and their gradients, too: one operation takes the values, and one adds the
gradients of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.adapters.lora import LoraLinear
from luthier.errors import ModelError
from luthier.model.merged import Matrices, MergedLinear


class Updates:
    """The updates of all adapted layers among `linears`."""

    def __init__(self, linears: Sequence[MergedLinear]) -> None:
        self.linears = linears
        self.parameters: list[Tensor] = []  # of the layers whose adapter is enabled
        self.layout = 0  # how often places were given
        self._live: list[LoraLinear] = []
        self._trained = False
        self._sources, self._totals = _Neighbours(), _Neighbours()

    @cached_property
    def values(self) -> Tensor:
        return self._memory()

    @cached_property
    def gradients(self) -> Tensor:
        return self._memory()

    def refresh(self, linears: Sequence[MergedLinear]) -> None:
        """Takes the present values of the layers of `linears` whose adapter is enabled."""
        live = [layer for linear in linears for layer, _ in linear.adapted if layer.enabled]
        trained = torch.is_grad_enabled()
        if live != self._live or trained > self._trained:
            with torch.inference_mode(False):  # what is made in that mode can be written to in no other
                self._lay_out([linear for linear in linears if linear.choose()], live, trained)
            self._live, self._trained = live, trained  # not before: memory may have run out
        if live:
            sources = self._sources.joined(self.parameters)
            places = _cut(self.values, [source.shape for source in sources]) if sources else self._places
            with torch.no_grad():
                torch._foreach_copy_(places, sources or self.parameters)

    def check(self, layout: int) -> None:
        """Raises ModelError where a forward pass with other adapters came since that of this `layout`."""
        if layout != self.layout:
            what = "the model ran with other adapters enabled before this loss went backward"
            raise ModelError(what, fix="call backward first, or build the model with run.kernels=reference")

    def collected(self, x: Tensor) -> Tensor:
        """x, the input of the first of these layers, as one that gradients flow to."""
        # Where autograd gets none of the gradients, one parameter is enough to say that there are some.
        parameters = self.parameters[: 1 if self._joined_gradients() else None]
        return _Collect.apply(x, self, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def hand_over(self, wanted: int) -> list[Tensor | None]:
        """The gradients of the `wanted` first parameters for autograd to add; None where they were added to `.grad`
        here: where all `.grad` lie side by side, or did so when `collected` was asked."""
        totals = self._joined_gradients()
        for total, part in zip(totals, _cut(self.gradients, [total.shape for total in totals]), strict=True):
            total.add_(part)
        if totals:
            return [None] * wanted
        parts = zip(_cut(self.gradients, [p.shape for p in self.parameters]), self.parameters, strict=True)
        found = [part.to(p.dtype, copy=True) for part, p in parts]
        if wanted == len(found):
            return [*found]
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [None] * wanted

    def _joined_gradients(self) -> list[Tensor]:
        return self._totals.joined([parameter.grad for parameter in self.parameters])

    def _memory(self) -> Tensor:
        size = sum(p.numel() for linear in self.linears for layer, _ in linear.adapted for p in (layer.A, layer.B))
        first = self.linears[0]
        return torch.empty(size, dtype=first.dtype, device=first.bases[0].weight.device)

    def _lay_out(self, linears: Sequence[MergedLinear], live: Sequence[LoraLinear], trained: bool) -> None:
        """Gives each product its places."""
        self.layout += 1
        self.parameters = [*(layer.A for layer in live), *(layer.B for layer in live)]
        self._places = _cut(self.values, [p.shape for p in self.parameters])
        for linear, values in zip(linears, _matrices(self.values, linears), strict=True):
            linear.values = values
        if trained:
            for linear, gradients in zip(linears, _matrices(self.gradients, linears), strict=True):
                linear.gradients = gradients


class _Collect(torch.autograd.Function):
    """Runs backward when all layers have, and hands their adapters' gradients over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, updates: Updates, *parameters: Tensor) -> Tensor:
        ctx.updates = updates
        ctx.set_materialize_grads(False)  # the first of these layers gives none for x
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.updates.hand_over(len(ctx.needs_input_grad) - 2)


class _Neighbours:
    """Tensors that lie side by side in memory, as one; remembered until one of them lies elsewhere."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._joined: list[Tensor] = []

    def joined(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """As 1-D tensors, in their order. Empty where no two are neighbours, or one is missing."""
        places = [(id(tensor), 0 if tensor is None else tensor.data_ptr()) for tensor in tensors]
        if places != self._places:
            self._places, self._joined = places, _join(tensors)
        return self._joined


def _join(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        if tensor is None or not tensor.is_contiguous():
            return []
        if runs and _follows(tensor, runs[-1][-1]):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    sizes = [sum(tensor.numel() for tensor in run) for run in runs]
    joined = [run[0].detach().as_strided((size,), (1,)) for run, size in zip(runs, sizes, strict=True)]
    return joined if len(joined) < len(tensors) else []


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether `one` begins in memory where `other` ends."""
    together = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return together and one.storage_offset() == other.storage_offset() + other.numel()


def _matrices(flat: Tensor, linears: Sequence[MergedLinear]) -> list[Matrices]:
    """The parts of `flat` for each of the products."""
    layers = [update.layer for linear in linears for update in linear.updates]
    merged = [(sum(update.layer.rank for update in linear.updates), linear.features) for linear in linears]
    parts = iter(_cut(flat, [*merged, *(layer.B.shape for layer in layers)]))
    A = list(islice(parts, len(linears)))
    return [Matrices(a, list(islice(parts, len(linear.updates)))) for a, linear in zip(A, linears, strict=True)]


def _cut(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Consecutive parts of `flat`, from its beginning, in these shapes."""
    sizes = [prod(shape) for shape in shapes]
    parts = torch.split(flat[: sum(sizes)], sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
