"""One decoder layer, its forward and its backward pass by hand.

What the backward pass needs and is cheap to make again (norm outputs, the activation) is not kept. The last layer
computes queries and all that follows attention for the supervised rows only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from luthier.adapters.method import Noise
from luthier.kernels import spare
from luthier.kernels.pointwise import Activation, Pointwise
from luthier.model.families import Family, activation
from luthier.model.heads import Heads, NormedHeads, Saved, Segments, attention_on
from luthier.model.merged import MergedLinear
from luthier.model.norm import Norm

Recompute = Literal["nothing", "gate_up", "all"]
"""What of a block's `Kept` is not kept, but made again in the backward pass; `gate_up`: that product alone."""


@dataclass(frozen=True)
class Pack:
    """What a layer is told about a micro-batch."""

    segments: Segments
    noise: Noise | None
    rows: Tensor | None = None  # int64 [Q]: the tokens whose output is wanted; None: all


class Kept(NamedTuple):
    """What a block's backward pass needs of its forward pass."""

    attention_scale: Tensor  # of the norm of the block's input: see `Norm`
    qkv_inner: Tensor | None
    attended: Tensor  # with what `out` adds for its adapters behind it
    attention_added: Tensor | None  # what a norm is put to before it is added, and that norm's scale
    attention_added_scale: Tensor | None
    middle: Tensor | None  # what `down` adds to; in a block that is not parallel what the MLP's norm reads
    mlp_scale: Tensor | None
    gate_up: Tensor
    gate_up_inner: Tensor | None
    added: Tensor | None  # the same for the MLP; never made again
    added_scale: Tensor | None
    attention: Saved


