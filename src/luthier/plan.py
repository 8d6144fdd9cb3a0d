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
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from luthier.errors import MemoryPlanError, RecipeError
from luthier.kernels.sizes import power_of_2
from luthier.machine import GIB, Gpu, Machine
from luthier.model.families import is_llama
from luthier.model.shape import blocks_of, padded_tokens, shape
from luthier.recipe import Full, Lora, Recipe, Run
from luthier.registry import counted

if TYPE_CHECKING:
    from luthier.model.block import Recompute
    from luthier.model.causal import CausalModel, Kernels
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
_MOST_CUTS = 16  # micro-batches of a step that are considered
_ROOM = 33 / 32  # of a micro-batch beyond its part of a step, so that rows fit
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose frequencies are the same for all rows
_WAITING = 0.02  # of a step's work, for copies beside it, that `auto` puts up with
_FASTER = 0.95  # of a step's time: to be a little faster is not worth keeping weights in host memory
_GRAPHS = 24  # as LIMIT of model/graphs.py, which needs torch
_SPREAD = 0.5  # of a micro-batch's tokens: what is added at most where all are padded to one shape
_WORTH = 0.97  # of a step's time: to be a little faster is not worth recording
_STEPS = 1000  # of a run whose data is not known yet
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
    """What a GPU sustains of its data sheet, and what the host costs, as measured on one H200: guesses for others."""

    products: float = 0.73  # of the dense rate
    bandwidth: float = 0.7
    edge: float = 2e-6  # seconds that an operation loses at its begin and end
    launch: float = 50e-6  # seconds of Python, autograd and driver for an operation: steps of little work wait for them
    replay: float = 6e-6  # seconds from one operation of a CUDA graph to the next
    record: float = 130e-6  # seconds for an operation of a shape to be recorded, and be launched before that
    node: int = 10 * 1024  # bytes of the driver's for an operation of a CUDA graph: a guess


_GPU = _Sustained()
# The driver's context and the kernels it loads, outside of torch's allocator; by the major compute capability.
_CONTEXT = {7: 350 * _MIB, 8: 450 * _MIB, 9: 770 * _MIB}
# Bytes/s between a GPU and pinned host memory, by the major compute capability: PCI Express 3, 4 and 5 (an H200:
# 55 GB/s).
_HOST_RATE = {7: 12e9, 8: 24e9, 9: 50e9}
# What torch's allocator holds besides all that the trace follows, as a share of that, by what runs the model: what
# libraries' kernels take for themselves, and holes that another order of the same tensors leaves. Calibrated from above
# in 29 cells on an H200 (docs/guides/memory.md).
_UNFOLLOWED = {"reference": 0.012, "eager": 0.02, "compiled": 0.02}
_UNFOLLOWED_INT8 = 0.03


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are of the whole machine, or of the GPU; `parts` add up to `peak_bytes`."""

    parts: dict[str, int]
    peak_bytes: int
    budget_bytes: int
    fits: bool
    micro_tokens: int
    recompute: bool | int
    """True: all decoder blocks compute their activations again in the backward pass; else so many, the first ones."""
    processes: int
    seconds_per_step: float
    place: str = "cpu"
    device: str = ""
    measurable_bytes: int = 0
    """The part of the peak that a process can measure: on a GPU what torch's allocator reserves, not the context."""
    offload: int = 0
    """Decoder blocks whose weights stay in host memory."""
    offload_embedding: bool = False
    """Whether the input embedding stays in host memory."""
    offload_activations: int = 0
    """Decoder blocks of which what is kept for the backward pass is in host memory meanwhile."""
    host_bytes: int = 0
    """Of host memory that is pinned for these three."""
    host_budget_bytes: int | None = 0
    """Of host memory that may be; None: not known, of a machine elsewhere."""
    recompute_gate_up: int = 0
    """Decoder blocks after those that compute the product gate|up alone again."""
    unpacked: int = 0
    """Decoder blocks of whose packed weights the values are kept beside."""
    graphs: bool = False
    """Whether launches are recorded as CUDA graphs, and replayed."""
    graph_price: float = 0.0
    """What it costs to record a shape, in tokens of a micro-batch; 0 where none is."""
    kernels: Kernels = "reference"
    advice: tuple[str, ...] = ()
    dtype: str = ""
    why: dict[str, str] = field(default_factory=dict)
    """For what was decided before the plan, which fact made it."""
    less: tuple[tuple[int, float], ...] = ()
    """What the same step takes where it may use less memory: the peak's bytes, and seconds. Told where it was asked."""

    @property
    def lacking(self) -> str:
        """Of which memory the run needs more than it may use; nothing where it fits."""
        gpu = ("", self.peak_bytes, self.budget_bytes)
        host = (" of host memory", self.host_bytes, self.host_budget_bytes)
        short = [(where, needed, most) for where, needed, most in (gpu, host) if most is not None and needed > most]
        return ", and ".join(f"{needed >> 20} MiB{where} and may use {most >> 20} MiB" for where, needed, most in short)

    @property
    def reservable_bytes(self) -> int:
        """Of the budget on a GPU, what torch's allocator may reserve: less the driver's context, and whatever else of
        the peak it does not know of."""
        return self.budget_bytes - (self.peak_bytes - self.measurable_bytes)

    @property
    def host_free_bytes(self) -> int:
        """Of host memory that has to be free, so that `host_bytes` may be pinned."""
        return math.ceil(self.host_bytes / _SHARE)

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


