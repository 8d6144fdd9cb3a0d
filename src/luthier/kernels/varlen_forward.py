"""Causal attention inside each segment of a packed row, in Triton, where cuDNN computes it less well.

cuDNN is told how long the longest segment is, and has programs for as long a one in the place of every other: where
heads are small, those take longer than the work. Here there is a program for each block of queries that there is. In
short segments of larger heads both take about as long (`tests/gpu/cudnn_costs.py`), but cuDNN takes a second to plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kernels import varlen_backward
from luthier.kernels.ends import Ends
from luthier.kernels.spare import empty
from luthier.kernels.varlen_backward import Blocks, fixed, options, places

LARGEST = 64  # head size
SHORT = 1024  # tokens of the longest segment: then `varlen_backward.LARGEST` is the largest head, too
QUERIES, QUERIES_64 = Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3)  # larger heads, and heads of 64 values and less


def takes(q: Tensor, k: Tensor, v: Tensor, longest: int) -> bool:
    """Whether `forward` is for these, for which `varlen.takes` holds: where their gradient is ours, too. A plan traces
    flash attention instead, which leaves the same."""
    better = q.shape[2] <= LARGEST or longest <= SHORT
    return q.is_cuda and better and varlen_backward.takes(q, k, v, longest)


def forward(q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """[T, Hq, D], with `spare` more values behind each token, and the fp32 logarithms [Hq, T] of the sums of
    exponentials."""
    tokens, heads, size = q.shape
    o, sums = empty(q, tokens, heads * size, spare).view(q.shape), q.new_empty(heads, tokens, dtype=torch.float32)
    queries = QUERIES_64 if size <= 64 else QUERIES
    launched(q, k, v, places(ends, tokens, queries.rows), scale, o, sums, queries)
    return o, sums


def launched(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, scale: float, o: Tensor, sums: Tensor, queries: Blocks
) -> None:
    """`forward`, by blocks of this size, where `places` says."""
    from luthier.kernels import varlen_jit

    steps = [x.stride(0) for x in (q, k, v, o)]
    varlen_jit.attended[q.shape[1], len(blocks)](
        q, k, v, blocks, o, sums, scale, *sums.stride(), *steps, **fixed(q, k), **options(queries)
    )
