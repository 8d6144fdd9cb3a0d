"""Run by test_fused.py: prints, for each result of each part, its relative distance from the twin's."""

import sys
from collections.abc import Iterable
from itertools import product
from typing import get_args

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
    compare(
        "rms_norm_backward_alone",
        fused.rms_norm_backward(dy.clone(), x, scale, weight, None),
        pointwise.rms_norm_backward(dy.clone(), x, scale, weight, None),
    )
    bias, finer = made(width), torch.randn(width)
    moments = pointwise.layer_norm(x, weight, bias, 1e-5)[1]
    for kind, factor in (("", weight), ("_finer", finer)):
        compare(
            f"layer_norm{kind}",
            fused.layer_norm(x, factor, bias, 1e-5),
            pointwise.layer_norm(x, factor, bias, 1e-5),
        )
        compare(
            f"layer_norm_backward{kind}",
            fused.layer_norm_backward(dy.clone(), x, moments, factor, bias, residual),
            pointwise.layer_norm_backward(dy.clone(), x, moments, factor, bias, residual),
        )
    compare("rms_norm_finer", fused.rms_norm(x, finer, 1e-5), pointwise.rms_norm(x, finer, 1e-5))
    wide, dh = made(5, 2 * width), made(5, width)
    for act in get_args(pointwise.Activation):
        for gated, before in ((True, wide), (False, wide[:, :width].contiguous())):
            name = f"{act}_{gated}"
            compare(name, [fused.activate(before, act, gated)], [pointwise.activate(before, act, gated)])
            compare(
                f"{name}_backward",
                fused.activate_backward(dh.clone(), before.clone(), act, gated),
                pointwise.activate_backward(dh.clone(), before.clone(), act, gated),
            )
    # 4,096 columns are read at a time, and a GPU's logits are 16-bit numbers of all sizes.
    logits = torch.cat([8 * made(5, 5000), made(5, width)], 1)
    compare("exponentials", fused.exponentials(logits.clone()), pointwise.exponentials(logits.clone()))
    size = 2 * (width // 2)
    whole, cos, sin = made(5, 4 * size), made(5, size // 2), made(5, size // 2)
    few = [table[:, : max(1, size // 4)].contiguous() for table in (cos, sin)]
    for back, neighbours, tables in product((False, True), (False, True), ((cos, sin), few)):
        mine, twin = whole.clone(), whole.clone()
        for turn, buffer in ((fused.turn, mine), (pointwise.turn, twin)):
            turn(buffer.unflatten(1, (4, size))[:, :3], *tables, back, neighbours)
        assert torch.equal(mine[:, 3 * size :], whole[:, 3 * size :])  # what lies beside the heads is left alone
        name = f"turn_{back}_{neighbours}_{len(tables[0][0])}"
        compare(name, [mine[:, :size], mine], [twin[:, :size], twin])
    place = (17, 3, 5, torch.tensor([7, 7, 2**40, 0, 9]), torch.tensor([0, 1, 2, 3, 70000]))
    seed, step, module, samples, positions = place
    leaf = x.clone().requires_grad_()
    dropped = drop.drop(leaf[None], torch.tensor([mask_key(seed, step)]), samples, positions, module, 0.3)
    dropped.backward(dy[None])
    mask = dropout_mask(seed, step, samples, positions, module, width, 0.3, dtype)
    assert torch.equal(dropped[0].detach() != 0, (x * mask) != 0)  # the same values are dropped
    compare("drop", [dropped[0].detach(), leaf.grad], [x * mask, dy * mask])


for width in (8, 200, 1025):
    compare_all(width)
