"""Run by test_activated.py: prints, for each result, its relative distance from the twin's."""

import sys
from itertools import product
from typing import get_args

import torch
from interpreted import allow_ends_of_one_value
from torch import Tensor

from luthier.kernels import activated, pointwise, spare
from luthier.kernels.adapted import Blocks

allow_ends_of_one_value()
dtype = getattr(torch, sys.argv[1])
torch.manual_seed(0)
SPARE = 64


def made(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width).to(dtype)


def apart(x: Tensor, room: int) -> Tensor:
    """x with so many columns behind each row."""
    return spare.empty(x, *x.shape, room).copy_(x)


def compare(act: pointwise.Activation, gated: bool, tokens: int, ranks: int, how: Blocks) -> None:
    width = 80
    dh, before = made(tokens, width), made(tokens, 2 * width if gated else width)
    dinner = apart(made(tokens, 7), SPARE)
    dinner = spare.whole(dinner, SPARE)[:, 7:]
    dinner[:, :ranks], dinner[:, ranks:] = made(tokens, ranks), torch.nan
    found = []
    for launched in (activated.launched, lambda *given: pointwise.activate_backward_dA(*given[:-1])):
        x, dA = apart(before, 16), torch.full((ranks, width), torch.nan, dtype=dtype)
        behind = spare.whole(x, 16)[:, before.shape[1] :].fill_(3)
        assert launched(dh.clone(), x, act, gated, dinner, dA, how) is x
        assert (behind == 3).all()
        found.append((x, dA))
    for name, one, twin in zip(("dx", "dA"), *found, strict=True):
        error = (one.float() - twin.float()).norm() / twin.float().norm()
        print(f"{act}.{gated}.{tokens}.{ranks}.{how.columns}.{how.programs}.{name}", float(error))


SIZES = (1, 5, Blocks(32, 4, 4, 2)), (64, 16, Blocks(16, 100, 4, 2)), (150, 16, Blocks(32, 4, 4, 2))
MANY = (1100, 16, Blocks(32, 100, 4, 2))  # 18 parts, which are added up 8 at a time
for act, gated, (tokens, ranks, how) in product(get_args(pointwise.Activation), (True, False), SIZES):
    compare(act, gated, tokens, ranks, how)
compare("silu", True, *MANY)
