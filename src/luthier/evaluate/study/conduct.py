"""A study: one recipe on nested parts of its data, or with several values of a setting, under several seeds.

A folder of ordinary runs, each of which can be compared, chatted with and exported:

study.json       what is studied, what was decided, and the cells
data/            the data, prepared once; the cells' data are links to it
answers.jsonl    all answers and likelihoods, those of the base once
base.json        the base's scores
cells/NAME/      a run for each size or value, and seed
findings.json    what `study --json` prints; study.html is the page for people
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from luthier.data.conversation import Conversation
from luthier.data.prepare import Prepared
from luthier.data.store import TokenStore
from luthier.errors import MemoryPlanError, RunError, UsageError
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.comparison import check_decides
from luthier.evaluate.metrics import resolved
from luthier.evaluate.study.cells import base_scores_of, scores_of
from luthier.evaluate.study.findings import Cell, Findings, find
from luthier.machine import Machine, machine
from luthier.model.load import load_tokenizer, model_folder
from luthier.plan import budget
from luthier.recipe import Recipe
from luthier.registry import counted
from luthier.runs import Run, read_json, vacant, versions, write_json
from luthier.train.decide import Decisions, Rows, decide, halved, steps_of
from luthier.train.group import RESTARTS, Killed, Progress, group
from luthier.train.interrupt import Interrupt
from luthier.train.launch import asked_of, config_of, is_same, prepare_data

if TYPE_CHECKING:
    from rich.console import Console

Json = dict[str, Any]

_SHARES = (8, 4, 2, 1)  # of the rows, where no sizes are asked for


@dataclass(frozen=True)
class Wanted:
    """What is studied. `over`: a key of the recipe, or None for the size of the data. `values`: of that key, or sizes;
    none: an eighth, a quarter, half and all of the rows. `seeds`: how many, counted up from `train.seed`."""

    over: str | None = None
    values: tuple[Any, ...] = ()
    seeds: int = 3


def wanted(sizes: str | None, over: str | None, seeds: int) -> Wanted:
    """Reads `--sizes 0,200,400`, `--over adapter.rank=4,8,16` and `--seeds 3`. Raises UsageError."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds} is no number of seeds", fix="write 1 or more")
    if sizes and over:
        raise UsageError("--sizes and --over are two studies", fix="ask for one of them")
    if over:
        key, values = _setting(over)
        return Wanted(key, values, seeds)
    return Wanted(None, _sizes(sizes) if sizes else (), seeds)


