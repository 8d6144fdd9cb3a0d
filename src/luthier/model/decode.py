"""How a model reads prompts and then goes on token by token, with its keys and values kept.

Two decoders, one meaning. `ReferenceDecoder` is the transformers module with its own cache: every family works.
`FastDecoder` runs the blocks of Llama-shaped models itself: prompts packed without padding, what they all begin with
computed once, merged projections, and a cache that is written in place. In float32 both choose the same greedy tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters.lora import LoraLinear
from luthier.kernels.loss import token_losses
from luthier.model import families

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

PREFILL_TOKENS = 2048  # tokens of prompts in one pass: enough to fill the processor, little enough for its caches
SHARED_FROM = 8  # a common beginning shorter than this is not worth a pass of its own

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [T, Hq, D], key [T, Hk, D], value [T, Hk, D]) to [T, Hq, D]."""


class Decoder(Protocol):
    """Holds one batch of rows at a time, a row for each prompt."""

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Reads prompts, makes room for so many tokens more, and gives the logits after each: fp32 [B, V]."""

    def step(self, ids: Tensor) -> Tensor:
        """Appends one token (int64 [B]) to each row; the logits after it: fp32 [B, V]."""

    def weigh(self, logits: Tensor, continuations: Sequence[Sequence[int]]) -> list[float]:
        """The negative log-likelihood (nats) of each row's continuation, at least a token, right after the prompt.
        `logits` are those of `prefill`. What the decoder holds stays as it is."""

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, and the others are forgotten. int64 [n], each either i or >= n."""


def decoder(model: CausalModel, *, merge: bool) -> Decoder:
    """The fast decoder where the model's family allows it. `merge` as in `FastDecoder`."""
    return FastDecoder(model, merge=merge) if is_fast(model) else ReferenceDecoder(model)


def is_fast(model: CausalModel) -> bool:
    """Whether the module is of a family we run: plain linear layers, no window, no rope that changes with length."""
    config = model.module.config
    family = families.find(config)
    if family is None or families.window(config) or config.rope_parameters.get("rope_type") in ("dynamic", "longrope"):
        return False
    return all(_is_plain(block) for block in getattr(model.module.base_model, family.layers))


def _is_plain(block: nn.Module) -> bool:
    holders = (
        m for m in block.modules() if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.dim() > 1
    )
    return all(type(m) is nn.Linear for m in holders)