class _Keeping(NamedTuple):
    """What a model's blocks keep for the backward pass: the first `whole` make all again, `gate_up` more that product
    alone, and the others nothing. Of the first `away` it is in host memory meanwhile."""

    whole: int = 0
    gate_up: int = 0
    away: int = 0


class _Cost(NamedTuple):
    """Of one process and one micro-batch."""

    parts: dict[str, int]
    outside: int  # bytes of them that torch cannot see
    seconds: Callable[[float, float, int], _Seconds]  # of a step: its tokens, micro-batches and unpacked blocks
    kept: tuple[float, ...] = ()  # bytes that each block leaves for the backward pass
    beside: int = 0  # bytes that are not in the parts and come where steps are recorded

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def recorded(self, tokens: int) -> int:
        """What micro-batches of so many tokens take besides, if they are recorded: what they are padded with, and what
        is `beside`. Graphs have a pool of memory for all that comes and goes in a pass, but none is launched beside it:
        they go before, and torch gives the memory of passes back before a recording (`torch.cuda.graph`). Graphs of
        several shapes take no more there than the largest one (`tests/contract/test_trace.py`)."""
        passing = sum(self.parts.get(name, 0) for name in ("activations", "logits", "backward"))
        return self.beside + math.ceil(passing * (padded_tokens(tokens) / tokens - 1))


class _Seconds(NamedTuple):
    """Of a step's work, and of its launches: one waits for the other."""

    work: float
    launches: float = 0.0
    forward: float = 0.0  # of the work, that of the forward pass

    @property
    def launched(self) -> float:
        """Of a step: the host runs ahead and falls behind, so that where both take as long, a sixth is lost. The fourth
        norm is near what was measured on an H200 (0.35 of the work: nothing lost; 1: 17 %; 4: all of it)."""
        return self.work * (1 + (self.launches / self.work) ** 4) ** 0.25 if self.work else self.launches


_Estimate = Callable[[int, _Keeping], _Cost]  # of the worst micro-batch of so many tokens


@dataclass(frozen=True)
class _Estimator:
    """What a model takes. `near` is quick, and exact for whole rows but for what attention takes for itself."""

    blocks: int
    exact: _Estimate
    near: _Estimate
    has_gate_up: bool
    frozen: int = 0
    """Bytes of a block's weights."""
    values: int = 0
    """Bytes of the values of a block's packed weights, which our decoder can keep beside."""
    embedding: int = 0
    """Bytes of the input embedding, where our decoder can leave it in host memory."""
    host_rate: float = 0.0
    """Bytes/s between the device and host memory."""
    sends: bool = False
    """Whether what blocks keep for the backward pass can be there meanwhile."""
    unrecorded: str = "they are our block's steps on a GPU alone"
    """Why launches cannot be recorded, or nothing."""


class _Graphs(NamedTuple):
    """What recorded launches take."""

    why: str  # they are recorded, or are not
    bytes: int = 0  # 0: they are not
    driver: int = 0  # of these bytes, those that torch's allocator does not know of
    price: float = 0.0  # of a shape, in tokens


class _Found(NamedTuple):
    seconds: float
    tokens: int
    keeping: _Keeping
    unpacked: int
    cost: _Cost
    graphs: _Graphs


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


