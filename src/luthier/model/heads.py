"""Attention as our block uses it: from the merged product q|k|v [T, N] to the attended heads, and its gradient back.

Rotary embedding is part of it, since where heads lie in memory is. Shape suffixes: G key heads, R query heads per key
head, T tokens, Q query tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import varlen
from luthier.kernels.attention import (
    Tile,
    attention_backward,
    attention_forward,
    causal_tiles,
    chosen_tiles,
)
from luthier.kernels.ends import Ends
from luthier.kernels.place import on_gpu
from luthier.kernels.pointwise import Pointwise
from luthier.kernels.spare import empty
from luthier.kernels.varlen import put, takes
from luthier.model.norm import Norm

Saved = tuple[Tensor | None, ...]
"""What an attention's backward pass needs of its forward pass, besides its output."""


@dataclass(frozen=True)
class Segments:
    """What attention is told about a micro-batch."""

    cos: Tensor  # [T, n], of the n pairs of features of a head that rotary embedding turns; perhaps none
    sin: Tensor
    bounds: tuple[int, ...]
    prefix: int  # tokens of the first segment that all others see too
    rows: Tensor | None = None  # int64 [Q], ascending: the queries; None: all tokens
    told: Ends | None = None  # where they are known; `bounds` may then be others

    @cached_property
    def tiles(self) -> list[Tile]:
        if self.rows is None:
            return causal_tiles(self.bounds, self.prefix)
        return chosen_tiles(self.bounds, self.rows.cpu(), self.prefix)

    @cached_property
    def ends(self) -> Ends:
        if self.told:
            return self.told
        edges = torch.tensor(self.bounds, dtype=torch.int32).to(self.cos.device, non_blocking=True)
        return Ends(edges, max(end - start for start, end in pairwise(self.bounds)))


@dataclass(frozen=True)
class Heads:
    """How heads lie in the merged product q|k|v [T, N], and how they are read."""

    queries: int
    keys: int
    size: int
    scale: float  # of the products of queries and keys
    grouped: bool = False  # query, key and value of one head, then those of the next: as many keys as queries
    neighbours: bool = False  # which features rotary embedding turns together: see `kernels.pointwise.rotate`

    @property
    def width(self) -> int:
        """N: of all heads side by side."""
        return (self.queries + 2 * self.keys) * self.size

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Hq, D], k and v [T, Hk, D] as views of q|k|v [T, N]."""
        if self.grouped:
            q, k, v = y.view(len(y), -1, 3, self.size).unbind(2)
        else:
            q, k, v = torch.split(y.view(len(y), -1, self.size), [self.queries, self.keys, self.keys], dim=1)
        return q, k, v

    def turned(self, y: Tensor) -> Sequence[Tensor]:
        """The queries and keys of q|k|v [T, N], each [T, heads, D], in as few views as there can be."""
        return self.split(y)[:2] if self.grouped else [y.view(len(y), -1, self.size)[:, : self.queries + self.keys]]


class Attention(Protocol):
    """Attention of a layer, whose heads lie as it was told."""

    heads: Heads

    def forward(self, y: Tensor, segments: Segments, spare: int = 0) -> tuple[Tensor, Saved]:
        """q|k|v [T, N] to [Q, Hq·D], with `spare` columns behind each row. `y` may be overwritten."""

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments, spare: int = 0) -> Tensor:
        """The gradient of q|k|v [T, N], with `spare` columns behind each row."""


def attention_on(place: Tensor, heads: Heads, point: Pointwise) -> Attention:
    """The attention for tensors where `place` is."""
    return RowAttention(heads, point) if on_gpu(place) else TileAttention(heads, point)


class TileAttention:
    """By tiles of query rows, on a CPU. The rotation of the queries carries the scale of attention, which then costs
    nothing."""

    def __init__(self, heads: Heads, point: Pointwise) -> None:
        self.heads, self.point = heads, point

    def forward(self, y: Tensor, segments: Segments, spare: int = 0) -> tuple[Tensor, Saved]:
        q_TGRD, k_TG1D, v_TG1D = self._split(y)
        chosen = q_TGRD if segments.rows is None else q_TGRD[segments.rows]
        q_GQRD = self.point.rotate(chosen, *_tables(segments), self.heads.scale, self.heads.neighbours)
        k_GTD = self.point.rotate(k_TG1D, segments.cos, segments.sin, 1.0, self.heads.neighbours)[:, :, 0]
        v_GTD = v_TG1D[:, :, 0].transpose(0, 1).contiguous()
        o, kept = attention_forward(q_GQRD, k_GTD, v_GTD, segments.tiles, self.point, spare)
        return o, (q_GQRD, k_GTD, v_GTD, *kept)

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments, spare: int = 0) -> Tensor:
        q_GQRD, k_GTD, v_GTD, *kept = cast(tuple[Tensor, ...], saved)
        dq, dk, dv = attention_backward(do, o, q_GQRD, k_GTD, v_GTD, kept, segments.tiles, self.point)
        dy = empty(do, k_GTD.shape[1], self.heads.width, spare)
        q_TGRD, k_TG1D, v_TG1D = self._split(dy)
        chosen = q_TGRD if segments.rows is None else q_TGRD.new_empty(len(segments.rows), *q_TGRD.shape[1:])
        self.point.unrotate(dq, *_tables(segments), chosen, self.heads.scale, self.heads.neighbours)
        if segments.rows is not None:
            q_TGRD.zero_().index_copy_(0, segments.rows, chosen)
        self.point.unrotate(dk[:, :, None], segments.cos, segments.sin, k_TG1D, 1.0, self.heads.neighbours)
        v_TG1D[:, :, 0] = dv.transpose(0, 1)
        return dy

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, G, R, D], k and v [T, G, 1, D] as views of q|k|v [T, N]."""
        q, k, v = self.heads.split(y)
        return q.view(len(y), self.heads.keys, -1, self.heads.size), k[:, :, None], v[:, :, None]


