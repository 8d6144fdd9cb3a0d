"""Segment-isolating attention for transformers' modules, through its public attention and mask interfaces.

A module whose attention is `NAME` (known to transformers once this is imported) asks for its masks by it. Inside
`packed(bounds)` it gets `Segments`, which say what the tokens of a packed row see without being a matrix, and which
its attention then computes a segment at a time or all at once. Outside, it is transformers' own attention, so that the
same module generates with a cache and padding masks.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luthier.errors import ModelError
from luthier.kernels.attention import segment_attention
from luthier.kernels.ends import Ends
from luthier.kernels.place import on_gpu
from luthier.kernels.varlen import takes, varlen_attention
from luthier.model import lean

with lean.importing():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "luthier_packed"
_bounds: ContextVar[tuple[int, ...] | None] = ContextVar("bounds", default=None)
# Options of attention that no fused kernel computes: a family that sets one has an attention function of its own.
_OWN = ("softcap", "s_aux", "sinks", "position_bias")
# Tensors that say where tokens are, which the segments say already.
_HARMLESS = ("position_ids", "cache_position")


@contextmanager
def packed(bounds: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, a module under `NAME`, or one that was taken over, takes one row of tokens for segments between `bounds`
    (None: it does not). Its `attention_mask` has to be ones [1, T]: transformers looks for segments itself where there
    is none."""
    token = _bounds.set(bounds)
    try:
        yield
    finally:
        _bounds.reset(token)


def bounds() -> tuple[int, ...] | None:
    """Of the `packed` that we are in."""
    return _bounds.get()


class _Calls(TorchFunctionMode):
    """Inside, torch's attention as a module's own code calls it. Where one key head serves all query heads it is given
    as many, which takes no memory; in a packed row, segments are kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self._judged: tuple[weakref.ref[Tensor], tuple[int, ...], bool] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, *rest = args
        ends = bounds()
        if ends is not None and not rest and query.shape[2] == key.shape[2] == ends[-1]:
            mask = kwargs.get("attn_mask")
            mask = None if mask is not None and self._is_causal(mask, ends) else mask
            return _called(query, key, value, ends, mask, kwargs.get("scale"))
        if key.shape[1] == 1 < query.shape[1]:
            key, value = _for_all(query, key, value)
        return function(query, key, value, *rest, **kwargs)

    def _is_causal(self, mask: Tensor, bounds: tuple[int, ...]) -> bool:
        """Whether a mask says what no mask says, too: Falcon always has one made, and no fused kernel takes any. Layers
        share it, so it is read once a pass."""
        if mask.dtype is not torch.bool or mask.shape != (1, 1, bounds[-1], bounds[-1]):
            return False
        if mask.is_meta:
            return True
        if self._judged is None or self._judged[0]() is not mask or self._judged[1] != bounds:
            whole = torch.ones(max(b - a for a, b in pairwise(bounds)), dtype=torch.bool, device=mask.device)
            whole = whole.expand(len(whole), -1).tril()
            alike = [(mask[0, 0, a:b, a:b] == whole[: b - a, : b - a]).all() for a, b in pairwise(bounds)]
            self._judged = weakref.ref(mask), bounds, bool(torch.stack(alike).all())
        return self._judged[2]


def take_over(module: Any) -> None:
    """Packs a family whose code calls torch's attention itself (Falcon), where transformers has no place for ours. It
    is also given the fused kernels for its one key head: torch's slow path would hold all probabilities."""
    if calls_torch(module) and not getattr(module, "_taken_over", False):
        module._taken_over = True
        within(module, _Calls())


def calls_torch(module: Any) -> bool:
    """Whether the module's own code may call torch's attention."""
    return bool(module.config._attn_implementation == "sdpa")


