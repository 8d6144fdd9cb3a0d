"""One decoder layer, its forward and its backward pass by hand.

What the backward pass needs and is cheap to make again (norm outputs, the activation) is not kept. The last layer
computes queries and all that follows attention for the supervised rows only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from luthier.adapters.method import Noise
from luthier.kernels.pointwise import Pointwise
from luthier.model.families import Family
from luthier.model.heads import Saved, Segments, attention_on
from luthier.model.merged import Gradients, MergedLinear

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

    attention_scale: Tensor  # 1 / rms of the block's input
    qkv_inner: Tensor | None
    attended: Tensor
    out_inner: Tensor | None
    middle: Tensor  # the residual stream between attention and MLP
    mlp_scale: Tensor
    gate_up: Tensor
    gate_up_inner: Tensor | None
    attention: Saved


class Block:
    """One decoder layer of a family, with adapters on some or all of its linear layers."""

    recompute: Recompute = "nothing"

    def __init__(self, layer: nn.Module, family: Family, config: Any, pointwise: Pointwise) -> None:
        part = layer.get_submodule
        self.pointwise = pointwise
        self.attention_norm = cast(Tensor, part(family.attention_norm).weight)
        self.mlp_norm = cast(Tensor, part(family.mlp_norm).weight)
        self.eps = float(getattr(config, family.eps))
        self.qkv = MergedLinear([part(name) for name in family.qkv])
        self.out = MergedLinear([part(family.out)])
        self.gate_up = MergedLinear([part(name) for name in family.gate_up])
        self.down = MergedLinear([part(family.down)])
        self.linears = (self.qkv, self.out, self.gate_up, self.down)
        self.parameters = [p for linear in self.linears for p in linear.parameters()]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.attention = attention_on(self.attention_norm, heads, groups, pointwise)

    def forward(self, x: Tensor, pack: Pack) -> tuple[Tensor, Kept, Tensor | None]:
        """x [T, H] to [Q, H]; what backward needs; and the inner values of `down`, which are never recomputed."""
        kept = self.until_down(x, pack)
        y, inner = self.down.forward(self.pointwise.swiglu(kept.gate_up), self._noise(pack))
        return y.add_(kept.middle), kept, inner

    def until_down(self, x: Tensor, pack: Pack) -> Kept:
        point = self.pointwise
        n, scale = point.rms_norm(x, self.attention_norm, self.eps)
        y, qkv_inner = self.qkv.forward(n, pack.noise)
        o, kept = self.attention.forward(y, pack.segments)
        del n, y
        z, out_inner = self.out.forward(o, self._noise(pack))
        residual = x if pack.rows is None else x[pack.rows]
        middle, n, mlp_scale = point.add_rms_norm(residual, z, self.mlp_norm, self.eps)
        gate_up, gate_up_inner = self.gate_up.forward(n, self._noise(pack))
        return Kept(scale, qkv_inner, o, out_inner, middle, mlp_scale, gate_up, gate_up_inner, kept)

    def kept_of(self, kept: Kept) -> Iterator[Tensor | Saved | None]:
        """The parts of `kept`, None for those that `again` makes."""
        remade = {"nothing": (), "gate_up": ("gate_up", "gate_up_inner"), "all": Kept._fields}[self.recompute]
        return (None if name in remade else part for name, part in zip(Kept._fields, kept, strict=True))

    def again(self, kept: Kept, x: Tensor, pack: Pack) -> Kept:
        """All of what was kept, to the bit: `kept` with what of it is missing."""
        if self.recompute == "all":
            return self.until_down(x, pack)
        if self.recompute == "gate_up":
            n, _ = self.pointwise.rms_norm(kept.middle, self.mlp_norm, self.eps)
            gate_up, inner = self.gate_up.forward(n, self._noise(pack))
            return kept._replace(gate_up=gate_up, gate_up_inner=inner)
        return kept

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, down_inner: Tensor | None, pack: Pack, wanted: bool
    ) -> tuple[Tensor | None, Gradients]:
        """The gradient of x, None unless `wanted`, and of the adapters."""
        point, noise, found = self.pointwise, self._noise(pack), Gradients()
        inner = self.down.backward_inner(dy, down_inner, found)
        dg, h = point.swiglu_backward(self.down.backward_input(dy, inner, noise), kept.gate_up)
        self.down.backward_adapters(inner, h, noise, found)
        del h
        inner = self.gate_up.backward_inner(dg, kept.gate_up_inner, found)
        dn = self.gate_up.backward_input(dg, inner, noise)
        dm, n = point.rms_norm_backward(dn, kept.middle, kept.mlp_scale, self.mlp_norm, dy)
        self.gate_up.backward_adapters(inner, n, noise, found)
        del dg, dn, n
        inner = self.out.backward_inner(dm, kept.out_inner, found)
        self.out.backward_adapters(inner, kept.attended, noise, found)
        if not (wanted or self.qkv.updates):
            return None, found
        do = self.out.backward_input(dm, inner, noise)
        dy = self.attention.backward(do, kept.attended, kept.attention, pack.segments)
        inner = self.qkv.backward_inner(dy, kept.qkv_inner, found)
        if not wanted:
            n, _ = point.rms_norm(x, self.attention_norm, self.eps)
            self.qkv.backward_adapters(inner, n, pack.noise, found)
            return None, found
        residual = dm if pack.rows is None else torch.zeros_like(x).index_copy_(0, pack.rows, dm)
        dn = self.qkv.backward_input(dy, inner, pack.noise)
        dx, n = point.rms_norm_backward(dn, x, kept.attention_scale, self.attention_norm, residual)
        self.qkv.backward_adapters(inner, n, pack.noise, found)
        return dx, found

    def _noise(self, pack: Pack) -> Noise | None:
        """Past the attention of the last layer only the chosen rows exist."""
        return pack.noise if pack.noise is None or pack.rows is None else pack.noise.at(pack.rows)
