"""Which rows share a forward pass, decided from their lengths alone. Pure functions of integers."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs rows into micro-batches of at most `budget` tokens: first-fit decreasing.

    Every index appears once. A row longer than the budget has a pack of its own. First-fit decreasing needs at most
    11/9 of the least possible number of packs, plus one (Johnson 1973). A tree over the packs' free space finds the
    first fit in O(log n), so a whole run is packed in O(n log n).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs: list[list[int]] = []
    free = _Free(len(lengths), budget)
    for row in order:
        pack = free.first(min(lengths[row], budget))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        free.take(pack, min(lengths[row], budget))
    return packs


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Shares rows among `ranks` processes so that their tokens are about equal: longest first, to the least loaded.

    Deterministic; each rank's rows are in ascending order. The largest load is at most 4/3 of the least possible one
    (Graham 1969).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    heapify(loads)
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, rank = loads[0]
        shares[rank].append(row)
        heapreplace(loads, (load + lengths[row], rank))
    return [sorted(rows) for rows in shares]


class _Free:
    """The free space of a row of packs, as a binary tree of maxima: the leftmost pack with room in O(log n)."""

    def __init__(self, packs: int, budget: int) -> None:
        self._leaves = 1 << max(packs - 1, 0).bit_length()
        self._most = [budget] * (2 * self._leaves)

    def first(self, size: int) -> int:
        node = 1
        while node < self._leaves:
            node = 2 * node if self._most[2 * node] >= size else 2 * node + 1
        return node - self._leaves

    def take(self, pack: int, size: int) -> None:
        node = pack + self._leaves
        self._most[node] -= size
        while node := node // 2:
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
