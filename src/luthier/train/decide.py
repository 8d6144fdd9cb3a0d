"""Every `auto` of a recipe's `run` half, resolved once from facts, never from timings: same facts, same decisions.

Decisions are written to the run's manifest and reused on resume, so that a resumed run is the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from luthier.errors import MemoryPlanError, RecipeError
from luthier.machine import Machine
from luthier.model import families
from luthier.model.load import dtype_name
from luthier.plan import Plan, Setting, plan
from luthier.recipe import Lora, Recipe

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
    recompute: bool
    kernels: str
    predicted_peak_bytes: int
    why: dict[str, str]
    offload: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """What the decisions need to know of the data: tokens of the longest and of the mean row, steps of the run."""

    longest: int
    mean: float
    steps: int


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
    place, place_why = _place(recipe, facts)
    chosen = (dtype, "as this run began") if dtype else dtype_name(recipe.model.compute, place, facts)
    dtype, dtype_why = chosen
    layout, planned = arrange(recipe, config, facts, rows, place=place, dtype=dtype)
    if not planned.fits:
        raise MemoryPlanError(
            f"the run needs about {planned.peak_bytes >> 20} MiB and may use {planned.budget_bytes >> 20} MiB",
            fix="; or ".join([*planned.advice, "allow more: run.memory=…"]),
        )
    kernels, kernels_why = _kernels(recipe, config, facts, place, planned.seconds_per_step * rows.steps)
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
        why={
            "place": place_why,
            "dtype": dtype_why,
            "engine": layout.why,
            "micro_tokens": "as the recipe says" if recipe.run.micro_tokens != "auto" else "planned from the memory",
            "kernels": kernels_why,
        },
    )


def _place(recipe: Recipe, facts: Machine) -> tuple[str, str]:
    if recipe.run.place != "auto":
        return recipe.run.place, "as the recipe says"
    if not facts.gpus:
        return "cpu", "no GPU is seen"
    import torch

    if torch.cuda.is_available():
        return "cuda", f"{facts.gpus[0].name} is there"
    return "cpu", f"this torch does not reach the {facts.gpus[0].name}"


def planned(recipe: Recipe, config: dict[str, Any], facts: Machine, place: str | None = None) -> Plan:
    """The plan of `recipe` before its data is known; `place`: not where the recipe says, but there."""
    place = place or _place(recipe, facts)[0]
    dtype, why = dtype_name(recipe.model.compute, place, facts)
    found = arrange(recipe, config, facts, None, place=place, dtype=dtype)[1]
    return replace(found, dtype=dtype, why={"dtype": why})


def arrange(
    recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows | None, *, place: str, dtype: str
) -> tuple[_Layout, Plan]:
    """The first arrangement of processes that fits the memory, else the smallest one."""
    for layout in _layouts(recipe, facts, place):
        block = place == "cpu" and recipe.model.quantize is None and not _unblocked(recipe, config)
        setting = Setting(place, dtype, block, layout.processes, layout.threads)
        longest, mean = (rows.longest, rows.mean) if rows else (None, None)
        planned = plan(recipe, config, setting, facts, longest=longest, mean_length=mean)
        if planned.fits:
            break
    return layout, planned


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
        said = f"memory is enough for {count} process(es)"
    yield _Layout("ddp" if run.engine == "ddp" else "local", 1, _threads(recipe, free), said)


def _threads(recipe: Recipe, free: int) -> int:
    return max(1, free) if recipe.run.threads == "auto" else recipe.run.threads


def _kernels(recipe: Recipe, config: dict[str, Any], facts: Machine, place: str, seconds: float) -> tuple[str, str]:
    if recipe.run.kernels != "auto":
        return recipe.run.kernels, "as the recipe says"
    if place != "cpu":
        return "reference", "our block is not yet the faster one here"
    if why := _unblocked(recipe, config):
        return "reference", why
    if facts.compiler is None:
        return "eager", "no C++ compiler on PATH"
    if seconds * _COMPILE_GAIN < _COMPILE_SECONDS:
        return "eager", f"compiling takes longer than it saves in a run of about {seconds:.0f} s"
    return "compiled", f"{facts.compiler} is there, and a run of about {seconds:.0f} s pays for compiling"


def _unblocked(recipe: Recipe, config: dict[str, Any]) -> str:
    """Why our decoder block does not run the recipe, or nothing."""
    if recipe.run.kernels == "reference":
        return "as the recipe says"
    if families.find(SimpleNamespace(**{"model_type": "", "hidden_act": "", **config})) is None:
        return "our block does not run this family"
    why = _beyond_our_block(recipe)
    return why and f"our block does not compute {why}"


def _beyond_our_block(recipe: Recipe) -> str:
    """What of the recipe our decoder block does not compute: `Adapter.foldable`, told before there is an adapter."""
    adapter = recipe.adapter
    if recipe.model.quantize is not None and recipe.model.quantize.kind == "int8":
        return "the rounded inputs of int8"
    if recipe.model.norms == "float32" and recipe.model.compute != "float32":
        return "norms that are finer than the products"
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
