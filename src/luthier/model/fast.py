"""Our own decoder: the blocks of Llama-shaped models, run on the module's own weights, adapter included.

Prompts are packed without padding, what they all begin with is computed once, projections are merged where that costs
little memory, and the cache is written in place. On a GPU a step works on whole buckets of rows and columns and on
tensors that stay where they are: so few kinds of steps come again and again, and those are recorded as CUDA graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from luthier.adapters.lora import LoraLinear
from luthier.kernels.ends import Ends
from luthier.kernels.loss import token_losses
from luthier.kernels.sizes import power_of_2
from luthier.kernels.varlen import takes, varlen_attention
from luthier.model import families
from luthier.model.graphs import CudaRecorder, Recorder, Step, lack, said, tell_launched
from luthier.model.place import free_memory
from luthier.model.quantize import PackedLinear

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

PREFILL_TOKENS = 2048  # tokens of prompts in one pass: enough to fill a CPU, little enough for its caches
PREFILL_TOKENS_ON_GPU = 16384
SHARED_FROM = 8  # a common beginning shorter than this is not worth a pass of its own
COLUMNS = 128  # attention of a bucketed step reads so many columns of the cache, or a multiple
RECORD_ROWS = 256  # with more rows the GPU takes longer for a step than the CPU takes to launch it
RECORD_AFTER = 4  # steps of one kind: short answers are done before a recording pays

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [T, Hq, D], key [T, Hk, D], value [T, Hk, D]) to [T, Hq, D]."""


