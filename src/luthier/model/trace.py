"""What a micro-batch takes, found by running the real code on tensors without data.

The model is built from its config on torch's `meta` device, quantised and given its adapter as in training, and one
forward and backward pass is run. Every storage that comes and goes is counted, and every operation's arithmetic and
memory traffic: so each family, each way of quantising and each adapter is planned by the code that trains it.

Where a value decides (which experts are chosen, what a mask holds), the answer that takes most memory is given: see
`_ANSWERS`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from luthier import recipe
from luthier.adapters.linears import features, linear_names
from luthier.adapters.lora import Lora
from luthier.adapters.method import Adapter, attach
from luthier.adapters.start import check_rank
from luthier.data.stream import Micro
from luthier.errors import LuthierError, ModelError
from luthier.kernels.place import noticing, on_gpu, planned_for
from luthier.model import attention, segments
from luthier.model.causal import CausalModel, Kernels
from luthier.model.load import norms_in_float32, skeleton
from luthier.model.offload import blocks_name
from luthier.model.quantize import empty
from luthier.registry import nearest

aten = torch.ops.aten
META = torch.device("meta")


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic of some operations: FLOPs, bytes read and written, and their number."""

    flops: float
    traffic: float
    launches: float


Figures = dict[tuple[Any, ...], float]
"""What a run was measured to take, flat, so that figures can be added and subtracted: ("live", phase, part) bytes at
the phase's peak, ("saved",) bytes that a block leaves for its backward pass, ("holes",) bytes, ("evaluation",) bytes
that a pass without gradient takes, ("work", phase, kind, "flops" | "traffic" | "launches")."""


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forward and backward. Bytes."""

    tokens: float
    blocks: int
    fixed: dict[str, int]
    """What lies in memory throughout, by part."""
    paged: int
    """Bytes of optimizer state outside of that allocator, in memory that CUDA moves to the host when it has to."""
    figures: Figures

    @property
    def peak(self) -> dict[str, int]:
        """What lies there at the worst moment, by part, `fixed` included."""
        return max(self.live.values(), key=lambda parts: sum(parts.values()))

    @property
    def live(self) -> dict[str, dict[str, int]]:
        """What lies there at the worst moment of each phase (`activations`, `logits`, `backward`), by part."""
        found: dict[str, dict[str, int]] = {}
        for (figure, *names), amount in self.figures.items():
            if figure == "live":
                found.setdefault(names[0], {"optimizer": 0})[names[1]] = round(amount)
        return found

    @property
    def holes(self) -> int:
        """What CUDA's caching allocator holds besides: pages that are partly used, and gaps too small for what is
        asked."""
        return round(self.figures["holes",])

    @property
    def evaluation(self) -> int:
        """What a pass without gradient takes where our decoder runs it on a GPU, with memory of its own."""
        return round(self.figures.get(("evaluation",), 0.0))

    @property
    def work(self) -> dict[tuple[str, str], Work]:
        """By phase and kind: `products` of matrices, `others`, and `unpacking` of packed weights."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for (figure, *names), amount in self.figures.items():
            if figure == "work":
                found.setdefault((names[0], names[1]), {})[names[2]] = amount
        return {key: Work(**amounts) for key, amounts in found.items()}


def outline(
    config: dict[str, Any],
    model: recipe.Model,
    adapter: recipe.Adapter,
    *,
    dtype: torch.dtype,
    recompute: bool,
    kernels: Kernels = "reference",
    capability: tuple[int, int] | None = None,
) -> CausalModel:
    """The model of `config` on the meta device, quantised and with its adapter, as `build` would make it on a GPU of
    that compute capability; None: on a CPU.

    Raises ModelError where transformers has no such architecture, it is no causal language model, or it cannot be run
    without data; AdapterError where the model lacks what the adapter names.
    """
    plain = adapter
    if isinstance(adapter, recipe.Lora):
        # Other start values and some more rows of the embedding take no more memory in a step.
        plain = adapter.model_copy(update={"init": "default", "new_tokens": []})
    _check_architecture(config.get("model_type"))
    with _explained(config["model_type"]), planned_for(capability), Meter():
        module = _module(config, model, dtype)
        attached = attach(module, plain, seed=0)
        if isinstance(attached, Lora) and isinstance(adapter, recipe.Lora):
            for name, layer in attached.layers.items():
                check_rank(layer, name, adapter.init)
        return CausalModel(module, attached, kernels=kernels, recompute=recompute)


