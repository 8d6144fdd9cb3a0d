"""The gradient of causal attention inside each segment of a packed row, in Triton: in one order, without copies.

FlashAttention 2 adds up the gradient of the queries in fp32 in memory, which it must clear before and round after, and
computes those of keys and values for each query head, to be summed. Here each block of queries, and each block of keys
with all query heads that share them, is written once, by the program that computed it; the products of queries and keys
are taken twice for it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from luthier.kernels.place import capability

LARGEST = 128  # head size: two gradients of a block of keys are kept in registers
SHARED = 8  # query heads that share keys, at most: a program goes through them one after the other


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
        and longest * max(width, *(x.stride(0) for x in (q, k, v))) < 2**31
        and find_spec("triton") is not None
    )


def gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, edges: Tensor, longest: int, scale: float
) -> Tensor:
    """Those of q [T, Hq, D], and of k and v [T, Hk, D], side by side in one tensor [T, Hq + 2 Hk, D].

    Args:
        do, o: [T, Hq, D], `o` contiguous.
        sums: fp32 [Hq, T], the logarithms of the sums of exponentials.
        edges, longest, scale: those of `varlen.varlen_attention`.
    """
    return torch.ops.luthier.varlen_backward(do, q, k, v, o, sums, edges, longest, scale)  # type: ignore[no-any-return]


def launched(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, edges: Tensor, longest: int, scale: float,
    queries: Blocks = QUERIES, keys: Blocks = KEYS,
) -> Tensor:  # fmt: skip
    """`gradients`, by blocks of these sizes."""
    (tokens, heads, size), groups = q.shape, k.shape[1]
    dy, inner = q.new_empty(tokens, heads + 2 * groups, size), torch.empty_like(sums)
    if dy.is_meta:
        return dy
    from luthier.kernels import varlen_jit

    do, segments = do.contiguous(), len(edges) - 1
    dq, dk, dv = torch.split(dy, [heads, groups, groups], 1)
    fixed = {"GROUP": heads // groups, "SIZE": size, "WIDE": max(16, 1 << (size - 1).bit_length())}
    numbers = (inner, scale, tokens, q.stride(0), k.stride(0), v.stride(0), do.stride(0), dy.stride(0))
    varlen_jit.queries[heads, segments, -(-longest // queries.rows)](
        do, q, k, v, o, sums, edges, dq, *numbers, **fixed, **_options(queries)
    )
    varlen_jit.keys_and_values[groups, segments, -(-longest // keys.keys)](
        do, q, k, v, sums, edges, dk, dv, *numbers, **fixed, **_options(keys)
    )
    return dy


def _options(blocks: Blocks) -> dict[str, Any]:
    return {"ROWS": blocks.rows, "KEYS": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}


# An operation of torch's, so that a plan sees it and its arithmetic.

_operations: Any = library.Library("luthier", "FRAGMENT")  # type: ignore[no-untyped-call]
_tensors = ", ".join(f"Tensor {name}" for name in ("do", "q", "k", "v", "o", "sums", "edges"))
_operations.define(f"varlen_backward({_tensors}, int longest, float scale) -> Tensor")
_operations.impl("varlen_backward", launched, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.luthier.varlen_backward)
def _flops(do: Any, q: Any, k: Any, v: Any, o: Any, sums: Any, edges: Any, longest: int, scale: float, **_: Any) -> int:
    """Seven products of the causal half, all segments as long as the longest."""
    tokens, heads, size = q
    return 7 * int(tokens * longest * heads * size)
