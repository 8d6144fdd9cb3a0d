"""Copies between many matrices at once: of adapters' values around the weights that they change, and of their gradients
out of the products that hold them.

On a GPU all are one launch, in Triton, which reads from a table where the matrices lie; `one_by_one` is the plain twin,
and `tests/contract/test_fused.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels.place import launch

Copies = Callable[[], None]
"""Makes some copies, of what the matrices hold now. They must stay where they are."""

_BLOCK, _PROGRAMS = 1024, 128  # values at a time, and programs for one rectangle at most


class Rectangle(NamedTuple):
    """`source` [R, w] times `factor` goes to `target` [R, C] from the column `first` on; zeros go beside it."""

    source: Tensor
    target: Tensor
    first: int = 0
    factor: float = 1.0


def one_by_one(rectangles: Sequence[Rectangle], *, add: bool) -> Copies:
    """The copies of these. `add`: each is added to what is there. Products are fp32, and rounded once."""
    return partial(_copy_each, rectangles, add)


def _copy_each(rectangles: Sequence[Rectangle], add: bool) -> None:
    for source, target, first, factor in rectangles:
        values, place = source.float() * factor, target[:, first : first + source.shape[1]]
        if add:
            place.add_(values)
        else:
            target.zero_()
            place.copy_(values)


def at_once(rectangles: Sequence[Rectangle], *, add: bool) -> Copies:
    """`one_by_one` by one launch. All sources are of one dtype, and all targets."""
    if not rectangles:
        return lambda: None
    (source, target, _, _), place = rectangles[0], rectangles[0].target.device
    assert {(r.source.dtype, r.target.dtype) for r in rectangles} == {(source.dtype, target.dtype)}
    table = torch.tensor([_told(r) for r in rectangles], device=place)
    factors = torch.tensor([r.factor for r in rectangles], device=place, dtype=torch.float32)
    most = max(r.target.numel() for r in rectangles)
    grid, options = (len(rectangles), min(-(-most // _BLOCK), _PROGRAMS)), {"ADD": add, "BLOCK": _BLOCK}
    # Without fusion a product and a sum are rounded one after the other, as the twin does.
    options |= {"num_warps": 4, "enable_fp_fusion": False}

    def copies() -> None:
        launch("rectangles", grid, table, factors, source, target, **options)

    copies.kept = rectangles  # type: ignore[attr-defined]  # the table alone would keep no memory
    return copies


def _told(rectangle: Rectangle) -> list[int]:
    """What the kernel is told of it: where, how far apart rows lie, how many of how many values, and the columns."""
    source, target, first, _ = rectangle
    assert source.stride(1) == target.stride(1) == 1 or not source.numel()
    places, apart = (source.data_ptr(), target.data_ptr()), (source.stride(0), target.stride(0))
    return [*places, *apart, *target.shape, first, source.shape[1]]