def context_bytes(gpu: Gpu) -> int:
    """Of the driver's context on a GPU, and the kernels in it, which no allocator of ours knows of."""
    return _CONTEXT[min(9, max(7, gpu.capability[0]))]


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
    budget. Raises ModelError for a model that cannot be run without its data, RecipeError for what is to be kept off
    the GPU and cannot be, or where there is no GPU.
    """
    _check_place(recipe.run, setting.place)
    longest = min(longest or recipe.data.length, recipe.data.length)
    mean = min(mean_length or longest, longest)
    allowed = budget(recipe.run.memory, facts, setting.place)
    step = _Step.of(recipe, setting, longest, mean)
    estimator = _estimator(recipe, config, setting, facts, step)
    _check_sent(recipe.run, config, setting, facts, estimator)
    _check_graphs(recipe.run, estimator)
    host = facts.available * _SHARE if facts.here else math.inf
    found = _offloaded(_Search(recipe.run, estimator, setting, step, allowed, host))
    if not found.fits:
        found = replace(found, advice=tuple(_advice(recipe, config, setting, facts, longest, found)))
    device = _gpu(facts).name if setting.place == "cuda" else counted(setting.processes * setting.threads, "core")
    return replace(found, place=setting.place, device=device, kernels=setting.kernels)


def _asked(run: Run) -> Iterator[tuple[str, str]]:
    """What the recipe itself keeps in host memory: the field with its value, and what that is."""
    named = (
        ("offload", "blocks stream from host memory to"),
        ("offload_embedding", "the input embedding is read out of host memory by"),
        ("offload_activations", "what blocks keep goes to host memory from"),
    )
    for name, what in named:
        value = getattr(run, name)
        if value not in ("auto", 0):  # False is 0
            yield f"run.{name}: {json.dumps(value)}", what


def _check_place(run: Run, place: str) -> None:
    """Raises RecipeError for what is to be in host memory where that is all there is."""
    for where, what in _asked(run) if place != "cuda" else ():
        fix = "leave it out, or set run.place=cuda"
        raise RecipeError(f"{what} a CUDA GPU, and this run is on {place}", where=where, fix=fix)


def _check_sent(run: Run, config: dict[str, Any], setting: Setting, facts: Machine, estimator: _Estimator) -> None:
    """Raises RecipeError for an embedding or activations that are to be in host memory and cannot be."""
    reference = "the transformers module runs here, and only our own block does that"
    if run.offload_embedding is True and not estimator.embedding:
        others = {"reference": reference, "eager": "a kernel of Triton's reads it there: run.kernels=compiled"}
        whole = "it is the output head's weight, too, all of which a step reads, or scales its rows, as Gemma's does"
        why = others.get(setting.kernels, whole)
        what = f"the input embedding cannot be in host memory: {why}"
        raise RecipeError(what, where="run.offload_embedding: true", fix="leave it out, or set it to auto")
    if run.offload_activations not in ("auto", 0) and not estimator.sends:
        why = reference if setting.kernels == "reference" else _unlaunched(config, setting, facts)
        what = f"what blocks keep cannot go to host memory: {why}"
        fix = "leave it out, or set it to auto; run.recompute=true takes less memory, too"
        raise RecipeError(what, where=f"run.offload_activations: {run.offload_activations}", fix=fix)


_STREAMS = "what comes from host memory is not recorded"


def _check_graphs(run: Run, estimator: _Estimator) -> None:
    """Raises RecipeError where launches are to be recorded that cannot be."""
    streams = run.offload not in ("auto", 0) or run.offload_activations not in ("auto", 0)
    if run.graphs is True and (why := estimator.unrecorded or (streams and _STREAMS)):
        what = f"a step's launches cannot be recorded: {why}"
        raise RecipeError(what, where="run.graphs: true", fix="leave it out, or set run.graphs=auto")


@dataclass(frozen=True)
class _Step:
    """One process's part of a step."""

    tokens: float  # on average
    most: int  # that can come
    longest: int  # of a row
    mean: float
    sizes: tuple[int, ...]
    """Tokens that a micro-batch may have, the most first."""

    @staticmethod
    def of(recipe: Recipe, setting: Setting, longest: int, mean: float) -> _Step:
        samples = recipe.train.samples_per_step
        most = setting.most(samples, longest)
        sizes = _sizes(recipe.run.micro_tokens, most, longest, _LONGEST_USEFUL[setting.place])
        return _Step(samples * mean / setting.processes, most, longest, mean, sizes)

    def cuts(self, tokens: int) -> float:
        """Micro-batches of a step on average: what is left over takes one, too."""
        return 1 if tokens >= self.most else max(1, self.tokens / tokens + 0.5)


