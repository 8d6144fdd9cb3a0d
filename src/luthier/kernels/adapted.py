"""What the gradient dy of a merged product means to the adapters in it: dy · B, and dyᵀ · inner, the gradient of B.

Both read all of dy, and little else: as two products they take twice as long as one reading of it. `at_once` reads it
once, in Triton: a program takes a block of columns and a chunk of rows, and leaves a part of the one sum and a part of
the other, which a second launch adds up, in one order. `one_by_one` is the plain twin, and `tests/contract/
test_adapted.py` holds this to it, through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels.place import capability, launch, on_gpu

RANKS = 16  # of an adapter, at most: a program keeps its part of the gradient of B in registers
ROWS = 64  # tokens that a program reads at a time


class Part(NamedTuple):
    """An adapter of a merged product: its columns of dy, and its ranks, which follow those of the one before."""

    columns: tuple[int, int]
    ranks: tuple[int, int]


class Blocks(NamedTuple):
    """Columns of a program, how many programs there are at most, their warps, and how many blocks of rows they read
    ahead."""

    columns: int
    programs: int
    warps: int
    stages: int


BLOCKS = Blocks(512, 132, 8, 3)  # of 28 that were tried on an H200, for its 132 multiprocessors (docs/log.md)


def one_by_one(dy: Tensor, B: Tensor, inner: Tensor, parts: Sequence[Part], dinner: Tensor, dB: Tensor) -> None:
    """Writes dy · B and dyᵀ · inner.

    Args:
        dy: [T, N].
        B: [N, S], zero beside what a part's columns have to do with its own ranks.
        inner: [T, S].
        parts: the adapters; others of the product may have none, or one that is switched off.
        dinner: [T, S], for dy · B.
        dB: [N, S], for dyᵀ · inner; only what a part's columns have to do with its own ranks is asked for.
    """
    torch.mm(dy, B, out=dinner)
    torch.mm(dy.t(), inner, out=dB)


def at_once(dy: Tensor, B: Tensor, inner: Tensor, parts: Sequence[Part], dinner: Tensor, dB: Tensor) -> None:
    """`one_by_one`, with one reading of dy where `takes` holds. Of dB only what is asked for is written."""
    if takes(dy, parts):
        launched(dy, B, inner, parts, dinner, dB, BLOCKS)
    else:
        one_by_one(dy, B, inner, parts, dinner, dB)


def takes(dy: Tensor, parts: Sequence[Part]) -> bool:
    """Whether dy is read once for these."""
    columns = {number for part in parts for number in part.columns}
    small = all(end - start <= RANKS and start % 8 == 0 for _, (start, end) in parts)
    return small and ahead(dy, {dy.stride(0), *columns})


def ahead(x: Tensor, places: Collection[int]) -> bool:
    """Whether blocks of x [T, N] are read ahead: on Hopper, whose shared memory holds them; 16-bit values, of which 16
    bytes are read at a time. `places`: where they begin, and how far apart."""
    hopper = on_gpu(x) and capability(x)[0] == 9 and torch.version.hip is None  # AMD counts otherwise
    even = not any(number % 16 for number in places)
    return hopper and x.dtype in (torch.bfloat16, torch.float16) and even and len(x) > 0


def launched(
    dy: Tensor, B: Tensor, inner: Tensor, parts: Sequence[Part], dinner: Tensor, dB: Tensor, how: Blocks
) -> None:
    """`at_once`, with blocks of this size."""
    (tokens, width), spare = dy.shape, B.shape[1]
    blocks, sums = _tables(tuple(parts), spare, how.columns, dy.device)
    chunk = ROWS * -(-tokens * len(blocks) // (ROWS * how.programs))
    chunks = -(-tokens // chunk)
    inner_parts = dy.new_empty(len(blocks), tokens, RANKS, dtype=torch.float32)
    B_parts = dy.new_empty(chunks, width, RANKS, dtype=torch.float32)
    numbers = (tokens, chunk, width, spare, dy.stride(0), B.stride(0), inner.stride(0))
    launch(
        "adapted", (len(blocks), chunks), dy, B, inner, blocks, inner_parts, B_parts, *numbers,
        ROWS=ROWS, COLUMNS=how.columns, RANKS=RANKS, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
    rows = max(tokens, *(end - start for (start, end), _ in parts))
    grid, steps = (-(-rows * RANKS // 512), len(sums), 2), (dinner.stride(0), dB.stride(0))
    launch(
        "adapted_sums", grid, inner_parts, B_parts, sums, dinner, dB, tokens, chunks, width, *steps,
        RANKS=RANKS, BLOCK=512, PARTS=8,
    )  # fmt: skip


@cache
def _tables(parts: tuple[Part, ...], spare: int, size: int, place: torch.device) -> tuple[Tensor, Tensor]:
    """What a recording cannot bring there. Where the blocks of `size` columns are, int32 [n, 3]: the first column, how
    many there are, and the first rank. And what is added up, int32 [m, 6]: the first block and the one behind the last;
    the first column and how many, the first rank and how many. Columns of `inner` that are nobody's rank are the sum
    of no block."""
    blocks: list[list[int]] = []
    sums = []
    for (start, end), (rank, last) in parts:
        first = len(blocks)
        blocks += [[at, min(size, end - at), rank] for at in range(start, end, size)]
        sums.append([first, len(blocks), start, end - start, rank, last - rank])
    sums += [[0, 0, 0, 0, at, min(RANKS, spare - at)] for at in range(parts[-1].ranks[1], spare, RANKS)]
    table, more = (torch.tensor(rows, dtype=torch.int32).to(place) for rows in (blocks, sums))
    return table, more
