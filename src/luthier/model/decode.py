"""How a model reads prompts and then goes on token by token, with its keys and values kept.

Three decoders, one meaning. `ReferenceDecoder` is the transformers module with its own cache or state; `WholeDecoder`,
for a module that keeps none, reads each text anew. A probe decides between them, since no table of families stays true.
`FastDecoder` runs the blocks of Llama-shaped models itself: prompts packed without padding, what they all begin with
computed once, merged projections, and a cache that is written in place. In float32 all choose the same greedy tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters.lora import LoraLinear
from luthier.kernels.loss import token_losses
from luthier.model import families
from luthier.model.quantize import unrounded

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

PREFILL_TOKENS = 2048  # tokens of prompts in one pass: enough to fill the processor, little enough for its caches
SHARED_FROM = 8  # a common beginning shorter than this is not worth a pass of its own

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [T, Hq, D], key [T, Hk, D], value [T, Hk, D]) to [T, Hq, D]."""

Batches = Literal["padded", "equal", "whole"]
"""What a module's batches may be: rows of any length, padded on the left; rows of one length; or no cache at all."""


class Decoder(Protocol):
    """Holds one batch of rows at a time, a row for each prompt."""

    equal: bool
    """Whether the prompts of a batch must be equally long."""

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Reads prompts, makes room for so many tokens more, and gives the logits after each: fp32 [B, V]."""

    def step(self, ids: Tensor) -> Tensor:
        """Appends one token (int64 [B]) to each row; the logits after it: fp32 [B, V]."""

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """The negative log-likelihood (nats) of each continuation, at least a token, right after the prompt of its row;
        a row may have several. `logits` are those of `prefill`. What the decoder holds stays as it is."""

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, and the others are forgotten. int64 [n], each either i or >= n."""


def decoder(model: CausalModel, *, merge: bool) -> Decoder:
    """The fastest decoder that the model's module allows. `merge` as in `FastDecoder`."""
    if is_fast(model):
        return FastDecoder(model, merge=merge)
    allowed = batches(model)
    return WholeDecoder(model) if allowed == "whole" else ReferenceDecoder(model, equal=allowed == "equal")


def is_fast(model: CausalModel) -> bool:
    """Whether the module is of a family we run: plain linear layers and norms of one dtype, no window, no rope that
    changes with length."""
    config, base, head = model.module.config, model.module.base_model, model.head.weight
    family = families.find(config)
    if family is None or families.window(config) or config.rope_parameters.get("rope_type") in ("dynamic", "longrope"):
        return False
    if model.adapter is not None and not model.adapter.foldable:
        return False
    if head is None or {head.dtype, getattr(base, family.norm).weight.dtype} != {model.dtype}:
        return False
    return all(_is_plain(block) for block in getattr(base, family.layers))


def _is_plain(block: nn.Module) -> bool:
    holders = (
        m for m in block.modules() if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.dim() > 1
    )
    return all(type(m) is nn.Linear for m in holders)


_PROBED: WeakKeyDictionary[nn.Module, Batches] = WeakKeyDictionary()
_CACHES = ("past_key_values", "cache_params", "state")
"""What transformers' modules call what they keep of the tokens they have read."""


def batches(model: CausalModel) -> Batches:
    """What `ReferenceDecoder` may be given, found by trying it once a module: the logits of rows that are padded, else
    of rows of one length, must be those of the texts read whole."""
    if model.module not in _PROBED:
        _PROBED[model.module] = _probe(model)
    return _PROBED[model.module]


@torch.inference_mode()
def _probe(model: CausalModel) -> Batches:
    vocabulary: int = model.module.config.get_text_config().vocab_size
    short, long = ([i * 7919 % vocabulary for i in range(1, length)] for length in (5, 26))
    with unrounded(model.module):
        for texts, found in (([short, long], "padded"), ([long, long[::-1]], "equal")):
            if _is_close(model, texts):
                return found  # type: ignore[return-value]
    return "whole"


def _trial(decoder: Decoder, texts: Sequence[list[int]]) -> Tensor:
    """The logits [3, B, V] after all but the last two tokens of each text and after each of these; the rows are chosen
    anew in between, which every cache must bear."""
    logits = [decoder.prefill([text[:-2] for text in texts], 2)]
    for place in (-2, -1):
        decoder.keep(torch.arange(len(texts), device=logits[0].device))
        logits.append(decoder.step(torch.tensor([text[place] for text in texts], device=logits[0].device)))
    return torch.stack(logits)


def _is_close(model: CausalModel, texts: Sequence[list[int]]) -> bool:
    """Whether a trial's logits are those of the texts read whole, but for rounding, which is coarse below float32 and
    in packed weights. What a wrong position or an unmasked pad does to logits is of the size of their own spread."""
    exact = model.dtype == torch.float32 and all(p.is_floating_point() for p in model.module.parameters())
    wanted = _trial(WholeDecoder(model), texts)
    try:
        error = (_trial(ReferenceDecoder(model), texts) - wanted).square().mean().sqrt()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # the module keeps nothing, or in a form that is not known here
    return bool(error <= (1e-3 if exact else 0.1) * wanted.std())


