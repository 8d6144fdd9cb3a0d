"""The fast path: one decoder layer as one autograd function with a backward written by hand.

Linear layers that read the same input are one product (q|k|v, gate|up). What the backward pass needs and is cheap to
make again (norm outputs, the activation) is not kept. Tokens that no supervised token can see are left out, the last
layer computes queries and all that follows attention for the supervised rows only, and no gradient flows below the
first adapted layer. What is learned is the same as on the reference path: `tests/contract/test_block.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.adapters.linears import dense_weight, is_quantized
from luthier.adapters.lora import LoraLinear
from luthier.adapters.method import Noise
from luthier.errors import ModelError
from luthier.kernels.place import on_gpu
from luthier.kernels.pointwise import Pointwise
from luthier.model.families import Family, window
from luthier.model.heads import Saved, Segments, attention_on

if TYPE_CHECKING:
    from luthier.data.stream import Micro

Gradients = dict[Tensor, Tensor]


@dataclass(frozen=True)
class Pack:
    """What a layer is told about a micro-batch."""

    segments: Segments
    noise: Noise | None
    rows: Tensor | None = None  # int64 [Q]: the tokens whose output is wanted; None: all


class Decoder:
    """The layers of a transformers module, run on packed rows of tokens by our own blocks.

    The module keeps working: its linear layers become views of the blocks' merged weights.
    """

    def __init__(
        self, module: Any, family: Family, pointwise: Pointwise, *, recompute: bool, unpacked: int = 0
    ) -> None:
        base = module.base_model
        self.embed, self.norm = module.get_input_embeddings(), base.get_submodule(family.norm)
        if (
            self.norm.weight.dtype
            != self.embed(torch.zeros(1, dtype=torch.int64, device=self.embed.weight.device)).dtype
        ):
            what = "our decoder block does not compute norms that are finer than the products (model.norms=float32)"
            raise ModelError(what, fix="set run.kernels to auto or reference")
        self.rotary, self.window = base.get_submodule(family.rotary), window(module.config)
        layers = cast(Sequence[nn.Module], base.get_submodule(family.layers))
        self.blocks = [Block(layer, family, module.config, pointwise, recompute=recompute) for layer in layers]
        _leave_file(module, self.blocks)
        for block in self.blocks[:unpacked]:
            for linear in block.linears:
                linear.keep()
        self.scratch = _shared_scratch([x for block in self.blocks for x in block.linears if x.dense is None])

    def hidden(self, micro: Micro, noise: Noise | None, prefix: int = 0) -> Tensor:
        """[S, H]: the final-normed hidden states at `micro.rows`.

        With a `prefix`, that many tokens are the first segment, which all others see as if they began with it.
        """
        if self.window and int(micro.positions.max()) >= self.window:
            fix = f"lower data.length to the model's attention window of {self.window} tokens"
            raise ModelError("a row is longer than the model sees", fix=fix)
        self._refresh()
        x: Tensor = self.embed(micro.ids)
        cos, sin = (table[0].chunk(2, -1)[0].contiguous() for table in self.rotary(x, micro.positions[None]))
        pack = Pack(Segments(cos, sin, micro.bounds, prefix), noise)
        last = replace(pack, segments=replace(pack.segments, rows=micro.rows), rows=micro.rows)
        for block in self.blocks:
            pack = last if block is self.blocks[-1] else pack
            x = _Layer.apply(x, block, pack, *block.parameters)  # type: ignore[no-untyped-call]
        return self.norm(x)  # type: ignore[no-any-return]

    def _refresh(self) -> None:
        """Takes the adapters' present values, those of all layers in a few launches."""
        copies = [copy for block in self.blocks for linear in block.linears for copy in linear.refresh()]
        if not copies:
            return
        sources, scales, places = (list(column) for column in zip(*copies, strict=True))
        if any(scale != 1 for scale in scales):
            sources = torch._foreach_mul(sources, scales)  # type: ignore[assignment]
        torch._foreach_copy_(places, sources)


