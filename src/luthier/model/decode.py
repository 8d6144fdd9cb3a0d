"""How a model reads prompts and then goes on token by token, with its keys and values kept.

Three decoders, one meaning. `ReferenceDecoder` is the transformers module with its own cache or state; `WholeDecoder`,
for a module that keeps none, reads each text anew. A probe decides between them, since no table of families stays true.
`FastDecoder` (`fast.py`) runs the blocks of Llama-shaped models itself. In float32 all choose the same greedy tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters.lora import Lora
from luthier.allocator import out_of_memory
from luthier.model import families
from luthier.model.fast import FastDecoder
from luthier.model.quantize import PackedLinear, unrounded

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

Batches = Literal["padded", "equal", "whole"]
"""What a module's batches may be: rows of any length, padded on the left; rows of one length; or no cache at all."""


class Decoder(Protocol):
    """Holds one batch of rows at a time, a row for each prompt."""

    equal: bool
    """Whether the prompts of a batch must be equally long."""
    bucketed: bool
    """Whether it is at its best with as many rows as memory holds, and with a host that runs ahead of a GPU."""

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Reads prompts, makes room for so many tokens more, and gives the logits after each: fp32 [B, V]."""

    def step(self, ids: Tensor) -> Tensor:
        """Appends one token (int64 [B]) to each row; the logits after it: fp32 [B, V]."""

    def weigh(self, logits: Tensor, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """The negative log-likelihood (nats) of each continuation, at least a token, right after the prompt of its row;
        a row may have several. `logits` are those of `prefill`. What the decoder holds stays as it is."""

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, and the others are forgotten. int64 [n], each either i or >= n."""

    def take_less(self) -> bool:
        """Forgets what it holds, and takes less memory for as many rows from here on, in more time; returns whether it
        could."""


def decoder(model: CausalModel, *, merge: bool) -> Decoder:
    """The fastest decoder that the model's module allows. `merge` as in `FastDecoder`."""
    if is_fast(model):
        return FastDecoder(model, merge=merge, bucketed=model.device.type == "cuda")
    allowed = batches(model)
    return WholeDecoder(model) if allowed == "whole" else ReferenceDecoder(model, equal=allowed == "equal")


def is_fast(model: CausalModel) -> bool:
    """Whether the module is of a family we run: linear layers and norms of one dtype, no window, no rope that changes
    with length. Layers may be packed."""
    config, base, head = model.module.config, model.module.base_model, model.head.weight
    family = families.find(config)
    if family is None or not family.is_llama or families.window(config):
        return False
    if config.rope_parameters.get("rope_type") in ("dynamic", "longrope"):
        return False
    if not _is_low_rank(model):
        return False
    if head is None or {head.dtype, getattr(base, family.norm).weight.dtype} != {model.dtype}:
        return False
    return all(_is_plain(block, model) for block in getattr(base, family.layers))


def _is_low_rank(model: CausalModel) -> bool:
    """Whether the adapter, if there is one, adds low-rank updates and nothing else."""
    adapter = model.adapter
    return adapter is None or adapter.foldable or (isinstance(adapter, Lora) and adapter.plain)


def _is_plain(block: nn.Module, model: CausalModel) -> bool:
    """Whether all its products are of layers that lie where the model is, at least while it runs."""
    holders = (
        m for m in block.modules() if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.dim() > 1
    )
    return all(
        m.weight.device == model.device and (type(m) is nn.Linear or _is_packed(m, model.dtype)) for m in holders
    )


def _is_packed(layer: Any, dtype: torch.dtype) -> bool:
    return isinstance(layer, PackedLinear) and layer.compute_dtype == dtype


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
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        if out_of_memory(fault):
            raise  # which says nothing of the module
        return False  # the module keeps nothing, or in a form that is not known here
    return bool(error <= (1e-3 if exact else 0.1) * wanted.std())


class ReferenceDecoder:
    """The transformers module with the cache or state that it makes itself; left-padded where prompts differ in length.

    Args:
        equal: the module cannot be padded, and is only given prompts of one length.
    """

    bucketed = False

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

    def take_less(self) -> bool:
        self.cache, self.mask = {}, None
        return False

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

    equal = bucketed = False

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

    def take_less(self) -> bool:
        return False

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
