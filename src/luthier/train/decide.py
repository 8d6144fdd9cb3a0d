"""Every `auto` of a recipe's `run` half, resolved once from facts, never from timings: same facts, same decisions.

Decisions are written to the run's manifest and reused on resume, so that a resumed run is the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from luthier.errors import MemoryPlanError, ModelError, RecipeError
from luthier.machine import Machine
from luthier.model import families
from luthier.model.load import dtype_name
from luthier.plan import Plan, budget, plan
from luthier.recipe import Recipe

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


def decide(recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows) -> Decisions:
    """Resolves every `auto`.

    Args:
        config: the model's `config.json`.
        facts: of this machine.

    Raises MemoryPlanError with what to change if no arrangement fits the memory, RecipeError if the recipe
    contradicts itself.
    """
    place, place_why = "cpu", "training on a GPU is not there yet"
    dtype, dtype_why = dtype_name(recipe.model, place, facts)
    layout, planned = arrange(recipe, config, facts, rows, place=place, dtype=dtype)
    if not planned.fits:
        raise MemoryPlanError(
            f"the run needs about {planned.peak_bytes >> 20} MiB and may use {planned.budget_bytes >> 20} MiB",
            fix="; or ".join([*planned.advice, "allow more: run.memory=…"]),
        )
    kernels, kernels_why = _kernels(recipe, config, facts, planned.seconds_per_step * rows.steps)
    return Decisions(
        place=place,
        dtype=dtype,
        engine=layout.engine,
        processes=layout.processes,
        threads=layout.threads,
        micro_tokens=planned.micro_tokens,
        recompute=planned.recompute,
        kernels=kernels,
        predicted_peak_bytes=planned.peak_bytes,
        why={
            "place": place_why,
            "dtype": dtype_why,
            "engine": layout.why,
            "micro_tokens": "as the recipe says" if recipe.run.micro_tokens != "auto" else "planned from the memory",
            "kernels": kernels_why,
        },
    )


def arrange(
    recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows | None, *, place: str, dtype: str
) -> tuple[_Layout, Plan]:
    """The first arrangement of processes that fits the memory, else the smallest one."""
    for layout in _layouts(recipe, facts, place):
        planned = _plan(recipe, config, facts, rows, layout, dtype)
        if planned.fits:
            break
    return layout, planned


def _layouts(recipe: Recipe, facts: Machine, place: str) -> Iterator[_Layout]:
    """Arrangements of processes by preference: as many as there are free cores, then fewer, then one."""
    run, free = recipe.run, facts.free_cores
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


def _plan(
    recipe: Recipe, config: dict[str, Any], facts: Machine, rows: Rows | None, layout: _Layout, dtype: str
) -> Plan:
    try:
        return plan(
            recipe,
            config,
            dtype=dtype,
            processes=layout.processes,
            threads=layout.threads,
            facts=facts,
            longest=rows.longest if rows else None,
            mean_length=rows.mean if rows else None,
        )
    except ModelError:
        # A family whose sizes plan does not know trains all the same: a row at a time, unless the recipe says more.
        longest = rows.longest if rows else recipe.data.length
        tokens = longest if recipe.run.micro_tokens == "auto" else recipe.run.micro_tokens
        allowed = budget(recipe.run.memory, facts)
        return Plan({}, 0, allowed, layout.processes == 1, tokens, recipe.run.recompute is True, layout.processes, 0.0)


def _kernels(recipe: Recipe, config: dict[str, Any], facts: Machine, seconds: float) -> tuple[str, str]:
    if recipe.run.kernels != "auto":
        return recipe.run.kernels, "as the recipe says"
    if families.find(SimpleNamespace(**{"model_type": "", "hidden_act": "", **config})) is None:
        return "reference", "our block does not run this family"
    if facts.compiler is None:
        return "eager", "no C++ compiler on PATH"
    if seconds * _COMPILE_GAIN < _COMPILE_SECONDS:
        return "eager", f"compiling takes longer than it saves in a run of about {seconds:.0f} s"
    return "compiled", f"{facts.compiler} is there, and a run of about {seconds:.0f} s pays for compiling"


def halved(decisions: Decisions, longest: int) -> Decisions:
    """The same with half the tokens of a micro-batch. Raises MemoryPlanError where that would still be one row."""
    if decisions.micro_tokens <= longest:
        raise MemoryPlanError(
            f"a row of {longest} tokens does not fit into memory by itself",
            fix="set data.length lower, run.recompute=true, or run.engine=local",
        )
    return replace(decisions, micro_tokens=max(longest, decisions.micro_tokens // 2))