def _tables(segments: Segments) -> tuple[Tensor, Tensor]:
    """The rotation of the queries."""
    cos, sin = (t if segments.rows is None else t[segments.rows] for t in (segments.cos, segments.sin))
    return cos, sin


class RowAttention:
    """By whole rows of segments, on a GPU: heads are turned in place, where the product left them, and kernels for
    packed rows read them there. Queries that nobody asked for are computed too; a prefix cannot be shared."""

    def __init__(self, heads: Heads, point: Pointwise) -> None:
        self.heads, self.point = heads, point

    def forward(self, y: Tensor, segments: Segments, spare: int = 0) -> tuple[Tensor, Saved]:
        assert not segments.prefix
        self._turn(y, segments, False)
        q, k, v = self.heads.split(y)
        if takes(q, k, v):
            behind = spare if segments.rows is None else 0
            whole, sums = varlen.forward(q, k, v, segments.ends, self.heads.scale, spare=behind)
            return _chosen(whole, segments, spare), (whole, q, k, v, sums)
        whole, leaves = _each(q, k, v, segments.bounds, self.heads.scale)
        return _chosen(whole.detach(), segments, spare), (whole, *leaves)

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments, spare: int = 0) -> Tensor:
        whole, q, k, v, *rest = cast(tuple[Tensor, ...], saved)
        if segments.rows is not None:
            do = do.new_zeros(len(whole), do.shape[1]).index_copy_(0, segments.rows, do)
        do, dy = do.view(whole.shape), empty(do, len(whole), self.heads.width, spare)
        into = self.heads.split(dy)
        if rest:
            turn = self._halves(segments)
            turned = varlen.backward(do, whole, rest[0], q, k, v, segments.ends, self.heads.scale, into, turn)
        else:
            put(torch.autograd.grad(whole, [q, k, v], do), into)
            turned = False
        if not turned:
            self._turn(dy, segments, True)
        return dy

    def _halves(self, segments: Segments) -> tuple[Tensor, Tensor] | None:
        """cos and sin, where halves of a head are turned together, all of it, as `varlen_backward` can."""
        size = self.heads.size
        whole = 2 * segments.cos.shape[1] == size and not self.heads.neighbours
        return (segments.cos, segments.sin) if whole and size in (16, 32, 64, 128) else None

    def _turn(self, y: Tensor, segments: Segments, back: bool) -> None:
        for heads in self.heads.turned(y) if segments.cos.shape[1] else ():
            self.point.turn(heads, segments.cos, segments.sin, back, self.heads.neighbours)


class NormedHeads:
    """An attention whose queries and keys go through a norm first, each head by itself."""

    def __init__(self, attention: Attention, heads: Heads, query_norm: Norm, key_norm: Norm) -> None:
        self.attention, self.heads, self.norms = attention, heads, (query_norm, key_norm)

    def forward(self, y: Tensor, segments: Segments, spare: int = 0) -> tuple[Tensor, Saved]:
        before: list[Tensor] = []
        for part, norm in zip(self.heads.split(y), self.norms, strict=False):
            x = part.clone(memory_format=torch.contiguous_format).view(-1, self.heads.size)
            n, scale = norm.forward(x)
            part.copy_(n.view(part.shape))
            before += [x, scale]
        o, saved = self.attention.forward(y, segments, spare)
        return o, (*before, *saved)

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments, spare: int = 0) -> Tensor:
        dy = self.attention.backward(do, o, saved[4:], segments, spare)
        before = cast(tuple[Tensor, ...], saved[:4])
        for part, norm, x, scale in zip(self.heads.split(dy), self.norms, before[::2], before[1::2], strict=False):
            dx, _ = norm.backward(part.reshape(x.shape).contiguous(), x, scale, None)
            part.copy_(dx.view(part.shape))
        return dy


def _each(
    q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """[T, Hq, D] by a kernel a segment, with the graph that leads back to the tensors that come with it."""
    # What is made in inference mode goes backward nowhere, and cannot be saved for it.
    with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.cat([_sdpa(q[a:b], k[a:b], v[a:b], scale) for a, b in pairwise(bounds)]), (q, k, v)


def _chosen(o: Tensor, segments: Segments, spare: int) -> Tensor:
    """Of o [T, Hq, D] what is asked for, [Q, Hq·D], with `spare` columns behind each row."""
    o, rows = o.flatten(1), segments.rows
    if rows is None and o.stride(0) == o.shape[1] + spare:
        return o
    chosen = o if rows is None else o[rows]
    return empty(o, len(chosen), o.shape[1], spare).copy_(chosen)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One segment, [T, H, D]."""
    # In fp32, and before Ampere, the kernel that keeps no probabilities wants as many key heads as query heads.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
