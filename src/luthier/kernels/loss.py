"""The loss of the supervised rows through a frozen head, without ever holding all their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.pointwise import EAGER, Pointwise

# Rows of logits held at once. The head is read twice a chunk, so fewer rows cost reads; more rows leave the cache.
CHUNK = 256


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, parts: Pointwise) -> Tensor:
        keep = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if keep else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            target = targets[rows, None]
            logits = torch.mm(hidden[rows], head.t())
            picked = logits.gather(1, target).float()
            weights, largest, mass = parts.exponentials(logits)
            total += (mass.log() + largest - picked).sum()
            if gradient is not None:
                # d loss / d hidden = softmax @ head - head[target]; the division waits until H columns are left of V.
                mean = torch.mm(weights, head).float()
                gradient[rows] = mean.div_(mass).sub_(head[target[:, 0]])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, parts: Pointwise = EAGER) -> Tensor:
    """The sum of -log softmax(hidden @ headᵀ)[target] over rows, as an fp32 scalar.

    Args:
        hidden: [S, H], the rows whose next token is supervised; fp32 or bf16.
        head: [V, H], frozen, of the same dtype: it gets no gradient.
        targets: int64 [S].
        parts: eager or native.

    The gradient of `hidden` is made in the forward pass, a chunk of rows at a time, so that at most `CHUNK` x V logits
    exist at once and the logits are computed once (2 products with the head, where recomputing them would take 3).
    """
    return _LinearCrossEntropy.apply(hidden, head, targets, parts)  # type: ignore[no-any-return, no-untyped-call]


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """fp32 [S]: -log softmax(hidden @ headᵀ)[target] of each row, without gradients; shapes as above."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = torch.mm(hidden[rows], head.t()).float()
        losses[rows] = logits.logsumexp(-1) - logits.gather(1, targets[rows, None])[:, 0]
    return losses