class ReferenceDecoder:
    """The transformers module with the cache or state that it makes itself; left-padded where prompts differ in length.

    Args:
        equal: the module cannot be padded, and is only given prompts of one length.
    """

    def __init__(self, model: CausalModel, *, equal: bool = False) -> None:
        self.module, self.device, self.equal = model.module, model.device, equal
        self.takes = inspect.signature(self.module.forward).parameters
        self.mask: Tensor | None = None
        self.cache: dict[str, Any] = {}
        self.prompts: Sequence[Sequence[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        self.prompts, self.cache, self.mask = prompts, {}, None
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        if any(len(p) < longest for p in prompts):
            self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return self._forward(ids)

    def step(self, ids: Tensor) -> Tensor:
        self.mask = None if self.mask is None else F.pad(self.mask, (0, 1), value=1)
        return self._forward(ids[:, None])

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        return _weighed(self.module, self.prompts, logits, rows, continuations)

    def keep(self, rows: Tensor) -> None:
        self.mask = None if self.mask is None else self.mask[rows]
        for name, cache in self.cache.items():
            if isinstance(cache, list | tuple):
                self.cache[name] = [state[rows] for state in cache]
            else:
                cache.reorder_cache(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True, **self.cache}
        if self.mask is not None:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given |= {"attention_mask": self.mask, "position_ids": positions}
        out = self.module(**_taken(given, self.takes), **_last(self.takes, 1))
        self.cache = {name: kept for name in _CACHES if (kept := getattr(out, name, None)) is not None}
        last: Tensor = out.logits[:, -1].float()
        return last


class WholeDecoder:
    """The transformers module without a cache: each text is read from its first token on, one by one."""

    equal = False

    def __init__(self, model: CausalModel) -> None:
        self.module, self.device = model.module, model.device
        self.texts: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        self.texts = [list(prompt) for prompt in prompts]
        return self._forward()

    def step(self, ids: Tensor) -> Tensor:
        for text, token in zip(self.texts, ids.tolist(), strict=True):
            text.append(token)
        return self._forward()

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        return _weighed(self.module, self.texts, logits, rows, continuations)

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]

    def _forward(self) -> Tensor:
        return torch.cat([_read(self.module, text, 1, self.device) for text in self.texts])


def _weighed(
    module: Any,
    prompts: Sequence[Sequence[int]],
    logits: Tensor,
    rows: Sequence[int],
    continuations: Sequence[Sequence[int]],
) -> list[float]:
    """As `Decoder.weigh`. A text is read anew for each continuation but those whose last token alone is their own:
    the choices A, B, C cost nothing, and option_1, option_2, option_3 one reading."""
    read: dict[tuple[int, tuple[int, ...]], Tensor] = {(row, ()): logits[row : row + 1] for row in rows}
    losses = []
    for row, continuation in zip(rows, continuations, strict=True):
        stem = tuple(continuation[:-1])
        if (row, stem) not in read:
            read[row, stem] = _read(module, [*prompts[row], *stem], len(continuation), logits.device)
        targets = torch.tensor(continuation, device=logits.device)
        losses.append(float(F.cross_entropy(read[row, stem], targets, reduction="sum")))
    return losses


def _read(module: Any, text: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The logits after the last `count` tokens of a text: fp32 [count, V]."""
    takes = inspect.signature(module.forward).parameters
    given = {"input_ids": torch.tensor([text], device=device), "use_cache": False}
    logits: Tensor = module(**_taken(given, takes), **_last(takes, count)).logits
    return logits[0, -count:].float()


def _taken(given: dict[str, Any], takes: Iterable[str]) -> dict[str, Any]:
    """What of `given` a forward takes by name."""
    takes = set(takes)
    return {name: value for name, value in given.items() if name in takes}


def _last(takes: Iterable[str], count: int) -> dict[str, int]:
    """Asks for no more logits than the last `count`, where a forward can be asked."""
    return {"logits_to_keep": count} if "logits_to_keep" in set(takes) else {}


class FastDecoder:
    """Runs the blocks of a Llama-shaped module on the module's own weights, adapter included.

    The cache of a layer is [B, Hk, Tmax, D] for keys and again for values. Rows end at the same column: a shorter
    prompt begins later, and `bias` hides the columns before it, so that a step writes one column.

    Args:
        merge: make one matrix of q, k and v and one of gate and up, with the adapter added in where weights are
            float32. Faster, and costs a copy of the blocks' weights.
    """

    equal = False

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

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        firsts = torch.tensor([c[0] for c in continuations], device=self.device)
        owned = logits[torch.tensor(rows, device=self.device)]
        losses = owned.logsumexp(-1) - owned.gather(1, firsts[:, None])[:, 0]
        longer = [i for i, continuation in enumerate(continuations) if len(continuation) > 1]
        for part in _passes([len(continuations[i]) for i in longer]) if longer else ():
            chosen = longer[part.start : part.stop]
            rests = [continuations[i] for i in chosen]
            owners = torch.tensor([i for i, rest in zip(chosen, rests, strict=True) for _ in rest[1:]])
            targets = torch.tensor([token for rest in rests for token in rest[1:]], device=self.device)
            read = self._read_on([rows[i] for i in chosen], [rest[:-1] for rest in rests])
            losses.index_add_(0, owners.to(self.device), token_losses(self._rms(read, self.norm), self.head, targets))
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
        x, head = self._rms(x, self.norm), self.head
        if head.weight is None or head.scale != 1 or head.softcap is not None:
            return head.logits(x).float()
        return _linear(x, head.weight, head.bias).float()


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
        (down, up), dtype = layer.pair(), layer.base.weight.dtype
        return cls(layer.base.weight, layer.base.bias, (down.to(dtype), (up * layer.scale).to(dtype)))

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
