"""What blocks keep for their backward passes, in host memory meanwhile.

It leaves as soon as a block is done, and comes back before the block's backward pass begins, both beside what the GPU
computes. The first blocks' is sent away: it is missed last.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.model.lane import Lane

CHUNK = 16 << 20  # bytes: torch rounds what it pins up to a power of two
_LINE = 512  # bytes: pieces begin at multiples of them, as torch's on a GPU do


class _View(NamedTuple):
    """Where in which piece of memory a tensor lies."""

    piece: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    start: int


class Shelf:
    """Host memory in chunks of one size, pinned once and lent again and again.

    All copies to and from it are of one lane, which keeps their order: a chunk may be lent as soon as no more copies
    out of it will be queued. Torch's own cache waits until they are done, and would pin more meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.chunks = 0
        self._free: list[Tensor] = []

    def lend(self, borrower: object, size: int) -> list[Tensor]:
        """uint8 [CHUNK] each, for as long as the borrower is there; of what has no data none."""
        count = 0 if self.device.type == "meta" else -(-size // CHUNK)
        while len(self._free) < count:
            self._free.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.device.type == "cuda"))
            self.chunks += 1
        lent = [self._free.pop() for _ in range(count)]
        weakref.finalize(borrower, self._free.extend, lent).atexit = False
        return lent


class Parcel:
    """Tensors of a GPU in host memory, on their way there, or back. Those that share memory share it again.

    `before`: the parcel that was sent before this one; it is wanted after it.
    """

    def __init__(self, tensors: Sequence[Tensor | None], lane: Lane, shelf: Shelf, before: Parcel | None) -> None:
        self.lane, self.before = lane, before
        pieces = {x.untyped_storage()._cdata: _bytes(x) for x in tensors if x is not None}
        places = {key: place for place, key in enumerate(pieces)}
        self._views = [None if x is None else _view(x, places[x.untyped_storage()._cdata]) for x in tensors]
        self._sizes = [len(piece) for piece in pieces.values()]
        self._device = next(iter(pieces.values())).device
        self._pieces = list(pieces.values())  # not to be lent to others before they left
        self._home = shelf.lend(self, _laid(self._sizes)[1])
        with lane.copying():
            for piece, chunk in self._parts():
                chunk.copy_(piece, non_blocking=True)
        self._mark = lane.mark()

    def leave(self) -> None:
        """Frees the GPU's memory: what is computed from now on may use it, when the copies are done."""
        self.lane.wait(self._mark)
        self._pieces = []

    def fetch(self) -> None:
        """Begins the way back."""
        if self._pieces:
            return
        self._pieces = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._sizes]
        with self.lane.copying():  # behind all that used this memory before
            for piece, chunk in self._parts():
                piece.copy_(chunk, non_blocking=True)
        self._mark = self.lane.mark()

    def take(self) -> list[Tensor | None]:
        """The tensors, to be used now. They are sent once, and can be taken again."""
        self.fetch()
        self.lane.wait(self._mark)
        pieces, self._pieces = self._pieces, []
        return [None if view is None else _made(view, pieces[view.piece]) for view in self._views]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the pieces, and where they are in host memory, both in parts as large as lie in one chunk."""
        for piece, start in zip(self._pieces, _laid(self._sizes)[0], strict=True):
            at = 0
            while self._home and at < len(piece):
                chunk, place = divmod(start + at, CHUNK)
                part = piece[at : at + CHUNK - place]
                yield part, self._home[chunk][place : place + len(part)]
                at += len(part)


class Away:
    """Sends away what the first `count` of so many `blocks` keep.

    On its way a parcel takes memory of the GPU, but only what blocks that stay take later, or have given back: together
    they never take more than those do, or two parcels.
    """

    def __init__(self, count: int, blocks: int, device: torch.device) -> None:
        self.count, self.staying, self.lane, self.shelf = count, blocks - count, Lane(device), Shelf(device)
        self.newest: Parcel | None = None
        self._going: deque[Parcel] = deque()

    def begin(self) -> None:
        """To be called before a forward pass: nothing is left of another one."""
        self.newest = None
        self._let_go(0)
        self.lane.wait(self.lane.mark())  # parcels that nobody took, where a backward pass failed, are on their way

    def enter(self, index: int) -> None:
        """To be called before block `index` computes what it keeps."""
        made = index + 1 - self.count
        self._let_go(self.staying - made if made > 0 else max(1, self.staying - 1))

    def send(self, index: int, tensors: Sequence[Tensor | None]) -> Parcel | None:
        """What block `index` keeps, if it is one of those."""
        if index >= self.count:
            return None
        self.newest = Parcel(tensors, self.lane, self.shelf, self.newest)
        self._going.append(self.newest)
        return self.newest

    def call(self, index: int, newest: Parcel | None) -> None:
        """To be called before the backward pass of block `index`, with the newest parcel that was there when it ran:
        begins to fetch that, and those before it, as far as there is room. What of them has not left stays."""
        done = self.count + self.staying - 1 - index
        parcel, more = newest, max(done, int(index == self.count)) if index >= self.count else max(2, self.staying)
        wanted: list[Parcel] = []
        while parcel is not None and len(wanted) < more:
            wanted.append(parcel)
            parcel = parcel.before
        self._going = deque(parcel for parcel in self._going if parcel not in wanted)
        self._let_go(0)
        for parcel in wanted:
            parcel.fetch()

    def _let_go(self, most: int) -> None:
        """Leaves so many on their way; what is computed from now on waits until the others are gone."""
        while len(self._going) > most:
            self._going.popleft().leave()


def _bytes(x: Tensor) -> Tensor:
    """All the memory that `x` is part of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _view(x: Tensor, piece: int) -> _View:
    return _View(piece, x.dtype, x.shape, x.stride(), int(x.storage_offset()))


def _made(view: _View, piece: Tensor) -> Tensor:
    return piece.view(view.dtype).as_strided(view.shape, view.strides, view.start)


def _laid(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where pieces of so many bytes begin, one after the other, and where the last one ends."""
    *starts, end = accumulate((-(-size // _LINE) * _LINE for size in sizes), initial=0)
    return starts, end
