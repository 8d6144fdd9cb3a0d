"""The contract of the head: its twin's loss and gradients, frozen or trained, with all that families put into it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from luthier.kernels import reference
from luthier.kernels.loss import IGNORED, Head, linear_cross_entropy, token_losses
from luthier.kernels.pointwise import EAGER, exponentials

# Relative to the norm of the whole tensor; bf16 rounds logits, probabilities and products once each.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
WORDS, WIDTH = 53, 24
ROWS = 2 * EAGER.logit_rows + 5
HEADS = {
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 4.0},
    "plain": {},
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str, dtype: torch.dtype, trained: bool, rows: int = ROWS) -> tuple[Tensor, Head, Tensor]:
    options = dict(HEADS[kind])
    bias = random(WORDS, seed=3).to(dtype).requires_grad_(trained) if options.pop("bias", False) else None
    weight = random(WORDS, WIDTH, seed=1).to(dtype).requires_grad_(trained)
    hidden = random(rows, WIDTH, seed=2).to(dtype).requires_grad_()
    targets = torch.randint(WORDS, (rows,), generator=torch.Generator().manual_seed(4))
    return hidden, Head(weight, bias, **options), targets  # type: ignore[arg-type]


def error(one: Tensor, other: Tensor) -> float:
    return float((one.detach().float() - other.detach().float()).norm() / other.detach().float().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_all_logits_at_once(kind: str, trained: bool, dtype: torch.dtype) -> None:
    hidden, head, targets = made(kind, dtype, trained)
    loss, twin = linear_cross_entropy(hidden, head, targets), reference.linear_cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32
    assert error(loss, twin) <= TOLERANCE[dtype]
    wanted = [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]
    assert len(wanted) == 1 + trained * (1 + (head.bias is not None))
    for mine, theirs in zip(torch.autograd.grad(loss * 3, wanted), torch.autograd.grad(twin * 3, wanted), strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_ignored_rows_add_nothing(kind: str, trained: bool, dtype: torch.dtype) -> None:
    hidden, head, targets = made(kind, dtype, trained)
    ignored = torch.arange(ROWS) % 3 == 1
    loss = linear_cross_entropy(hidden, head, targets.masked_fill(ignored, IGNORED))
    chosen = hidden.detach()[~ignored].requires_grad_()
    twin = reference.linear_cross_entropy(chosen, head, targets[~ignored])
    assert error(loss, twin) <= TOLERANCE[dtype]
    trained_parts = [x for x in (head.weight, head.bias) if x is not None and x.requires_grad]
    mine, *others = torch.autograd.grad(loss, [hidden, *trained_parts])
    theirs, *wanted = torch.autograd.grad(twin, [chosen, *trained_parts])
    assert not mine[ignored].any()
    for one, other in zip([mine[~ignored], *others], [theirs, *wanted], strict=True):
        assert error(one, other) <= TOLERANCE[dtype]


def test_an_ignored_row_that_is_not_finite_leaves_the_loss_and_the_gradients_of_the_others_finite() -> None:
    hidden, head, targets = made("plain", torch.float32, trained=False)
    broken = hidden.detach().clone()
    broken[3] = torch.inf
    broken.requires_grad_()
    targets[3] = IGNORED
    loss = linear_cross_entropy(broken, head, targets)
    (gradient,) = torch.autograd.grad(loss, broken)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[3].any()


def test_nothing_is_left_of_a_chunk_s_logits_when_the_next_ones_come() -> None:
    left: list[weakref.ref[Tensor]] = []

    def watched(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert [ref for ref in left if ref() is not None] == []
        found = exponentials(logits)
        left.extend([weakref.ref(logits), weakref.ref(found[0])])
        return found

    linear_cross_entropy(*made("plain", torch.float32, trained=False), replace(EAGER, exponentials=watched))
    assert len(left) == 2 * 3


@pytest.mark.parametrize("kind", HEADS)
def test_the_losses_of_rows_add_up_to_the_loss(kind: str) -> None:
    hidden, head, targets = made(kind, torch.float32, trained=False)
    with torch.no_grad():
        assert error(token_losses(hidden, head, targets).sum(), linear_cross_entropy(hidden, head, targets)) <= 1e-6


def test_a_trained_weight_in_fp32_serves_products_in_bf16() -> None:
    hidden, head, targets = made("all", torch.float32, trained=True)
    narrow = hidden.detach().bfloat16().requires_grad_()
    assert head.weight is not None
    (mine,) = torch.autograd.grad(linear_cross_entropy(narrow, head, targets), head.weight)
    (exact,) = torch.autograd.grad(reference.linear_cross_entropy(hidden, head, targets), head.weight)
    assert mine.dtype == torch.float32
    assert error(mine, exact) <= TOLERANCE[torch.bfloat16]


def test_a_head_without_weight_takes_logits() -> None:
    hidden, head, targets = made("all", torch.float32, trained=False)
    logits = head.logits(hidden).detach().requires_grad_()
    loss = linear_cross_entropy(logits, Head(None), targets)
    assert error(loss, linear_cross_entropy(hidden, head, targets)) <= 1e-6
    (gradient,) = torch.autograd.grad(loss, logits)
    onehot = torch.nn.functional.one_hot(targets, WORDS)
    assert error(gradient, logits.softmax(-1) - onehot) <= 1e-5
    assert token_losses(logits.detach(), Head(None), targets).shape == targets.shape
