"""What CUDA's caching allocator reserves for a sequence of allocations, without a GPU.

The rules are those of torch's `c10/cuda/CUDACachingAllocator.cpp` with expandable segments, which `luthier.allocator`
asks for: sizes are multiples of 512 bytes; tensors up to 1 MiB lie in one segment, larger ones in another; the smallest
free block that is large enough is taken and split, where the last one, which can grow, counts as the largest of all
(`get_free_block`); neighbours that are free become one block; where none is large enough the segment grows at its end,
by pages of 2 or 20 MiB (`kSmallBuffer`, `kLargeBuffer`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

_MIB = 1 << 20
_PAGES = {True: 2 * _MIB, False: 20 * _MIB}


@dataclass(eq=False)
class _Block:
    start: int
    size: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


class Segments:
    """Follows `take` and `give`, which name a tensor by any key.

    `used`: bytes of the tensors that are there now. `tops`: the highest byte that the segment of small tensors (True)
    and that of large ones (False) ever reached.
    """

    def __init__(self) -> None:
        self.used, self.tops = 0, {True: 0, False: 0}
        self._taken: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._last: dict[bool, _Block | None] = {True: None, False: None}

    def take(self, key: int, size: int) -> None:
        rounded = -(-max(size, 1) // 512) * 512
        small = rounded <= _MIB
        block = self._fitting(rounded, small) or self._grown(rounded, small)
        self._split(block, rounded)
        self._taken[key] = block
        self.used += block.size

    def give(self, key: int) -> None:
        block = self._taken.pop(key)
        self.used -= block.size
        if block.before is not None and block.before.free:
            self._forget(block.before)
            block = self._joined(block.before, block)
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block = self._joined(block, block.after)
        self._keep(block)

    def _fitting(self, size: int, small: bool) -> _Block | None:
        """The smallest block that is large enough; the last one of the segment is left for `_grown`."""
        blocks = self._free[small]
        place = bisect_left(blocks, (size, 0))
        if place < len(blocks) and blocks[place][2] is self._last[small]:
            place += 1
        return blocks.pop(place)[2] if place < len(blocks) else None

    def _grown(self, size: int, small: bool) -> _Block:
        """A block at the end of the segment; what is free there already is part of it."""
        last = self._last[small]
        if last is not None and last.free:
            self._forget(last)
            last.size = max(last.size, size)
            block = last
        else:
            block = _Block(0 if last is None else last.start + last.size, size, small, before=last)
            if last is not None:
                last.after = block
            self._last[small] = block
        self.tops[small] = max(self.tops[small], block.start + size)
        return block

    def _split(self, block: _Block, size: int) -> None:
        left, block.free = block.size - size, False
        if left:
            rest = _Block(block.start + size, left, block.small, block, block.after)
            if block.after is not None:
                block.after.before = rest
            else:
                self._last[block.small] = rest
            block.after, block.size = rest, size
            self._keep(rest)

    def _keep(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.start, block))

    def _forget(self, block: _Block) -> None:
        blocks = self._free[block.small]
        del blocks[bisect_left(blocks, (block.size, block.start))]

    def _joined(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        else:
            self._last[first.small] = first
        return first


def reserved(tops: dict[bool, int]) -> int:
    """Bytes of the pages that segments with these tops hold."""
    return sum(-(-top // _PAGES[small]) * _PAGES[small] for small, top in tops.items())
