"""From a run to a trained run: data, decisions, and the processes that do the work, watched until they end.

The processes of a group are started and watched here, without torch. One that is killed stops the group, which starts
again from the last checkpoint, with half the tokens in a micro-batch if the kernel killed it for want of memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.prepare import Prepared, prepare
from luthier.machine import Machine, machine
from luthier.model.load import check_new_tokens, load_tokenizer, model_config, model_folder
from luthier.model.place import wake
from luthier.plan import Plan
from luthier.recipe import Recipe
from luthier.recipe import Run as Settings
from luthier.runs import Run, naming, read_json
from luthier.train.decide import Decisions, Rows, decide, halved, planned, steps_of
from luthier.train.group import RESTARTS, Killed, Progress, group, quiet_threads
from luthier.train.interrupt import Interrupt

if TYPE_CHECKING:
    from rich.console import Console


def train(run: Run, *, console: Console | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Trains `run` to its end, or goes on from its last checkpoint; a finished run is left as it is.

    Args:
        console: where progress is shown to people.
        progress: told of every event instead (see `view.py`).

    Returns what `train --json` prints. Raises LuthierError; Stopped after SIGTERM or SIGINT.
    """
    from luthier.train.view import show

    with show(console, progress) as emit, run.lock(), Interrupt(at_once=True):
        if run.finished and "result" in run.manifest:
            emit({"event": "note", "text": f"{run.folder} is trained already"})
            result: dict[str, Any] = run.manifest["result"]
            return result | {"resumed_from": result["steps"]}
        prepared = prepare_data(run, say=lambda text: emit({"event": "note", "text": text}))
        decisions = decisions_of(run, prepared)
        emit({"event": "decisions", **decisions.as_dict()})
        if decisions.engine == "local":
            result = _here(run, prepared, decisions, emit)
        else:
            result = _in_processes(run, decisions, int(prepared.train.lengths.max()), emit)
        run.update_manifest(result=result)
        return result


def prepare_data(run: Run, say: Callable[[str], None] | None = None) -> Prepared:
    """The run's data as tokens: made once, then reused. A run that has not begun takes a changed file as it is now; one
    that has begun stays with the rows it began with. `say` is told so, and if the model has to be fetched first."""
    tokenizer = load_tokenizer(model_folder(run.recipe.model, say), run.recipe.adapter)
    say = say or (lambda text: None)
    if (run.data / "report.json").exists():
        prepared = Prepared.open(run.data, tokenizer)
        changed = ", ".join(prepared.changed(run.root))
        if changed and run.steps():
            say(f"{changed} changed since this run began: it goes on with the rows it began with")
        if not changed or run.steps():
            return prepared
        say(f"{changed} changed since the data was prepared: preparing it again")
        run.update_manifest(asked=None)  # other rows, other decisions
    recipe = run.recipe
    with naming(run.data):
        return prepare(
            recipe.data,
            tokenizer,
            seed=recipe.split_seed,
            folder=run.data,
            root=run.root,
            keep=recipe.evaluate.slices,
        )


def decisions_of(run: Run, prepared: Prepared) -> Decisions:
    """The decisions recorded in the manifest, if the recipe asks for the same; else new ones, then recorded. A run that
    has begun keeps its dtype: that decides what is learned."""
    manifest = run.manifest
    asked = asked_of(run.recipe)
    if is_same(manifest.get("asked"), asked):
        return Decisions(**manifest["decisions"])
    facts = machine()
    wake("cuda" if facts.gpus and run.recipe.run.place == "auto" else run.recipe.run.place)
    rows = _rows(run.recipe, prepared)
    dtype = manifest["decisions"]["dtype"] if "decisions" in manifest and run.steps() else None
    decisions = decide(run.recipe, config_of(run.recipe), facts, rows, dtype=dtype)
    run.update_manifest(asked=asked, decisions=decisions.as_dict(), machine=facts.as_dict())
    return decisions


def asked_of(recipe: Recipe) -> dict[str, Any]:
    """What decisions are made from, of how a recipe is to be run: JSON values."""
    return recipe.run.model_dump(mode="json", exclude={"dir", "log_every", "save", "track"})


def is_same(stored: dict[str, Any] | None, asked: dict[str, Any]) -> bool:
    """Whether a manifest's decisions are for what is asked. That of an older version lacks what was `auto` then; and in
    JSON a number of blocks, 1, is not all of them, true."""
    if stored is None:
        return False
    defaults = Settings().model_dump(mode="json")
    told = {key: value for key, value in {**defaults, **stored}.items() if key in asked}
    return json.dumps(told, sort_keys=True) == json.dumps(asked, sort_keys=True)


