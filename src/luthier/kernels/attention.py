"""Causal attention inside each segment of a packed row of tokens, for CPUs.

A segment is cut into tiles: some query rows and the keys they may see. A tile is a few batched products and one
softmax; tiles that end early skip the keys above the diagonal, and no mask is wider than a tile. Grouped queries are
laid out so that the heads that share a key lie side by side (shape suffixes: G key heads, R query heads per key head,
T tokens, Q query rows, D head size), and a group is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.pointwise import EAGER, Pointwise
from luthier.kernels.spare import empty

BLOCK = 128  # query rows of a tile: fewer waste less work above the diagonal, more make better products
KEEP = 512  # tiles with at most so many keys keep their probabilities for the backward pass, longer ones recompute them


@dataclass(frozen=True)
class Tile:
    """Some query rows and the keys that they may see: one stretch of tokens, or a shared prefix and one more."""

    rows: slice
    keys: tuple[slice, ...]
    seen: Tensor  # int64 [Q]: how many of the keys, from the first, each row sees


def causal_tiles(bounds: Sequence[int], prefix: int = 0) -> list[Tile]:
    """Tiles in which every token is a query and sees its own segment up to itself.

    With a `prefix`, the first segment has that many tokens and every other segment sees it whole.
    """
    return chosen_tiles(bounds, torch.arange(bounds[-1]), prefix)


def chosen_tiles(bounds: Sequence[int], chosen: Tensor, prefix: int = 0) -> list[Tile]:
    """Tiles in which only the tokens `chosen` (int64 [Q], ascending) are queries; their rows are numbered 0 to Q-1."""
    tiles = []
    edges = torch.searchsorted(chosen, torch.tensor(bounds)).tolist()
    for start, (first, last) in zip(bounds, pairwise(edges), strict=False):
        before = (slice(0, prefix),) if prefix and start else ()
        for low in range(first, last, BLOCK):
            places = chosen[low : min(low + BLOCK, last)]
            own = slice(start, int(places[-1]) + 1)
            seen = places - start + 1 + sum(s.stop for s in before)
            tiles.append(Tile(slice(low, low + len(places)), (*before, own), seen))
    return tiles


def attention_forward(
    q_GTRD: Tensor, k_GTD: Tensor, v_GTD: Tensor, tiles: Sequence[Tile], parts: Pointwise = EAGER, spare: int = 0
) -> tuple[Tensor, list[Tensor | None]]:
    """Attention with queries scaled already. Returns [Q, G·R·D], with `spare` columns behind each row, and the kept
    probabilities of each tile, or None."""
    groups, queries, repeats, size = q_GTRD.shape
    o_TH = empty(q_GTRD, queries, groups * repeats * size, spare)
    o_TGRD = o_TH.view(queries, groups, repeats, size)
    kept: list[Tensor | None] = []
    for tile in tiles:
        p_GQK = _probabilities(q_GTRD, k_GTD, tile, parts)
        o_GQD = torch.bmm(p_GQK, _keys(v_GTD, tile))
        o_TGRD[tile.rows] = o_GQD.view(groups, -1, repeats, size).transpose(0, 1)
        kept.append(p_GQK if p_GQK.shape[-1] <= KEEP else None)
    return o_TH, kept


def attention_backward(
    do_TH: Tensor,
    o_TH: Tensor,
    q_GTRD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    kept: Sequence[Tensor | None],
    tiles: Sequence[Tile],
    parts: Pointwise = EAGER,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries [G, Q, R, D], the keys and the values [G, T, D]."""
    groups, queries, repeats, size = q_GTRD.shape
    delta_TGR = (do_TH * o_TH).view(queries, groups, repeats, size).sum(-1, dtype=torch.float32)
    delta_GTR = delta_TGR.transpose(0, 1).contiguous()
    do_GTRD = do_TH.view(queries, groups, repeats, size).transpose(0, 1).contiguous()
    dq_GTRD = torch.empty_like(q_GTRD)
    dk_GTD, dv_GTD = (k_GTD.new_zeros(k_GTD.shape) for _ in range(2))
    for tile, saved in zip(tiles, kept, strict=True):
        p_GQK = saved if saved is not None else _probabilities(q_GTRD, k_GTD, tile, parts)
        do_GQD, q_GQD = _rows(do_GTRD, tile), _rows(q_GTRD, tile)
        _add(dv_GTD, tile, torch.bmm(p_GQK.transpose(1, 2), do_GQD))
        dp_GQK = torch.bmm(do_GQD, _keys(v_GTD, tile).transpose(1, 2))
        ds_GQK = parts.softmax_backward(dp_GQK, p_GQK, delta_GTR[:, tile.rows].flatten(1).contiguous())
        dq_GTRD[:, tile.rows] = torch.bmm(ds_GQK, _keys(k_GTD, tile)).view(groups, -1, repeats, size)
        _add(dk_GTD, tile, torch.bmm(ds_GQK.transpose(1, 2), q_GQD))
    return dq_GTRD, dk_GTD, dv_GTD


