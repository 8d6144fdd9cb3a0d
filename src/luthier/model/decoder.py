"""The fast path: the decoder layers of a transformers module as our own blocks, each one autograd function.

Linear layers that read the same input are one product (q|k|v, gate|up). Tokens that no supervised token can see are
left out, and no gradient flows below the first adapted layer. What is learned is the same as on the reference path:
`tests/contract/test_block.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.adapters.method import Noise
from luthier.kernels.ends import Ends
from luthier.kernels.pointwise import Pointwise
from luthier.kernels.varlen_backward import How, how
from luthier.model.away import Away, Parcel
from luthier.model.block import Block, Kept, Pack, Recompute
from luthier.model.families import Family, window
from luthier.model.heads import Segments
from luthier.model.merged import MergedLinear
from luthier.model.offload import Streamed
from luthier.model.pack import Placed
from luthier.model.shape import blocks_of
from luthier.model.updates import Updates

if TYPE_CHECKING:
    from luthier.data.stream import Micro


SETTINGS = ("unpacked", "recompute", "recompute_gate_up")
"""Of a recipe's `run`: those that `Decoder.keep_less` may change."""


class Decoder:
    """The layers of a transformers module, run on packed rows of tokens by our own blocks.

    The module keeps working: its linear layers become views of the blocks' merged weights. Those of `streamed` blocks
    come and go; what the first `away` blocks keep for the backward pass waits for it in host memory.
    """

    def __init__(
        self,
        module: Any,
        family: Family,
        pointwise: Pointwise,
        *,
        unpacked: int = 0,
        streamed: Streamed | None = None,
        away: int = 0,
    ) -> None:
        base = module.base_model
        self.embed, self.norm = module.get_input_embeddings(), base.get_submodule(family.norm)
        self.rotary, self.window = base.get_submodule(family.rotary), window(module.config)
        layers = cast(Sequence[nn.Module], base.get_submodule(family.layers))
        self.blocks = [Block(layer, number, family, module.config, pointwise) for number, layer in enumerate(layers)]
        _leave_file(module, self.blocks)
        self.streamed, first = streamed, 0 if streamed is None else len(streamed.blocks)
        self.away = Away(min(away, len(layers)), len(layers), self.norm.weight.device) if away else None
        for block in self.blocks[first : first + unpacked]:
            for linear in block.linears:
                linear.keep()
        self.updates = Updates(self._products, pointwise.copies)
        self.scratch: Tensor | None = None
        self.scratch = self._shared_scratch()

    def recompute(self, whole: bool | int, gate_up: int = 0) -> None:
        """Makes the first `whole` blocks (True: all) recompute everything, and `gate_up` more that product alone. The
        last ones, which keep everything, are done with first: what they free is there for the others."""
        count = blocks_of(whole, len(self.blocks))
        for number, block in enumerate(self.blocks):
            block.recompute = "all" if number < count else "gate_up" if number < count + gate_up else "nothing"

    def keep_less(self, free: Collection[str] = SETTINGS) -> bool:
        """Takes less memory for the same bits, as far as the settings that are `free` let it, what costs the least time
        first: lets go of the unpacked values of an eighth of the blocks; makes gate|up again in as many more; makes
        everything again. False where nothing is left to do."""
        if "unpacked" in free and self._forget(self._eighth):
            return True
        steps: list[tuple[Recompute, Recompute]] = [("nothing", "all")]
        if "recompute_gate_up" in free:
            steps = [("nothing", "gate_up"), ("gate_up", "all")]
        return "recompute" in free and any(self._recompute_more(*step) for step in steps)

    @property
    def _eighth(self) -> int:
        return -(-len(self.blocks) // 8)

    def _forget(self, count: int) -> bool:
        kept = [block for block in self.blocks if any(linear.kept for linear in block.linears)]
        for linear in chain.from_iterable(block.linears for block in kept[-count:]):
            linear.forget()
        if kept:
            self.scratch = self._shared_scratch()
            self.updates.moved()
        return bool(kept)

    def _recompute_more(self, before: Recompute, after: Recompute) -> bool:
        blocks = [block for block in self.blocks if block.recompute == before]
        for block in blocks[: self._eighth]:
            block.recompute = after
        return bool(blocks)

    def hidden(self, micro: Micro, noise: Noise | None, prefix: int = 0) -> Tensor:
        """[S, H]: the final-normed hidden states at `micro.rows`.

        With a `prefix`, that many tokens are the first segment, which all others see as if they began with it.
        """
        away = self.away if torch.is_grad_enabled() else None
        self.updates.refresh(self._products)
        x: Tensor = self.embed(micro.ids)
        before: Tensor | None = None
        told = Ends(micro.edges, micro.longest) if isinstance(micro, Placed) else None
        packs = {
            how: Pack(Segments(*self._tables(x, micro.positions, how), micro.bounds, prefix, told=told), noise)
            for how in dict.fromkeys(block.turned for block in self.blocks)
        }
        for number, block in enumerate(self.blocks):
            pack = packs[block.turned]
            if block is self.blocks[-1]:
                pack = replace(pack, segments=replace(pack.segments, rows=micro.rows), rows=micro.rows)
            wanted = x.requires_grad
            if torch.is_grad_enabled() and not wanted and any(linear.updates for linear in block.linears):
                x = self.updates.collected(x, self._products)
            turn = _Turn(number, self.streamed, away if x.requires_grad else None)
            x, before = _Layer.apply(x, before, block, pack, wanted, self.updates, turn)  # type: ignore[no-untyped-call]
        # Where norms are finer than the products (model.norms=float32), so is the head.
        return self.norm(x).to(self.norm.weight.dtype)  # type: ignore[no-any-return]

    def _tables(self, x: Tensor, positions: Tensor, how: str | int | None) -> tuple[Tensor, Tensor]:
        """cos and sin of rotary embedding, [T, n] for n pairs of features of a head; `how` as of `Family.turned`."""
        if how == 0:
            return x.new_empty(len(x), 0), x.new_empty(len(x), 0)
        cos, sin = self.rotary(x, positions[None], *([how] if isinstance(how, str) else []))
        return cos[0].chunk(2, -1)[0].contiguous(), sin[0].chunk(2, -1)[0].contiguous()

    def programs(self, tokens: int) -> list[How]:
        """What of a GPU's kernels depends on how many tokens a micro-batch has: how each block's attention finds its
        gradient."""
        heads = (block.attention.heads for block in self.blocks)
        return [how(tokens, of.queries, of.keys, of.size) for of in heads]

    def too_long(self, micro: Micro) -> bool:
        """Whether a row of `micro`, on the host, is longer than the model's attention window."""
        return bool(self.window and len(micro.positions) and int(micro.positions.max()) >= self.window)

    def _shared_scratch(self) -> Tensor | None:
        """One piece of memory, which the linears are given to unpack their weights into. Pieces that come and go would
        leave holes of their sizes between what the layers keep."""
        packed = [linear for linear in chain(*self._products) if linear.dense is None]
        if not packed:
            return None
        values, like = max(linear.size for linear in packed), packed[0]
        scratch = self.scratch
        if scratch is None or len(scratch) < values:
            scratch = torch.empty(values, dtype=like.dtype, device=like.bases[0].weight.device)
        for linear in packed:
            linear.scratch = scratch
        return scratch

    @property
    def _products(self) -> list[tuple[MergedLinear, ...]]:
        return [block.linears for block in self.blocks]


def _leave_file(module: nn.Module, blocks: Sequence[Block]) -> None:
    """Copies what was not merged, mostly the embedding, so that nothing holds the weights' file in memory any more."""
    merged = {id(p) for block in blocks for linear in block.linears for base in linear.bases for p in base.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in merged and not parameter.requires_grad and _in_a_file(parameter):
            parameter.data = parameter.data.clone()


def _in_a_file(parameter: Tensor) -> bool:
    """Whether it may be: what is pinned for a GPU was copied there."""
    return parameter.device.type == "cpu" and not parameter.is_pinned()


class _Turn(NamedTuple):
    """A block's number, and what of it may be in host memory until it is its turn."""

    number: int
    streamed: Streamed | None
    away: Away | None

    def forward(self) -> None:
        if self.streamed is not None:
            self.streamed.enter(self.number)
        if self.away is not None:
            self.away.enter(self.number)

    def backward(self, newest: Parcel | None) -> None:
        if self.streamed is not None:
            self.streamed.enter(self.number, -1)
        if self.away is not None:
            self.away.call(self.number, newest)


class _Layer(torch.autograd.Function):
    """Gradients flow through the first of the two parts that blocks hand on; that of the other one is the same."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor | None,
        block: Block,
        pack: Pack,
        wanted: bool,
        updates: Updates,
        turn: _Turn,
    ) -> tuple[Tensor, Tensor | None]:
        turn.forward()
        x = x.detach()  # which `block` may write to
        y, middle, kept, inner = block.forward(x, before, pack, keep=ctx.needs_input_grad[0])
        *tensors, attention = block.kept_of(kept)
        saved = x, inner, *tensors, *(attention or ())
        ctx.turn, ctx.parcel = turn, turn.away and turn.away.send(turn.number, saved)
        ctx.newest = turn.away and turn.away.newest
        ctx.save_for_backward(*(() if ctx.parcel else saved))
        ctx.block, ctx.pack, ctx.wanted = block, pack, wanted
        ctx.updates, ctx.then = updates, updates.now
        if pack.rows is not None:  # nobody else adds them
            return y.add_(middle), None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(middle)
        return y, middle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        ctx.updates.check(ctx.then)
        block, pack = ctx.block, ctx.pack
        ctx.turn.backward(ctx.newest)
        x, inner, *rest = ctx.parcel.take() if ctx.parcel else ctx.saved_tensors
        parts = len(Kept._fields) - 1
        kept = block.again(Kept._make([*rest[:parts], rest[parts:]]), x, pack)
        dx = block.backward(dy, x, kept, inner, pack, ctx.wanted)
        ctx.updates.gather(block.linears, ctx.then)
        return dx, None, None, None, None, None, None