def _check_architecture(kind: Any) -> None:
    """Raises ModelError unless `kind`, a config's model_type, is a causal language model of transformers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    where = "config.json: model_type"
    if not isinstance(kind, str):
        fix = "take config.json from where the weights come from"
        raise ModelError("is missing, so the architecture is not known", where=where, fix=fix)
    if kind not in CONFIG_MAPPING:
        close = nearest(kind, list(CONFIG_MAPPING))
        hint = f"{close} Or " if close.startswith("did you mean") else ""
        fix = f"{hint}take a newer transformers, or a base of a family that it knows"
        raise ModelError(f"transformers {__version__} has no architecture '{kind}'", where=where, fix=fix)
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        fix = "give a base that continues text, such as a Llama, Qwen or Mistral"
        raise ModelError(f"a '{kind}' model is no causal language model", where=where, fix=fix)


def trace(
    model: CausalModel, lengths: Sequence[int], *, optimizer: str = "adamw", capability: tuple[int, int] | None = None
) -> Trace:
    """Runs one micro-batch of rows of `lengths` tokens, all of them supervised, through `model` of the meta device.

    Args:
        optimizer: the recipe's name of it, whose state is counted.
        capability: compute capability of the GPU that the model would run on; None: a CPU.

    Raises ModelError where the model cannot be run without data.
    """
    assert model.adapter is not None
    parameters, meter = list(model.adapter.parameters()), Meter()
    for part, tensor in _fixed(model):
        meter.see(part, tensor)
    meter.see("gradients", _flat_gradient(model.adapter))
    paged = 0
    for size in chain.from_iterable(_state(p.numel(), optimizer, capability) for p in parameters):
        if optimizer.startswith("paged") and capability is not None:
            paged += size
        else:
            meter.take("optimizer", size)
    for _ in range(2 if capability else 0):  # the forward and the backward pass run in threads of their own
        meter.take("workspace", _CUBLAS)
    fixed = {"optimizer": 0} | dict(meter.live)
    hooks = attention.within(model.module, _FusedAttention())  # in a recomputation, too
    try:
        with planned_for(capability), _explained(model.module.config.model_type):
            figures = _extrapolated(model, _micro(lengths), meter)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(sum(lengths), len(_blocks(model)), fixed, paged, figures)


def between(one: Trace, two: Trace, tokens: float) -> Trace:
    """The trace of a micro-batch of so many tokens, by the line through two others of one model: exact for whole rows
    of the same length."""
    share = (tokens - one.tokens) / (two.tokens - one.tokens)
    keys = one.figures.keys() | two.figures.keys()
    figures = {key: (1 - share) * one.figures.get(key, 0) + share * two.figures.get(key, 0) for key in keys}
    return replace(one, tokens=tokens, figures=figures)


def mixed(groups: Sequence[tuple[Trace, int]], away: int = 0) -> Trace:
    """The trace of a model of which so many blocks keep for the backward pass what they do in that trace, the first
    group first. Exact where blocks are alike, but for the allocator's holes.

    All that is saved is there when the last group's backward pass begins, and less of it for each group before. What
    the first `away` blocks save is in host memory (see `away.py`).
    """
    first, blocks = groups[0][0], sum(count for _, count in groups)
    figures: Figures = {}
    for trace, count in groups:
        for key, amount in trace.figures.items():
            if key[0] != "live":
                figures[key] = figures.get(key, 0.0) + amount * count / blocks
    moments: dict[str, list[dict[str, int]]] = {phase: [] for phase in first.live}
    saved = 0.0
    for (trace, count), held in zip(groups, _held([count for _, count in groups], away), strict=True):
        saved += held * trace.figures["saved",]
        for phase, parts in trace.live.items() if count else ():
            more = round(saved - blocks * trace.figures["saved",])
            moments[phase].append(parts | {"activations": parts["activations"] + more})
    for phase, reached in moments.items():
        most = max(reached, key=lambda parts: sum(parts.values()))
        figures |= {("live", phase, part): amount for part, amount in most.items()}
    return replace(first, figures=figures)


def _held(counts: Sequence[int], away: int) -> list[int]:
    """Of each group, how many blocks' parcels are on the GPU at the worst: of those that stay; else two at a time."""
    held, left, coming = [], away, max(0, 2 - (sum(counts) - away))
    for count in counts:
        gone = min(left, count)
        held.append(count - gone + min(gone, coming))
        left -= gone
    return held


