"""The activation's gradient, and that of the A of the adapter which reads the activation: dinnerᵀ · h.

That sum reads all of the hidden values h, and nothing else of a backward pass does. So `launched` stores none of them:
a program takes a block of columns and a chunk of rows, has h at hand when it computes the gradient of what h was made
of, and leaves a part of the sum. A second launch adds the parts up, in one order. The plain twin is
`activate_backward_dA` of `pointwise.py`, and `tests/contract/test_activated.py` holds this to it, through Triton's
interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kernels.adapted import RANKS, Blocks, ahead
from luthier.kernels.place import launch
from luthier.kernels.pointwise import Activation

ROWS = 32  # tokens that a program reads at a time
BLOCKS = Blocks(128, 1056, 4, 2)  # of 26 that were tried on an H200: the smallest parts among those as fast as the best


def takes(dh: Tensor, x: Tensor, dinner: Tensor, dA: Tensor) -> bool:
    """Whether h is not stored for these."""
    return len(dA) <= RANKS <= dinner.shape[1] and ahead(dh, {dh.stride(0), x.stride(0), dinner.stride(0)})


def launched(dh: Tensor, x: Tensor, act: Activation, gated: bool, dinner: Tensor, dA: Tensor, how: Blocks) -> Tensor:
    """As `activate_backward_dA`, with blocks of this size."""
    assert dh.is_contiguous()
    assert dA.is_contiguous()
    (tokens, width), ranks = dh.shape, len(dA)
    blocks = -(-width // how.columns)
    chunk = ROWS * -(-tokens * blocks // (ROWS * how.programs))
    chunks = -(-tokens // chunk)
    parts = dh.new_empty(chunks, ranks, width, dtype=torch.float32)
    launch(
        "activate_backward_dA", (blocks, chunks), dh, x, dinner, parts,
        tokens, chunk, width, ranks, x.stride(0), dinner.stride(0), ACT=act, GATED=gated,
        ROWS=ROWS, COLUMNS=how.columns, RANKS=RANKS, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
    launch("dA_sums", (-(-dA.numel() // 512),), parts, dA, chunks, dA.numel(), BLOCK=512, PARTS=8)
    return x
