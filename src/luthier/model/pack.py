"""What of a micro-batch is computed. Tokens that no supervised token sees are left out, and the tokens that all rows
begin with are computed once; for recorded steps there are some more, which change nothing. All is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.data.stream import Micro
from luthier.kernels.loss import IGNORED
from luthier.kernels.sizes import power_of_2
from luthier.model.shape import padded_tokens

ROUND = 128  # tokens, and rows, that the shapes of a run are multiples of: products are computed in tiles of so many
WORTH = 0.05  # share of the tokens that sharing must save to be worth the copies of keys and values it costs


@dataclass(frozen=True)
class Placed(Micro):
    """A micro-batch where a GPU reads it: its numbers are views of one tensor, which came in one copy."""

    owners: Tensor  # int64 [T]: each token's sample
    edges: Tensor  # int32 [n + 1]: `bounds`
    longest: int  # tokens of the longest segment, or more
    key: Tensor  # int64 [1]: dropout's `mask_key` of seed and step


class Shape(NamedTuple):
    """How much a padded micro-batch holds: tokens, supervised rows, segments, and tokens of the longest segment."""

    tokens: int
    rows: int
    segments: int
    longest: int


class Coming(NamedTuple):
    """The sizes of a run's first micro-batches, trimmed, and how often as many come in all of the run."""

    sizes: list[Shape]
    times: float


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


