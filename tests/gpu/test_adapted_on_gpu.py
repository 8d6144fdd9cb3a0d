"""What a product's gradient means to its adapters, of one reading of it, beside two products and fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.kernels import adapted, spare
from luthier.kernels.adapted import Part

pytestmark = pytest.mark.gpu
SPARE = 64
SHAPES = {  # columns and rank of each adapter
    "qkv": ((4096, 16), (1024, 16), (1024, 16)),
    "down": ((4096, 16),),
    "gate_up": ((14336, 16), (14336, 16)),
    "small": ((576, 8), (192, 8), (192, 5)),
}


def parts(shape: str) -> list[Part]:
    found = [Part((0, 0), (0, 0))]
    for columns, rank in SHAPES[shape]:
        (_, column), (_, last) = found[-1]
        found.append(Part((column, column + columns), (last, last + rank)))
    return found[1:]


def made(shape: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dy, B and inner as a product's backward pass has them."""
    torch.manual_seed(0)
    told, options = parts(shape), {"device": "cuda", "dtype": dtype}
    width = told[-1].columns[1]
    B = torch.zeros(width, width + SPARE, **options)[:, width:]
    for columns, ranks in told:
        B[slice(*columns), slice(*ranks)] = torch.randn(columns[1] - columns[0], ranks[1] - ranks[0], **options) * 0.02
    dy = spare.empty(B, tokens, width, SPARE).copy_(torch.randn(tokens, width, **options) * 0.02)
    return dy, B, torch.randn(tokens, SPARE, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70, 515, 2048, 8190])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_reading_is_as_near_to_fp32_as_two_products_and_always_the_same(
    shape: str, tokens: int, dtype: torch.dtype
) -> None:
    dy, B, inner = made(shape, tokens, dtype)
    told = parts(shape)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("dy is read twice on this GPU")
    assert adapted.takes(dy, told)
    found: list[list[Tensor]] = []
    for way in (adapted.at_once, adapted.at_once, adapted.one_by_one):
        dinner, dB = (x.new_full((len(x), SPARE), torch.nan) for x in (dy, B))
        way(dy, B, inner, told, dinner, dB)
        found.append([dinner, *(dB[slice(*c), slice(*r)] for c, r in told)])
    exact = [dy.float() @ B.float(), *(dy[:, slice(*c)].float().t() @ inner[:, slice(*r)].float() for c, r in told)]
    for one, again, two, wanted in zip(*found, exact, strict=True):
        assert torch.equal(one, again)
        assert float((one - wanted).norm()) <= 1.02 * float((two - wanted).norm()) + 1e-6 * float(wanted.norm())