def _sizes(text: str) -> tuple[int, ...]:
    words = [word.strip().replace("_", "") for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise UsageError(f"--sizes {text} is no list of numbers of rows", fix="write e.g. --sizes 200,400,600")
    found = sorted({int(word) for word in words} - {0})  # the base is always there
    if not found:
        raise UsageError("--sizes holds no size to train on", fix="write e.g. --sizes 200,400,600")
    return tuple(found)


def _setting(text: str) -> tuple[str, tuple[Any, ...]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, values = text.partition("=")
    if not equals or key.partition(".")[0] not in ("adapter", "train") or key == "train.seed":
        fix = "write e.g. --over adapter.rank=4,8,16 or --over train.lr=1e-4,2e-4; sizes are --sizes, seeds --seeds"
        raise UsageError(
            f"--over {text}: a study goes over the size of the data, or a key of adapter or train", fix=fix
        )
    try:
        # A comma inside brackets belongs to a value: adapter.targets=all-linear,[q_proj,v_proj]
        found = [YAML(typ="safe").load(word) for word in re.split(r",(?![^\[{]*[\]}])", values)]
    except YAMLError as error:
        raise UsageError(f"--over {text}: a value is not valid YAML", fix="quote it") from error
    distinct = {json.dumps(value): value for value in found if value is not None}
    if len(distinct) < 2:
        raise UsageError(f"--over {text} holds fewer than two values", fix=f"write e.g. --over {key}=4,8,16")
    return key, tuple(distinct.values())


def study(
    recipe: Recipe, asked: Wanted, folder: Path, *, root: Path | None = None, console: Console | None = None
) -> Findings:
    """Trains and scores what is missing of a study, and judges all of it. A finished cell is left as it is, an
    interrupted one goes on from its checkpoint; more seeds, sizes or values add cells.

    Args:
        root: the folder that data paths count from.

    Raises UsageError for more rows than there are, RunError where `folder` holds another study, Stopped after SIGTERM
    or SIGINT, and what training and comparing raise.
    """
    from luthier.evaluate.study.page import write_page
    from luthier.evaluate.study.view import watching

    for value in asked.values if asked.over else ():
        _with(recipe, asked.over, value)  # one that cannot be is told before anything is written
    whole = _opened(recipe, asked, folder, root)
    with whole.lock(), watching(console) as view, Interrupt(at_once=True):
        started = time.monotonic()
        prepared = _prepared(whole, lambda text: view({"event": "note", "text": text}))
        asked = replace(asked, values=_checked(asked, prepared, recipe))
        questions = suite(whole)
        check_decides(questions.questions, recipe.evaluate.metrics[0])
        plan = _Plan.of(whole, asked, prepared, lambda text: view({"event": "note", "text": text}))
        cells = plan.create()
        _work(whole, plan, cells, view)
        _report([run for run in cells if run.finished], whole, view)
        found = _found(whole, asked.over, questions.questions)
        if questions.source == "held-out":
            found.warnings.append("there is no test set: questions are the held-out rows of the training file")
        found.settings.update(_settings(whole, asked, time.monotonic() - started))
        write_json(folder / "findings.json", found.as_dict())
        write_page(folder)
    return found


# --- the folder ---------------------------------------------------------------------------------------------------


def _opened(recipe: Recipe, asked: Wanted, folder: Path, root: Path | None) -> Run:
    """The study's folder, made if it is new, as a run whose data can be prepared. It has no recipe.yaml: it is none."""
    whole = Run(folder, recipe)
    if (folder / "study.json").exists():
        _refuse_another(recipe, asked, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if not vacant(folder):
            fix = "set run.dir to a new folder"
            raise RunError("is not empty and is not a study", where=str(folder), fix=fix)
        write_json(folder / "study.json", {"recipe": recipe.learned(), "over": asked.over, "cells": [], "decided": {}})
    if not whole.manifest:
        whole.write_first_manifest(root)
    return whole


def _refuse_another(recipe: Recipe, asked: Wanted, folder: Path) -> None:
    there = read_json(folder / "study.json")
    old, new = there["over"] or "the size of the data", asked.over or "the size of the data"
    changed = [f"it goes over {old} there, {new} now"] if old != new else []
    before = Recipe.model_validate({**there["recipe"], "run": recipe.run.model_dump(mode="json")})
    changed += [f"{key}: {mine!r} there, {now!r} now" for key, (mine, now) in before.diff(recipe).items()]
    if changed:
        fix = "set run.dir to a new folder, or delete this one to study anew"
        raise RunError(f"holds another study ({'; '.join(changed)})", where=str(folder), fix=fix)


def _prepared(whole: Run, say: Callable[[str], None]) -> Prepared:
    """The data of the study as tokens: made once. A study that has begun stays with the rows it began with."""
    if not any(_begun(Run(path.parent, whole.recipe)) for path in _cells(whole.folder)):
        return prepare_data(whole, say)
    prepared = Prepared.open(whole.data, load_tokenizer(model_folder(whole.recipe.model, say), whole.recipe.adapter))
    if changed := ", ".join(prepared.changed(whole.root)):
        say(f"{changed} changed since this study began: it goes on with the rows it began with")
    return prepared


def _cells(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*/recipe.yaml"))


def _begun(run: Run) -> bool:
    return run.metrics.exists() or scores_of(run).exists()


def _checked(asked: Wanted, prepared: Prepared, recipe: Recipe) -> tuple[Any, ...]:
    """The values; for sizes, those asked for, which must be there, or the default ones."""
    if asked.over is not None:
        return asked.values
    rows = min(len(prepared.train), recipe.data.rows or len(prepared.train))
    if not asked.values:
        return tuple(sorted({max(1, rows // share) for share in _SHARES}))
    if asked.values[-1] > rows:
        what = f"--sizes asks for {asked.values[-1]:,} rows, and {rows:,} are left to learn from"
        raise UsageError(what, fix=f"ask for at most {rows}, or see `luthier data` for what was dropped")
    return asked.values


# --- what is to be done, and in how many processes ----------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The cells asked for, and the decisions that they share: by value, or for all sizes under one name."""

    whole: Run
    asked: Wanted
    decided: dict[str, Decisions]
    workers: int
    facts: Machine

    @classmethod
    def of(cls, whole: Run, asked: Wanted, prepared: Prepared, say: Callable[[str], None]) -> _Plan:
        facts = machine()
        known = _known(whole, asked, prepared, facts, say)
        decided = {kind: Decisions(**decisions) for kind, decisions in known["kinds"].items()}
        return cls(whole, asked, decided, known["workers"], facts)

    def create(self) -> list[Run]:
        """The runs of the cells, made if they are new; the longest first, so that none is begun when others end."""
        first = self.whole.recipe.train.seed
        runs = [self._cell(at, first + i) for at in reversed(self.asked.values) for i in range(self.asked.seeds)]
        there = read_json(self.whole.folder / "study.json")
        write_json(self.whole.folder / "study.json", there | {"cells": [run.folder.name for run in runs]})
        return runs

    def _cell(self, at: Any, seed: int) -> Run:
        folder = self.whole.folder / "cells" / _name(self.asked.over, at, seed)
        if (folder / "recipe.yaml").exists() and _begun(run := Run.open(folder)):
            return run
        decisions = self.decided[_kind(self.asked.over, at)]
        recipe = _recipe_of(self.whole.recipe, self.asked.over, at, seed, folder, decisions)
        run = Run.create(recipe, root=self.whole.root)
        _link(self.whole.data, run.data)
        decided = {"asked": asked_of(recipe), "decisions": decisions.as_dict(), "machine": self.facts.as_dict()}
        run.update_manifest(**decided, study={"at": at, "seed": seed})
        return run


def _known(whole: Run, asked: Wanted, prepared: Prepared, facts: Machine, say: Callable[[str], None]) -> Json:
    """What study.json holds of decisions: as before where the recipe's `run` half asks for the same, so that new cells
    run as the others did. Else, and for new values, decided now; in the dtype of cells that have begun, since another
    one would change what is learned."""
    there, run = read_json(whole.folder / "study.json"), asked_of(whole.recipe)
    known = there["decided"] or {"asked": None, "workers": 1, "kinds": {}}
    kept: Json = known["kinds"] if is_same(known["asked"], run) else {}
    new = {kind: value for value in asked.values if (kind := _kind(asked.over, value)) not in kept}
    if not new:
        return known
    begun = [one for path in _cells(whole.folder) if _begun(one := Run.open(path.parent))]
    if begun and not kept:
        say("the recipe's section `run` has changed: cells that have begun go on as they did, the others take it")
    dtype = begun[0].manifest["decisions"]["dtype"] if begun else None
    workers, decided = _decide(whole.recipe, asked, new, prepared, facts, dtype)
    kinds = kept | {kind: decisions.as_dict() for kind, decisions in decided.items()}
    known = {"asked": run, "workers": min(workers, known["workers"]) if kept else workers, "kinds": kinds}
    write_json(whole.folder / "study.json", there | {"decided": known})
    return known


def _kind(over: str | None, value: Any) -> str:
    """What decisions go by: cells that differ in their size alone take the same memory."""
    return "sizes" if over is None else json.dumps(value)


def _name(over: str | None, at: Any, seed: int) -> str:
    if over is None:
        return f"size-{at:05d}-seed-{seed}"
    value = at if isinstance(at, str) else json.dumps(at)
    return f"{over.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]+', '_', value).strip('_')}-seed-{seed}"


def _recipe_of(recipe: Recipe, over: str | None, at: Any, seed: int, folder: Path, decisions: Decisions) -> Recipe:
    """The recipe of one cell, with all that was decided written out: trained alone, it gives the same bits."""
    changes = [
        f"data.rows={at}" if over is None else f"{over}={json.dumps(at)}",
        f"train.seed={seed}",
        f"data.heldout.seed={recipe.split_seed}",  # the same held-out rows for every seed
        "evaluate.forgetting=false",  # questions beside the study's own would be asked of every cell
        "evaluate.harness=[]",
        f"run.dir={json.dumps(str(folder))}",
        "run.engine=local",
        "run.processes=1",
        f"run.place={decisions.place}",
        f"run.threads={decisions.threads}",
        f"run.micro_tokens={decisions.micro_tokens}",
        f"run.recompute={json.dumps(decisions.recompute)}",
        f"run.recompute_gate_up={decisions.recompute_gate_up}",
        f"run.kernels={decisions.kernels}",
        f"run.offload={decisions.offload}",
        f"run.offload_embedding={json.dumps(decisions.offload_embedding)}",
        f"run.offload_activations={decisions.offload_activations}",
        f"run.unpacked={decisions.unpacked}",
        f"run.graphs={json.dumps(decisions.graphs)}",
    ]
    return Recipe.parse(recipe.dump(), *changes)


def _link(data: Path, copy: Path) -> None:
    """The same files in another folder: on disk and in memory once, and each run whole by itself."""
    aside = copy.with_name(f"{copy.name}.partial")
    for folder in (aside, copy):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data, aside, copy_function=_linked)
    aside.rename(copy)


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)
    return target


def _decide(
    recipe: Recipe, asked: Wanted, kinds: dict[str, Any], prepared: Prepared, facts: Machine, dtype: str | None
) -> tuple[int, dict[str, Decisions]]:
    """How many workers, and how each kind of cell is run in one of them: as many as there are free cores, or GPUs, and
    as fit into the memory together. `dtype` as of `decide`. Raises MemoryPlanError where not even one does."""
    config = config_of(recipe)
    lengths, cells = prepared.train.lengths, len(asked.values) * asked.seeds
    steps = sum(_steps(recipe, asked, value, len(lengths)) for value in asked.values) * asked.seeds

    def alone(workers: int) -> dict[str, Decisions]:
        rows = Rows(int(lengths.max(initial=1)), float(lengths.mean()), max(1, steps // workers))
        chosen = {kind: _in_one_worker(_with(recipe, asked.over, at), workers, facts) for kind, at in kinds.items()}
        return {kind: decide(one, config, facts, rows, dtype=dtype) for kind, one in chosen.items()}

    one = alone(1)
    on_gpus = next(iter(one.values())).place == "cuda"
    free = len(facts.gpus) if on_gpus else facts.free_cores
    workers = min(cells, free if recipe.run.processes == "auto" else recipe.run.processes)
    while workers > 1:
        try:
            return workers, alone(workers)
        except MemoryPlanError:
            workers //= 2
    return 1, one


def _with(recipe: Recipe, over: str | None, at: Any) -> Recipe:
    return recipe if over is None else Recipe.parse(recipe.dump(), f"{over}={json.dumps(at)}")


def _steps(recipe: Recipe, asked: Wanted, value: Any, rows: int) -> int:
    seen = value if asked.over is None else recipe.data.rows or rows
    return steps_of(_with(recipe, asked.over, value).train, seen)


def _in_one_worker(recipe: Recipe, workers: int, facts: Machine) -> Recipe:
    """As one of several workers runs it: with its part of cores and, on a CPU, of memory."""
    run: Json = {"engine": "local", "processes": 1}
    if recipe.run.threads == "auto":
        run["threads"] = max(1, facts.free_cores // workers)
    if recipe.run.place != "cuda" and workers > 1 and not facts.gpus:
        run["memory"] = str(budget(recipe.run.memory, facts) // workers)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=run)})


# --- the work -----------------------------------------------------------------------------------------------------


def _work(whole: Run, plan: _Plan, cells: Sequence[Run], view: Progress) -> None:
    """Starts workers until every cell is scored: fewer, and then with half the tokens, where memory lacks."""
    workers, restarts = plan.workers, 0
    steps = {run.folder.name: _all_steps(run, whole) for run in cells}
    while left := _left(whole, cells):
        workers = min(workers, len(left))
        done = sorted(steps.keys() - {run.folder.name for run in left})
        view({"event": "cells", "steps": steps, "done": done, "workers": workers})
        killed = _attempt(plan, workers, view)
        if killed is None:
            break
        if killed.wants_memory and workers > 1:
            workers //= 2
            how = f"with {counted(workers, 'process', 'processes')}"
        elif restarts == RESTARTS:
            raise killed.error(whole.folder)
        else:
            restarts += 1
            tokens = _halve(left, whole) if killed.wants_memory else None
            how = f"with {tokens} tokens at a time" if tokens else "as before"
        view({"event": "note", "text": f"{killed.what}; going on {how}"})
    _check_done(whole, cells)


def _attempt(plan: _Plan, workers: int, view: Progress) -> Killed | None:
    """What is known of a kill, if one of the workers was killed."""
    with group("luthier.evaluate.study.cells", plan.whole.folder, _environments(plan, workers)) as started:
        started.watch(view)
        return started.killed if started.was_killed else None


def _check_done(whole: Run, cells: Sequence[Run]) -> None:
    if left := _left(whole, cells):
        what = f"another process works on {', '.join(run.folder.name for run in left)}"
        raise RunError(what, where=str(whole.folder), fix="wait for it; the same command goes on then")
    if not base_scores_of(whole.folder).exists():
        raise RunError("every training diverged", where=str(whole.folder), fix="lower train.lr, in a new folder")


def _left(whole: Run, cells: Sequence[Run]) -> list[Run]:
    """Cells that are not scored; the base counts as left with the first of them that trained."""
    left = [run for run in cells if not scores_of(run).exists()]
    trained = [run for run in cells if run.finished]
    return left or ([] if base_scores_of(whole.folder).exists() else trained[:1])


def _all_steps(run: Run, whole: Run) -> int:
    rows = run.recipe.data.rows or int(read_json(whole.data / "report.json")["train"]["rows"])
    return steps_of(run.recipe.train, rows)


def _environments(plan: _Plan, workers: int) -> list[dict[str, str]]:
    """One thread setting for each worker, and a GPU of its own where it works on one."""
    decisions = next(iter(plan.decided.values()))
    shared = {"OMP_NUM_THREADS": str(decisions.threads)}
    if decisions.place != "cuda":
        return [shared] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if visible != [""] else [str(i) for i in range(len(plan.facts.gpus))]
    return [{**shared, "CUDA_VISIBLE_DEVICES": names[i % len(names)].strip()} for i in range(workers)]


def _halve(runs: Sequence[Run], whole: Run) -> int | None:
    """Half the tokens of a micro-batch for those of the cells that are not scored, and how many these are; what they
    learn stays the same."""
    longest, tokens = int(TokenStore.open(whole.data / "train").lengths.max()), None
    for run in runs:
        if not scores_of(run).exists():
            decisions = halved(Decisions(**run.manifest["decisions"]), longest)
            run.update_manifest(decisions=decisions.as_dict())
            tokens = decisions.micro_tokens
    return tokens


def _report(trained: Sequence[Run], whole: Run, view: Progress) -> None:
    """Compares each cell with the base, from the answers that are there, and so writes its report."""
    from luthier.evaluate.compare import compare

    missing = [run for run in trained if not (run.results / "compare" / "comparison.json").exists()]
    for place, run in enumerate(missing, start=1):
        view({"event": "report", "cell": run.folder.name, "number": place, "of": len(missing)})
        answers = run.results / "compare" / "answers.jsonl"
        answers.parent.mkdir(parents=True, exist_ok=True)
        if not answers.exists():
            _linked(str(whole.folder / "answers.jsonl"), str(answers))
        compare(run)


# --- what came out ------------------------------------------------------------------------------------------------


def _found(whole: Run, over: str | None, questions: Sequence[Conversation]) -> Findings:
    """Judges all cells of the folder that are done, those of earlier commands too."""
    metric = next(iter(resolved(whole.recipe.evaluate.metrics[:1]).values()))
    cells = sorted(_done(whole), key=lambda cell: (_order(cell.at), cell.seed))
    chance = _chance(questions) if metric.name.startswith("accuracy") else None
    return find(metric, cells, read_json(base_scores_of(whole.folder)), over=over, chance=chance)


def _done(whole: Run) -> Iterator[Cell]:
    for path in _cells(whole.folder):
        run = Run.open(path.parent)
        if scores_of(run).exists():
            scores, about = read_json(scores_of(run)), run.manifest["study"]
            folder = str(run.folder.relative_to(whole.folder))
            yield Cell(about["at"], about["seed"], folder, None if "failed" in scores else scores)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then all else by name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, str(value)


def _chance(questions: Sequence[Conversation]) -> float | None:
    shares = [100.0 / len(question.choices) for question in questions if question.choices]
    return fmean(shares) if shares else None


def _settings(whole: Run, asked: Wanted, seconds: float) -> Json:
    recipe = whole.recipe
    return {
        "study": str(whole.folder),
        "base": recipe.model.base,
        "method": recipe.adapter.title,
        "seeds": asked.seeds,
        "seconds": round(seconds, 1),
        "created": whole.manifest.get("created"),
        "versions": versions(),
        "recipe": recipe.dump(),
    }