def decide_for(recipe: Recipe, facts: Machine, place: str | None = None) -> Plan:
    """The plan of `recipe` on a machine before its data is known, where the recipe says or in another `place`.

    Raises what training would raise of a base that cannot be loaded, or an adapter that does not go with it.
    """
    config = model_config(recipe.model)
    check_new_tokens(recipe.model, recipe.adapter)
    return planned(recipe, config, facts, place)


def with_less(planned: Plan, recipe: Recipe, facts: Machine, place: str | None = None) -> Plan:
    """`planned`, which fits a GPU, and what the same step takes in three quarters and in half of its memory."""
    found = []
    for quarters in (3, 2) if planned.fits and planned.place == "cuda" else ():
        memory = str(planned.peak_bytes * quarters // 4)
        changed = recipe.model_copy(update={"run": recipe.run.model_copy(update={"memory": memory})})
        less = decide_for(changed, facts, place)
        found += [(less.peak_bytes, less.seconds_per_step)] if less.fits else []
    return replace(planned, less=tuple(found))


def _here(run: Run, prepared: Prepared, decisions: Decisions, emit: Progress) -> dict[str, Any]:
    os.environ |= {name: value for name, value in quiet_threads().items() if name not in os.environ}
    wake(decisions.place)
    from luthier.train.engines.local import Local
    from luthier.train.worker import work

    return work(run, decisions, Local(), emit, prepared=prepared)


def _in_processes(run: Run, decisions: Decisions, longest: int, emit: Progress) -> dict[str, Any]:
    """Starts the group, and again each time that one of it is killed: with half the token budget, unless the kernel
    counted no kill for want of memory meanwhile."""
    restarts = 0
    while isinstance(ended := _attempt(run, decisions, emit), Killed):
        if restarts == RESTARTS:
            raise ended.error(run.folder)
        restarts += 1
        if ended.wants_memory:
            decisions = halved(decisions, longest)
            run.update_manifest(decisions=decisions.as_dict())
        text = f"{ended.what}; going on with {decisions.micro_tokens} tokens at a time"
        emit({"event": "note", "text": text})
    return ended


def _attempt(run: Run, decisions: Decisions, emit: Progress) -> dict[str, Any] | Killed:
    with tempfile.TemporaryDirectory(prefix="luthier-") as meeting:
        environments = _environments(decisions, Path(meeting))
        with group("luthier.train.worker", run.folder, environments) as ranks:
            return ranks.watch(emit) or ranks.killed


def _environments(decisions: Decisions, meeting: Path) -> list[dict[str, str]]:
    """What each rank finds in its environment; in `meeting` they find each other."""
    shared = {
        "WORLD_SIZE": str(decisions.processes),
        "LUTHIER_RENDEZVOUS": str(meeting / "rendezvous"),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": str(decisions.threads),
    }
    return [{**shared, "RANK": str(rank)} for rank in range(decisions.processes)]


def _rows(recipe: Recipe, prepared: Prepared) -> Rows:
    lengths, train = prepared.train.lengths, recipe.train
    count = recipe.data.rows or len(lengths)
    whole = train.samples_per_step <= count  # else a step holds epochs
    return Rows(
        longest=int(lengths.max(initial=1)),
        mean=float(lengths.mean()) if len(lengths) else 1.0,
        steps=steps_of(train, count),
        step_tokens=largest_step(lengths, prepared.weights, train.samples_per_step) if whole else None,
    )


def largest_step(lengths: NDArray[np.int64], weights: NDArray[np.float64] | None, samples: int) -> int | None:
    """Tokens of the longest rows that can meet in a step of so many, by any seed: a row comes as often as its weight
    says, and as often again where an epoch ends and another begins. None where a step holds whole epochs."""
    times = 2 * np.ceil(np.ones(len(lengths)) if weights is None else weights).astype(np.int64)
    if samples > times.sum() // 2:
        return None
    order = np.argsort(-lengths, kind="stable")
    before = np.cumsum(times[order]) - times[order]
    return int((lengths[order] * np.clip(samples - before, 0, times[order])).sum())


def config_of(recipe: Recipe) -> dict[str, Any]:
    """The config of a base that is there with all of its files."""
    return dict(read_json(model_folder(recipe.model) / "config.json"))
