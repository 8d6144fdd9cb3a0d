"""The LoRA updates of all layers around their weights, and the gradients that backward passes leave.

The parameters' values go there with one launch, of the whole model or, where weights are unpacked for each product, of
that product. A block's gradients come out of its products with one launch: they are added to `.grad`, where all of it
is one piece of memory, as `train/optim.py` makes it, or given to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.adapters.lora import LoraLinear
from luthier.errors import ModelError
from luthier.kernels.rectangles import Copies, Rectangle
from luthier.model.merged import Gradients, MergedLinear

Products = tuple[MergedLinear, ...]
"""Those of a block."""


class Pass(NamedTuple):
    """A forward pass, as its backward pass finds it."""

    layout: int
    added: bool  # whether gradients are added to `.grad` here, not given to autograd


class Updates:
    """The updates of all adapted layers of `blocks`. `copies`: as of `Pointwise`."""

    def __init__(self, blocks: Sequence[Products], copies: Callable[..., Copies]) -> None:
        self.blocks, self.copies = blocks, copies
        self.parameters: list[Tensor] = []  # of the layers whose adapter is enabled
        self.now = Pass(0, added=False)
        self._live: list[LoraLinear] = []
        self._sources: list[int] = []
        self._border: Copies = lambda: None
        self._placed = False  # whether products know where their gradients go
        self._gathered: dict[Products, tuple[list[int], Copies]] = {}
        self._apart: dict[int, Tensor] = {}

    @cached_property
    def gradients(self) -> Tensor:
        """The gradients of a block, in the dtype of the products."""
        linears = [linear for block in self.blocks for linear in block if linear.adapted]
        ranks = {linear: sum(layer.rank for layer, _ in linear.adapted) for linear in linears}
        size = max(sum(sum(_sizes(x, ranks[x])) for x in block if x in ranks) for block in self.blocks)
        return torch.empty(size, dtype=linears[0].dtype, device=linears[0].adapted[0][0].A.device)

    def refresh(self, blocks: Sequence[Products]) -> None:
        """Takes the present values of the layers of `blocks` whose adapter is enabled."""
        linears = list(chain(*blocks))
        live = [layer for linear in linears for layer, _ in linear.adapted if layer.enabled]
        if live != self._live:
            self._choose(linears, live)
        sources = [parameter.data_ptr() for parameter in self.parameters]
        if sources != self._sources:
            with torch.inference_mode(False), torch.no_grad():  # what is made in that mode can be used in no other
                self._surround([linear for linear in linears if linear.updates])
            self._sources = sources  # not before: memory may have run out
        with torch.no_grad():
            self._border()

    def launches(self) -> list[Copies]:
        """What the last pass launched. They read tables, which are there as long as these are."""
        apart = [linear.border for block in self.blocks for linear in block if linear.updates and linear.dense is None]
        return [self._border, *apart, *(copies for _, copies in self._gathered.values())]

    def moved(self) -> None:
        """To be called where products lie elsewhere from now on."""
        self._sources = []

    def check(self, then: Pass) -> None:
        """Raises ModelError where a forward pass with other adapters came since that one."""
        if then.layout != self.now.layout:
            what = "the model ran with other adapters enabled before this loss went backward"
            raise ModelError(what, fix="call backward first, or build the model with run.kernels=reference")

    def collected(self, x: Tensor, blocks: Sequence[Products]) -> Tensor:
        """x, the input of the first of these layers, as one that gradients flow to."""
        self.now = self.now._replace(added=_in_one_piece([parameter.grad for parameter in self.parameters]))
        if not self._placed:
            for block in blocks:
                self._place(block)
            self._placed = True
        # Where autograd gets none of the gradients, one parameter is enough to say that there are some.
        parameters = self.parameters[: 1 if self.now.added else None]
        return _Collect.apply(x, self, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def gather(self, block: Products, then: Pass) -> None:
        """Takes a block's gradients out of its products, when its backward pass has run."""
        layers = [update.layer for linear in block for update in linear.updates]
        if not layers:
            return
        found = _totals if then.added else self._apart_of
        totals = [found(parameter) for layer in layers for parameter in (layer.A, layer.B)]
        places = [then.added, *(total.data_ptr() for total in totals)]
        if block not in self._gathered or self._gathered[block][0] != places:
            parts = zip(chain.from_iterable(_parts(linear) for linear in block), totals, strict=True)
            rectangles = [Rectangle(part, total, factor=factor) for (part, factor), total in parts]
            self._gathered[block] = places, self.copies(rectangles, add=then.added)
        self._gathered[block][1]()

    def hand_over(self) -> list[Tensor]:
        """The gradient of each parameter, for autograd, which is given none of the next pass'."""
        return [self._apart_of(parameter).clone() for parameter in self.parameters]

    def _apart_of(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self._apart:
            self._apart[id(parameter)] = torch.empty_like(parameter, requires_grad=False)
        return self._apart[id(parameter)]

    def _choose(self, linears: Sequence[MergedLinear], live: list[LoraLinear]) -> None:
        self.now = Pass(self.now.layout + 1, self.now.added)
        for linear in linears:
            linear.choose()
        self.parameters = [*(layer.A for layer in live), *(layer.B for layer in live)]
        self._live, self._sources, self._placed = live, [], False
        self._gathered.clear()
        self._apart.clear()

    def _surround(self, linears: Sequence[MergedLinear]) -> None:
        """Prepares the launches that put A and B around the weights."""
        kept = [linear for linear in linears if linear.dense is not None]
        self._border = self.copies([part for linear in kept for part in linear.borders()], add=False)
        for linear in linears:
            if linear.dense is None:
                linear.border = self.copies(linear.borders(), add=False)

    def _place(self, block: Products) -> None:
        """Gives the products of a block the places of their gradients, which are those of all other blocks, too."""
        rest = self.gradients
        for linear in block:
            if linear.updates:
                sizes = _sizes(linear, linear.updates[-1].inner.stop)
                A, B, rest = torch.split(rest, [*sizes, len(rest) - sum(sizes)])
                linear.gradients = Gradients(A.view(-1, linear.features), B.view(linear.outputs, -1))


class _Collect(torch.autograd.Function):
    """Runs backward when all layers have, and hands their adapters' gradients over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, updates: Updates, *parameters: Tensor) -> Tensor:
        ctx.updates, ctx.added = updates, updates.now.added
        ctx.set_materialize_grads(False)  # the first of these layers gives none for x
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *([None] if ctx.added else ctx.updates.hand_over())


def _sizes(linear: MergedLinear, ranks: int) -> tuple[int, int]:
    """Values of the gradients of A and B of a product, of so many ranks."""
    return ranks * linear.features, linear.outputs * linear.spare


def _parts(linear: MergedLinear) -> Iterator[tuple[Tensor, float]]:
    """The gradients of A and B of each update, and what each is to be multiplied with."""
    for layer, columns, ranks in linear.updates:
        yield linear.gradients.A[ranks], 1.0
        yield linear.gradients.B[columns, ranks], layer.scale


def _totals(parameter: Tensor) -> Tensor:
    """Its `.grad`, to be added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _in_one_piece(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are there, in one piece of memory."""
    pieces = {None if x is None else x.untyped_storage()._cdata for x in tensors}
    return len(pieces) == 1 and None not in pieces