def _blocks(model: CausalModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.module.get_submodule(blocks_name(model.module)))


# A model's blocks are alike, so a few of them tell what all take.

_FEW = 2


def _extrapolated(model: CausalModel, micro: Micro, meter: Meter) -> Figures:
    """The figures of a run of all blocks, from runs of `_FEW` blocks of each kind and of one more: a block of a kind
    takes as much, whatever the number. Exact but for the allocator's holes."""
    name, blocks = blocks_name(model.module), list(_blocks(model))
    kinds: dict[Any, list[int]] = {}
    for i, block in enumerate(blocks):
        kinds.setdefault(_kind(model.module.config, i, block), []).append(i)
    chosen = [i for of_kind in kinds.values() for i in of_kind[:_FEW]]
    evaluation = _evaluation(model, micro, meter, name, [of_kind[0] for of_kind in kinds.values()])
    if len(blocks) <= len(chosen) + len(kinds):
        total, base = (_measured(model, micro, meter, name, range(n)) for n in (len(blocks), max(1, len(blocks) - 1)))
        return total | {("saved",): _saved(total, base), ("evaluation",): evaluation}
    base = _measured(model, micro, meter, name, chosen)
    total, most = dict(base), 0.0
    for of_kind in kinds.values():
        if len(of_kind) > _FEW:
            more = _measured(model, micro, meter, name, [*chosen, of_kind[_FEW]])
            for key in more.keys() | base.keys():
                step = more.get(key, 0.0) - base.get(key, 0.0)
                total[key] = total.get(key, 0.0) + (len(of_kind) - _FEW) * step
            most = max(most, base["holes",], more["holes",])
    # Blocks that keep their activations leave holes between these; recomputed ones use the same places in turn.
    total["holes",] = most if _recomputes_all(model) else max(most, total["holes",])
    total["saved",] = _saved(total, base) / (len(blocks) - len(chosen))
    total["evaluation",] = evaluation
    return total


def _saved(more: Figures, less: Figures) -> float:
    """Bytes that the blocks which are in `more` alone leave for the backward pass: when the logits come, all do."""
    return more["live", "logits", "activations"] - less["live", "logits", "activations"]


def _recomputes_all(model: CausalModel) -> bool:
    return model.recompute is True if model.decoder is None else model.decoder.blocks[0].recompute == "all"


def _kind(config: Any, number: int, block: nn.Module) -> Any:
    """Equal for blocks that compute the same on other weights."""
    types = getattr(config.get_text_config(), "layer_types", None) or []
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
    return types[number] if number < len(types) else None, modules, shapes


def _measured(model: CausalModel, micro: Micro, meter: Meter, name: str, chosen: Iterable[int]) -> Figures:
    """The figures of a run with only the `chosen` blocks of the list `name`, in their order."""
    with _only(model, name, chosen), meter.begun() as run:
        _step(model, micro, run)
    return run.figures


