"""Where the segments of packed rows begin and end, as kernels are told of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Ends:
    """The ends of the segments of packed rows, and what kernels make of them, once for all layers that share them.

    Attributes:
        edges: int32 [n + 1], the segment boundaries from 0 to T, where the tokens are.
        longest: tokens of the longest segment, or more.
    """

    def __init__(self, edges: Tensor, longest: int) -> None:
        self.edges, self.longest = edges, longest
        self._made: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        """How many segments there are, empty ones among them."""
        return len(self.edges) - 1

    def made(self, what: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned when `what` was first asked for."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]  # type: ignore[no-any-return]
