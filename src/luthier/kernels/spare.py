"""Activations with spare columns behind each row, in which an adapter's inner values find their place.

A product with the adapters folded in reads [x | inner] as one matrix: who writes x leaves room for `inner` there, so
that x is never copied. Everyone else sees x [rows, width] alone, a view whose rows lie further apart.
"""

from __future__ import annotations

from torch import Tensor


def empty(like: Tensor, rows: int, width: int, spare: int) -> Tensor:
    """[rows, width] without values, of the dtype and device of `like`, with `spare` more columns behind each row."""
    made = like.new_empty(rows, width + spare)
    return made[:, :width] if spare else made


def has(x: Tensor, spare: int) -> bool:
    """Whether x [rows, width] lies in memory as `empty` gives it, which holds nothing else."""
    rows, width = x.shape
    whole = x.storage_offset() == 0 and x.untyped_storage().nbytes() == rows * (width + spare) * x.itemsize
    return x.stride() == (width + spare, 1) and whole


def made(x: Tensor, spare: int) -> Tensor:
    """x itself where it has those columns, else a copy that does."""
    return x if has(x, spare) else empty(x, len(x), x.shape[1], spare).copy_(x)


def whole(x: Tensor, spare: int) -> Tensor:
    """x [rows, width] and the columns behind it, [rows, width + spare]. x is one that `empty` gave."""
    rows, width = x.shape
    assert has(x, spare), f"rows of {width} are {x.stride()} apart, which leaves no {spare} spare columns"
    return x.as_strided((rows, width + spare), (width + spare, 1))