def _evaluation(model: CausalModel, micro: Micro, meter: Meter, name: str, chosen: Iterable[int]) -> int:
    """Bytes that a GPU's allocator reserves for a pass without gradient, beside all that is there: it keeps nothing, so
    that one block of each kind takes as much as all."""
    if model.decoder is None or not on_gpu(model.decoder.norm.weight):
        return 0
    run = Meter()
    run.known = set(meter.known)
    with _only(model, name, chosen), run, noticing(run.launched), torch.no_grad():
        model.loss(micro)
    return segments.reserved(run.segments.tops)


@contextmanager
def _only(model: CausalModel, name: str, chosen: Iterable[int]) -> Iterator[None]:
    """Inside, the model has only the `chosen` blocks of the list `name`, in their order."""
    whole, numbers = cast(nn.ModuleList, model.module.get_submodule(name)), sorted(chosen)
    model.module.set_submodule(name, nn.ModuleList(whole[i] for i in numbers))
    ours = model.decoder.blocks if model.decoder else []
    if model.decoder:
        model.decoder.blocks = [ours[i] for i in numbers]
    try:
        yield
    finally:
        model.module.set_submodule(name, whole)
        if model.decoder:
            model.decoder.blocks = ours


# Workspace that torch lends to a cuBLAS handle, out of its allocator: eight pieces of 4 MiB, as training asks for by
# CUBLAS_WORKSPACE_CONFIG (`train/reproducible.py`); it is Hopper's default, too. cuBLASLt shares it where torch unifies
# them (TORCH_CUBLASLT_UNIFIED_WORKSPACE, now the default).
_CUBLAS = 33_554_432
_PROCESSORS = 148  # of the largest GPUs; smaller ones split less


