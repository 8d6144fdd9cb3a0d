"""The gradient of causal attention inside each segment of a packed row, in Triton: in one order, without copies.

FlashAttention 2 adds up the gradient of the queries in fp32 in memory, which it must clear before and round after, and
computes those of keys and values for each query head, to be summed. Here each block of queries, and each block of keys
with all query heads that share them, is written once, by the program that computed it; the products of queries and keys
are taken twice for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from luthier.allocator import out_of_memory
from luthier.kernels.ends import Ends
from luthier.kernels.place import capability
from luthier.kernels.sizes import power_of_2

LARGEST = 128  # head size: two gradients of a block of keys are kept in registers
SHARED = 8  # query heads that share keys, at most: a program goes through them one after the other


Parts = Sequence[Tensor]
Turn = tuple[Tensor, Tensor]


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and how many blocks it reads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


class How(NamedTuple):
    """How gradients are computed."""

    queries: Blocks
    keys: Blocks
    apart: bool = False  # each query head has programs of its own for the keys it shares, and what they find is summed


# Measured: tests/gpu/cudnn_costs.py.
QUERIES, KEYS = Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2)
KEYS_ALONE = Blocks(64, 64, 4, 3)  # which a multiprocessor's memory holds once, and not twice
QUERIES_64, KEYS_64 = Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)  # for heads of 64 values and less
# Programs of whole groups, for 132 multiprocessors:
FEW, FEW_64 = 150, 264  # where there are fewer, each query head has its own
SOME = 350  # where there are fewer, a second one on a multiprocessor finds little to do meanwhile


def takes(q: Tensor, k: Tensor, v: Tensor, longest: int) -> bool:
    """Whether `gradients` is for these, for which `varlen.takes` holds: on Hopper, whose shared memory holds the
    blocks. Places inside a segment, of the gradients side by side too, are numbers of 32 bits."""
    size = q.shape[-1]
    width = (q.shape[1] + 2 * k.shape[1]) * size
    return (
        capability(q)[0] == 9
        and torch.version.hip is None  # AMD counts otherwise
        and size <= LARGEST
        and q.shape[1] <= SHARED * k.shape[1]
        and all(x.stride()[1:] == (size, 1) for x in (q, k, v))
        and longest * max(width, *(x.stride(0) for x in (q, k, v))) < 2**30  # or twice as far, with spare columns
        and (starts(q.device) if q.is_cuda else find_spec("triton") is not None)
    )


@cache
def starts(place: torch.device) -> bool:
    """Whether Triton starts a kernel there: it builds what starts one with a C compiler, and not every machine has one.
    Training does not need it, so that it stops nobody."""
    try:
        from luthier.kernels import varlen_jit

        one, out = torch.ones(2, 16, device=place), torch.empty(2, 16, device=place)
        varlen_jit.summed[1, 2](one, None, None, out, 16, 16, HALF=0, WIDTH=16, PARTS=1, SIZE=16, BLOCK=16)
    except Exception as error:  # of many kinds, a compiler's that fails among them
        if out_of_memory(error):  # it may start later
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"flash attention computes the gradients of attention, as Triton cannot: {reason}", stacklevel=2)
        return False
    return True


def how(tokens: int, heads: int, groups: int, size: int) -> How:
    """For so many tokens, query heads, key heads, and values of a head. It follows from nothing else, as the order of
    sums does."""
    programs = groups * tokens / KEYS.keys
    if size <= 64:
        return How(QUERIES_64, KEYS_64, apart=groups < heads and programs < FEW_64)
    apart = groups < heads and programs < FEW
    return How(QUERIES, KEYS_ALONE if programs < SOME and not apart else KEYS, apart)


def gradients(
    do: Tensor, o: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, into: Parts,
    turn: Turn | None = None,
) -> None:  # fmt: skip
    """Those of q [T, Hq, D], and of k and v [T, Hk, D].

    Args:
        do, o: [T, Hq, D].
        sums: fp32 [Hq, T], the logarithms of the sums of exponentials.
        ends: of the segments.
        into: where they are written, as far from token to token; the heads of a token lie side by side.
        turn: cos and sin [T, D / 2] of the rotary embedding of halves of a head; then they are those of what q and k
            were before it. D is a power of two.
    """
    chosen = how(*q.shape[:2], *k.shape[1:])
    tables = [places(ends, len(q), size) for size in (chosen.queries.rows, chosen.keys.keys)]
    parts = q.new_empty(2, *q.shape, dtype=torch.float32) if chosen.apart else None
    cos, sin = turn or (None, None)
    rest = (ends.longest, scale, cos, sin, torch.empty_like(sums), parts, *into)
    torch.ops.luthier.varlen_backward(do, o, sums, q, k, v, *tables, *rest)


def places(ends: Ends, tokens: int, size: int) -> Tensor:
    """int32 [n, 3]: where programs find the blocks of `size` tokens that segments are cut into. Those with most tokens
    from their first to the segment's end come first, since they take longest; the last ones are empty.

    Each is told as the token with which its segment begins, the segment's tokens, and those of them before the block.
    """
    return ends.made((_cut, size), lambda: _cut(ends.edges, tokens, size))


def _cut(edges: Tensor, tokens: int, size: int) -> Tensor:
    numbers = torch.arange(tokens // size + len(edges) - 1, dtype=torch.int32, device=edges.device)
    starts, lengths = edges[:-1], edges.diff()
    # From here on segments have numbers for their blocks: a number each besides one for every `size` tokens is enough.
    firsts = starts // size + numbers[: len(starts)]
    owners = torch.searchsorted(firsts, numbers, right=True) - 1
    before = (numbers - firsts[owners]) * size
    found = torch.stack([starts[owners], lengths[owners], before], 1)
    return found[(found[:, 2] - found[:, 1]).argsort(stable=True)]


def launched(
    do: Tensor, o: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, query_places: Tensor, key_places: Tensor,
    longest: int, scale: float, cos: Tensor | None, sin: Tensor | None, inner: Tensor, parts: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, chosen: How | None = None,
) -> None:  # fmt: skip
    """`gradients`, with blocks where `places` says, and room for what they need meanwhile."""
    (tokens, heads, size), groups = q.shape, k.shape[1]
    queries, keys, _ = chosen or how(tokens, heads, groups, size)
    if dq.is_meta:
        return
    from luthier.kernels import varlen_jit

    do, group = _side_by_side(do), heads // groups
    known, half = fixed(q, k), 0 if cos is None else size // 2
    numbers, steps = (scale, *sums.stride(), do.stride(0)), [x.stride(0) for x in (q, k, v)]
    varlen_jit.queries[heads, len(query_places)](
        do, o, q, k, v, sums, inner, query_places, cos, sin, dq, *numbers, o.stride(0), *steps, dq.stride(0),
        **known, HALF=half, **options(queries),
    )  # fmt: skip
    programs, each, found = (groups, group, (dk, dv)) if parts is None else (heads, 1, parts.unbind())
    varlen_jit.keys_and_values[programs, len(key_places)](
        do, q, k, v, sums, inner, key_places, cos, sin, *found, *numbers, *steps, found[0].stride(0),
        **known, HALF=half if parts is None else 0, HEADS=each, **options(keys),
    )  # fmt: skip
    if parts is not None:
        sizes = {"HALF": half, "WIDTH": groups * size, "PARTS": group, "SIZE": size}
        between = (dv.data_ptr() - dk.data_ptr()) // dk.itemsize
        varlen_jit.summed[tokens, 2](
            parts, cos, sin, dk, between, dk.stride(0), **sizes, BLOCK=power_of_2(groups * size), num_warps=2
        )


def _side_by_side(x: Tensor) -> Tensor:
    """x [T, H, D], whose values of a token lie side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def fixed(q: Tensor, k: Tensor) -> dict[str, int]:
    """What is compiled into a kernel of the heads."""
    size = q.shape[2]
    return {"GROUP": q.shape[1] // k.shape[1], "SIZE": size, "WIDE": max(16, power_of_2(size))}


def options(blocks: Blocks) -> dict[str, Any]:
    """What is compiled into a kernel of its blocks."""
    return {"ROWS": blocks.rows, "KEYS": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}


# An operation of torch's, so that a plan sees it and its arithmetic.

_operations: Any = library.Library("luthier", "FRAGMENT")  # type: ignore[no-untyped-call]
_names = ("do", "o", "sums", "q", "k", "v", "query_places", "key_places")
_read = ", ".join(f"Tensor {name}" for name in _names)
_turned = "Tensor? cos, Tensor? sin"
_written = "Tensor(a!) inner, Tensor(b!)? parts, Tensor(c!) dq, Tensor(d!) dk, Tensor(e!) dv"
_operations.define(f"varlen_backward({_read}, int longest, float scale, {_turned}, {_written}) -> ()")
_operations.impl("varlen_backward", launched, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.luthier.varlen_backward)
def _flops(*shapes: Any, **_: Any) -> int:
    """Seven products of the causal half, all segments as long as the longest."""
    (tokens, heads, size), longest = shapes[3], shapes[8]
    return 7 * int(tokens * longest * heads * size)
