"""The loss of the supervised rows through the output head, without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.pointwise import EAGER, Pointwise

IGNORED = -100  # the target of a row that nothing is learned from, as torch has it


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: cap(scale · (x weightᵀ + bias)), with cap(z) = softcap · tanh(z / softcap).

    Attributes:
        weight: [V, H], or None where the hidden states are the logits already.
        bias: [V], or None.
        softcap: the bound of the logits (Gemma 2, arXiv:2408.00118), or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, H] to [S, V], in the dtype of `hidden`."""
        if self.weight is None:
            return hidden
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, parts: Pointwise = EAGER) -> Tensor:
    """The sum of -log softmax(head.logits(hidden))[target] over rows, as an fp32 scalar.

    Args:
        hidden: [S, H], the rows whose next token is supervised; fp32, bf16 or fp16.
        head: its weight and bias get a gradient if they require one; products are in the dtype of `hidden`.
        targets: int64 [S]. A row whose target is `IGNORED` adds exactly nothing, to the loss and to any gradient.
        parts: eager or native.

    All gradients are made in the forward pass, a chunk of rows at a time, so that at most `parts.logit_rows` x V logits
    exist at once and they are computed once. A frozen head costs 2 products with it, where recomputing the logits would
    take 3; a trained one 3 and a gradient of its own size in fp32.
    """
    if head.weight is None:
        return F.cross_entropy(hidden.float(), targets, reduction="sum")
    arguments = (hidden, head.weight, head.bias, head, targets, parts)
    return _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def token_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """fp32 [S]: -log softmax(head.logits(hidden))[target] of each row, without gradients; shapes as above."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for rows in _chunks(hidden, EAGER.logit_rows):
        logits = head.logits(hidden[rows]).float()
        losses[rows] = logits.logsumexp(-1) - logits.gather(1, targets[rows, None])[:, 0]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, targets: Tensor, parts: Pointwise
    ) -> Tensor:
        frozen = Head(weight.to(hidden.dtype), bias, head.scale, head.softcap)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        ignored, targets = targets[:, None] == IGNORED, targets.clamp_min(0)
        for rows in _chunks(hidden, parts.logit_rows):
            logits = frozen.logits(hidden[rows])
            picked = logits.gather(1, targets[rows, None]).float()
            # The cap's slope is read from its output: 1 - (z / cap)².
            slope = None if head.softcap is None else 1 - (logits.float() / head.softcap).square_()
            weights, largest, mass = parts.exponentials(logits)
            total += (mass.log() + largest - picked).masked_fill_(ignored[rows], 0).sum()
            gradients.add(rows, frozen, targets[rows], weights, mass, slope, ignored[rows])
            del logits, weights, slope  # the next rows' come before the names are taken again
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return (*found, None, None, None)


class _Gradients:
    """Those of the hidden states, the weight and the bias, each None where it is not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.rows = hidden
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        # Many chunks add up in the head's gradient: in fp32, whatever the dtype of the products.
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def add(
        self,
        rows: slice,
        head: Head,
        targets: Tensor,
        weights: Tensor,
        mass: Tensor,
        slope: Tensor | None,
        ignored: Tensor,
    ) -> None:
        """`weights` / `mass` is the softmax of these rows; those `ignored` [S, 1] get a gradient of zero."""
        assert head.weight is not None
        if slope is None and self.weight is None and self.bias is None:
            if self.hidden is not None:
                # d loss / d hidden = softmax @ head - head[target]; the division waits until H columns are left of V.
                mean = torch.mm(weights, head.weight).float()
                found = mean.div_(mass).sub_(head.weight[targets]).mul_(head.scale)
                self.hidden[rows] = found.masked_fill_(ignored, 0)
            return
        dz = weights.float().div_(mass)
        dz[torch.arange(len(dz), device=dz.device), targets] -= 1
        dz = (dz if slope is None else dz.mul_(slope)).mul_(head.scale).masked_fill_(ignored, 0)
        if self.bias is not None:
            self.bias += dz.sum(0)
        dz = dz.to(weights.dtype)
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(dz, head.weight)
        if self.weight is not None:
            self.weight += torch.mm(dz.t(), self.rows[rows])


def _chunks(hidden: Tensor, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, len(hidden), size))
