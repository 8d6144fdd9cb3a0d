"""Every `auto` of a recipe's `run` half, resolved once from facts, never from timings: same facts, same decisions.

Decisions are written to the run's manifest and reused on resume, so that a resumed run is the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from luthier.errors import MemoryPlanError, RecipeError
from luthier.machine import Machine
from luthier.model import families
from luthier.model.load import dtype_name
from luthier.plan import Plan, Setting, plan
from luthier.recipe import Lora, Recipe, Train
from luthier.registry import counted

if TYPE_CHECKING:
    from luthier.model.causal import Kernels

# Building the C++ parts takes about this long, once a machine, and makes a step this much shorter (docs/log.md).
_COMPILE_SECONDS = 4.0
_COMPILE_GAIN = 0.15


@dataclass(frozen=True)
class Decisions:
    """How a run is run. `why` says for each decision which fact made it."""

    place: str
    dtype: str
    engine: str
    processes: int
    threads: int
    micro_tokens: int
    recompute: bool | int
    kernels: Kernels
    predicted_peak_bytes: int
    why: dict[str, str]
    offload: int = 0
    offload_embedding: bool = False
    offload_activations: int = 0
    recompute_gate_up: int = 0
    unpacked: int = 0
    graphs: bool = False
    graph_price: float = 0.0
    memory_bytes: int | None = None
    """Of a GPU, what torch may reserve in training, where the recipe says how much memory the run may use."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """What the decisions need to know of the data: tokens of the longest and of the mean row, steps of the run, and the
    most tokens that one of them can have, whatever the seed."""

    longest: int
    mean: float
    steps: int
    step_tokens: int | None = None


def steps_of(train: Train, rows: int) -> int:
    """Steps of a run that sees so many rows an epoch, as `Stream.steps` has them."""
    return train.max_steps or math.ceil(max(1, round(train.epochs * rows)) / train.samples_per_step)


@dataclass(frozen=True)
class _Layout:
    engine: str
    processes: int
    threads: int
    why: str


def decide(
    recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows, *, dtype: str | None = None
) -> Decisions:
    """Resolves every `auto`.

    Args:
        config: the model's `config.json`.
        facts: of this machine.
        dtype: of a run that has begun, which goes on in it: another one would change what is learned.

    Raises MemoryPlanError with what to change if no arrangement fits the memory, RecipeError if the recipe
    contradicts itself.
    """
    place, place_why = place_of(recipe.run.place, facts)
    chosen = (dtype, "as this run began") if dtype else dtype_name(recipe.model.compute, place, facts)
    dtype, dtype_why = chosen
    layout, planned = arrange(recipe, config, facts, rows, place=place, dtype=dtype)
    if not planned.fits:
        raise MemoryPlanError(
            f"the run needs about {planned.lacking}",
            fix="; or ".join([*planned.advice, "allow more: run.memory=…"]),
        )
    kernels, kernels_why = _kernels(recipe, facts, planned, planned.seconds_per_step * rows.steps)
    return Decisions(
        place=place,
        dtype=dtype,
        engine=layout.engine,
        processes=layout.processes,
        threads=layout.threads,
        micro_tokens=planned.micro_tokens,
        recompute=planned.recompute,
        kernels=kernels,
        predicted_peak_bytes=planned.measurable_bytes,
        offload=planned.offload,
        offload_embedding=planned.offload_embedding,
        offload_activations=planned.offload_activations,
        recompute_gate_up=planned.recompute_gate_up,
        unpacked=planned.unpacked,
        graphs=planned.graphs,
        graph_price=planned.graph_price,
        memory_bytes=planned.reservable_bytes if place == "cuda" and recipe.run.memory != "auto" else None,
        why={
            **planned.why,
            "place": place_why,
            "dtype": dtype_why,
            "engine": layout.why,
            "micro_tokens": "as the recipe says" if recipe.run.micro_tokens != "auto" else "planned from the memory",
            "kernels": kernels_why,
        },
    )


def place_of(wanted: str, facts: Machine) -> tuple[str, str]:
    """Where a run goes whose recipe says `wanted`, and why."""
    if wanted != "auto":
        return wanted, "as the recipe says"
    if not facts.gpus:
        return "cpu", "no GPU is seen"
    import torch

    if torch.cuda.is_available():
        return "cuda", f"{facts.gpus[0].name} is there"
    return "cpu", f"this torch does not reach the {facts.gpus[0].name}"


def planned(recipe: Recipe, config: dict[str, Any], facts: Machine, place: str | None = None) -> Plan:
    """The plan of `recipe` before its data is known; `place`: not where the recipe says, but there."""
    place = place or place_of(recipe.run.place, facts)[0]
    dtype, why = dtype_name(recipe.model.compute, place, facts)
    found = arrange(recipe, config, facts, None, place=place, dtype=dtype)[1]
    return replace(found, why=found.why | {"dtype": why})


def arrange(
    recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows | None, *, place: str, dtype: str
) -> tuple[_Layout, Plan]:
    """The first arrangement of processes that fits the memory, else the smallest one."""
    kernels, why = _path(recipe, config, facts, rows, place)
    for layout in _layouts(recipe, facts, place):
        setting = Setting(place, dtype, kernels, layout.processes, layout.threads)
        if rows:
            setting = replace(setting, steps=rows.steps, step_tokens=rows.step_tokens)
        longest, mean = (rows.longest, rows.mean) if rows else (None, None)
        planned = plan(recipe, config, setting, facts, longest=longest, mean_length=mean)
        if not planned.fits and _may_stream(recipe, setting):
            why = "blocks that do not fit stream from host memory, which ours do with packed weights alone"
            streamed = replace(setting, kernels="reference")
            planned = plan(recipe, config, streamed, facts, longest=longest, mean_length=mean)
        if planned.fits:
            break
    return layout, replace(planned, dtype=dtype, why=planned.why | {"kernels": why})


def _path(recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows | None, place: str) -> tuple[Kernels, str]:
    """What runs the model, and why; on a CPU our block by its eager parts, which `_kernels` may have compiled."""
    longest = rows.longest if rows else recipe.data.length
    if why := _unblocked(recipe, config, facts, place) or _out_of_window(config, longest):
        return "reference", why
    if recipe.run.kernels != "auto":
        return recipe.run.kernels, "as the recipe says"
    return "eager" if place == "cpu" else "compiled", "our block runs this family, in less memory and time"


def _may_stream(recipe: Recipe, setting: Setting) -> bool:
    """Whether blocks that do not fit may stream from host memory instead: where weights are not packed, only the
    transformers module's do."""
    run = recipe.run
    ours = run.offload_embedding is True or run.offload_activations not in ("auto", 0)  # which only our block does
    free = run.kernels == run.offload == "auto" and recipe.model.quantize is None and not ours
    return setting.place == "cuda" and setting.kernels != "reference" and free


