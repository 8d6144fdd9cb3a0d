"""Where the training of A and B starts.

`pissa` and `olora` start from a part B₀A₀ of the frozen weight W. As published they then train W - s·B₀A₀ + s·BA, and
keep that difference in the place of W. Here W stays what it is, and the layer adds s·(BA - B₀A₀): the same function
with the same gradients, from which the base model can be had back bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.adapters.linears import dense_weight, is_quantized
from luthier.errors import AdapterError

if TYPE_CHECKING:
    from luthier.adapters.lora import LoraLinear

Original = Callable[[str], Tensor | None]
"""The name of a layer to its weight [out, in] before it was quantised, None where it is not to be had."""


@torch.no_grad()
def start(layer: LoraLinear, name: str, init: str, generator: torch.Generator, original: Original | None) -> None:
    """Sets A and B of a new layer. Raises AdapterError if `init` asks for what the layer does not have."""
    if init in _RANDOM:
        _RANDOM[init](layer.A, generator)
        return
    check_rank(layer, name, init)
    if not layer.A.is_meta:  # a plan has shapes alone
        A, B = _loftq(layer, name, original) if init == "loftq" else _FROM_WEIGHT[init](layer)
        layer.A.copy_(A)
        layer.B.copy_(B)
    if init in _FROM_WEIGHT:
        layer.start_A, layer.start_B = layer.A.detach().clone(), layer.B.detach().clone()


def check_rank(layer: LoraLinear, name: str, init: str) -> None:
    """Raises AdapterError if `init` takes more vectors from the layer's weight than there are."""
    full = min(layer.A.shape[1], len(layer.B))
    if init not in _RANDOM and layer.rank > full:
        fix = f"set adapter.rank to at most {full}, or adapter.ranks={{{name.rpartition('.')[2]}: {full}}}"
        raise AdapterError(f"rank {layer.rank} is more than {name} has, {full}", where=f"adapter.init: {init}", fix=fix)


def _uniform(A: Tensor, generator: torch.Generator) -> None:
    """PEFT's default (Kaiming, a = √5). B is zero, so that training starts from the base model."""
    bound = 1 / math.sqrt(A.shape[1])
    A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))


def _gaussian(A: Tensor, generator: torch.Generator) -> None:
    A.copy_(torch.empty(A.shape).normal_(0, 1 / len(A), generator=generator))


def _pissa(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """The main singular vectors of W (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3)."""
    return _halves(dense_weight(layer.base), layer)


def _olora(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R, W = QR (Büyükakyüz 2024, arXiv:2406.01775). These columns of Q depend on as
    many columns of W alone. As in PEFT, s·BA and not BA is this part of W, scaled by s."""
    W = dense_weight(layer.base).float()
    Q = torch.linalg.qr(W[:, : layer.rank])[0]
    return Q.t() @ W, Q


def _loftq(layer: LoraLinear, name: str, original: Original | None) -> tuple[Tensor, Tensor]:
    """The main part of what quantisation took from W (Li et al. 2023, arXiv:2310.08659, algorithm 1 with T = 1: a
    second round would quantise another weight, and the base would be this adapter's alone)."""
    where = "adapter.init: loftq"
    if not is_quantized(layer.base):
        raise AdapterError(f"{name} is not quantised", where=where, fix="set model.quantize, or another init")
    weight = original(name) if original else None
    if weight is None or weight.shape != dense_weight(layer.base).shape:
        fix = "use a base whose weights are kept in 16 or 32 bits, or another init"
        raise AdapterError(f"the weight of {name} before it was quantised is not at hand", where=where, fix=fix)
    lost = weight.to(layer.A.device, torch.float32) - dense_weight(layer.base).float()
    return _halves(lost, layer)


def _halves(matrix: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """A and B such that s·BA is the nearest to `matrix` [out, in] of that rank: singular values in equal parts.

    The vectors are eigenvectors of the smaller of M Mᵀ and Mᵀ M, in double precision: several times as fast as a
    singular value decomposition, of which only the first few vectors are wanted.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        B, A = (half.t() for half in _left_halves(matrix.t(), layer))
    else:
        A, B = _left_halves(matrix, layer)
    return A, B


def _left_halves(matrix: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(matrix @ matrix.t())  # ascending
    main = vectors[:, -layer.rank :].flip(1)
    sizes = squares[-layer.rank :].flip(0).clamp_min(torch.finfo(torch.float64).tiny).sqrt().sqrt()
    return (main.t() @ matrix) / sizes[:, None] / math.sqrt(layer.scale), main * sizes / math.sqrt(layer.scale)


_RANDOM = {"default": _uniform, "gaussian": _gaussian}
_FROM_WEIGHT = {"pissa": _pissa, "olora": _olora}
