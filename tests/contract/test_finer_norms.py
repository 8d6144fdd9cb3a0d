"""`model.norms: float32` beside products in 16 bits: exact on the reference path, and refused on any other."""

from pathlib import Path

import pytest
import torch

import tiny
from luthier import recipe
from luthier.data.stream import Micro
from luthier.errors import ModelError
from luthier.model.causal import CausalModel, Kernels, build


def model(folder: Path, dtype: torch.dtype, kernels: Kernels = "reference") -> CausalModel:
    settings = recipe.Model(base=str(folder), norms="float32")
    place = torch.device("cpu")
    return build(settings, None, folder=folder, kernels=kernels, recompute=False, seed=0, device=place, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_packed_and_the_loss_is_that_of_float32_within_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base")
    ids = torch.arange(3, 17)
    rows = torch.arange(13)
    micro = Micro(ids, torch.arange(14), (0, 14), rows, ids[1:], torch.zeros(1, dtype=torch.int64), 0)
    finer = model(folder, dtype)
    assert finer.layout == "packed"
    with torch.no_grad():
        loss, expected = finer.loss(micro), model(folder, torch.float32).loss(micro)
    assert abs(loss - expected) < 4 * torch.finfo(dtype).eps * expected


def test_our_block_refuses_what_it_does_not_compute(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base")
    with pytest.raises(ModelError, match=r"model\.norms=float32"):
        model(folder, torch.bfloat16, "eager")
    assert model(folder, torch.float32, "eager").decoder is not None