class FastDecoder:
    """Runs the blocks of a Llama-shaped module on the module's own weights, adapter included.

    The cache of a layer is [B, Hk, Tmax, D] for keys and again for values. Rows end at the same column: a shorter
    prompt begins later, and `bias` hides the columns before it, so that a step writes one column.

    Blocks whose weights are in host memory come as they are needed, in every pass and every step.

    Args:
        merge: make one matrix of q, k and v and one of gate and up, with the adapter added in where weights are
            float32. Faster, and costs a copy of the blocks' weights. Packed weights stay as they are, and so do those
            that come and go.
        bucketed: let a step compute up to a power of two of rows, and attend to a multiple of `COLUMNS`, the
            superfluous ones hidden; such steps are recorded on a GPU. Otherwise it works on what there is.
    """

    equal = False

    def __init__(self, model: CausalModel, *, merge: bool, bucketed: bool = False) -> None:
        base, config = model.module.base_model, model.module.config
        family = families.find(config)
        assert family is not None
        self.device, self.dtype, self.head, self.bucketed = model.device, model.dtype, model.head, bucketed
        self.embed, self.rope = model.module.get_input_embeddings(), getattr(base, family.rotary)
        self.norm, self.eps = getattr(base, family.norm).weight, getattr(config, family.eps)
        blocks = getattr(base, family.layers)
        self.streamed = model.streamed
        self.merged = merge and self.streamed is None
        self.layers_of = partial(_layers, blocks, family)
        self.layers = self.layers_of(merge=self.merged)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        # Which inputs LLM.int8() rounds is for the host to decide: that cannot be recorded. Copies are not, either.
        launched = _rounds_inputs(blocks) or self.streamed is not None
        self.recorder = _Recorder(on=bucketed and self.device.type == "cuda" and not launched)
        self.pass_tokens = self._pass_tokens(config.hidden_size, config.intermediate_size, model.memory)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.end = 0

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        lengths = [len(p) for p in prompts]
        self._make_room(lengths, room)
        shared, starts = _shared(prompts), [self.end - n for n in lengths]
        if shared:
            self._read(_Texts([0], starts[:1], [0], [prompts[0][:shared]], self.norm), write=True)
            self._spread(shared)
        ends = []
        for part in _passes([_weight(n - shared, shared) for n in lengths], self.pass_tokens):
            rests = [prompts[row][shared:] for row in part]
            texts = _Texts(part, starts[part.start : part.stop], [shared] * len(part), rests, self.norm)
            ends.append(self._read(texts, write=True)[texts.lasts])
        return self._logits(torch.cat(ends))

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        firsts = torch.tensor([c[0] for c in continuations], device=self.device)
        owned = torch.tensor(rows, device=self.device)
        losses = logits.logsumexp(-1)[owned] - logits[owned, firsts]
        longer = [i for i, continuation in enumerate(continuations) if len(continuation) > 1]
        starts = self.starts.tolist()
        weights = [_weight(len(continuations[i]), self.end - starts[rows[i]]) for i in longer]
        for part in _passes(weights, self.pass_tokens) if longer else ():
            chosen = longer[part.start : part.stop]
            begun = [starts[rows[i]] for i in chosen]
            rests = [continuations[i] for i in chosen]
            owners = torch.tensor([i for i, rest in zip(chosen, rests, strict=True) for _ in rest[1:]])
            targets = torch.tensor([token for rest in rests for token in rest[1:]], device=self.device)
            before, heads = [self.end - start for start in begun], [rest[:-1] for rest in rests]
            read = self._read(_Texts([rows[i] for i in chosen], begun, before, heads, self.norm), write=False)
            losses.index_add_(0, owners.to(self.device), token_losses(self._rms(read, self.norm), self.head, targets))
        return losses.tolist()

    def step(self, ids: Tensor) -> Tensor:
        count = len(ids)
        self.ids[:count] = ids
        kind = self._rows(count), self._columns(self.end + 1)
        self.end += 1
        return self.recorder(partial(self._next, *kind), kind)[:count].float()

    def keep(self, rows: Tensor) -> None:
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        for cache in chain(self.keys, self.values):
            cache[moved, :, : self.end] = cache[rows[moved], :, : self.end]
        self.bias[:count], self.starts[:count] = self.bias[rows], self.starts[rows]

    def take_less(self) -> bool:
        """Without a copy of the weights, and with half as many tokens in a pass: one of fewer than the longest row has
        takes no less. Nothing is made here, where memory has just lacked: `prefill` does."""
        less = self.merged or self.pass_tokens > self.end
        self._forget()
        self.layers = [] if self.merged else self.layers
        self.merged, self.pass_tokens = False, self.pass_tokens // 2
        return less

    def _make_room(self, lengths: Sequence[int], room: int) -> None:
        """An empty cache for rows of these lengths, of which none sees a column yet that is still to be written."""
        self._forget()  # the old one goes before the new one comes
        count, self.end = len(lengths), max(lengths)
        self.layers = self.layers or self.layers_of(merge=self.merged)
        rows, columns = self._rows(count), self._columns(self.end + room)
        self.ids, self.starts = (torch.zeros(rows, dtype=torch.int64, device=self.device) for _ in range(2))
        self.starts[:count] = torch.tensor([self.end - n for n in lengths], device=self.device)
        self.column = torch.tensor([self.end], device=self.device)  # `end`, for recorded steps
        places = torch.arange(columns, device=self.device)
        hidden = (places < self.starts[:, None]) | (places >= self.end)
        self.bias = torch.zeros(rows, 1, 1, columns, dtype=self.dtype, device=self.device)
        self.bias.masked_fill_(hidden[:, None, None], -torch.inf)
        shape = (rows, self.kv_heads, columns, self.width)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers] for _ in range(2)
        )

    def _forget(self) -> None:
        """Lets go of the cache, and of the recorded steps that work on it."""
        self.keys, self.values = [], []
        self.recorder.forget()

    def _rows(self, count: int) -> int:
        """How many rows a step for `count` rows computes."""
        return power_of_2(count) if self.bucketed and count <= RECORD_ROWS else count

    def _columns(self, end: int) -> int:
        """How many columns a step attends to that writes the last of `end`."""
        return -(-end // COLUMNS) * COLUMNS if self.bucketed else end

    def _pass_tokens(self, hidden: int, inner: int, memory: int | None) -> int:
        """Tokens of prompts in one pass; on a GPU what takes about a sixteenth of its free memory, or a quarter where
        weights come anew for each pass."""
        if self.device.type != "cuda":
            return PREFILL_TOKENS
        room = free_memory(self.device, memory) // (16 if self.streamed is None else 4)
        tokens = room // token_bytes(hidden, inner, self.dtype.itemsize)
        return min(max(tokens, PREFILL_TOKENS), PREFILL_TOKENS_ON_GPU)

    def _next(self, rows: int, columns: int) -> Tensor:
        """The logits [rows, V] after `ids`. Reads and writes tensors that stay where they are: it can be recorded."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer][:rows], self.values[layer][:rows]
            for cache, new in ((keys, k), (values, v)):
                cache.index_copy_(2, self.column, new[:, :, None])
            grouped = q.view(rows, self.kv_heads, -1, self.width)  # the heads that share a key are its queries
            bias = self.bias[:rows, ..., :columns]
            out = F.scaled_dot_product_attention(grouped, keys[:, :, :columns], values[:, :, :columns], bias)
            return out.flatten(1, 2)

        self.bias.index_fill_(3, self.column, 0)
        with self._masking_kernels():
            x = self._forward(self.ids[:rows], self.column - self.starts[:rows], attend)
        self.column += 1
        return self._logits(x)

    def _masking_kernels(self) -> AbstractContextManager[Any]:
        """On a GPU, those that neither plan anew for each shape nor copy the keys."""
        if self.device.type != "cuda":
            return nullcontext()
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def _read(self, texts: _Texts, *, write: bool) -> Tensor:
        """The last hidden states [T, H] of texts that follow what their rows hold, which they are added to if `write`
        says so."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            caches = [cache[layer].transpose(1, 2) for cache in (self.keys, self.values)]  # [B, Tmax, Hk, D]
            for cache, new in zip(caches, (k, v), strict=True) if write else ():
                cache[texts.places] = new
            k, v = (texts.with_what_they_follow(cache, new) for cache, new in zip(caches, (k, v), strict=True))
            return _attend(q, k, v, texts)

        return self._forward(texts.ids, texts.positions, attend)

    def _spread(self, count: int) -> None:
        """Gives every row the beginning of the first, `count` tokens."""
        columns = self.starts[:, None] + torch.arange(count, device=self.device)
        rows = torch.arange(len(columns), device=self.device)[:, None]
        for cache in (cache.transpose(1, 2) for cache in chain(self.keys, self.values)):
            cache[rows, columns] = cache[0, columns[0]]

    def _forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions [T] to the last block's hidden states [T, H]."""
        x: Tensor = self.embed(ids)
        cos, sin = (t[0, :, None] for t in self.rope(x, positions[None]))
        rotated = self.heads + self.kv_heads
        for index, layer in enumerate(self.layers):
            if self.streamed is not None:
                self.streamed.enter(index)
            qkv = layer.qkv(self._rms(x, layer.before_attention)).view(len(x), -1, self.width)
            q, k = _rotate(qkv[:, :rotated], cos, sin).tensor_split([self.heads], dim=1)
            v = qkv[:, rotated:]
            x += layer.out(attend(index, q, k, v).flatten(1))
            gate, up = layer.gate_up.apart(self._rms(x, layer.before_mlp))
            x += layer.down(F.silu(gate, inplace=True).mul_(up))
        return x

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _logits(self, x: Tensor) -> Tensor:
        x, head = self._rms(x, self.norm), self.head
        if head.weight is None or head.scale != 1 or head.softcap is not None:
            return head.logits(x).float()
        return _linear(x, head.weight, head.bias).float()


def token_bytes(hidden: int, inner: int, size: int) -> int:
    """What a token of a prompt takes while it is read, beside its keys and values: in a block of these widths, in
    numbers of `size` bytes."""
    return (6 * hidden + 5 * inner) * size


class _Recorder:
    """Runs steps. Where it is `on`, one whose kind has come `RECORD_AFTER` times is recorded, and replayed from then
    on.

    Args:
        on: whether to record, until a recording fails: for good, or, for want of memory, until `forget`.
    """

    def __init__(self, *, on: bool) -> None:
        self.able = on
        self.recorder: Recorder | None = None
        self.forget()

    def forget(self) -> None:
        """Before the tensors that recorded steps work on make way for others."""
        self.on = self.able
        self.times = Counter[tuple[int, int]]()
        self.recorded = dict[tuple[int, int], Step]()
        self.recorder = None

    def __call__(self, step: Step, kind: tuple[int, int]) -> Tensor:
        self.times[kind] += 1
        if self.on and self.times[kind] > RECORD_AFTER and kind not in self.recorded:
            self._record(step, kind)
        if kind not in self.recorded:
            return step()
        return self.recorded[kind]().clone()  # the next replay writes there

    def _record(self, step: Step, kind: tuple[int, int]) -> None:
        """What is recorded does not run. Where that fails, steps are launched from here on."""
        self.recorder = self.recorder or CudaRecorder()
        try:
            self.recorded[kind] = self.recorder.record(step)
        except RuntimeError as error:
            self.on = False
            if lack(error) is None:
                self.able = False
                tell_launched(said(error))
        if not self.on:  # not in the handler: what went wrong holds what the step had made
            self.recorded.clear()
            self.recorder.forget()


@dataclass(frozen=True)
class _Texts:
    """Texts that are read together, packed without padding: T tokens. Text i is of the row `rows[i]` of the cache,
    which begins at the column `starts[i]`, and follows its first `before[i]` tokens; with those they are S tokens."""

    rows: Sequence[int]
    starts: Sequence[int]
    before: Sequence[int]
    texts: Sequence[Sequence[int]]
    like: Tensor  # of the device and dtype of the cache

    @cached_property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    @cached_property
    def bounds(self) -> list[int]:
        """Of the texts among the T tokens."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def key_bounds(self) -> list[int]:
        """Of the texts among the S tokens."""
        return [0, *accumulate(before + length for before, length in zip(self.before, self.lengths, strict=True))]

    @cached_property
    def ids(self) -> Tensor:
        return self._moved(torch.tensor(list(chain.from_iterable(self.texts))))

    @cached_property
    def positions(self) -> Tensor:
        return self._moved(_ranges(self.before, self.lengths))

    @cached_property
    def lasts(self) -> Tensor:
        """The last token of each text among the T tokens."""
        return self._moved(torch.tensor(self.bounds[1:]) - 1)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns [T] of the cache."""
        return self._places(map(sum, zip(self.starts, self.before, strict=True)), self.lengths)

    def with_what_they_follow(self, cache: Tensor, new: Tensor) -> Tensor:
        """Of the cache [B, Tmax, Hk, D] what the texts follow, and of themselves `new` [T, Hk, D]: [S, Hk, D]."""
        if not any(self.before):
            return new
        joined = new.new_empty(self.key_bounds[-1], *new.shape[1:])
        (cached_at, new_at), followed = self._order, self._followed
        joined[cached_at], joined[new_at] = cache[followed], new
        return joined

    @cached_property
    def _followed(self) -> tuple[Tensor, Tensor]:
        """Rows and columns [S - T] of the cache."""
        return self._places(self.starts, self.before)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """Where the S tokens are from the cache, and where they are the texts' own."""
        own = map(sum, zip(self.key_bounds, self.before, strict=False))
        return self._moved(_ranges(self.key_bounds[:-1], self.before)), self._moved(_ranges(own, self.lengths))

    @cached_property
    def ends(self) -> tuple[Ends, Ends]:
        """`bounds` and `key_bounds`, where the tokens are."""
        own, keys = (
            Ends(self._moved(torch.tensor(bounds, dtype=torch.int32)), max(b - a for a, b in pairwise(bounds)))
            for bounds in (self.bounds, self.key_bounds)
        )
        return own, keys

    @cached_property
    def biases(self) -> dict[int, Tensor]:
        """By what texts follow, [length, before + length] for the longest such text: 0 where a token sees another, else
        -inf."""
        longest: dict[int, int] = {}
        for before, length in zip(self.before, self.lengths, strict=True):
            longest[before] = max(length, longest.get(before, 0))
        return {
            before: self.like.new_full((length, before + length), -torch.inf).triu(before + 1)
            for before, length in longest.items()
            if before
        }

    def _places(self, firsts: Iterable[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(self.rows).repeat_interleave(torch.tensor(counts))
        return self._moved(rows), self._moved(_ranges(firsts, counts))

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.like.device, non_blocking=True)


def _ranges(firsts: Iterable[int], counts: Sequence[int]) -> Tensor:
    """first, first + 1, … for each first, as many as its count: int64 [sum of counts]."""
    sizes = torch.tensor(counts)
    shifts = torch.tensor(list(firsts)) - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes)


def _attend(q: Tensor, k: Tensor, v: Tensor, texts: _Texts) -> Tensor:
    """Causal attention inside each text: q [T, Hq, D], k and v [S, Hk, D] to [T, Hq, D]."""
    if takes(q, k, v):
        ends, keys = texts.ends
        return varlen_attention(q, k, v, ends, q.shape[-1] ** -0.5, keys=keys)
    outs = []
    for before, (a, b), (c, d) in zip(texts.before, pairwise(texts.bounds), pairwise(texts.key_bounds), strict=True):
        bias = texts.biases.get(before)
        outs.append(_attention(q[a:b], k[c:d].transpose(0, 1), v[c:d].transpose(0, 1), bias))
    return torch.cat(outs)


def _layers(blocks: Iterable[nn.Module], family: families.Family, *, merge: bool) -> list[_Layer]:
    return [_Layer(block, family, merge) for block in blocks]


class _Layer:
    def __init__(self, block: nn.Module, family: families.Family, merge: bool) -> None:
        find: Callable[[str], Any] = block.get_submodule
        assert family.mlp_norm is not None  # `Family.is_llama`
        self.before_attention, self.before_mlp = find(family.attention_norm).weight, find(family.mlp_norm).weight
        self.qkv = Projection([find(name) for name in family.qkv], merge)
        self.out = Projection([find(family.out)], merge)
        self.gate_up = Projection([find(name) for name in family.gate_up], merge)
        self.down = Projection([find(family.down)], merge)


class Projection:
    """Linear layers with one input, their outputs side by side, adapters included."""

    def __init__(self, layers: Sequence[nn.Module], merge: bool) -> None:
        parts = [_Part.of(layer) for layer in layers]
        dense = all(isinstance(part.weight, Tensor) for part in parts)
        self.count, self.parts = len(parts), [_Part.merged(parts)] if merge and dense else parts

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, sum of out]."""
        outs = [part(x) for part in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def apart(self, x: Tensor) -> Sequence[Tensor]:
        """[T, in] to [T, out] of each layer, where these are equally wide."""
        outs = [part(x) for part in self.parts]
        return outs[0].chunk(self.count, dim=-1) if len(outs) == 1 else outs


class _Part:
    """x W^T + bias + (x down^T) up^T, where W may be packed: then the layer that holds it computes its product."""

    def __init__(self, weight: Any, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> None:
        self.weight, self.bias, self.low_rank = weight, bias, low_rank

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _linear(x, self.weight, self.bias) if isinstance(self.weight, Tensor) else self.weight(x)
        if self.low_rank:
            down, up = self.low_rank
            inner = F.linear(x, down)
            # One pass over y on a GPU, where its rows are many; a CPU's answers stay what they have been.
            y = y.addmm_(inner, up.t()) if y.is_cuda else y + F.linear(inner, up)
        return y

    @classmethod
    def of(cls, layer: Any) -> _Part:
        base = layer.base if isinstance(layer, LoraLinear) else layer
        packed = isinstance(base, PackedLinear)
        weight, dtype = (base, base.compute_dtype) if packed else (base.weight, base.weight.dtype)
        if base is layer or not layer.enabled:
            return cls(weight, base.bias, None)
        down, up = layer.pair()
        return cls(weight, base.bias, (down.to(dtype), (up * layer.scale).to(dtype)))

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

    `bias` as of `_Texts.biases`, at least [L, T]; None where L = T.
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


def _weight(length: int, before: int) -> int:
    """What a text counts for in a pass: its tokens, and little for those it follows, whose keys are copied."""
    return length + before // 8


def _passes(weights: Sequence[int], most: int) -> list[range]:
    """Neighbouring texts that are read together."""
    passes, first, total = [], 0, 0
    for text, weight in enumerate(weights):
        if total and total + weight > most:
            passes.append(range(first, text))
            first, total = text, 0
        total += weight
    return [*passes, range(first, len(weights))]


def _rounds_inputs(blocks: nn.Module) -> bool:
    return any(getattr(layer, "rounds_inputs", False) for layer in blocks.modules())
