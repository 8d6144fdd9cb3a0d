"""Run by test_fused.py: prints, for each result of each part, its relative distance from the twin's."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from luthier.kernels import drop, fused, pointwise
from luthier.kernels.dropout import dropout_mask, mask_key

dtype = getattr(torch, sys.argv[1])
torch.manual_seed(0)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def compare(name: str, mine: Iterable[Tensor], twins: Iterable[Tensor]) -> None:
    for i, (one, twin) in enumerate(zip(mine, twins, strict=True)):
        assert one.dtype == twin.dtype
        assert one.shape == twin.shape
        print(f"{len(one[0])}.{name}.{i}", float((one.float() - twin.float()).norm() / twin.float().norm()))


def compare_all(width: int) -> None:
    x, update, dy, residual, weight = made(5, width), made(5, width), made(5, width), made(5, width), made(width)
    scale = pointwise.rms_norm(x, weight, 1e-5)[1]
    for module in (fused, pointwise):
        assert torch.equal(module.add_rms_norm(x, kept := update.clone(), weight, 1e-5)[0], kept)
    compare("rms_norm", fused.rms_norm(x, weight, 1e-5), pointwise.rms_norm(x, weight, 1e-5))
    compare(
        "add_rms_norm",
        fused.add_rms_norm(x, update.clone(), weight, 1e-5),
        pointwise.add_rms_norm(x, update.clone(), weight, 1e-5),
    )
    compare(
        "rms_norm_backward",
        fused.rms_norm_backward(dy.clone(), x, scale, weight, residual),
        pointwise.rms_norm_backward(dy.clone(), x, scale, weight, residual),
    )
    gate_up, dh = made(5, 2 * width), made(5, width)
    compare("swiglu", [fused.swiglu(gate_up)], [pointwise.swiglu(gate_up)])
    compare(
        "swiglu_backward",
        fused.swiglu_backward(dh.clone(), gate_up.clone()),
        pointwise.swiglu_backward(dh.clone(), gate_up.clone()),
    )
    # 4,096 columns are read at a time, and a GPU's logits are 16-bit numbers of all sizes.
    logits = torch.cat([8 * made(5, 5000), made(5, width)], 1)
    compare("exponentials", fused.exponentials(logits.clone()), pointwise.exponentials(logits.clone()))
    size = 2 * (width // 2)
    whole, cos, sin = made(5, 4 * size), made(5, size // 2), made(5, size // 2)
    for back in (False, True):
        mine, twin = whole.clone(), whole.clone()
        for turn, buffer in ((fused.turn, mine), (pointwise.turn, twin)):
            turn(buffer[:, : 3 * size].unflatten(1, (3, size)), cos, sin, back)
        assert torch.equal(mine[:, 3 * size :], whole[:, 3 * size :])  # what lies beside the heads is left alone
        compare(f"turn_back_{back}", [mine[:, :size], mine], [twin[:, :size], twin])
    place = (17, 3, 5, torch.tensor([7, 7, 2**40, 0, 9]), torch.tensor([0, 1, 2, 3, 70000]))
    seed, step, module, samples, positions = place
    leaf = x.clone().requires_grad_()
    dropped = drop.drop(leaf[None], mask_key(seed, step, module), samples, positions, 0.3)
    dropped.backward(dy[None])
    mask = dropout_mask(seed, step, samples, positions, module, width, 0.3, dtype)
    assert torch.equal(dropped[0].detach() != 0, (x * mask) != 0)  # the same values are dropped
    compare("drop", [dropped[0].detach(), leaf.grad], [x * mask, dy * mask])


for width in (8, 200, 1025):
    compare_all(width)