def _called(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], mask: Tensor | None, scale: float | None
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hk, T, D] to [1, Hq, T, D]. A mask is that of the whole row."""
    scale = scale or query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if mask is None and takes(q, k, v):
        out = varlen_attention(q, k, v, _same_ends(bounds, q.device), scale)
    elif mask is None and not on_gpu(q):
        out = segment_attention(q, k, v, bounds, scale)
    else:
        pieces = []
        for a, b in pairwise(bounds):
            q, k, v = (x[:, :, a:b] for x in (query, *_for_all(query, key, value)))
            seen = None if mask is None else mask[..., a:b, a:b]
            pieces.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, is_causal=seen is None))
        return torch.cat(pieces, 2)
    return out.transpose(0, 1)[None]


def _for_all(query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    """Key and value [B, Hk, T, D] with as many heads as the query has: with fewer, torch takes its slow path where it
    has a mask."""
    times = query.shape[1] // key.shape[1]
    for x in (key, value):
        yield x.expand(-1, times, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(times, 1)


def _ends(bounds: tuple[int, ...], device: torch.device) -> Ends:
    with torch.inference_mode(False):  # what is made in that mode could not be saved for a backward pass after it
        edges = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Ends(edges, max(end - start for start, end in pairwise(bounds)))


_same_ends = lru_cache(maxsize=1)(_ends)
"""For all layers, where nothing is handed to them but tensors."""


def within(module: nn.Module, mode: TorchFunctionMode) -> list[Any]:
    """Runs the module's attention layers inside `mode`, around the modes they are inside of already. Returns the hooks.

    By hooks, since those run in a recomputation too, where a mode that the whole forward pass is in would be missing.
    """
    entered: Any = mode
    layers = [layer for layer in module.modules() if type(layer).__name__.endswith("Attention")]
    before = [
        layer.register_forward_pre_hook(lambda *_: entered.__enter__() and None, prepend=True) for layer in layers
    ]
    after = [
        layer.register_forward_hook(lambda *_: entered.__exit__(None, None, None), always_call=True) for layer in layers
    ]
    return [*before, *after]


@dataclass(frozen=True)
class Segments:
    """What the tokens of a packed row see: in their own segment, what `function` lets them.

    Attributes:
        ends: `bounds`, on the module's device.
        function: transformers' mask function of (batch, head, query, key) indices, counted from the segment's start.
        local: how many tokens a token sees at most, itself among them, for the masks that have such a limit.
        composed: the function is not made of comparisons alone (transformers' `use_vmap`).
    """

    bounds: tuple[int, ...]
    ends: Ends
    function: Callable[..., Any]
    local: int | None
    composed: bool
    masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether each token sees all that comes before it."""
        return self.function is causal_mask_function or (self.local is not None and self.local >= self.ends.longest)

    def mask(self, length: int) -> Tensor:
        """bool [1, 1, length, length]: what is seen in a segment of so many tokens."""
        if length not in self.masks:
            seen = sdpa_mask(
                1,
                length,
                length,
                mask_function=self.function,
                allow_is_causal_skip=False,
                use_vmap=self.composed,
                device=self.ends.edges.device,
            )
            assert seen is not None
            self.masks[length] = seen
        return self.masks[length]


def _mask(batch_size: int, q_length: int, kv_length: int, **options: Any) -> Tensor | Segments | None:
    """What transformers hands to the attention of a module under `NAME`."""
    ends = bounds()
    if ends is None:
        return sdpa_mask(batch_size, q_length, kv_length, **options)
    if batch_size != 1 or q_length != kv_length or q_length != ends[-1]:
        raise ModelError("attends to other tokens than its own, and so cannot be packed")
    function, device = options.get("mask_function", causal_mask_function), options.get("device", "cpu")
    return Segments(ends, _ends(ends, device), function, options.get("local_size"), options.get("use_vmap", False))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """query [B, Hq, T, D], key and value [B, Hk, T, D] to [B, T, Hq, D] and no weights."""
    if isinstance(attention_mask, Segments):
        return _segments(module, query, key, value, attention_mask, options), None
    if _is_own(options):
        return _theirs(module, query, key, value, attention_mask, options), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: Segments, options: dict[str, Any]
) -> Tensor:
    if odd := [k for k, v in options.items() if isinstance(v, Tensor) and k not in (*_OWN, *_HARMLESS)]:
        raise ModelError(f"{type(module).__name__} gives attention its own {odd[0]}, which mean other tokens in a pack")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window = None if seen.causal else options.get("sliding_window")
    simple = not _is_own(options) and (seen.causal or (window is not None and window == seen.local))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if simple and takes(q, k, v):
        return varlen_attention(q, k, v, seen.ends, scale, window)[None]
    if simple and window is None and not on_gpu(q) and q.shape[-1] == v.shape[-1]:
        return segment_attention(q, k, v, seen.bounds, scale)[None]
    pieces = []
    for start, end in pairwise(seen.bounds):
        own = [x[:, :, start:end] for x in (query, key, value)]
        bias = options.get("position_bias")
        part = {} if bias is None else {"position_bias": bias[..., start:end, start:end]}
        pieces.append(_one(module, own, seen, options | part | {"scaling": scale}))
    return torch.cat(pieces, 1)


def _one(module: nn.Module, own: list[Tensor], seen: Segments, options: dict[str, Any]) -> Tensor:
    """Attention of the query, key and value of one segment, to [1, L, Hq, D]."""
    query, key, value = own
    if _is_own(options):
        return _theirs(module, query, key, value, seen.mask(query.shape[2]), options)
    mask = None if seen.causal else seen.mask(query.shape[2])
    if on_gpu(query) and query.shape[1] != key.shape[1]:  # in fp32, and before Ampere, its slow path alone takes fewer
        key, value = _for_all(query, key, value)
    shared = {"scale": options["scaling"], "enable_gqa": query.shape[1] != key.shape[1]}
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **shared).transpose(1, 2)


def _is_own(options: dict[str, Any]) -> bool:
    return any(options.get(name) is not None for name in _OWN)


def _theirs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The plain attention function that stands beside the module's class. It adds its mask, and knows no causality."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(f"{type(module).__name__} sets options of attention that only its own code computes")
    if mask is None and query.shape[2] > 1:
        mask = sdpa_mask(1, query.shape[2], key.shape[2], allow_is_causal_skip=False, device=query.device)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    out: Tensor = function(module, query, key, value, mask, **options)[0]
    return out


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
