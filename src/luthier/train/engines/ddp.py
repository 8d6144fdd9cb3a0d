"""Data parallel: each process holds the whole model and works on its share of a step's rows; gradients are summed.

Made for one single-threaded process per core over gloo: on a CPU that beats one process with as many threads, since
only the adapter's gradients, a few megabytes, travel. Rank and world size come from the environment (`launch.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.data.packing import share

_PATIENCE = timedelta(minutes=30)  # a rank may wait this long for another: rank 0 writes samples and checkpoints


class DataParallel:
    """Reads RANK, WORLD_SIZE and LUTHIER_RENDEZVOUS (a file that the processes meet by)."""

    def __init__(self) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{os.environ['LUTHIER_RENDEZVOUS']}",
            rank=self.rank,
            world_size=self.ranks,
            timeout=_PATIENCE,
        )

    def share(self, lengths: Sequence[int]) -> list[int]:
        return share(lengths, self.ranks)[self.rank]

    def reduce(self, values: Tensor) -> None:
        dist.all_reduce(values)

    def total(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def highest(self, value: int) -> int:
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def close(self) -> None:
        dist.destroy_process_group()