class ReferenceDecoder:
    """The transformers module, left-padded, with its own cache."""

    def __init__(self, model: CausalModel) -> None:
        self.module, self.device = model.module, model.device
        takes = inspect.signature(self.module.forward).parameters
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.mask = torch.empty(0)
        self.cache: Any = None
        self.prompts: Sequence[Sequence[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        from transformers import DynamicCache

        self.prompts = prompts
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.cache = DynamicCache(config=self.module.config)
        return self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def weigh(self, logits: Tensor, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Reads every row anew, from its first token on."""
        losses = []
        for prompt, continuation in zip(self.prompts, continuations, strict=True):
            ids = torch.tensor([[*prompt, *continuation]], device=self.device)
            seen = self.module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            losses.append(float(F.cross_entropy(seen, ids[0, len(prompt) :], reduction="sum")))
        return losses

    def step(self, ids: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(ids[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.module(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self.only_last,
        )
        last: Tensor = out.logits[:, -1].float()
        return last


class FastDecoder:
    """Runs the blocks of a Llama-shaped module on the module's own weights, adapter included.

    The cache of a layer is [B, Hk, Tmax, D] for keys and again for values. Rows end at the same column: a shorter
    prompt begins later, and `bias` hides the columns before it, so that a step writes one column.

    Args:
        merge: make one matrix of q, k and v and one of gate and up, with the adapter added in where weights are
            float32. Faster, and costs a copy of the blocks' weights.
    """

    def __init__(self, model: CausalModel, *, merge: bool) -> None:
        base, config = model.module.base_model, model.module.config
        family = families.find(config)
        assert family is not None
        self.device, self.dtype, self.head = model.device, model.dtype, model.head
        self.embedding, self.rope = model.module.get_input_embeddings().weight, getattr(base, family.rotary)
        self.norm, self.eps = getattr(base, family.norm).weight, getattr(config, family.eps)
        self.layers = [_Layer(block, family, merge) for block in getattr(base, family.layers)]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.bias = self.starts = torch.empty(0)
        self.end = 0

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        lengths = [len(p) for p in prompts]
        self.end = max(lengths)
        self.starts = torch.tensor([self.end - n for n in lengths], device=self.device)
        columns = torch.arange(self.end + room, device=self.device)
        self.bias = torch.zeros(len(prompts), 1, 1, len(columns), dtype=self.dtype, device=self.device)
        self.bias.masked_fill_(columns < self.starts[:, None, None, None], -torch.inf)
        shape = (len(prompts), self.kv_heads, len(columns), self.width)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers] for _ in range(2)
        )
        shared = _shared(prompts)
        if shared:
            self._read_shared(prompts[0][:shared])
        ends = [self._read(rows, prompts, shared) for rows in _passes([n - shared for n in lengths])]
        return self._logits(torch.cat(ends))

    def weigh(self, logits: Tensor, continuations: Sequence[Sequence[int]]) -> list[float]:
        firsts = torch.tensor([c[0] for c in continuations], device=self.device)
        losses = logits.logsumexp(-1) - logits.gather(1, firsts[:, None])[:, 0]
        longer = [row for row, continuation in enumerate(continuations) if len(continuation) > 1]
        for part in _passes([len(continuations[row]) for row in longer]) if longer else ():
            rows = longer[part.start : part.stop]
            rests = [continuations[row] for row in rows]
            owners = torch.tensor([row for row, rest in zip(rows, rests, strict=True) for _ in rest[1:]])
            targets = torch.tensor([i for rest in rests for i in rest[1:]], device=self.device)
            x = self._rms(self._read_on(rows, [rest[:-1] for rest in rests]), self.norm)
            losses.index_add_(0, owners.to(self.device), token_losses(x, self.head, targets))
        return losses.tolist()

    def step(self, ids: Tensor) -> Tensor:
        x = self._forward(ids, self.end - self.starts, self._attend_cache)
        self.end += 1
        return self._logits(x)

    def keep(self, rows: Tensor) -> None:
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        for cache in (self.keys, self.values):
            for layer, old in enumerate(cache):
                old[moved, :, : self.end] = old[rows[moved], :, : self.end]
                cache[layer] = old[:count]
        self.bias, self.starts = self.bias[rows], self.starts[rows]

    def _read_shared(self, ids: Sequence[int]) -> None:
        """Runs what all prompts begin with, and puts its keys and values into every row."""
        count = len(ids)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for row, start in enumerate(starts):
                self.keys[layer][row, :, start : start + count] = k.transpose(0, 1)
                self.values[layer][row, :, start : start + count] = v.transpose(0, 1)
            return _attention(q, k.transpose(0, 1), v.transpose(0, 1), None)

        starts = self.starts.tolist()
        self._forward(torch.tensor(ids, device=self.device), torch.arange(count, device=self.device), attend)

    def _read(self, rows: range, prompts: Sequence[Sequence[int]], shared: int) -> Tensor:
        """Runs the rest of some rows packed, fills their cache, and gives the last hidden states [len(rows), H]."""
        rests = [prompts[row][shared:] for row in rows]
        bounds = [0, *accumulate(len(rest) for rest in rests)]
        starts = self.starts[rows.start : rows.stop].tolist()
        bias = self._causal(max(len(rest) for rest in rests), shared)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs = []
            for row, start, (first, last) in zip(rows, starts, pairwise(bounds), strict=True):
                keys, values = self.keys[layer][row], self.values[layer][row]
                keys[:, start + shared : self.end] = k[first:last].transpose(0, 1)
                values[:, start + shared : self.end] = v[first:last].transpose(0, 1)
                outs.append(_attention(q[first:last], keys[:, start : self.end], values[:, start : self.end], bias))
            return torch.cat(outs)

        ids = torch.tensor([i for rest in rests for i in rest], device=self.device)
        positions = torch.cat([torch.arange(shared, shared + len(rest)) for rest in rests]).to(self.device)
        x = self._forward(ids, positions, attend)
        return x[torch.tensor(bounds[1:], device=self.device) - 1]

    def _read_on(self, rows: Sequence[int], rests: Sequence[Sequence[int]]) -> Tensor:
        """The last hidden states [T, H] of tokens that follow the cached ones of some rows; nothing is written."""
        bounds = [0, *accumulate(len(rest) for rest in rests)]
        starts = self.starts.tolist()
        starts = [starts[row] for row in rows]
        biases = [self._causal(len(rest), self.end - start) for rest, start in zip(rests, starts, strict=True)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs = []
            for row, start, bias, (first, last) in zip(rows, starts, biases, pairwise(bounds), strict=True):
                keys, values = (
                    torch.cat([cache[layer][row][:, start : self.end], own[first:last].transpose(0, 1)], 1)
                    for cache, own in ((self.keys, k), (self.values, v))
                )
                outs.append(_attention(q[first:last], keys, values, bias))
            return torch.cat(outs)

        ids = torch.tensor([i for rest in rests for i in rest], device=self.device)
        before = [torch.arange(self.end - a, self.end - a + len(r)) for a, r in zip(starts, rests, strict=True)]
        return self._forward(ids, torch.cat(before).to(self.device), attend)

    def _causal(self, length: int, shared: int) -> Tensor | None:
        """[length, shared + length]: 0 where a token sees another, else -inf. None where nothing is shared."""
        if not shared:
            return None
        hidden = torch.full((length, shared + length), -torch.inf, dtype=self.dtype, device=self.device)
        return hidden.triu(shared + 1)

    def _attend_cache(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token of each row: q [B, Hq, D] sees the row's cache, into which k and v [B, Hk, D] go first."""
        end = self.end + 1
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.end], values[:, :, self.end] = k, v
        grouped = q.view(
            len(q), self.kv_heads, -1, self.width
        )  # the query heads that share a key are its query positions
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :end], values[:, :, :end], self.bias[..., :end])
        return out.flatten(1, 2)

    def _forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions [T] to the last block's hidden states [T, H]."""
        x = F.embedding(ids, self.embedding)
        cos, sin = (t[0, :, None] for t in self.rope(x, positions[None]))
        rotated = self.heads + self.kv_heads
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._rms(x, layer.before_attention)).view(len(x), -1, self.width)
            q, k = _rotate(qkv[:, :rotated], cos, sin).tensor_split([self.heads], dim=1)
            v = qkv[:, rotated:]
            x += layer.out(attend(index, q, k, v).flatten(1))
            gate, up = layer.gate_up(self._rms(x, layer.before_mlp)).chunk(2, dim=-1)
            x += layer.down(F.silu(gate, inplace=True).mul_(up))
        return x

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _logits(self, x: Tensor) -> Tensor:
        return _linear(self._rms(x, self.norm), self.head).float()