def _state(values: int, optimizer: str, capability: tuple[int, int] | None) -> Iterator[int]:
    """Bytes of each tensor of AdamW's state for a parameter: two moments, in fp32 or, in bitsandbytes' 8 bits, with one
    fp32 scale for 256 values; parameters of fewer than 4,096 values keep theirs in fp32."""
    for _ in range(2):
        if optimizer.endswith("8bit") and values >= 4096:
            yield values
            yield -(-values // 256) * 4
        else:
            yield 4 * values


def _step(model: CausalModel, micro: Micro, meter: Meter) -> None:
    # A layout is found by trying a model out; without data there is only what its attention says of itself.
    ours = model.module.config._attn_implementation == attention.NAME
    is_packed = model.decoder is not None or ours or attention.calls_torch(model.module)
    hidden = model.hidden if is_packed else model._padded

    def then_logits(micro: Micro) -> Tensor:
        result = hidden(micro)
        meter.phase = "logits"
        return result

    meter.phase, model.hidden = "activations", then_logits  # type: ignore[method-assign]
    try:
        loss = model.loss(micro)
    finally:
        del model.hidden
    meter.phase = "backward"
    loss.backward()  # type: ignore[no-untyped-call]


def _module(config: dict[str, Any], model: recipe.Model, dtype: torch.dtype) -> Any:
    from transformers import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    module = skeleton(CONFIG_MAPPING[config["model_type"]].from_dict(plain), model, dtype)
    if model.quantize is not None:
        _quantize(module, model.quantize, dtype)
    if model.norms == "float32":
        norms_in_float32(module, dtype)
    return module.requires_grad_(False).eval()


def _quantize(module: nn.Module, settings: recipe.Quantize, dtype: torch.dtype) -> None:
    for name in linear_names(module):
        layer = module.get_submodule(name)
        packed = empty(*features(layer), layer.bias is not None, settings, dtype)
        module.set_submodule(name, packed)


def _fixed(model: CausalModel) -> Iterator[tuple[str, Tensor]]:
    """(part, tensor) of all that the model holds, in the order of its modules."""
    assert model.adapter is not None
    trained = {id(p) for p in model.adapter.parameters()}
    for module in model.module.modules():
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None:
                part = "adapter" if id(tensor) in trained else _part(module, name)
                yield part, tensor
    if model.decoder is not None:
        yield "gradients", model.decoder.updates.gradients
        if model.decoder.scratch is not None:
            yield "workspace", model.decoder.scratch


def _flat_gradient(adapter: Adapter) -> Tensor:
    """As that of `train/optim.py`: the block's backward pass looks at how gradients lie."""
    named = sorted(adapter.named_parameters(), key=lambda named: named[0].endswith("lora_B.weight"))
    flat = torch.empty(sum(p.numel() for _, p in named), device=META)
    for (_, parameter), part in zip(named, torch.split(flat, [p.numel() for _, p in named]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def _part(module: nn.Module, name: str) -> str:
    """Scales and tables that a quantised layer keeps besides its weight and bias are its constants."""
    packed = "luthier" in type(module).__module__ and name not in ("weight", "bias")
    return "constants" if packed else "weights"


def _micro(lengths: Sequence[int]) -> Micro:
    tokens = torch.zeros(sum(lengths), dtype=torch.int64, device=META)
    return Micro(
        ids=tokens,
        positions=torch.zeros_like(tokens),
        bounds=(0, *accumulate(lengths)),
        rows=torch.zeros_like(tokens),
        targets=torch.zeros_like(tokens),
        samples=torch.zeros(len(lengths), dtype=torch.int64, device=META),
        step=0,
    )


@contextmanager
def _explained(kind: Any) -> Iterator[None]:
    """Whatever a model's code raises without data becomes a ModelError that names the architecture."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"a '{kind}' model cannot be run without data ({reason})") from error


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the storages of meta tensors as they come and go, by phase, and the work of each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "activations"
        self.live: Counter[str] = Counter()
        self.figures: Figures = {}
        self.segments, self.known = segments.Segments(), set[int]()
        self._refs: dict[int, Any] = {}
        self._most: Counter[str] = Counter()
        self._history: list[tuple[str, int]] = []

    @contextmanager
    def begun(self) -> Iterator[Meter]:
        """A meter that goes on from what this one has seen, and leaves it as it is. Inside, it counts."""
        run = Meter()
        for part, size in self._history:
            run.take(part, size)
        run.known = set(self.known)
        with run, _FusedAttention(), noticing(run.launched):
            yield run
        run.figures["holes",] = segments.reserved(run.segments.tops) - max(run._most.values())

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(op)
        result = answer(*args, **kwargs) if answer and _tensors(args, meta=True) else op(*args, **kwargs)
        tensors = _tensors(result, meta=True)
        new = [self.see(self.phase, tensor) for tensor in tensors]
        if any(new) or op._schema.is_mutable:
            self._count(op, args, kwargs, result, tensors)
        if op.name().startswith(_FLASH + "_backward"):
            self._pass("workspace", _flash_backward(*args))
        return result

    def see(self, part: str, tensor: Tensor) -> bool:
        """Counts the tensor's storage under `part` until it is freed. Returns whether it is new."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return False
        self.known.add(key)
        place = self.take(part, size)
        self._refs[key] = weakref.ref(storage, lambda _: self._gone(key, place, part, size))
        return True

    def take(self, part: str, size: int) -> int:
        """Counts `size` bytes for good. Returns the allocation's number."""
        self._history.append((part, size))
        self.segments.take(len(self._history), size)
        self.live[part] += size
        if self.segments.used > self._most[self.phase]:
            self._most[self.phase] = self.segments.used
            self.figures |= {("live", self.phase, name): amount for name, amount in self.live.items()}
        return len(self._history)

    def _pass(self, part: str, size: int) -> None:
        """Counts `size` bytes that are freed at once."""
        place = self.take(part, size)
        self.segments.give(place)
        self.live[part] -= size

    def _gone(self, key: int, place: int, part: str, size: int) -> None:
        self.known.discard(key)
        del self._refs[key]
        self.segments.give(place)
        self.live[part] -= size

    def _count(self, op: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        count, flops = flop_registry.get(_IN_PLACE.get(op.overloadpacket, op.overloadpacket)), 0.0
        if op.name().startswith(_FLASH):
            flops = _flash_flops(op.name(), args)
        elif count is not None:
            flops = count(*args, **kwargs, out_val=result)
        self._add("products" if flops else "others", flops, [*_tensors((args, kwargs)), *tensors])

    def launched(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        """Counts a kernel of ours: each of its tensors passes once."""
        self._add("unpacking" if kernel == "dequantize" else "others", 0.0, tensors)

    def _add(self, kind: str, flops: float, tensors: Iterable[Tensor]) -> None:
        traffic = sum(x.numel() * x.element_size() for x in tensors)
        for name, amount in (("flops", flops), ("traffic", traffic), ("launches", 1)):
            key = ("work", self.phase, kind, name)
            self.figures[key] = self.figures.get(key, 0.0) + amount


_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # which torch's table of FLOPs does not name


class _FusedAttention(TorchFunctionMode):
    """Torch's attention, which without data would take its slow path and keep all probabilities, by the kernels that
    tensors with data get."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not args[0].is_meta:
            return function(*args, **kwargs)
        # Kernels want as many key heads as query heads; where one is broadcast (Falcon), the slow path is what runs.
        fits = args[0].shape[1] == args[1].shape[1] or kwargs.get("enable_gqa")
        return _fused(*args, **kwargs) if fits else function(*args, **kwargs)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=q.dtype, device=META)
    if on_gpu(q):
        options = {"compute_log_sumexp": True, "is_causal": is_causal, "scale": scale}
        out: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, **options)[0]
    else:
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return out


def _tensors(tree: Any, *, meta: bool = False) -> list[Tensor]:
    """The tensors in a tree of lists and mappings; with `meta` only those without data."""
    if isinstance(tree, Tensor):
        return [tree] if not meta or tree.is_meta else []
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [x for part in tree for x in _tensors(part, meta=meta)]


# What operations answer whose result depends on values. Every expert is chosen, every mask is full, every token counts.


def _scalar(x: Tensor) -> Any:
    return (x.dtype.is_floating_point and 1.0) or x.dtype is torch.bool or 0


def _nonzero(x: Tensor) -> Tensor:
    return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=META)


def _copied(x: Tensor, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
    if device is None or torch.device(device).type == "meta":
        return aten._to_copy.default(x, dtype=dtype, device=device, **options)  # type: ignore[no-any-return]
    if x.dtype is torch.int64 and x.dim() == 1:
        return torch.arange(len(x), device=device)  # places in a list: all of them
    return torch.zeros(x.shape, dtype=dtype or x.dtype, device=device)


def _indexed(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """A boolean index chooses everything."""
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            whole += [torch.empty(index.numel(), dtype=torch.int64, device=META)] * index.dim()
        else:
            whole.append(index)
    return aten.index.Tensor(x, whole)  # type: ignore[no-any-return]


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten._to_copy.default: _copied,
    aten.index.Tensor: _indexed,
    aten.equal.default: lambda x, y: True,
    aten.bincount.default: lambda x, weights=None, minlength=0: torch.empty(
        max(minlength, 1), dtype=torch.int64, device=META
    ),
}


# FlashAttention 2 on packed rows: what it takes for itself while it runs, and its arithmetic.

_FLASH = "aten::_flash_attention"


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    """Bytes: the gradient of q in fp32, and a sum for each row, padded by 128 rows a segment; those of k and v for each
    query head where heads share keys. Where sums have a fixed order, the first is there once for each split of the keys
    (`mha_varlen_bwd`)."""
    (tokens, heads, size), segments = q.shape, len(rest[3]) - 1
    rows, wide = tokens + 128 * segments, -(-size // 32) * 32 if size <= 192 else 256
    expanded = 2 * tokens * heads * size * q.element_size() if k.shape[1] != heads else 0
    splits = -(-_PROCESSORS // (segments * heads))
    return rows * heads * (splits * wide + 1) * 4 + expanded


def _flash_flops(name: str, args: Any) -> float:
    """Two products of the causal half forward, five backward, all segments as long as the longest."""
    q, longest, products = (args[1], args[8], 5) if "_backward" in name else (args[0], args[5], 2)
    tokens, heads, size = q.shape
    return float(products * tokens * longest * heads * size)
