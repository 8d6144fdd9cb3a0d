"""`model.norms: float32` beside products in 16 bits, on the reference path and by our block."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from luthier import recipe
from luthier.data.stream import Micro
from luthier.kernels import native
from luthier.model.causal import CausalModel, Kernels, build

IDS = torch.arange(3, 17)
MICRO = Micro(IDS, torch.arange(14), (0, 14), torch.arange(13), IDS[1:], torch.zeros(1, dtype=torch.int64), 0)


def model(
    folder: Path,
    dtype: torch.dtype,
    kernels: Kernels = "reference",
    *,
    adapter: recipe.Lora | None = None,
    recompute: bool = False,
) -> CausalModel:
    settings = recipe.Model(base=str(folder), norms="float32")
    return build(
        settings,
        adapter,
        folder=folder,
        kernels=kernels,
        recompute=recompute,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_packed_and_the_loss_is_that_of_float32_within_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base")
    finer = model(folder, dtype)
    assert finer.layout == "packed"
    with torch.no_grad():
        loss, expected = finer.loss(MICRO), model(folder, torch.float32).loss(MICRO)
    assert abs(loss - expected) < 4 * torch.finfo(dtype).eps * expected


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True])
def test_our_block_is_as_near_to_float32_as_the_reference_path(
    kernels: Kernels, recompute: bool, tmp_path: Path
) -> None:
    if kernels == "compiled" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    folder, made = tiny.base(tmp_path / "base"), {}
    for name, dtype in {"exact": torch.float32, "reference": torch.bfloat16, kernels: torch.bfloat16}.items():
        path: Kernels = "reference" if name == "exact" else name  # type: ignore[assignment]
        made[name] = gradients(model(folder, dtype, path, adapter=recipe.Lora(rank=4), recompute=recompute))
    (loss, exact), (theirs_loss, theirs), (ours_loss, ours) = made.values()
    assert abs(ours_loss - loss) <= 1.2 * abs(theirs_loss - loss) + 1e-3 * loss
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_what_our_block_gives_the_head_is_as_fine_as_the_head(tmp_path: Path) -> None:
    finer = model(tiny.base(tmp_path / "base"), torch.bfloat16, "eager")
    assert finer.head.weight is not None
    assert finer.hidden(MICRO).dtype == finer.head.weight.dtype == torch.float32


def gradients(made: CausalModel) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in the adapter, whose B is not 0."""
    assert made.adapter is not None
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    loss = made.loss(MICRO)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), torch.cat([p.grad.flatten() for p in made.adapter.parameters() if p.grad is not None])