class _Layer:
    def __init__(self, block: nn.Module, family: families.Family, merge: bool) -> None:
        find: Callable[[str], Any] = block.get_submodule
        self.before_attention, self.before_mlp = find(family.attention_norm).weight, find(family.mlp_norm).weight
        self.qkv = Projection([find(name) for name in family.qkv], merge)
        self.out = Projection([find(family.out)], merge)
        self.gate_up = Projection([find(name) for name in family.gate_up], merge)
        self.down = Projection([find(family.down)], merge)


class Projection:
    """Linear layers with one input, their outputs side by side, adapters included."""

    def __init__(self, layers: Sequence[nn.Linear | LoraLinear], merge: bool) -> None:
        parts = [_Part.of(layer) for layer in layers]
        self.parts = [_Part.merged(parts)] if merge else parts

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, sum of out]."""
        outs = [part(x) for part in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


class _Part:
    """x W^T + bias + (x down^T) up^T."""

    def __init__(self, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> None:
        self.weight, self.bias, self.low_rank = weight, bias, low_rank

    def __call__(self, x: Tensor) -> Tensor:
        y = _linear(x, self.weight, self.bias)
        if self.low_rank:
            down, up = self.low_rank
            y = y + F.linear(F.linear(x, down), up)
        return y

    @classmethod
    def of(cls, layer: nn.Linear | LoraLinear) -> _Part:
        if isinstance(layer, nn.Linear):
            return cls(layer.weight, layer.bias, None)
        if not layer.enabled:
            return cls(layer.base.weight, layer.base.bias, None)
        dtype = layer.base.weight.dtype
        return cls(layer.base.weight, layer.base.bias, (layer.A.to(dtype), (layer.B * layer.scale).to(dtype)))

    @classmethod
    def merged(cls, parts: Sequence[_Part]) -> _Part:
        """One part for several. Low ranks are added into float32 weights; a bfloat16 weight would round them away."""
        if parts[0].weight.dtype == torch.float32:
            parts = [p._folded() for p in parts]
        weight = torch.cat([p.weight for p in parts]) if len(parts) > 1 else parts[0].weight
        biases = [p.bias if p.bias is not None else p.weight.new_zeros(len(p.weight)) for p in parts]
        bias = torch.cat(biases) if any(p.bias is not None for p in parts) else None
        return cls(weight, bias, _side_by_side(parts))

    def _folded(self) -> _Part:
        if self.low_rank is None:
            return self
        down, up = self.low_rank
        return _Part(torch.addmm(self.weight, up, down), self.bias, None)


def _side_by_side(parts: Sequence[_Part]) -> tuple[Tensor, Tensor] | None:
    """One pair (down, up) that acts as the pairs of all parts: down stacked, up on the diagonal."""
    if all(p.low_rank is None for p in parts):
        return None
    none = parts[0].weight[:0]
    pairs = [p.low_rank or (none, p.weight[:, :0]) for p in parts]
    return torch.cat([down for down, _ in pairs]), _diagonal([up for _, up in pairs])


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    diagonal: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return diagonal


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. With few rows the CPU's float32 product is up to 1.6 times as fast as W x^T."""
    if bias is None and 8 <= len(x) <= 64 and x.device.type == "cpu" and x.dtype == torch.float32:
        return (weight @ x.t().contiguous()).t().contiguous()
    return F.linear(x, weight, bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves paired: x [T, heads, D], cos and sin [T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Causal attention of the last L of T tokens: q [L, Hq, D], k and v [Hk, T, D] to [L, Hq, D].

    `bias` as of `FastDecoder._causal`, at least [L, T]; None where L = T.
    """
    length, total = len(q), k.shape[1]
    grouped = q.transpose(0, 1).reshape(len(k), -1, length, q.shape[-1])
    k, v = (t[:, None].expand(-1, grouped.shape[1], -1, -1) for t in (k, v))  # a key head serves its group
    mask = bias[:length, :total] if bias is not None else None
    out = F.scaled_dot_product_attention(grouped, k, v, mask, is_causal=mask is None)
    return out.flatten(0, 1).transpose(0, 1)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, at least one token of each left over; 0 where it does not pay."""
    if len(prompts) < 2:
        return 0
    columns = zip(*(p[:-1] for p in prompts), strict=False)
    count = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return count if count >= SHARED_FROM else 0


def _passes(lengths: Sequence[int]) -> list[range]:
    """Neighbouring rows that are read together."""
    passes, first, tokens = [], 0, 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > PREFILL_TOKENS:
            passes.append(range(first, row))
            first, tokens = row, 0
        tokens += length
    return [*passes, range(first, len(lengths))]