def _rows(x_GTRD: Tensor, tile: Tile) -> Tensor:
    """A tile's rows as [G, Q·R, D], without a copy: rows and repeats lie one after the other."""
    return x_GTRD[:, tile.rows].flatten(1, 2)


def _keys(x_GTD: Tensor, tile: Tile) -> Tensor:
    """A tile's keys (or values) [G, K, D]: a view, unless there is a prefix."""
    pieces = [x_GTD[:, part] for part in tile.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _add(x_GTD: Tensor, tile: Tile, gradient_GKD: Tensor) -> None:
    start = 0
    for part in tile.keys:
        end = start + part.stop - part.start
        x_GTD[:, part] += gradient_GKD[:, start:end]
        start = end


def _probabilities(q_GTRD: Tensor, k_GTD: Tensor, tile: Tile, parts: Pointwise) -> Tensor:
    q_GQD = _rows(q_GTRD, tile)
    scores = torch.bmm(q_GQD, _keys(k_GTD, tile).transpose(1, 2))
    groups, _, repeats, _ = q_GTRD.shape
    return parts.softmax(scores.view(groups, -1, repeats, scores.shape[-1]), tile.seen).flatten(1, 2)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
        tokens, heads, size = q.shape
        q_GTRD = (q.view(tokens, k.shape[1], -1, size) * scale).transpose(0, 1).contiguous()
        k_GTD, v_GTD = k.transpose(0, 1), v.transpose(0, 1)
        tiles = causal_tiles(bounds)
        o_TH, kept = attention_forward(q_GTRD, k_GTD, v_GTD, tiles)
        ctx.save_for_backward(q_GTRD, k_GTD, v_GTD, o_TH, *kept)
        ctx.tiles, ctx.scale = tiles, scale
        return o_TH.view(tokens, heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q_GTRD, k_GTD, v_GTD, o_TH, *kept = ctx.saved_tensors
        dq, dk, dv = attention_backward(do.flatten(1), o_TH, q_GTRD, k_GTD, v_GTD, kept, ctx.tiles)
        return (dq.transpose(0, 1).reshape(do.shape) * ctx.scale, dk.transpose(0, 1), dv.transpose(0, 1), None, None)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, causal inside each segment.

    Args:
        q: [T, Hq, D]; k and v: [T, Hk, D], with Hq a multiple of Hk; fp32 or bf16.
        bounds: n + 1 segment boundaries from 0 to T.

    Returns [T, Hq, D]. Differentiable once. Memory is that of the tiles' probabilities, at most `KEEP` a token and
    head; no T x T tensor exists.
    """
    return _SegmentAttention.apply(q, k, v, bounds, scale)  # type: ignore[no-any-return, no-untyped-call]
