"""Run by test_fused.py: prints, for each result of each part, its relative distance from the twin's."""

import sys
from collections.abc import Iterable
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from luthier.kernels import drop, fused, pointwise, rectangles, spare
from luthier.kernels.dropout import dropout_mask, mask_key

dtype = getattr(torch, sys.argv[1])
torch.manual_seed(0)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def compare(name: str, mine: Iterable[Tensor], twins: Iterable[Tensor]) -> None:
    for i, (one, twin) in enumerate(zip(mine, twins, strict=True)):
        assert one.dtype == twin.dtype
        assert one.shape == twin.shape
        print(f"{len(one[0])}.{name}.{i}", float((one.float() - twin.float()).norm() / (twin.float().norm() + 1e-30)))


def apart(x: Tensor, room: int) -> Tensor:
    """x with so many columns behind each row."""
    return spare.empty(x, *x.shape, room).copy_(x)


def compare_norms(width: int, room: int) -> None:
    """With so many columns behind the rows of what a product reads, and of what its gradient was written to."""
    x, update, dy, weight = made(5, width), made(5, width), made(5, width), made(width)
    residual = apart(made(5, width), room)
    scale = pointwise.rms_norm(x, weight, 1e-5)[1]
    for module in (fused, pointwise):
        assert torch.equal(module.add_rms_norm(x, kept := update.clone(), weight, 1e-5)[0], kept)

    def both(name: str, part: str, *arguments: Any) -> None:
        results = [getattr(module, part)(*arguments, room) for module in (fused, pointwise)]
        assert spare.has(results[0][part == "add_rms_norm"], room)
        compare(f"{name}.{room}", *results)

    both("rms_norm", "rms_norm", x, weight, 1e-5)
    compare(
        f"add_rms_norm.{room}",
        fused.add_rms_norm(x, update.clone(), weight, 1e-5, room),
        pointwise.add_rms_norm(x, update.clone(), weight, 1e-5, room),
    )
    both("rms_norm_backward", "rms_norm_backward", dy, x, scale, weight, residual)
    both("rms_norm_backward_alone", "rms_norm_backward", dy, x, scale, weight, None)
    bias, finer = made(width), torch.randn(width)
    moments = pointwise.layer_norm(x, weight, bias, 1e-5)[1]
    for kind, factor in (("", weight), ("_finer", finer)):
        both(f"layer_norm{kind}", "layer_norm", x, factor, bias, 1e-5)
        both(f"layer_norm_backward{kind}", "layer_norm_backward", dy, x, moments, factor, bias, residual)
    both("rms_norm_finer", "rms_norm", x, finer, 1e-5)


def compare_activations(width: int, room: int) -> None:
    wide, dh = apart(made(5, 2 * width), room), made(5, width)
    for act in get_args(pointwise.Activation):
        for gated, before in ((True, wide), (False, apart(made(5, width), room))):
            name = f"{act}_{gated}.{room}"
            compare(name, [fused.activate(before, act, gated, room)], [pointwise.activate(before, act, gated, room)])
            compare(
                f"{name}_backward",
                fused.activate_backward(dh.clone(), apart(before, room), act, gated),
                pointwise.activate_backward(dh.clone(), apart(before, room), act, gated),
            )


def compare_rectangles() -> None:
    """More programs than there are values of one, fewer than of the other; all of one, or some columns of it."""
    sources = [torch.randn(200, 700), torch.randn(3, 5), torch.randn(9, 4)[:, :3], torch.randn(4, 0)]
    places = [(0, 700), (2, 9), (1, 4), (0, 6)]
    results = []
    for copies in (rectangles.at_once, rectangles.one_by_one):
        for add, narrow in product((False, True), (False, True)):  # values go out rounded, gradients come in
            kinds = (dtype, torch.float32) if narrow else (torch.float32, dtype)
            pairs = list(zip(sources, places, strict=True))
            targets = [torch.ones(len(s), wide + 2, dtype=kinds[1])[:, :wide] for s, (_, wide) in pairs]
            told = [
                rectangles.Rectangle(s.to(kinds[0]), t, first, 0.3)
                for (s, (first, _)), t in zip(pairs, targets, strict=True)
            ]
            run = copies([r for r in told if not add or r.source.shape == r.target.shape], add=add)
            run()
            results.append(targets)
            assert all((t._base[:, -2:] == 1).all() for t in targets)  # what lies beside is left alone
    half = len(results) // 2
    for i, (mine, twins) in enumerate(zip(results[:half], results[half:], strict=True)):
        compare(f"rectangles.{i}", mine, twins)


def compare_all(width: int) -> None:
    for room in (0, 8):
        compare_norms(width, room)
        compare_activations(width, room)
    x, dy = made(5, width), made(5, width)
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
    leaf = apart(x, 8).requires_grad_()
    dropped = drop.drop(leaf[None], torch.tensor([mask_key(seed, step)]), samples, positions, module, 0.3)
    dropped.backward(dy[None])
    mask = dropout_mask(seed, step, samples, positions, module, width, 0.3, dtype)
    assert torch.equal(dropped[0].detach() != 0, (x * mask) != 0)  # the same values are dropped
    compare("drop", [dropped[0].detach(), leaf.grad], [x * mask, dy * mask])


for width in (8, 200, 1025):
    compare_all(width)
compare_rectangles()