def _shared_scratch(packed: Sequence[MergedLinear]) -> Tensor | None:
    """One piece of memory, which the linears are given to unpack their weights into. Pieces that come and go would
    leave holes of their sizes between what the layers keep."""
    if not packed:
        return None
    values, like = max(linear.columns[-1].stop * linear.features for linear in packed), packed[0]
    scratch = torch.empty(values, dtype=like.dtype, device=like.bases[0].weight.device)
    for linear in packed:
        linear.scratch = scratch
    return scratch


def _leave_file(module: nn.Module, blocks: Sequence[Block]) -> None:
    """Copies what was not merged, mostly the embedding, so that nothing holds the weights' file in memory any more."""
    merged = {id(p) for block in blocks for linear in block.linears for base in linear.bases for p in base.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in merged and not parameter.requires_grad and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


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

    def __init__(self, layer: nn.Module, family: Family, config: Any, pointwise: Pointwise, *, recompute: bool) -> None:
        part = layer.get_submodule
        self.pointwise, self.recompute = pointwise, recompute
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


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, pack: Pack, *parameters: Tensor) -> Tensor:
        y, kept, inner = block.forward(x, pack)
        *tensors, attention = (None,) * len(Kept._fields) if block.recompute else kept
        ctx.save_for_backward(x, inner, *tensors, *(attention or ()))
        ctx.block, ctx.pack = block, pack
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        block, pack = ctx.block, ctx.pack
        x, inner, *rest = ctx.saved_tensors
        parts = len(Kept._fields) - 1
        kept = block.until_down(x, pack) if block.recompute else Kept._make([*rest[:parts], rest[parts:]])
        dx, found = block.backward(dy, x, kept, inner, pack, ctx.needs_input_grad[0])
        return dx, None, None, *(found.get(p) for p in block.parameters)


class Update(NamedTuple):
    """One adapted layer of a merged product."""

    layer: LoraLinear
    columns: slice  # its outputs among the merged ones
    inner: slice  # its ranks among the merged ones
    B: Tensor  # [out, rank], in the dtype of the products


