"""Attention as our block uses it: from the merged product q|k|v [T, N] to the attended heads, and its gradient back.

Rotary embedding is part of it, since where heads lie in memory is. Shape suffixes: G key heads, R query heads per key
head, T tokens, Q query tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.attention import (
    Tile,
    attention_backward,
    attention_forward,
    causal_tiles,
    chosen_tiles,
)
from luthier.kernels.place import on_gpu
from luthier.kernels.pointwise import Pointwise
from luthier.kernels.varlen import takes, varlen_attention

Saved = tuple[Tensor | None, ...]
"""What an attention's backward pass needs of its forward pass, besides its output."""


@dataclass(frozen=True)
class Segments:
    """What attention is told about a micro-batch."""

    cos: Tensor  # [T, D/2]
    sin: Tensor
    bounds: tuple[int, ...]
    prefix: int  # tokens of the first segment that all others see too
    rows: Tensor | None = None  # int64 [Q], ascending: the queries; None: all tokens

    @cached_property
    def tiles(self) -> list[Tile]:
        if self.rows is None:
            return causal_tiles(self.bounds, self.prefix)
        return chosen_tiles(self.bounds, self.rows.cpu(), self.prefix)

    @cached_property
    def edges(self) -> Tensor:
        """`bounds` as int32 [n + 1], where the tokens are."""
        return torch.tensor(self.bounds, dtype=torch.int32).to(self.cos.device, non_blocking=True)

    @property
    def longest(self) -> int:
        return max(end - start for start, end in pairwise(self.bounds))


class Attention(Protocol):
    """Attention of a layer, with as many query heads and key heads as it was made for."""

    def forward(self, y: Tensor, segments: Segments) -> tuple[Tensor, Saved]:
        """q|k|v [T, N] to [Q, Hq·D]. `y` may be overwritten."""

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments) -> Tensor:
        """The gradient of q|k|v [T, N]."""


def attention_on(place: Tensor, heads: int, groups: int, point: Pointwise) -> Attention:
    """The attention for tensors where `place` is."""
    return RowAttention(heads, groups, point) if on_gpu(place) else TileAttention(heads, groups, point)


def split(y: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hk, D] as views of q|k|v [T, N]."""
    q, k, v = torch.split(y.view(len(y), heads + 2 * groups, -1), [heads, groups, groups], dim=1)
    return q, k, v


def _size(y: Tensor, heads: int, groups: int) -> int:
    return y.shape[1] // (heads + 2 * groups)


class TileAttention:
    """By tiles of query rows, on a CPU."""

    def __init__(self, heads: int, groups: int, point: Pointwise) -> None:
        self.heads, self.groups, self.point = heads, groups, point

    def forward(self, y: Tensor, segments: Segments) -> tuple[Tensor, Saved]:
        q_TGRD, k_TG1D, v_TG1D = self._split(y)
        chosen = q_TGRD if segments.rows is None else q_TGRD[segments.rows]
        q_GQRD = self.point.rotate(chosen, *self._scaled(segments, y))
        k_GTD = self.point.rotate(k_TG1D, segments.cos, segments.sin)[:, :, 0]
        v_GTD = v_TG1D[:, :, 0].transpose(0, 1).contiguous()
        o, kept = attention_forward(q_GQRD, k_GTD, v_GTD, segments.tiles, self.point)
        return o, (q_GQRD, k_GTD, v_GTD, *kept)

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments) -> Tensor:
        q_GQRD, k_GTD, v_GTD, *kept = cast(tuple[Tensor, ...], saved)
        dq, dk, dv = attention_backward(do, o, q_GQRD, k_GTD, v_GTD, kept, segments.tiles, self.point)
        dy = do.new_empty(k_GTD.shape[1], (self.heads + 2 * self.groups) * k_GTD.shape[-1])
        q_TGRD, k_TG1D, v_TG1D = self._split(dy)
        if segments.rows is None:
            self.point.unrotate(dq, *self._scaled(segments, dy), q_TGRD)
        else:
            chosen = q_TGRD.new_empty(len(segments.rows), *q_TGRD.shape[1:])
            self.point.unrotate(dq, *self._scaled(segments, dy), chosen)
            q_TGRD.zero_().index_copy_(0, segments.rows, chosen)
        self.point.unrotate(dk[:, :, None], segments.cos, segments.sin, k_TG1D)
        v_TG1D[:, :, 0] = dv.transpose(0, 1)
        return dy

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, G, R, D], k and v [T, G, 1, D] as views of q|k|v [T, N]."""
        q, k, v = split(y, self.heads, self.groups)
        return q.view(len(y), self.groups, -1, q.shape[-1]), k[:, :, None], v[:, :, None]

    def _scaled(self, segments: Segments, y: Tensor) -> tuple[Tensor, Tensor]:
        """The rotation of the queries; it carries the 1/√D of attention, which then costs nothing."""
        size, rows = _size(y, self.heads, self.groups), segments.rows
        cos, sin = (t if rows is None else t[rows] for t in (segments.cos, segments.sin))
        return cos * size**-0.5, sin * size**-0.5


class RowAttention:
    """By whole rows of segments, on a GPU: heads are turned in place, where the product left them, and torch's flash
    attention reads them there. Queries that nobody asked for are computed too; a prefix cannot be shared."""

    def __init__(self, heads: int, groups: int, point: Pointwise) -> None:
        self.heads, self.groups, self.point = heads, groups, point

    def forward(self, y: Tensor, segments: Segments) -> tuple[Tensor, Saved]:
        assert not segments.prefix
        q, k, v = split(y, self.heads, self.groups)
        for heads in (q, k):
            self.point.turn(heads, segments.cos, segments.sin, False)
        with torch.enable_grad():
            q, k, v = (heads.detach().requires_grad_() for heads in (q, k, v))
            whole = _attend(q, k, v, segments)
        o = whole.detach().flatten(1)
        return o if segments.rows is None else o[segments.rows], (whole, q, k, v)

    def backward(self, do: Tensor, o: Tensor, saved: Saved, segments: Segments) -> Tensor:
        whole, *leaves = cast(tuple[Tensor, ...], saved)
        if segments.rows is not None:
            do = do.new_zeros(len(whole), do.shape[1]).index_copy_(0, segments.rows, do)
        dq, dk, dv = torch.autograd.grad(whole, leaves, do.view_as(whole))
        dy = torch.cat([dq, dk, dv], 1)
        turned = dy[:, : self.heads + self.groups]
        self.point.turn(turned, segments.cos, segments.sin, True)
        return dy.flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """[T, Hq, D], with the graph that leads back to q, k and v."""
    scale = q.shape[-1] ** -0.5
    if takes(q, k, v):
        return varlen_attention(q, k, v, segments.edges, segments.longest, scale)
    parts = [_sdpa(q[a:b], k[a:b], v[a:b], scale) for a, b in pairwise(segments.bounds)]
    return torch.cat(parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One segment, [T, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
