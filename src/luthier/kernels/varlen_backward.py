"""The gradient of causal attention inside each segment of a packed row, in Triton: in one order, without copies.

FlashAttention 2 adds up the gradient of the queries in fp32 in memory, which it must clear before and round after, and
computes those of keys and values for each query head, to be summed. Here each block of queries, and each block of keys
with all query heads that share them, is written once, by the program that computed it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and how many blocks it reads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


QUERIES, KEYS = Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)


def varlen_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, edges: Tensor, longest: int, scale: float,
    queries: Blocks = QUERIES, keys: Blocks = KEYS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q [T, Hq, D], and of k and v [T, Hk, D], side by side in one tensor [T, Hq + 2 Hk, D].

    Args:
        do, o: [T, Hq, D], contiguous.
        sums: fp32 [Hq, T], the logarithms of the sums of exponentials.
        edges, longest, scale: those of `varlen.varlen_attention`.
    """
    (tokens, heads, size), groups = q.shape, k.shape[1]
    do = do.contiguous()
    dy = q.new_empty(tokens, heads + 2 * groups, size)
    dq, dk, dv = torch.split(dy, [heads, groups, groups], 1)
    inner = torch.empty_like(sums)
    if dy.is_meta:
        return dq, dk, dv
    from luthier.kernels import varlen_jit

    segments, reads = len(edges) - 1, (q.stride(0), k.stride(0), v.stride(0), do.stride(0))
    fixed = {"GROUP": heads // groups, "SIZE": size, "WIDE": 1 << (size - 1).bit_length()}
    numbers = (scale, tokens, *reads)
    varlen_jit.queries[-(-longest // queries.rows), heads, segments](
        do, q, k, v, o, sums, edges, dq, inner, *numbers, dq.stride(0), **fixed, **_options(queries)
    )  # fmt: skip
    varlen_jit.keys_and_values[-(-longest // keys.keys), groups, segments](
        do, q, k, v, sums, edges, dk, dv, inner, *numbers, dk.stride(0), dv.stride(0), **fixed, **_options(keys)
    )  # fmt: skip
    return dq, dk, dv


def _options(blocks: Blocks) -> dict[str, Any]:
    return {"ROWS": blocks.rows, "KEYS": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}