class Block:
    """One decoder layer of a family, with adapters on some or all of its linear layers."""

    recompute: Recompute = "nothing"

    def __init__(self, layer: nn.Module, number: int, family: Family, config: Any, pointwise: Pointwise) -> None:
        part = layer.get_submodule
        self.turned: str | int | None = None if family.turned is None else getattr(config, family.turned)[number]
        self.act: Activation = activation(family, config)
        self.pointwise, self.gated, self.parallel = pointwise, family.gated, family.parallel
        eps = float(getattr(config, family.eps))
        norm = partial(Norm, eps=eps, gain=family.gain, pointwise=pointwise)
        self.attention_norm = norm(part(family.attention_norm))
        self.mlp_norm, self.attention_end, self.mlp_end, query_norm, key_norm = (
            None if name is None else norm(part(name))
            for name in (family.mlp_norm, family.attention_end, family.mlp_end, family.query_norm, family.key_norm)
        )
        merged = partial(MergedLinear, adapted_backward=pointwise.adapted_backward)
        self.qkv = merged([part(name) for name in family.qkv])
        self.out = merged([part(family.out)])
        self.gate_up = merged([part(name) for name in family.gate_up])
        self.down = merged([part(family.down)])
        self.linears = (self.qkv, self.out, self.gate_up, self.down)
        heads = _heads(family, config, self.qkv.columns[-1].stop)
        self.attention = attention_on(self.attention_norm.weight, heads, pointwise)
        if query_norm is not None and key_norm is not None:
            self.attention = NormedHeads(self.attention, heads, query_norm, key_norm)

    def forward(
        self, x: Tensor, before: Tensor | None, pack: Pack, *, keep: bool
    ) -> tuple[Tensor, Tensor, Kept, Tensor | None]:
        """x [T, H] to two parts of [Q, H], whose sum the next block takes as it reads them: x and `before` are such,
        and x becomes their sum. Then what backward needs, and the inner values of `down`, which are never recomputed.
        `keep`: whether there is a backward pass."""
        kept = self.until_down(x, pack, before, keep=keep and self.recompute != "all")
        h = self.pointwise.activate(kept.gate_up, self.act, self.gated, self.down.spare)
        y, inner = self.down.forward(h, self._noise(pack), keep=keep)
        y, d, d_scale = _ended(self.mlp_end, y)
        middle = cast(Tensor, kept.middle)
        return y, middle, kept._replace(middle=None if self.parallel else middle, added=d, added_scale=d_scale), inner

    def until_down(self, x: Tensor, pack: Pack, before: Tensor | None = None, *, keep: bool) -> Kept:
        noise, ahead = self._noise(pack), self.gate_up.spare
        if before is None:
            n, scale = self.attention_norm.forward(x, self.qkv.spare)
        else:
            x, n, scale = self.attention_norm.forward_sum(before, x, self.qkv.spare)
        residual = _chosen(x, pack)
        y, qkv_inner = self.qkv.forward(n, pack.noise, keep=keep)
        if self.parallel:  # before attention, so that nothing has to wait for it
            n, mlp_scale = self.mlp_norm.forward(residual, ahead) if self.mlp_norm else (_chosen(n, pack), None)
            gate_up, gate_up_inner = self._forward_gate_up(n, noise, keep=keep)
        del n
        o, attention = self.attention.forward(y, pack.segments, self.out.spare)
        del y
        o = spare.made(o, self.out.spare)
        middle, _ = self.out.forward(o, noise, keep=False)  # as it is kept in `o`
        middle, z, z_scale = _ended(self.attention_end, middle)
        if self.parallel:
            middle.add_(residual)
        else:
            assert self.mlp_norm is not None
            middle, n, mlp_scale = self.mlp_norm.forward_sum(residual, middle, ahead)
            gate_up, gate_up_inner = self._forward_gate_up(n, noise, keep=keep)
        return Kept(scale, qkv_inner, o, z, z_scale, middle, mlp_scale, gate_up, gate_up_inner, None, None, attention)

    def _forward_gate_up(self, n: Tensor, noise: Noise | None, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """With room behind for what the backward pass does with the gradient, which takes that place."""
        return self.gate_up.forward(n, noise, keep=keep, behind=self.gate_up.spare)

    def kept_of(self, kept: Kept) -> Iterator[Tensor | Saved | None]:
        """The parts of `kept`, None for those that `again` makes."""
        every = [name for name in Kept._fields if name not in ("added", "added_scale")]
        remade = {"nothing": [], "gate_up": ["gate_up", "gate_up_inner"], "all": every}[self.recompute]
        return (None if name in remade else part for name, part in zip(Kept._fields, kept, strict=True))

    def again(self, kept: Kept, x: Tensor, pack: Pack) -> Kept:
        """All of what was kept, to the bit: `kept` with what of it is missing."""
        if self.recompute == "all":
            return self.until_down(x, pack, keep=True)._replace(added=kept.added, added_scale=kept.added_scale)
        if self.recompute == "gate_up":
            n = self._mlp_input(x, kept, pack)
            gate_up, inner = self._forward_gate_up(n, self._noise(pack), keep=True)
            return kept._replace(gate_up=gate_up, gate_up_inner=inner)
        return kept

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, down_inner: Tensor | None, pack: Pack, wanted: bool
    ) -> Tensor | None:
        """The gradient of x, None unless `wanted`. Those of the adapters go to their places."""
        noise, dm = self._noise(pack), dy
        dn, gate_up_inner = self._backward_mlp(dy, kept, down_inner, noise)
        if self.mlp_norm is not None:
            read = _chosen(x, pack) if self.parallel else cast(Tensor, kept.middle)
            room = 0 if self.parallel or self.attention_end else self.out.spare
            dm, n = self.mlp_norm.backward(dn, read, cast(Tensor, kept.mlp_scale), dy, room)
            self.gate_up.backward_adapters(gate_up_inner, n, noise)
            del dn, n, read
        da, qkv_inner = self._backward_attention(dy if self.parallel else dm, kept, pack, wanted)
        if da is None:
            dx, n = None, self.attention_norm.forward(x)[0]
        else:
            if self.mlp_norm is None:
                _add(da, dn, pack)
            room = 0 if self.mlp_end else self.down.spare  # for the block before, if its adapters are as wide
            dx, n = self.attention_norm.backward(da, x, kept.attention_scale, _spread(dm, x, pack), room)
        self.qkv.backward_adapters(qkv_inner, n, pack.noise)
        if self.mlp_norm is None:
            self.gate_up.backward_adapters(gate_up_inner, _chosen(n, pack), noise)
        return dx

    def _backward_mlp(
        self, dy: Tensor, kept: Kept, inner: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of what the MLP reads [Q, H] and of the inner values of `gate_up`."""
        dy = _before_end(self.mlp_end, dy, kept.added, kept.added_scale, self.down.spare)
        dh, inner = self.down.backward(dy, inner, noise)
        assert dh is not None
        dg = self._backward_activation(dh, kept.gate_up, inner, noise)
        del dh
        dn, inner = self.gate_up.backward(dg, kept.gate_up_inner, noise)
        assert dn is not None
        return dn, inner

    def _backward_activation(self, dh: Tensor, gate_up: Tensor, inner: Tensor | None, noise: Noise | None) -> Tensor:
        """The gradient of `gate_up`, in its place. That of the A of `down` goes to its own."""
        if inner is not None and not self.down.drops(noise):
            dA = self.down.gradients.A
            return self.pointwise.activate_backward_dA(dh, gate_up, self.act, self.gated, inner, dA)
        dg, h = self.pointwise.activate_backward(dh, gate_up, self.act, self.gated)
        self.down.backward_adapters(inner, h, noise)
        return dg

    def _backward_attention(
        self, dz: Tensor, kept: Kept, pack: Pack, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of what attention reads [T, H], None unless `wanted`, and of the inner values of `qkv`."""
        noise = self._noise(pack)
        dz = _before_end(self.attention_end, dz, kept.attention_added, kept.attention_added_scale, self.out.spare)
        on = wanted or bool(self.qkv.updates)
        do, inner = self.out.backward(dz, self.out.inner(kept.attended), noise, wanted=on)
        self.out.backward_adapters(inner, kept.attended, noise)
        if do is None:
            return None, None
        dy = self.attention.backward(do, kept.attended, kept.attention, pack.segments, self.qkv.spare)
        return self.qkv.backward(dy, kept.qkv_inner, pack.noise, wanted=wanted)

    def _mlp_input(self, x: Tensor, kept: Kept, pack: Pack) -> Tensor:
        if self.mlp_norm is None:
            return _chosen(self.attention_norm.forward(x, self.qkv.spare)[0], pack)
        read = _chosen(x, pack) if self.parallel else cast(Tensor, kept.middle)
        return self.mlp_norm.forward(read, self.gate_up.spare)[0]

    def _noise(self, pack: Pack) -> Noise | None:
        """Past the attention of the last layer only the chosen rows exist."""
        return pack.noise if pack.noise is None or pack.rows is None else pack.noise.at(pack.rows)


def _ended(norm: Norm | None, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is added of a half's output x [Q, H], and what its gradient needs."""
    if norm is None:
        return x, None, None
    n, scale = norm.forward(x)
    return n, x, scale


def _before_end(norm: Norm | None, dn: Tensor, x: Tensor | None, scale: Tensor | None, room: int) -> Tensor:
    """The gradient of x of `_ended`."""
    return dn if norm is None else norm.backward(dn, cast(Tensor, x), cast(Tensor, scale), None, room)[0]


def _chosen(x: Tensor, pack: Pack) -> Tensor:
    """Of [T, H] the rows whose output is wanted: [Q, H]."""
    return x if pack.rows is None else x[pack.rows]


def _spread(x: Tensor, like: Tensor, pack: Pack) -> Tensor:
    """[Q, H] to [T, H], zero where no output is wanted."""
    return x if pack.rows is None else torch.zeros_like(like).index_copy_(0, pack.rows, x)


def _add(total: Tensor, x: Tensor, pack: Pack) -> None:
    """Adds [Q, H] to its rows of [T, H]."""
    if pack.rows is None:
        total.add_(x)
    else:
        total.index_add_(0, pack.rows, x)


def _heads(family: Family, config: Any, width: int) -> Heads:
    """How heads lie in the product of q, k and v, which is so wide."""
    queries = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    keys = (width // size - queries) // 2
    scale = float(size if family.scale is None else getattr(config, family.scale)) ** -0.5
    return Heads(queries, keys, size, scale, family.grouped, family.neighbours)
