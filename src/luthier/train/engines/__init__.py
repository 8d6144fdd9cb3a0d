"""How the processes of a run work as one. An engine decides nothing about learning: its loss curve equals `local`.

To add one: a class with these members, and a line in ENGINES; `tests/contract/test_engines.py` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from luthier.registry import Registry

ENGINES = Registry(
    "engine",
    {"local": "luthier.train.engines.local:Local", "ddp": "luthier.train.engines.ddp:DataParallel"},
)


class Engine(Protocol):
    """What the loop asks of an engine. Every process calls the same methods in the same order."""

    rank: int
    """This process's number, from 0. Only rank 0 writes files."""
    ranks: int

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which of a step's rows, given by their lengths, this process works on."""

    def reduce(self, values: Tensor) -> None:
        """Sums `values` (flat, or a scalar) over the processes, in place, in an order that is the same each time."""

    def total(self, *values: float) -> list[float]:
        """The sums of `values` over the processes, in float64."""

    def highest(self, value: int) -> int:
        """The largest `value` of any process: how they agree that one was signalled or ran out of memory."""

    def close(self) -> None: ...
