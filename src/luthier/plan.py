"""Memory and time of a run, from the recipe and the model's config alone: no weights are needed.

Our decoder block with dense weights on CPUs is planned by a formula that needs no torch: what the block of
`model/block.py` keeps per token and layer, and 2·P FLOPs forward and 2·P backward for frozen weights (Hu et al. 2021,
section 4). Everything else is planned by running the training code on tensors without data (`model/trace.py`): its
bytes are counted as they come and go, and its time is that of each operation's arithmetic and memory traffic at the
device's rates. Both are held against measurements in `docs/log.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.errors import MemoryPlanError, RecipeError
from luthier.machine import GIB, Gpu, Machine
from luthier.recipe import Full, Lora, Recipe

if TYPE_CHECKING:
    from luthier.model.causal import Kernels
    from luthier.model.trace import Trace

_MIB = 1024**2
_PROCESS = 470 * _MIB  # Python with torch and transformers imported, and the allocator's slack: measured
_MODULE = 90 * _MIB  # and besides, where the transformers module runs or is traced: its code, autograd's records
# In 16 bits oneDNN makes code for each size of product and keeps it: so much, for so many sizes anew in a step of other
# rows, until there are as many as `group.py` lets it keep (docs/log.md).
_CODE, _SIZES = 0.7 * _MIB, 48
_KEPT_SIZES = 512
_HOLES = 0.08  # of the activations, between those that our block keeps on a CPU
_SHARE = 0.8  # of the free memory that `memory: auto` takes: the rest is for the page cache and for other programs
_GPU_SHARE = 0.96  # of a GPU's free memory: what the plan may be wrong by
_LOGIT_ROWS = 256  # rows of the head computed at once (kernels/loss.py)
_LONGEST_USEFUL = {"cpu": 4096, "cuda": 16384, "mps": 4096}  # tokens of a micro-batch beyond which steps get no faster
_SUPERVISED = 0.3  # share of the tokens that are learned, where the data is not known yet

# Sustained FLOP/s of a training step per core, measured on SmolLM2-135M (docs/log.md), by dtype and instruction set.
_RATES = {
    ("bfloat16", "amx_bf16"): 200e9,
    ("bfloat16", "avx512_bf16"): 80e9,
    ("float32", "avx512f"): 60e9,
    ("float32", "avx2"): 30e9,
}
_SLOWEST = 10e9
_CPU_BANDWIDTH = 10e9  # bytes/s of operations that are no products, per core: a guess


class _Sustained(NamedTuple):
    """What a GPU sustains of its data sheet, and what the host costs. Guesses until measured."""

    products: float = (
        0.6  # of the dense rate: large bf16 products reach 0.7 on an H200, the small ones of LoRA far less
    )
    bandwidth: float = 0.7
    launch: float = 12e-6  # seconds of Python, autograd and driver for an operation: steps of little work wait for them


_GPU = _Sustained()
# The driver's context and the kernels it loads, outside of torch's allocator; by the major compute capability.
_CONTEXT = {7: 350 * _MIB, 8: 450 * _MIB, 9: 770 * _MIB}
# What torch's allocator holds besides all that the trace follows, as a share of that, by what runs the model: what
# libraries' kernels take for themselves, and holes that another order of the same tensors leaves. Calibrated from above
# in 25 cells on an H200 (docs/guides/memory.md). In LLM.int8() it varies most, and is not explained.
_UNFOLLOWED = {"reference": 0.01, "eager": 0.025, "compiled": 0.025}
_UNFOLLOWED_INT8 = 0.03


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are of the whole machine, or of the GPU; `parts` add up to `peak_bytes`."""

    parts: dict[str, int]
    peak_bytes: int
    budget_bytes: int
    fits: bool
    micro_tokens: int
    recompute: bool
    processes: int
    seconds_per_step: float
    place: str = "cpu"
    device: str = ""
    measurable_bytes: int = 0
    """The part of the peak that a process can measure: on a GPU what torch's allocator reserves, not the context."""
    offload: int = 0
    """Decoder blocks whose weights stay in host memory."""
    unpacked: int = 0
    """Decoder blocks of whose packed weights the values are kept beside."""
    kernels: Kernels = "reference"
    advice: tuple[str, ...] = ()
    dtype: str = ""
    why: dict[str, str] = field(default_factory=dict)
    """For what was decided before the plan, which fact made it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """Where and how a recipe is to be run, apart from what the plan decides."""

    place: str
    dtype: str
    kernels: Kernels = "reference"
    """As the recipe's `run.kernels`: `reference` is the transformers module, the others our own decoder block."""
    processes: int = 1
    threads: int = 1
    steps: int | None = None
    """Of the run, where its data is known."""
    step_tokens: int | None = None
    """The most that a step can have, where the data is known."""

    def most(self, samples: int, longest: int) -> int:
        """Tokens of a step of `samples` rows that can come to one process. Rows go to the least loaded (`share`), so
        that none has more than its part and one row."""
        most = math.ceil(samples / self.processes) * longest
        if self.step_tokens is None:
            return most
        return min(most, self.step_tokens if self.processes == 1 else self.step_tokens // self.processes + longest)

    @property
    def code(self) -> int:
        """Bytes that products in 16 bits keep of their code on a CPU."""
        if self.place != "cpu" or self.dtype == "float32":
            return 0
        sizes = _KEPT_SIZES if self.steps is None else min(_KEPT_SIZES, _SIZES * (self.steps + 1))
        return int(sizes * _CODE)


class _Cost(NamedTuple):
    """Of one process and one micro-batch."""

    parts: dict[str, int]
    outside: int  # bytes of them that torch cannot see
    seconds: Callable[[float], float]  # of a step of so many tokens, cut into such micro-batches


_Estimate = Callable[[tuple[int, ...], bool], _Cost]


def parse_bytes(text: str) -> int:
    """`6GiB`, `512MiB`, `8GB` or a plain number, as bytes. Raises MemoryPlanError."""
    units = {"KiB": 1024, "MiB": 1024**2, "GiB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = text.strip().rstrip("KMGiBb ")
    try:
        amount = int(float(number) * units[text.strip()[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError) as error:
        raise MemoryPlanError(f"'{text}' is not an amount of memory", fix="write e.g. 6GiB") from error
    if amount < 1024**2:
        raise MemoryPlanError(f"'{text}' is less than a megabyte", fix="write a unit, e.g. 6GiB")
    return amount


def budget(memory: str, facts: Machine, place: str = "cpu") -> int:
    """Bytes a run may use: as the recipe says, else most of what the machine, or its first GPU, has free. No recipe
    makes a GPU larger than it is."""
    if place == "cuda":
        gpu = _gpu(facts)
        return int(gpu.free * _GPU_SHARE) if memory == "auto" else min(parse_bytes(memory), gpu.total)
    return int(facts.available * _SHARE) if memory == "auto" else parse_bytes(memory)


def plan(
    recipe: Recipe,
    config: dict[str, Any],
    setting: Setting,
    facts: Machine,
    *,
    longest: int | None = None,
    mean_length: float | None = None,
) -> Plan:
    """Predicts peak memory and the time of a step, and picks the micro-batch's tokens and whether to recompute.

    Args:
        config: the model's `config.json`.
        longest, mean_length: tokens of the longest and of the mean row, where the data is known; else data.length.

    Returns a Plan whose `fits` is False, with advice, where even one longest row a time, recomputed, exceeds the
    budget. Raises ModelError for a model that cannot be run without its data, RecipeError for blocks to be kept off the
    GPU that are not there, or where there is no GPU.
    """
    if setting.place != "cuda" and recipe.run.offload not in ("auto", 0):
        what = f"blocks stream from host memory to a CUDA GPU, and this run is on {setting.place}"
        raise RecipeError(what, where=f"run.offload: {recipe.run.offload}", fix="leave it out, or set run.place=cuda")
    longest = min(longest or recipe.data.length, recipe.data.length)
    mean = min(mean_length or longest, longest)
    allowed = budget(recipe.run.memory, facts, setting.place)
    estimate = _estimator(recipe, config, setting, facts, mean)
    found = _best(recipe, estimate, allowed, setting, longest, mean)
    streams = recipe.run.offload if recipe.run.offload != "auto" else not found.fits
    if setting.place == "cuda" and setting.kernels == "reference" and streams:
        found = _streamed(recipe, config, estimate, setting, longest, mean, allowed)
    found = _unpacked(recipe, config, setting, found)
    if found.peak_bytes > allowed:
        found = replace(found, advice=tuple(_advice(recipe, config, setting, facts, longest, found)))
    device = _gpu(facts).name if setting.place == "cuda" else f"{setting.processes * setting.threads} core(s)"
    return replace(found, place=setting.place, device=device, kernels=setting.kernels)


def _best(recipe: Recipe, estimate: _Estimate, allowed: int, setting: Setting, longest: int, mean: float) -> Plan:
    """The fastest of the choices of `recompute` that fit, else the smallest."""
    asked, plans = recipe.run.recompute, []
    most = setting.most(recipe.train.samples_per_step, longest)
    for recompute in (False, True) if asked == "auto" else (asked,):
        tokens, cost = _largest(recipe, estimate, allowed / setting.processes, longest, most, setting, recompute)
        parts = {name: amount * setting.processes for name, amount in cost.parts.items()}
        peak, outside = sum(parts.values()), cost.outside * setting.processes
        seconds = cost.seconds(recipe.train.samples_per_step * mean / setting.processes)
        fits = peak <= allowed
        plans.append(
            Plan(
                parts,
                peak,
                allowed,
                fits,
                tokens,
                recompute,
                setting.processes,
                seconds,
                measurable_bytes=peak - outside,
            )
        )
        if fits and tokens >= min(most, _LONGEST_USEFUL[setting.place]):
            break  # recomputing has nothing to offer
    fitting = [p for p in plans if p.fits]
    return min(fitting, key=lambda p: p.seconds_per_step) if fitting else min(plans, key=lambda p: p.peak_bytes)


def _largest(
    recipe: Recipe, estimate: _Estimate, allowed: float, longest: int, most: int, setting: Setting, recompute: bool
) -> tuple[int, _Cost]:
    """Tokens of the largest useful micro-batch within `allowed` bytes, at least one longest row, and its cost.

    Memory is linear in whole rows, and convex within one, so that a line through one and two rows is never too low.
    """
    if recipe.run.micro_tokens != "auto":
        tokens = min(most, recipe.run.micro_tokens)
        return tokens, estimate(_rows(max(longest, tokens), longest), recompute)
    one = estimate((longest,), recompute)
    useful = max(longest, min(most, _LONGEST_USEFUL[setting.place]))
    if sum(one.parts.values()) >= allowed or useful == longest:
        return longest, one
    slope = (sum(estimate((longest, longest), recompute).parts.values()) - sum(one.parts.values())) / longest
    tokens = min(useful, longest + int((allowed - sum(one.parts.values())) / max(slope, 1)) // 8 * 8)
    while True:
        cost = estimate(_rows(tokens, longest), recompute)
        if sum(cost.parts.values()) <= allowed or tokens == longest:
            return tokens, cost
        tokens = max(longest, int(tokens * 0.95) // 8 * 8)


def _streamed(
    recipe: Recipe,
    config: dict[str, Any],
    estimate: _Estimate,
    setting: Setting,
    longest: int,
    mean: float,
    allowed: int,
) -> Plan:
    """With as many blocks in host memory as the recipe says, else as few as let one longest row fit. Streamed blocks
    are recomputed, and two of them are on the GPU at a time. Each comes to it twice a micro-batch (about 50 GB/s)."""
    changed = Recipe.model_validate(_merged(recipe.model_dump(), {"run": {"recompute": True}}))
    count, size, _ = _blocks(
        recipe.model_dump_json(include={"model", "adapter", "data"}), json.dumps(config), setting.dtype
    )
    wanted: int
    if recipe.run.offload == "auto":
        smallest = _best(changed, estimate, 0, setting, longest, mean)
        wanted = 2 + math.ceil(max(0, smallest.peak_bytes - allowed) / size)
    else:
        wanted = recipe.run.offload
        if wanted > count:
            what, fix = f"the model has {count} blocks", f"write at most {count}, or auto"
            raise RecipeError(what, where=f"run.offload: {wanted}", fix=fix)
    wanted = min(count, wanted)
    saved = max(0, wanted - 2) * size
    found = _best(changed, estimate, allowed + saved, setting, longest, mean)
    parts = {**found.parts, "streamed to host memory": -saved}
    peak = found.peak_bytes - saved
    return replace(
        found,
        parts=parts,
        peak_bytes=peak,
        budget_bytes=allowed,
        fits=peak <= allowed,
        measurable_bytes=found.measurable_bytes - saved,
        seconds_per_step=found.seconds_per_step + 2 * wanted * size / 50e9,
        offload=wanted,
    )


def _unpacked(recipe: Recipe, config: dict[str, Any], setting: Setting, found: Plan) -> Plan:
    """With the values of packed weights kept, of as many blocks as the recipe says; `auto` leaves half of the room that
    there is to what no plan knows: sampled answers, and other programs."""
    asked = recipe.run.unpacked
    if setting.kernels == "reference" or recipe.model.quantize is None or (asked == "auto" and setting.place != "cuda"):
        return found
    settings = recipe.model_dump_json(include={"model", "adapter", "data"})
    count, _, size = _blocks(settings, json.dumps(config), setting.dtype)
    room = max(0, found.budget_bytes - found.peak_bytes) // 2
    wanted = min(count, room // (size * setting.processes) if asked == "auto" else asked)
    more = wanted * size * setting.processes
    return replace(
        found,
        parts={**found.parts, "unpacked": more},
        peak_bytes=found.peak_bytes + more,
        measurable_bytes=found.measurable_bytes + more,
        fits=found.peak_bytes + more <= found.budget_bytes,
        unpacked=wanted,
    )


@lru_cache(maxsize=8)
def _blocks(settings: str, config: str, dtype: str) -> tuple[int, int, int]:
    """How many decoder blocks a model has, and a block's bytes: of frozen tensors, and of packed weights' values."""
    import torch

    from luthier.model.offload import blocks_name
    from luthier.model.trace import outline

    recipe = Recipe.model_validate_json(settings)
    model = outline(json.loads(config), recipe.model, recipe.adapter, dtype=getattr(torch, dtype), recompute=False)
    blocks: Any = model.module.get_submodule(blocks_name(model.module))
    frozen = sum(p.nbytes for p in blocks[0].parameters() if not p.requires_grad)
    return len(blocks), frozen, sum(getattr(layer, "kept_bytes", 0) for layer in blocks[0].modules())


def _rows(tokens: int, longest: int) -> tuple[int, ...]:
    """The lengths of the worst micro-batch of so many tokens: longest rows, and the rest."""
    whole, rest = divmod(tokens, longest)
    return (longest,) * whole + ((rest,) if rest else ())


def _estimator(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, mean: float) -> _Estimate:
    plain = setting.place == "cpu" and setting.kernels != "reference" and recipe.model.quantize is None
    return (_formula if plain else _traced)(recipe, config, setting, facts, mean)


# Our block with dense weights on a CPU, by formula.


def _formula(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, mean: float) -> _Estimate:
    from luthier.model.shape import shape

    assert isinstance(recipe.adapter, Lora), "our block runs LoRA only"
    model, size, rank = shape(config), 4 if setting.dtype == "float32" else 2, recipe.adapter.rank
    adapter = model.adapter(recipe.adapter)
    rate = _rate(setting.dtype, facts, setting.threads)
    flops = model.token_flops(adapter, mean, _SUPERVISED)
    fixed = {
        "process": _PROCESS,
        "weights": model.weights * size,
        "adapter": adapter * (4 + size),
        "gradients": adapter * 4,
        "optimizer": adapter * 8,
        # Eagerly in fp32 and as exponentials, or in 16 bits beside both.
        "logits": _LOGIT_ROWS * model.vocab * (4 if setting.kernels == "compiled" and size == 2 else 8),
        "code": setting.code,
    }
    # Loading holds the weights' file, of 16 bits, beside what is merged from it.
    loading = model.weights * 2 - sum(fixed[name] for name in ("gradients", "optimizer", "logits", "code"))

    def estimate(lengths: tuple[int, ...], recompute: bool) -> _Cost:
        kept = sum(lengths) * model.token_bytes(size, max(lengths), rank, recompute)
        activations = max(loading, math.ceil(kept * (1 + _HOLES)))
        again = 4 / 3 if recompute else 1
        return _Cost({**fixed, "activations": activations}, 0, lambda tokens: tokens * flops * again / rate)

    return estimate


def _rate(dtype: str, facts: Machine, cores: int) -> float:
    """Sustained FLOP/s of a training step on `cores` cores of this kind."""
    known = [rate for (kind, flag), rate in _RATES.items() if kind == dtype and flag in facts.flags]
    return max([_SLOWEST, *known]) * min(cores, facts.cores)


# Everything else, by running the code without data.


def _traced(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, mean: float) -> _Estimate:
    settings = recipe.model_dump_json(include={"model", "adapter", "data", "train"})
    on_gpu = setting.place == "cuda"
    capability = _gpu(facts).capability if on_gpu else None
    int8 = recipe.model.quantize is not None and recipe.model.quantize.kind == "int8"
    share = _UNFOLLOWED_INT8 if int8 else _UNFOLLOWED[setting.kernels]

    def estimate(lengths: tuple[int, ...], recompute: bool) -> _Cost:
        found = _trace(settings, json.dumps(config), setting.dtype, setting.kernels, recompute, capability, lengths)
        seconds = _seconds(found, setting, facts)
        if not on_gpu:
            ours = setting.kernels != "reference"
            holes = int(_HOLES * found.peak.get("activations", 0)) if ours else 0
            fixed = {"process": _PROCESS + _MODULE, "code": setting.code, "fragmentation": holes}
            return _Cost({**fixed, **found.peak}, 0, seconds)
        context = _CONTEXT[min(9, max(7, _gpu(facts).capability[0]))]
        followed = sum(found.peak.values()) + found.holes
        holes = found.holes + math.ceil(share * followed)
        parts = {**found.peak, "fragmentation": holes, "context": context}
        parts["optimizer"] += found.paged
        return _Cost(parts, context + found.paged, seconds)

    return estimate


@lru_cache(maxsize=64)
def _trace(
    settings: str,
    config: str,
    dtype: str,
    kernels: Kernels,
    recompute: bool,
    capability: tuple[int, int] | None,
    lengths: tuple[int, ...],
) -> Trace:
    import torch

    from luthier.model.trace import outline, trace

    recipe = Recipe.model_validate_json(settings)
    model = outline(
        json.loads(config),
        recipe.model,
        recipe.adapter,
        dtype=getattr(torch, dtype),
        recompute=recompute,
        kernels=kernels,
        capability=capability,
    )
    # Where bitsandbytes is missing, adamw takes the place of its optimizers (train/optim.py).
    optimizer = recipe.train.optimizer if find_spec("bitsandbytes") else "adamw"
    return trace(model, lengths, optimizer=optimizer, capability=capability)


def _seconds(found: Trace, setting: Setting, facts: Machine) -> Callable[[float], float]:
    """Each phase's products and other operations take as long as their arithmetic or their traffic, whichever is more;
    and no step is shorter than the host needs to launch it."""
    if setting.place == "cuda":
        kind = _gpu(facts).known
        rate, bandwidth, launch = kind.tflops * 1e12 * _GPU.products, kind.bandwidth * 1e9 * _GPU.bandwidth, _GPU.launch
    else:
        rate, bandwidth, launch = _rate(setting.dtype, facts, setting.threads), _CPU_BANDWIDTH * setting.threads, 0.0
    busy, launches = 0.0, 0.0
    for (phase, _), work in found.work.items():
        share = _SUPERVISED if phase == "logits" else 1.0  # the trace supervises every token
        busy += share * max(work.flops / rate, work.traffic / bandwidth)
        launches += work.launches

    def seconds(tokens: float) -> float:
        cuts = math.ceil(tokens / found.tokens)
        return max(busy * tokens / found.tokens, cuts * launches * launch)

    return seconds


def _gpu(facts: Machine) -> Gpu:
    if not facts.gpus:
        fix = "set run.place=cpu; `luthier plan` takes the name of one: --gpu"
        raise MemoryPlanError("nvidia-smi lists no GPU here", fix=fix)
    return facts.gpus[0]


# What to change where it does not fit.


def _advice(
    recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, longest: int, found: Plan
) -> Iterator[str]:
    """Changes that need less, each with the peak it leads to, tried alone."""
    for override, section in _offers(recipe, setting, longest):
        changed = Recipe.model_validate(_merged(recipe.model_dump(), section))
        length = min(longest, changed.data.length)
        tried = setting
        if "run" in section and "engine" in section["run"]:
            tried = replace(tried, processes=1, threads=setting.processes * setting.threads)
        smallest = _best(changed, _estimator(changed, config, tried, facts, length), 0, tried, length, length)
        if smallest.peak_bytes < found.peak_bytes:
            fits = "fits" if smallest.peak_bytes <= found.budget_bytes else "not enough by itself"
            yield f"{override} ({smallest.peak_bytes / GIB:.1f} GiB, {fits})"


def _offers(recipe: Recipe, setting: Setting, longest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if setting.processes > 1:
        yield "run.engine=local", {"run": {"engine": "local", "processes": "auto"}}
    if recipe.run.recompute is False:
        yield "run.recompute=true", {"run": {"recompute": True}}
    if recipe.run.micro_tokens != "auto" and recipe.run.micro_tokens > longest:
        yield "run.micro_tokens=auto", {"run": {"micro_tokens": "auto"}}
    if recipe.model.quantize is None and not isinstance(recipe.adapter, Full):
        yield "model.quantize={kind: nf4}", {"model": {"quantize": {"kind": "nf4"}}}
    if isinstance(recipe.adapter, Full):
        yield "adapter={kind: lora}", {"adapter": {"kind": "lora"}}
    half = max(64, longest // 2)
    if half < longest:
        yield f"data.length={half}", {"data": {"length": half}}


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the keys of `changes`; a section whose kind changes is replaced whole."""
    merged = dict(tree)
    for name, change in changes.items():
        merged[name] = change if "kind" in change else {**tree[name], **change}
    return merged
