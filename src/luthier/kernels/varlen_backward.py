"""The gradient of causal attention inside each segment of a packed row, in Triton: in one order, without copies.

FlashAttention 2 adds up the gradient of the queries in fp32 in memory, which it must clear before and round after, and
computes those of keys and values for each query head, to be summed. Here each block of queries, and each block of keys
with all query heads that share them, is written once, by the program that computed it; the products of queries and keys
are taken twice for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from luthier.kernels.ends import Ends
from luthier.kernels.place import capability

LARGEST = 128  # head size: two gradients of a block of keys are kept in registers
SHARED = 8  # query heads that share keys, at most: a program goes through them one after the other


Parts = Sequence[Tensor]


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and how many blocks it reads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


QUERIES, KEYS = Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)


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
        and find_spec("triton") is not None
    )


def gradients(
    do: Tensor,
    o: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Ends,
    scale: float,
    into: Sequence[Tensor],
) -> None:
    """Those of q [T, Hq, D], and of k and v [T, Hk, D].

    Args:
        do, o: [T, Hq, D].
        sums: fp32 [Hq, T], the logarithms of the sums of exponentials.
        ends: of the segments.
        into: where they are written, as far from token to token; the heads of a token lie side by side.
    """
    torch.ops.luthier.varlen_backward(do, o, sums, q, k, v, ends.edges, ends.longest, scale, *into)


def launched(
    do: Tensor, o: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor, queries: Blocks = QUERIES, keys: Blocks = KEYS,
) -> None:  # fmt: skip
    """`gradients`, by blocks of these sizes."""
    (_, heads, size), groups = q.shape, k.shape[1]
    inner = torch.empty_like(sums)
    if dq.is_meta:
        return
    from luthier.kernels import varlen_jit

    do, segments = _side_by_side(do), len(edges) - 1
    fixed = {"GROUP": heads // groups, "SIZE": size, "WIDE": max(16, 1 << (size - 1).bit_length())}
    steps = [x.stride(0) for x in (q, k, v, do, o, dq)]
    numbers = (inner, scale, *sums.stride(), *steps)
    varlen_jit.queries[heads, segments, -(-longest // queries.rows)](
        do, o, q, k, v, sums, edges, dq, *numbers, **fixed, **_options(queries)
    )
    varlen_jit.keys_and_values[groups, segments, -(-longest // keys.keys)](
        do, q, k, v, sums, edges, dk, dv, *numbers, **fixed, **_options(keys)
    )


def _side_by_side(x: Tensor) -> Tensor:
    """x [T, H, D], whose values of a token lie side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _options(blocks: Blocks) -> dict[str, Any]:
    return {"ROWS": blocks.rows, "KEYS": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}


# An operation of torch's, so that a plan sees it and its arithmetic.

_operations: Any = library.Library("luthier", "FRAGMENT")  # type: ignore[no-untyped-call]
_read = ", ".join(f"Tensor {name}" for name in ("do", "o", "sums", "q", "k", "v", "edges"))
_written = ", ".join(f"Tensor({name}!) d{name}" for name in ("q", "k", "v"))
_operations.define(f"varlen_backward({_read}, int longest, float scale, {_written}) -> ()")
_operations.impl("varlen_backward", launched, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.luthier.varlen_backward)
def _flops(do: Any, o: Any, sums: Any, q: Any, k: Any, v: Any, edges: Any, longest: int, *_: Any, **__: Any) -> int:
    """Seven products of the causal half, all segments as long as the longest."""
    tokens, heads, size = q
    return 7 * int(tokens * longest * heads * size)