def _sizes(asked: int | str, most: int, longest: int, useful: int) -> tuple[int, ...]:
    """A step in one micro-batch, in two, and so on, with some room for how rows fit, down to one longest row."""
    if not isinstance(asked, str):
        return (min(most, asked),)
    first = max(longest, min(most, useful))
    parts = {int(first / cuts * _ROOM) // 8 * 8 for cuts in range(2, _MOST_CUTS + 1)}
    return (first, *sorted((size for size in parts if longest < size < first), reverse=True), longest)


@dataclass(frozen=True)
class _Search:
    """For the fastest of all sizes of micro-batches and all that blocks may keep, in `allowed` bytes of the machine."""

    run: Run
    estimator: _Estimator
    setting: Setting
    step: _Step
    allowed: float
    host: float = 0.0
    """Bytes of host memory that may be pinned; infinite where that is not known."""
    embedded: bool = True
    """Whether the embedding is on the device, and not in host memory."""
    streamed: int = 0
    """Blocks whose weights come from host memory."""

    def best(self) -> Plan:
        """The fastest that fits, else the smallest. Sizes are ranked by what is near, and what blocks keep is chosen by
        what is exact."""
        exact, sizes = self.estimator.exact, self.step.sizes
        if self.fits(exact, sizes[0], self.least):
            uncut = self.found(exact, sizes[0], self.least)
            return self.planned(self.faster_cut(uncut) or uncut)
        if not self.fits(exact, sizes[-1], self.most):
            return self.smallest()
        found = self.fastest_of(sizes)
        return self.planned(found) if found else self.smallest()

    def fastest_of(self, sizes: Sequence[int]) -> _Found | None:
        """The fastest micro-batches of these sizes, if any fits."""
        near = [found for size in sizes if (found := self.fastest(self.estimator.near, size))]
        ranked = sorted(near, key=lambda found: (found.seconds, -found.tokens))
        fitting = (self.fastest(self.estimator.exact, found.tokens) for found in ranked)
        return next(filter(None, fitting), None)

    def faster_cut(self, uncut: _Found) -> _Found | None:
        """Smaller micro-batches, where a step in one waits for its launches, or for what attention makes of it."""
        if self.setting.place != "cuda" or uncut.graphs.bytes:
            return None
        found = self.fastest_of(self.step.sizes[1:])
        return found if found and found.seconds < _FASTER * uncut.seconds else None

    def smallest(self) -> Plan:
        """What takes the least memory."""
        return self.planned(self.found(self.estimator.exact, self.step.sizes[-1], self.most))

    def fastest(self, estimate: _Estimate, tokens: int) -> _Found | None:
        """The fastest of what blocks may keep of micro-batches of so many tokens, if anything fits."""
        if not self.fits(estimate, tokens, self.most):
            return None
        found = []
        for whole in self.wholes:
            choices = [_Keeping(whole, count) for count in self.gate_ups(whole)]
            place = _first(choices, lambda keeping: self.fits(estimate, tokens, self.sent(estimate, tokens, keeping)))
            if place < len(choices):
                most = self.sent(estimate, tokens, choices[place])
                sent = [most._replace(away=away) for away in self.aways(most.away)]
                fewest = sent[_first(sent, lambda keeping: self.fits(estimate, tokens, keeping))]
                found.append(self.found(estimate, tokens, fewest))
            if place == 0:
                break  # to make more again only takes longer
        return min(found, key=lambda found: found.seconds, default=None)

    def fits(self, estimate: _Estimate, tokens: int, keeping: _Keeping) -> bool:
        cost = estimate(tokens, keeping)
        wanted = self.taken(cost, tokens).bytes if self.run.graphs is True else 0
        return cost.bytes + wanted <= self.room and self.pinned(cost, keeping) <= self.host

    def sent(self, estimate: _Estimate, tokens: int, keeping: _Keeping) -> _Keeping:
        """With as many blocks' parcels away as the recipe says, else as go and come while others compute. The last
        block's would have to be back at once."""
        asked, blocks = self.run.offload_activations, self.estimator.blocks
        if not self.estimator.sends or self.run.graphs is True:
            return keeping
        if asked != "auto":
            return keeping._replace(away=min(asked, blocks))
        cost = estimate(tokens, keeping)
        passing = cost.seconds(min(tokens, self.step.tokens), 1, 0)
        host = self.host - self.pinned_weights
        most = sum(sent <= host for sent in accumulate(map(_parcel, cost.kept[: blocks - 1])))
        longest = _WAITING * passing.work
        away = bisect_left(range(1, most + 1), True, key=lambda count: self.late(cost, passing, count) > longest)
        return keeping._replace(away=away)

    def late(self, cost: _Cost, passing: _Seconds, away: int) -> float:
        """Seconds for which a micro-batch waits for what the first `away` blocks keep to leave, with as many on their
        way as `away.py` lets there be. It has longer to come back."""
        blocks = self.estimator.blocks
        now, leaving, left = 0.0, 0.0, list[float]()
        for number in range(blocks):
            many = blocks - number - 1 if number >= away else max(1, blocks - away - 1)
            if len(left) > many:
                now = max(now, left[-many - 1])
            now += passing.forward / blocks
            if number < away:
                leaving = max(now, leaving) + cost.kept[number] / self.estimator.host_rate
                left.append(leaving)
        return now - passing.forward

    def aways(self, most: int) -> Sequence[int]:
        return range(most + 1) if self.run.offload_activations == "auto" else [most]

    def found(self, estimate: _Estimate, tokens: int, keeping: _Keeping) -> _Found:
        cost, step = estimate(tokens, keeping), self.step
        left, cuts = self.room - cost.bytes, step.cuts(tokens)
        graphs = _Graphs(_STREAMS) if keeping.away or self.streamed else self.graphs(cost, tokens, left)
        unpacked = self.unpacked(left - graphs.bytes)
        whole = cost.seconds(step.tokens, cuts, unpacked)
        seconds = self.recorded(whole, cuts)[0] if graphs.bytes else whole.launched
        seconds += cuts * self.waiting(cost, keeping, cost.seconds(step.tokens / cuts, 1, unpacked))
        return _Found(seconds, tokens, keeping, unpacked, cost, graphs)

    def waiting(self, cost: _Cost, keeping: _Keeping, passing: _Seconds) -> float:
        """Seconds for which a micro-batch waits for copies: the weights of a streamed block come twice, while the block
        before it or after it computes."""
        late = self.late(cost, passing, keeping.away) if keeping.away else 0.0
        if not self.streamed:
            return late
        copy, blocks = self.estimator.frozen / self.estimator.host_rate, self.estimator.blocks
        passes = passing.forward, passing.work - passing.forward
        return late + self.streamed * sum(max(0.0, copy - seconds / blocks) for seconds in passes)

    def graphs(self, cost: _Cost, tokens: int, left: float) -> _Graphs:
        """What recorded launches take of the bytes that are left, if they are worth it."""
        if self.run.graphs is False:
            return _Graphs("as the recipe says")
        if self.estimator.unrecorded:
            return _Graphs(self.estimator.unrecorded)
        cuts, taken = self.step.cuts(tokens), self.taken(cost, tokens)
        # Without them more blocks' values may be kept.
        plain, beside = (
            cost.seconds(self.step.tokens, cuts, self.unpacked(room)) for room in (left, left - taken.bytes)
        )
        times = f"a step's launches take the host {plain.launches:.2g} s, its work takes the GPU {plain.work:.2g} s"
        if self.run.graphs is True:
            return taken._replace(why="as the recipe says")
        if self.recorded(beside, cuts)[0] > _WORTH * plain.launched:
            return _Graphs(times)
        if taken.bytes > left:
            return _Graphs(f"{times}, but {taken.bytes / GIB:.1f} GiB for them are not there")
        return taken._replace(why=times)

    def taken(self, cost: _Cost, tokens: int) -> _Graphs:
        """What recorded launches take, if there are any."""
        tokens, cuts = max(tokens, self.step.longest), self.step.cuts(tokens)
        one, two = (cost.seconds(times * self.step.tokens, cuts, 0) for times in (1, 2))
        operations = one.launches / cuts / _GPU.launch
        driver = int(self.recorded(one, cuts)[1] * operations * _GPU.node)
        price = operations * _GPU.record * self.step.tokens / (two.work - one.work)
        return _Graphs("", cost.recorded(tokens) + driver, driver, price)

    def recorded(self, seconds: _Seconds, cuts: float) -> tuple[float, int]:
        """Of a step that is replayed, its share of all recordings included, and how many shapes make it the fastest:
        the more there are, the less is added to a micro-batch."""
        spread = min(_SPREAD, self.step.most / self.step.tokens - 1)
        recording = seconds.launches / cuts * _GPU.record / _GPU.launch / (self.setting.steps or _STEPS)
        replays = seconds.launches * _GPU.replay / _GPU.launch
        of = (
            (max(seconds.work * (1 + spread / shapes), replays) + shapes * recording, shapes)
            for shapes in range(1, _GRAPHS + 1)
        )
        return min(of)

    @property
    def room(self) -> float:
        """Bytes of a process, without the values that the recipe wants kept."""
        asked = self.run.unpacked
        values = 0 if asked == "auto" else min(asked, self.estimator.blocks) * self.estimator.values
        return self.allowed / self.setting.processes - values + self.elsewhere

    @property
    def elsewhere(self) -> int:
        """Bytes of weights that are in host memory and not on the device, which has places for two streamed blocks."""
        embedding = 0 if self.embedded else self.estimator.embedding
        return embedding + max(0, self.streamed - 2) * self.estimator.frozen

    def unpacked(self, left: float) -> int:
        """How many blocks keep their packed weights' values where so many bytes are left. `auto` leaves half of them to
        what no plan knows: sampled answers, and other programs."""
        asked, values = self.run.unpacked, self.estimator.values
        if not values or (asked == "auto" and self.setting.place != "cuda"):
            return 0
        return min(self.estimator.blocks, max(0, int(left / 2 // values)) if asked == "auto" else asked)

    @property
    def least(self) -> _Keeping:
        """The least that blocks may make again."""
        keeping = _Keeping(self.wholes[0], self.gate_ups(self.wholes[0])[0])
        asked = self.run.offload_activations
        return keeping if asked == "auto" else self.sent(self.estimator.exact, self.step.sizes[0], keeping)

    @property
    def most(self) -> _Keeping:
        keeping = _Keeping(self.wholes[-1], self.gate_ups(self.wholes[-1])[-1])
        return self.sent(self.estimator.exact, self.step.sizes[-1], keeping)

    @property
    def wholes(self) -> Sequence[int]:
        """How many blocks may make all again."""
        asked, blocks = self.run.recompute, self.estimator.blocks
        return range(blocks + 1) if asked == "auto" else [blocks_of(asked, blocks)]

    def gate_ups(self, whole: int) -> Sequence[int]:
        """How many more may make gate|up again."""
        asked, rest = self.run.recompute_gate_up, self.estimator.blocks - whole
        if asked != "auto":
            return [min(asked, rest) if self.estimator.has_gate_up else 0]
        return range(rest + 1) if self.run.recompute == "auto" and self.estimator.has_gate_up else [0]

    def planned(self, found: _Found) -> Plan:
        processes, values = self.setting.processes, self.estimator.values
        parts = found.cost.parts | ({"unpacked": found.unpacked * values} if values else {})
        parts |= {"graphs": found.graphs.bytes} if found.graphs.bytes else {}
        parts |= {"weights": parts["weights"] - self.elsewhere}
        parts = {name: amount * processes for name, amount in parts.items()}
        peak, whole = sum(parts.values()), found.keeping.whole
        pinned = self.pinned(found.cost, found.keeping)
        return Plan(
            parts,
            peak,
            int(self.allowed),
            peak <= self.allowed and pinned <= self.host,
            found.tokens,
            whole == self.estimator.blocks or whole or False,
            processes,
            found.seconds,
            measurable_bytes=peak - (found.cost.outside + found.graphs.driver) * processes,
            recompute_gate_up=found.keeping.gate_up,
            unpacked=found.unpacked,
            graphs=found.graphs.bytes > 0,
            graph_price=found.graphs.price,
            offload=self.streamed,
            offload_embedding=not self.embedded,
            offload_activations=found.keeping.away,
            host_bytes=pinned,
            host_budget_bytes=None if math.isinf(self.host) else int(self.host),
            why={"graphs": found.graphs.why} if self.setting.place == "cuda" else {},
        )

    def pinned(self, cost: _Cost, keeping: _Keeping) -> int:
        """Bytes of host memory."""
        return self.pinned_weights + sum(map(_parcel, cost.kept[: keeping.away]))

    @property
    def pinned_weights(self) -> int:
        """Bytes of host memory, of which torch pins large pieces as powers of two."""
        embedding = 0 if self.embedded else power_of_2(self.estimator.embedding)
        return embedding + self.streamed * power_of_2(self.estimator.frozen)


def _parcel(kept: float) -> int:
    """Bytes of host memory for what a block keeps, which lies there in whole chunks."""
    from luthier.model.away import CHUNK

    return math.ceil(kept / CHUNK) * CHUNK


def _first(choices: Sequence[_Keeping], fits: Callable[[_Keeping], bool]) -> int:
    """The place of the first choice that fits, where all after it do, too; their number where none does."""
    if fits(choices[0]):
        return 0
    return bisect_left(choices, True, key=fits) if fits(choices[-1]) else len(choices)


def _offloaded(search: _Search) -> Plan:
    """With as much in host memory as the recipe says, else as little as fits, or makes a step faster."""
    asked, streams = search.run.offload_embedding, search.run.offload
    streams = 0 if search.run.graphs is True else streams
    found = search.best()
    if search.estimator.embedding and (asked is True or (asked == "auto" and not _is_plain(found, search))):
        without = replace(search, embedded=False)
        less = without.best()
        if asked is True or (_is_better(less, found) and less.host_bytes <= search.host):
            search, found = without, less
    if search.estimator.frozen and streams != 0 and (streams != "auto" or not _is_plain(found, search)):
        # Where none fits, one that lacks host memory alone, so that the advice is of that.
        less = min(
            _streamed(search), key=lambda plan: (not plan.fits, plan.peak_bytes > search.allowed, plan.seconds_per_step)
        )
        found = less if streams != "auto" or _is_better(less, found) else found
    return found


def _is_plain(found: Plan, search: _Search) -> bool:
    """Whether a step is one micro-batch of which all is kept, so that more memory would make it no faster."""
    kept = not (found.recompute or found.recompute_gate_up or found.offload_activations)
    return found.fits and kept and found.micro_tokens >= search.step.sizes[0]


def _is_better(less: Plan, found: Plan) -> bool:
    """Whether a plan that has more in host memory is worth that."""
    if not found.fits:
        return less.fits or less.peak_bytes < found.peak_bytes
    return less.fits and less.seconds_per_step < _FASTER * found.seconds_per_step


def _streamed(search: _Search) -> Iterator[Plan]:
    """With as many blocks in host memory as the recipe says, else from as few as let one longest row fit to all."""
    if search.setting.kernels == "reference":  # a transformers module must not hold on to weights that go
        search = replace(search, run=search.run.model_copy(update={"recompute": True}))
    count, asked = search.estimator.blocks, search.run.offload
    if asked != "auto":
        if asked > count:
            what, fix = f"the model has {count} blocks", f"write at most {count}, or auto"
            raise RecipeError(what, where=f"run.offload: {asked}", fix=fix)
        yield replace(search, streamed=asked).best()
        return
    yield replace(search, streamed=count).best()
    lacking = search.smallest().peak_bytes - search.allowed
    fewest = min(count, 2 + math.ceil(max(0, lacking) / search.estimator.frozen))
    for streamed in {fewest, (fewest + count) // 2} if lacking > 0 else ():
        yield replace(search, streamed=streamed).best()


def _rows(tokens: int, longest: int) -> tuple[int, ...]:
    """The lengths of the worst micro-batch of so many tokens: longest rows, and the rest; at least one row."""
    whole, rest = divmod(max(tokens, longest), longest)
    return (longest,) * whole + ((rest,) if rest else ())


def _estimator(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, step: _Step) -> _Estimator:
    plain = setting.place == "cpu" and setting.kernels != "reference" and recipe.model.quantize is None
    plain = plain and recipe.model.norms != "float32" and is_llama(config)
    return (_formula if plain else _traced)(recipe, config, setting, facts, step)


# Our block with dense weights on a CPU, by formula.


def _formula(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, step: _Step) -> _Estimator:
    assert isinstance(recipe.adapter, Lora), "our block runs LoRA only"
    model, size, rank = shape(config), 4 if setting.dtype == "float32" else 2, recipe.adapter.rank
    adapter = model.adapter(recipe.adapter)
    rate = _rate(setting.dtype, facts, setting.threads)
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

    def estimate(tokens: int, keeping: _Keeping) -> _Cost:
        tokens = max(tokens, step.longest)
        kept = tokens * model.token_bytes(size, min(tokens, step.longest), rank, keeping.whole, keeping.gate_up)
        activations = max(loading, math.ceil(kept * (1 + _HOLES)))
        flops = model.token_flops(adapter, step.mean, _SUPERVISED, keeping.whole, keeping.gate_up)
        return _Cost({**fixed, "activations": activations}, 0, lambda tokens, *_: _Seconds(tokens * flops / rate))

    return _Estimator(model.layers, estimate, estimate, has_gate_up=True)


def _rate(dtype: str, facts: Machine, cores: int) -> float:
    """Sustained FLOP/s of a training step on `cores` cores of this kind."""
    known = [rate for (kind, flag), rate in _RATES.items() if kind == dtype and flag in facts.flags]
    return max([_SLOWEST, *known]) * min(cores, facts.cores)


# Everything else, by running the code without data.


def _traced(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine, step: _Step) -> _Estimator:
    from luthier.model.offload import blocks_name, embedding_bytes, streamed_bytes
    from luthier.model.trace import between, mixed

    ours = setting.kernels != "reference"
    capability = _gpu(facts).capability if setting.place == "cuda" else None
    settings = recipe.model_dump_json(include={"model", "adapter", "data", "train"}), json.dumps(config)
    share = _unfollowed(recipe, setting)

    def trace(keeps: Recompute, tokens: int) -> Trace:
        lengths = _rows(tokens, step.longest)
        return _trace(*settings, setting.dtype, setting.kernels, keeps, capability, lengths)

    @lru_cache(maxsize=64)
    def line(keeps: Recompute, tokens: int) -> Trace:
        if tokens in (step.sizes[0], step.sizes[-1]):
            return trace(keeps, tokens)
        return between(trace(keeps, step.sizes[-1]), trace(keeps, step.sizes[0]), tokens)

    def estimate(trace: Callable[[Recompute, int], Trace]) -> _Estimate:
        def cost(tokens: int, keeping: _Keeping) -> _Cost:
            rest = blocks - keeping.whole - keeping.gate_up
            counts = {"all": keeping.whole, "gate_up": keeping.gate_up, "nothing": rest}
            groups = [(trace(cast("Recompute", keeps), tokens), count) for keeps, count in counts.items() if count]
            found = _traced_cost(mixed(groups, keeping.away), setting, facts, share)
            kept = tuple(trace.figures["saved",] for trace, count in groups for _ in range(count))
            # An evaluation is launched while the graphs keep their memory.
            beside = groups[0][0].evaluation + _empty_segments(config, capability, tokens)
            return found._replace(kept=kept, beside=beside)

        return cost

    model = _outline(*settings, setting.dtype, setting.kernels, False, capability)
    found = model.module.get_submodule(blocks_name(model.module))
    blocks, on_gpu = len(found), setting.place == "cuda"
    frozen = streamed_bytes(found[0]) if on_gpu and (not ours or recipe.model.quantize is not None) else 0
    host_rate = _HOST_RATE[min(9, max(7, _gpu(facts).capability[0]))] if on_gpu else 0.0
    # A kernel of Triton's reads it there.
    embedding = embedding_bytes(model.module) if on_gpu and setting.kernels == "compiled" else 0
    values = sum(linear.kept_bytes for linear in model.decoder.blocks[0].linears) if model.decoder else 0
    # Elsewhere the backward pass needs the graph that autograd makes of attention, which cannot go.
    sends = on_gpu and ours and not _unlaunched(config, setting, facts)
    why = _unrecorded(recipe, config, setting, facts)
    return _Estimator(blocks, estimate(trace), estimate(line), ours, frozen, values, embedding, host_rate, sends, why)


def _unlaunched(config: dict[str, Any], setting: Setting, facts: Machine) -> str:
    """Why attention of packed rows is not one launch of our block on a GPU (`varlen.takes`), or nothing."""
    if setting.dtype == "float32" or _gpu(facts).capability < (8, 0):
        return "attention of packed rows is one launch in 16 bits on GPUs since Ampere"
    _, size = _heads(config)
    if size % 8 or size > 256:
        return f"attention of packed rows is not one launch for heads of {size} features"
    return ""


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    """Attention's heads, and the features of one."""
    heads = config.get("num_attention_heads") or 1
    return heads, config.get("head_dim") or config.get("hidden_size", 0) // heads


def _empty_segments(config: dict[str, Any], capability: tuple[int, int] | None, tokens: int) -> int:
    """Bytes that flash attention's backward pass takes for the segments without tokens that padding adds to a
    micro-batch, one for 128 tokens (`pack.shape`): each is 128 rows, of a sum and a gradient of q in fp32
    (`trace._flash_backward`). Hopper's backward pass is our own, and takes nothing for them."""
    if capability is None or capability[0] == 9:
        return 0
    heads, size = _heads(config)
    wide = -(-size // 32) * 32 if size <= 192 else 256
    return power_of_2(padded_tokens(tokens)) * heads * (wide + 1) * 4


def _unrecorded(recipe: Recipe, config: dict[str, Any], setting: Setting, facts: Machine) -> str:
    """Why a micro-batch's launches cannot be recorded, or nothing: then no launch depends on what the rows hold."""
    if setting.place != "cuda" or setting.kernels == "reference":
        return _Estimator.unrecorded
    if why := _unlaunched(config, setting, facts):
        return why
    if setting.kernels == "eager" and getattr(recipe.adapter, "dropout", None):
        return "the eager parts would repeat one step's dropout: set adapter.dropout=0, or run.kernels=compiled"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = [part for part in rope.values() if isinstance(part, dict)]
    kinds = (part.get("rope_type") or part.get("type") or "default" for part in by_layer or [rope])
    other = next((kind for kind in kinds if kind not in _FIXED_ROTATIONS), None)
    return f"'{other}' positions depend on the longest row" if other else ""


def _traced_cost(found: Trace, setting: Setting, facts: Machine, share: float) -> _Cost:
    seconds = _seconds(found, setting, facts)
    if setting.place != "cuda":
        holes = int(_HOLES * found.peak.get("activations", 0)) if setting.kernels != "reference" else 0
        fixed = {"process": _PROCESS + _MODULE, "code": setting.code, "fragmentation": holes}
        return _Cost({**fixed, **found.peak}, 0, seconds)
    context, peak = context_bytes(_gpu(facts)), found.peak
    holes = found.holes + math.ceil(share * (sum(peak.values()) + found.holes))
    parts = {**peak, "fragmentation": holes, "context": context}
    parts["optimizer"] += found.paged
    return _Cost(parts, context + found.paged, seconds)


def _unfollowed(recipe: Recipe, setting: Setting) -> float:
    int8 = recipe.model.quantize is not None and recipe.model.quantize.kind == "int8"
    return _UNFOLLOWED_INT8 if int8 else _UNFOLLOWED[setting.kernels]


@lru_cache(maxsize=4)
def _outline(
    settings: str, config: str, dtype: str, kernels: Kernels, recompute: bool, capability: tuple[int, int] | None
) -> CausalModel:
    import torch

    from luthier.model.trace import outline

    recipe = Recipe.model_validate_json(settings)
    options: Any = {"kernels": kernels, "recompute": recompute, "capability": capability}
    return outline(json.loads(config), recipe.model, recipe.adapter, dtype=getattr(torch, dtype), **options)


@lru_cache(maxsize=64)
def _trace(
    settings: str,
    config: str,
    dtype: str,
    kernels: Kernels,
    keeps: Recompute,
    capability: tuple[int, int] | None,
    lengths: tuple[int, ...],
) -> Trace:
    from luthier.model.trace import trace

    again = kernels == "reference" and keeps == "all"
    model = _outline(settings, config, dtype, kernels, again, capability)
    if model.decoder is not None:
        model.decoder.recompute(keeps == "all", len(model.decoder.blocks) if keeps == "gate_up" else 0)
    # Where bitsandbytes is missing, adamw takes the place of its optimizers (train/optim.py).
    optimizer = Recipe.model_validate_json(settings).train.optimizer if find_spec("bitsandbytes") else "adamw"
    return trace(model, lengths, optimizer=optimizer, capability=capability)


def _seconds(found: Trace, setting: Setting, facts: Machine) -> Callable[[float, float, int], _Seconds]:
    """Each phase's products and other operations take as long as their arithmetic or their traffic, whichever is more;
    and no step is shorter than the host needs to launch it. Packed weights are unpacked once a micro-batch, whatever
    its tokens."""
    if setting.place == "cuda":
        kind = _gpu(facts).known
        rate, bandwidth = kind.tflops * 1e12 * _GPU.products, kind.bandwidth * 1e9 * _GPU.bandwidth
        edge, launch = _GPU.edge, _GPU.launch
    else:
        rate, bandwidth = _rate(setting.dtype, facts, setting.threads), _CPU_BANDWIDTH * setting.threads
        edge, launch = 0.0, 0.0
    busy, unpacking, launches, forward = 0.0, 0.0, 0.0, 0.0
    for (phase, kind_of), work in found.work.items():
        share = _SUPERVISED if phase == "logits" else 1.0  # the trace supervises every token
        took = share * max(work.flops / rate, work.traffic / bandwidth)
        busy, unpacking = (busy, unpacking + took) if kind_of == "unpacking" else (busy + took, unpacking)
        launches += work.launches
        forward += took if phase == "activations" and kind_of != "unpacking" else 0.0

    def seconds(tokens: float, cuts: float, unpacked: int) -> _Seconds:
        whole = unpacking * (1 - unpacked / found.blocks) + launches * edge
        work = busy * tokens / found.tokens + cuts * whole
        return _Seconds(work, cuts * launches * launch, forward * tokens / found.tokens)

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
    if found.host_budget_bytes is not None and found.host_bytes > found.host_budget_bytes:
        needed, most = found.host_bytes / GIB, found.host_budget_bytes / GIB
        yield f"free host memory: {needed:.1f} GiB of it would be pinned, and {most:.1f} GiB may be"
    if found.peak_bytes <= found.budget_bytes:
        return
    for override, section in _offers(recipe, setting, longest):
        changed = Recipe.model_validate(_merged(recipe.model_dump(), section))
        length = min(longest, changed.data.length)
        tried = setting
        if "run" in section and "engine" in section["run"]:
            tried = replace(tried, processes=1, threads=setting.processes * setting.threads)
        step = _Step.of(changed, tried, length, length)
        smallest = _Search(changed.run, _estimator(changed, config, tried, facts, step), tried, step, 0).smallest()
        if smallest.peak_bytes < found.peak_bytes:
            fits = "fits" if smallest.peak_bytes <= found.budget_bytes else "not enough by itself"
            yield f"{override} ({smallest.peak_bytes / GIB:.1f} GiB, {fits})"


def _offers(recipe: Recipe, setting: Setting, longest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if setting.processes > 1:
        yield "run.engine=local", {"run": {"engine": "local", "processes": "auto"}}
    if recipe.run.recompute != "auto" and recipe.run.recompute is not True:  # 1 is a number of blocks
        yield "run.recompute=true", {"run": {"recompute": True}}
    if recipe.run.graphs is True:
        yield "run.graphs=auto", {"run": {"graphs": "auto"}}
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