def _layouts(recipe: Recipe, facts: Machine, place: str) -> Iterator[_Layout]:
    """Arrangements of processes by preference: as many as there are free cores, then fewer, then one."""
    run, free = recipe.run, facts.free_cores
    if place != "cpu":
        if run.engine == "ddp" or run.processes not in ("auto", 1):
            raise RecipeError("on a GPU a run is one process", where="run.engine", fix="set run.engine=local")
        yield _Layout("local", 1, _threads(recipe, free), "one process for the GPU")
        return
    asked = None if run.processes == "auto" else run.processes
    if run.engine == "local" and asked not in (None, 1):
        raise RecipeError(f"run.processes={asked}, but run.engine=local is one process", fix="set run.engine=ddp")
    most = 1 if run.engine == "local" else min(free, recipe.train.samples_per_step)
    count = asked or most
    said = "as the recipe says" if asked or run.engine != "auto" else f"{free} of {facts.cores} cores are free"
    while count > 1:
        yield _Layout("ddp", count, _threads(recipe, free // count), said)
        if asked:
            return
        count //= 2
        said = f"memory is enough for {counted(count, 'process', 'processes')}"
    yield _Layout("ddp" if run.engine == "ddp" else "local", 1, _threads(recipe, free), said)


def _threads(recipe: Recipe, free: int) -> int:
    return max(1, free) if recipe.run.threads == "auto" else recipe.run.threads


def _kernels(recipe: Recipe, facts: Machine, planned: Plan, seconds: float) -> tuple[Kernels, str]:
    if recipe.run.kernels != "auto":
        return recipe.run.kernels, "as the recipe says"
    if planned.kernels == "reference" or planned.place != "cpu":
        return planned.kernels, planned.why["kernels"]
    if facts.compiler is None:
        return "eager", "no C++ compiler on PATH"
    if planned.dtype == "float16":
        return "eager", "the C++ parts do not compute float16"
    if seconds * _COMPILE_GAIN < _COMPILE_SECONDS:
        return "eager", f"compiling takes longer than it saves in a run of about {seconds:.0f} s"
    return "compiled", f"{facts.compiler} is there, and a run of about {seconds:.0f} s pays for compiling"


def _unblocked(recipe: Recipe, config: dict[str, Any], facts: Machine, place: str) -> str:
    """Why our decoder block does not run the recipe, or nothing."""
    if recipe.run.kernels == "reference":
        return "as the recipe says"
    if place == "mps":
        return "our block is not tested on Apple's GPUs"
    if families.of_file(config) is None:
        return "our block does not run this family"
    if why := _beyond_our_block(recipe):
        return f"our block does not compute {why}"
    if recipe.run.offload not in ("auto", 0) and recipe.model.quantize is None:
        return "our block streams packed weights alone from host memory"
    return _lacking(facts) if place == "cuda" and recipe.run.kernels != "eager" else ""


def _lacking(facts: Machine) -> str:
    """What our block's parts for a GPU need and is not there, or nothing."""
    if not _has_triton():
        return "our block's parts for a GPU need Triton, which is not installed"
    if facts.gpus and facts.gpus[0].capability < (7, 0):
        return "our block's parts for a GPU need one since Volta (compute capability 7.0)"
    return ""


def _has_triton() -> bool:
    """Whether Triton is here, or its lack means nothing: a torch without CUDA plans for another machine."""
    import torch

    return find_spec("triton") is not None or torch.version.cuda is None


def _out_of_window(config: dict[str, Any], longest: int) -> str:
    """Why rows are longer than our block's attention, or nothing."""
    window = families.window_of_file(config)
    if window is None or longest <= window:
        return ""
    return f"our block does not compute attention windows, and rows of {longest} tokens leave that of {window}"


def _beyond_our_block(recipe: Recipe) -> str:
    """What of the recipe our decoder block does not compute: `Adapter.foldable`, told before there is an adapter."""
    adapter = recipe.adapter
    if recipe.model.quantize is not None and recipe.model.quantize.kind == "int8":
        return "the rounded inputs of int8"
    if not isinstance(adapter, Lora) or adapter.dora:
        return adapter.title
    if adapter.init in ("pissa", "olora"):
        return f"a start by {adapter.init}"
    if adapter.bias != "none" or adapter.modules_to_save or adapter.new_tokens:
        return "trained weights of the base"
    return ""


def halved(decisions: Decisions, longest: int) -> Decisions:
    """The same with half the tokens of a micro-batch. Raises MemoryPlanError where that would still be one row."""
    if decisions.micro_tokens <= longest:
        raise MemoryPlanError(
            f"a row of {longest} tokens does not fit into memory by itself",
            fix="set data.length lower, run.recompute=true, or run.engine=local",
        )
    return replace(decisions, micro_tokens=max(longest, decisions.micro_tokens // 2))
