"""What of a micro-batch has to be computed: tokens that no supervised token sees are left out, and the tokens that all
rows begin with are computed once. Both are exact."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier.data.stream import Micro

WORTH = 0.05  # share of the tokens that sharing must save to be worth the copies of keys and values it costs


def trim(micro: Micro) -> Micro:
    """`micro` without the tokens after each segment's last supervised one, and without segments that have none."""
    bounds, rows = torch.tensor(micro.bounds), micro.rows.cpu()
    edges = torch.searchsorted(rows, bounds)
    learned = edges.diff() > 0
    starts, ends = bounds[:-1][learned], rows[edges[1:][learned] - 1] + 1
    return _kept(
        micro, _ranges(starts, ends), (ends - starts).tolist(), micro.samples[learned.to(micro.samples.device)]
    )


def share_prefix(micro: Micro) -> tuple[Micro, int]:
    """`micro` with the tokens that all segments begin with moved into a first segment of their own, and their number.

    The other segments must see that first one too. Supervised tokens stay apart: each counts in its own loss. Where
    sharing saves too little, or nothing, the number is 0 and nothing changes.
    """
    bounds = torch.tensor(micro.bounds)
    others = len(bounds) - 2
    prefix = _common(micro) if others > 0 else 0
    if prefix * others <= WORTH * len(micro.ids):
        return micro, 0
    starts = bounds[:-1] + prefix
    starts[0] = 0
    lengths = (bounds.diff() - prefix).tolist()
    return _kept(micro, _ranges(starts, bounds[1:]), [prefix, *lengths], micro.samples), prefix


def _common(micro: Micro) -> int:
    """How many tokens all segments begin with, before the first that has a supervised next token."""
    most = int(micro.positions[micro.rows].min())
    beginnings = torch.stack([micro.ids[start : start + most] for start in micro.bounds[:-1]])
    return int((beginnings == beginnings[0]).all(0).long().cumprod(0).sum())


def _ranges(starts: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])


def _kept(micro: Micro, kept: Tensor, lengths: list[int], samples: Tensor) -> Micro:
    """Only the tokens `kept` (ascending), in segments of `lengths`."""
    kept = kept.to(micro.ids.device)
    return replace(
        micro,
        ids=micro.ids[kept],
        positions=micro.positions[kept],
        bounds=(0, *torch.tensor(lengths).cumsum(0).tolist()),
        rows=torch.searchsorted(kept, micro.rows),
        samples=samples,
    )
