"""The activation's gradient and that of the A which reads it, in one pass, beside two passes and fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels import activated, fused, pointwise, reference, spare
from luthier.kernels.pointwise import Activation

pytestmark = pytest.mark.gpu
SPARE = 64
SHAPES: dict[str, tuple[int, Activation, bool, int]] = {  # hidden values of a token, and ranks
    "Llama-3.1-8B": (14336, "silu", True, 16),
    "Gemma-2B": (16384, "gelu_tanh", True, 5),
    "Falcon-7B": (18176, "gelu", False, 16),
    "SmolLM2-135M": (1536, "silu", True, 8),
}


def made(shape: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dh, x and dinner as a block's backward pass has them."""
    torch.manual_seed(0)
    width, _, gated, ranks = SHAPES[shape]
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    dh = torch.randn(tokens, width, **options) * 0.02
    wide = 2 * width if gated else width
    x = spare.empty(dh, tokens, wide, SPARE).copy_(torch.randn(tokens, wide, **options))
    dinner = torch.zeros(tokens, 576 + SPARE, **options)[:, 576:]
    dinner[:, :ranks] = torch.randn(tokens, ranks, **options) * 0.02
    return dh, x, dinner


def exact(dh: Tensor, x: Tensor, act: Activation, gated: bool, dinner: Tensor, ranks: int) -> list[Tensor]:
    """The gradients of x and A, in fp32."""
    leaf = x.float().requires_grad_()
    hidden = reference.activate(leaf, act, gated)
    hidden.backward(dh.float())  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return [leaf.grad, dinner[:, :ranks].float().t() @ hidden.detach()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70, 515, 2048, 8190])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_pass_is_as_near_to_fp32_as_two_and_always_the_same(shape: str, tokens: int, dtype: torch.dtype) -> None:
    width, act, gated, ranks = SHAPES[shape]
    dh, x, dinner = made(shape, tokens, dtype)
    hopper = torch.cuda.get_device_capability()[0] == 9  # elsewhere it is two passes, too
    found: list[list[Tensor]] = []
    for more in ((), (), (fused.activate_backward,)):
        way = pointwise.activate_backward_dA if more else fused.activate_backward_dA
        gradient, dA = spare.empty(x, *x.shape, SPARE).copy_(x), x.new_full((ranks, width), torch.nan)
        assert activated.takes(dh, gradient, dinner, dA) == hopper
        assert way(dh.clone(), gradient, act, gated, dinner, dA, *more) is gradient
        found.append([gradient, dA])
    for one, again, two, wanted in zip(*found, exact(dh, x, act, gated, dinner, ranks), strict=True):
        assert torch.equal(one, again)
        assert float((one - wanted).norm()) <= 1.02 * float((two - wanted).norm()) + 1e-6 * float(wanted.norm())