class MergedLinear:
    """Linear layers that read the same input, as one product, and their LoRA updates beside it.

    The merged weight [N, K] becomes the storage of the layers it was made from; packed weights stay packed, and are
    unpacked side by side each time, into memory that all linears of a model share. Shape suffix: P, the ranks of all
    updates.
    """

    scratch: Tensor | None = None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.bases = [cast(Any, layer.base if isinstance(layer, LoraLinear) else layer) for layer in layers]
        packed = any(is_quantized(base) for base in self.bases)
        self.dense = None if packed else _merge([base.weight for base in self.bases])
        self.bias = None if self.bases[0].bias is None else _merge([base.bias for base in self.bases])
        self.columns = _slices([base.out_features for base in self.bases])
        self.features = self.bases[0].in_features
        self.updates: list[Update] = []

    def keep(self) -> None:
        """Keeps the values of packed weights, which else are unpacked for each product."""
        self.dense = self.weight

    @property
    def weight(self) -> Tensor:
        """[N, K] in the dtype of the products; where it was packed, only until the next of these is asked for."""
        if self.dense is not None:
            return self.dense
        first, rows = self.bases[0], self.columns[-1].stop
        if self.scratch is None or (len(self.bases) == 1 and not on_gpu(first.weight)):
            parts = [dense_weight(base) for base in self.bases]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        merged = self.scratch[: rows * self.features].view(rows, self.features)
        for base, part in zip(self.bases, self.columns, strict=True):
            _write(base, merged[part])
        return merged

    def parameters(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, LoraLinear):
                yield from (layer.A, layer.B)

    @property
    def dtype(self) -> torch.dtype:
        packed = next((base for base in self.bases if is_quantized(base)), None)
        return self.bases[0].weight.dtype if packed is None else packed.compute_dtype  # type: ignore[no-any-return]

    def refresh(self) -> Iterator[tuple[Tensor, float, Tensor]]:
        """What has to be copied for the adapters' present values to be here, in the dtype of the products: (source,
        factor, place). Places are kept from one time to the next."""
        live = [
            (x, c) for x, c in zip(self.layers, self.columns, strict=True) if isinstance(x, LoraLinear) and x.enabled
        ]
        if not self._has_places([layer for layer, _ in live]):
            self._make_places(live)
        for update in self.updates:
            yield update.layer.A.detach(), update.layer.scale, self.A[update.inner]
            yield update.layer.B.detach(), 1.0, update.B

    def _has_places(self, live: Sequence[LoraLinear]) -> bool:
        """Whether there are places for these layers. Those made in inference mode can be written to only there."""
        ranks = [(update.layer, len(self.A[update.inner])) for update in self.updates]
        inference = not self.updates or self.A.is_inference() == torch.is_inference_mode_enabled()
        return inference and ranks == [(layer, layer.rank) for layer in live]

    def _make_places(self, live: Sequence[tuple[LoraLinear, slice]]) -> None:
        inner, like = _slices([layer.rank for layer, _ in live]), self.bases[0].weight
        make = partial(torch.empty, dtype=self.dtype, device=like.device)
        places = [make(layer.B.shape) for layer, _ in live]
        self.updates = [Update(x, c, i, B) for (x, c), i, B in zip(live, inner, places, strict=True)]
        self.A = make(inner[-1].stop if inner else 0, self.features)  # [P, K]

    def forward(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """x [T, K] to y [T, N], and the updates' inner values scale · x Aᵀ [T, P]."""
        weight = self.weight
        y = torch.mm(x, weight.t()) if self.bias is None else torch.addmm(self.bias, x, weight.t())
        if not self.updates:
            return y, None
        inner = x.new_empty(len(x), len(self.A))
        for part, drop in self._readers(noise):
            torch.mm(drop(x) if drop else x, self.A[part].t(), out=inner[:, part])
        for update in self.updates:
            y[:, update.columns].addmm_(inner[:, update.inner], update.B.t())
        return y, inner

    def backward_inner(self, dy: Tensor, inner: Tensor | None, found: Gradients) -> Tensor | None:
        """The gradient of the inner values; that of each B goes to `found`."""
        if inner is None:
            return None
        dinner = torch.empty_like(inner)
        for update in self.updates:
            part = dy[:, update.columns]
            torch.mm(part, update.B, out=dinner[:, update.inner])
            found[update.layer.B] = torch.mm(inner[:, update.inner].t(), part).t()
        return dinner

    def backward_input(self, dy: Tensor, dinner: Tensor | None, noise: Noise | None) -> Tensor:
        """The gradient of x [T, K]."""
        dx = torch.mm(dy, self.weight)
        if dinner is None:
            return dx
        for part, drop in self._readers(noise):
            if drop is None:
                dx.addmm_(dinner[:, part], self.A[part])
            else:
                dx.add_(drop(torch.mm(dinner[:, part], self.A[part])))
        return dx

    def backward_adapters(self, dinner: Tensor | None, x: Tensor, noise: Noise | None, found: Gradients) -> None:
        """Puts the gradient of each A into `found`."""
        if dinner is None:
            return
        dA = torch.empty_like(self.A)
        for part, drop in self._readers(noise):
            torch.mm(dinner[:, part].t(), drop(x) if drop else x, out=dA[part])
        for update in self.updates:
            found[update.layer.A] = dA[update.inner].mul_(update.layer.scale)

    def _readers(self, noise: Noise | None) -> list[tuple[slice, Callable[[Tensor], Tensor] | None]]:
        """Which ranks read x, and what is done to it before: all at once if nothing is dropped, else each layer's own
        values are."""
        if noise is None or noise.samples is None or not any(u.layer.dropout for u in self.updates):
            return [(slice(None), None)]
        return [(u.inner, partial(noise.dropped, module=u.layer.index, p=u.layer.dropout)) for u in self.updates]


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    return [slice(a, b) for a, b in pairwise(accumulate([0, *sizes]))]


def _write(base: Any, out: Tensor) -> None:
    """Puts the weight of a linear layer into `out` [out, in]."""
    if is_quantized(base):
        base.write(out)
    else:
        out.copy_(base.weight)


def _merge(parts: list[Tensor]) -> Tensor:
    """The parameters `parts`, one under the other in one tensor, of which they become views."""
    merged = torch.cat([p.detach() for p in parts])
    for part, rows in zip(parts, _slices([len(p) for p in parts]), strict=True):
        part.data = merged[rows]
    return merged