def shape(micro: Micro, longest: int = 1) -> Shape:
    """The shape that `micro` is padded to, for segments of at least `longest` tokens: one of few.

    Each costs a pass launched one by one and a recording, some 0.3 s. In steps of few tokens a small model's GPU waits
    from launch to launch even so, and more tokens cost little; from 8,192 on it is at most an eighth more than needed.
    """
    count = len(micro.ids)
    tokens = padded_tokens(count)
    some = max(512, tokens // 8)
    rows = -(-len(micro.rows) // some) * some
    longest = max(128, longest, power_of_2(max(b - a for a, b in pairwise(micro.bounds))))
    more = -(-(tokens - count) // longest)
    segments = power_of_2(max(8, tokens // 128, len(micro.bounds) - 1 + more))
    # So many segments, all as long as the longest, would look like a batch.
    return Shape(tokens, rows, segments if segments * longest > tokens else 2 * segments, longest)


def size(micro: Micro) -> Shape:
    """How much `micro` holds as it is."""
    longest = max(b - a for a, b in pairwise(micro.bounds))
    return Shape(len(micro.ids), len(micro.rows), len(micro.bounds) - 1, longest)


def choose(sizes: Sequence[Shape], price: float, row: float, limit: int) -> list[Shape]:
    """The shapes, at most `limit`, that micro-batches of these sizes are padded to so that they take the least time in
    all, the smallest first. Times are in tokens: a shape costs `price`, and a supervised row as much as `row` tokens.

    Micro-batches that share a shape are neighbours in the order of their tokens, so the best cut of that order is the
    best cut of its beginning and one more group.
    """
    kinds = _kinds(sizes)
    best: list[tuple[float, list[Shape]]] = [(0.0, [])]
    for end in range(len(kinds)):
        groups = _groups(kinds[: end + 1])
        cuts = [(best[start], shape, count * (shape.tokens + row * shape.rows)) for start, shape, count in groups]
        least, shape, cost = min(cuts, key=lambda cut: cut[0][0] + cut[2])
        best.append((least[0] + cost + price, [*least[1], shape]))
    found = best[-1][1]
    return found if len(found) <= limit else choose(sizes, 2 * max(price, 1.0), row, limit)


def _kinds(sizes: Sequence[Shape]) -> list[tuple[Shape, int]]:
    """A shape for each rounded number of tokens, ascending, and how many of `sizes` it holds. Segments, which cost next
    to nothing, are as many and as long in all, since attention's programs are made for their numbers."""
    if not sizes:
        return []
    most = Shape(*(max(column) for column in zip(*sizes, strict=True)))
    longest = power_of_2(max(ROUND, most.longest))
    segments = power_of_2(most.segments + -(-_rounded(most.tokens) // longest))
    rows: dict[int, list[int]] = {}
    for size in sizes:
        rows.setdefault(_rounded(size.tokens), []).append(size.rows)
    return [(Shape(t, min(t, _rounded(max(r))), segments, longest), len(r)) for t, r in sorted(rows.items())]


def _groups(kinds: Sequence[tuple[Shape, int]]) -> Iterator[tuple[int, Shape, int]]:
    """(first, shape that holds them all, how many they hold) of all runs of `kinds` that end with the last."""
    rows = count = 0
    for first in range(len(kinds) - 1, -1, -1):
        shape, more = kinds[first]
        rows, count = max(rows, shape.rows), count + more
        yield first, kinds[-1][0]._replace(rows=rows), count


def fits(micro: Micro, shape: Shape) -> bool:
    """Whether `micro` can be padded to `shape`."""
    mine = size(micro)
    more = -(-(shape.tokens - mine.tokens) // shape.longest)
    return (
        mine.tokens <= shape.tokens
        and mine.rows <= shape.rows
        and mine.segments + more <= shape.segments
        and mine.longest <= shape.longest
    )


def _rounded(count: int) -> int:
    return -(-count // ROUND) * ROUND


def padded(micro: Micro, shape: Shape) -> Micro:
    """`micro` with as much of everything as `shape` says. Its loss and its gradients stay what they are.

    Tokens are added in segments of their own, the same tokens again, so that no number appears in them that none of
    ours would lead to; then segments of no tokens. Rows are added among the tokens that are not supervised, each once,
    with targets that the loss ignores.
    """
    count, samples = len(micro.ids), len(micro.samples)
    places = torch.arange(shape.tokens - count)
    bounds = [*micro.bounds, *range(count + shape.longest, shape.tokens, shape.longest)]
    targets = torch.full((shape.tokens,), IGNORED)
    targets[micro.rows] = micro.targets
    spare = (targets == IGNORED).nonzero()[:, 0]
    rows = torch.cat([micro.rows, spare[len(spare) - (shape.rows - len(micro.rows)) :]]).sort().values
    return replace(
        micro,
        ids=torch.cat([micro.ids, micro.ids[places % count]]),
        positions=torch.cat([micro.positions, places % shape.longest]),
        bounds=(*bounds, *[shape.tokens] * (shape.segments + 1 - len(bounds))),
        rows=rows,
        targets=targets[rows],
        samples=torch.cat([micro.samples, micro.samples.new_zeros(shape.segments - samples)]),
    )


def numbers(micro: Micro, key: int) -> Tensor:
    """int64: all that a GPU is told of `micro`, and dropout's `key`, one after the other, so that it is one copy."""
    bounds, key_of_step = (torch.tensor(x, device=micro.ids.device) for x in (micro.bounds, [key]))
    owners = micro.samples.repeat_interleave(bounds.diff(), output_size=len(micro.ids))
    return torch.cat([micro.ids, micro.positions, owners, micro.rows, micro.targets, bounds, key_of_step])


def placed(numbers: Tensor, micro: Micro, longest: int) -> Placed:
    """`micro`, or another one of its shape, whose `numbers` are these."""
    tokens, rows, bounds = len(micro.ids), len(micro.rows), len(micro.bounds)
    ids, positions, owners, places, targets, edges, key = torch.split(numbers, [tokens] * 3 + [rows] * 2 + [bounds, 1])
    rest = micro.samples, micro.step, owners, edges.int(), longest, key
    return Placed(ids, positions, micro.bounds, places, targets, *rest)


def _common(micro: Micro) -> int:
    """How many tokens all segments begin with, before the first that has a supervised next token."""
    most = int(micro.positions[micro.rows].min())
    beginnings = torch.stack([micro.ids[start : start + most] for start in micro.bounds[:-1]])
    return int((beginnings == beginnings[0]).all(0).long().cumprod(0).sum())


def _ranges(starts: Tensor, ends: Tensor) -> Tensor:
    """start, start + 1, … up to its end, for each start."""
    lengths = ends - starts
    shifts = starts - lengths.cumsum(0) + lengths
    return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


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
