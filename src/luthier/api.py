"""The verbs as functions, for Python and for the command line: a notebook and a terminal take the same path.

run = luthier.start("recipe.yaml", "train.lr=1e-4")
luthier.prepare(run)
luthier.fit(run)
comparison = luthier.compare(run)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import demos
from luthier.machine import GIB, Machine, machine, named_gpu, unnamed_gpu
from luthier.recipe import Recipe, flatten, packaged
from luthier.registry import counted
from luthier.runs import Run, read_json, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.data.prepare import Prepared
    from luthier.evaluate.compare import Comparison
    from luthier.evaluate.repro import Repro
    from luthier.evaluate.study.conduct import Wanted
    from luthier.evaluate.study.findings import Findings
    from luthier.plan import Plan


def start(recipe: Recipe | str | Path, *overrides: str) -> Run:
    """The run of a recipe (see `chosen`), made if it is new."""
    found, root, name = chosen(recipe, overrides)
    return Run.create(found, name=name, root=root)


def chosen(recipe: Recipe | str | Path, overrides: Sequence[str]) -> tuple[Recipe, Path | None, str]:
    """A recipe with changes, the folder that its data paths count from (None: this one), and its name. It is given as a
    Recipe, a file, a run's folder, or a name that ships with luthier.

    Raises RecipeError, for a metric that is not known, too: before hours of training and not after.
    """
    if isinstance(recipe, Recipe):
        found, root, name = Recipe.parse(recipe.dump(), *overrides), None, "run"
    elif ((path := packaged(str(recipe)) or Path(recipe)) / "recipe.yaml").is_file():
        place = f"run.dir={json.dumps(str(path))}"  # quoted: values are YAML
        found, root, name = Recipe.load(path / "recipe.yaml", place, *overrides), Run.open(path).root, path.name
    else:
        found, root, name = Recipe.load(path, *overrides), path.parent, path.stem
    _check_metrics(found)
    return found, root, name


def _check_metrics(recipe: Recipe) -> None:
    from luthier.evaluate.metrics import resolved

    resolved(recipe.evaluate.metrics)


def prepare(run: Run) -> Prepared:
    """The run's data as tokens: read, cleaned, split and encoded once, then reused."""
    from luthier.train.launch import prepare_data

    return prepare_data(run)


def fit(run: Run, console: Console | None = None) -> dict[str, Any]:
    """Trains, or goes on from the last checkpoint. Returns what `train --json` prints."""
    from luthier.train.launch import train

    return train(run, console=console or _quiet())


def compare(
    run: Run | str | Path,
    *others: Run | str | Path,
    base: bool | None = None,
    questions: Run | str | Path | None = None,
    console: Console | None = None,
) -> Comparison:
    """Base against tuned on the test rows: metrics, intervals, a verdict; writes report.html.

    With `others`, or for a checkpoint or a PEFT adapter in place of a run: all of them against each other. `base`:
    whether the untouched base is a side too (None: where all share one). `questions`: the run that asks.
    """
    from luthier.evaluate.compare import compare as compare_run
    from luthier.evaluate.several import compare_several

    console = console or _quiet()
    if not others and base is None and questions is None and (only := _whole_run(run)) is not None:
        return compare_run(only, console=console)
    folders, asker = [_folder(one) for one in (run, *others)], None if questions is None else _folder(questions)
    return compare_several(folders, base=base, questions=asker, console=console)


def _whole_run(run: Run | str | Path) -> Run | None:
    if isinstance(run, Run):
        return run
    return Run.open(run) if (Path(run) / "recipe.yaml").is_file() else None


def _folder(run: Run | str | Path) -> Path:
    return run.folder if isinstance(run, Run) else Path(run)


def _quiet() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def _say(console: Console, text: str) -> None:
    """A line as it is: paths hold brackets, and a broken path cannot be clicked or copied."""
    console.print(text, markup=False, soft_wrap=True)


def show_data(run: Run, *, rows: int, console: Console) -> dict[str, Any]:
    """Prepares the data, prints the report and the mask of a few rows, and writes both to the run."""
    from luthier.data import view

    prepared = prepare(run)
    examples = [prepared.train.as_example(i) for i in range(min(max(rows, 0), len(prepared.train)))]
    console.print(view.render_report(prepared.report))
    if run.recipe.data.rows:
        _say(console, f"of these, {run.recipe.data.rows:,} rows are learned from (data.rows), chosen by train.seed")
    for example in examples:
        console.print(view.render_mask(example, prepared.encoder.tokenizer))
    shown = [prepared.train.as_example(i) for i in range(min(12, len(prepared.train)))]
    write_atomic(run.data / "data.html", view.report_html(prepared.report, shown, prepared.encoder.tokenizer))
    _say(console, f"report and mask: {run.data / 'data.html'}")
    return prepared.report


def show_plan(recipe: Recipe, *, gpu: str | None = None, vram: str | None = None, console: Console) -> Plan:
    """Prints memory by part, the micro-batch and the time of a step, on this machine or on a GPU that need not be here:
    `gpu` names its kind, `vram` says how much memory it has (`24GiB`). Of a kind that is not here, the host's memory is
    not known, and what of it has to be free is told.

    Raises UsageError for a GPU that is not known.
    """
    from luthier.train.launch import decide_for, with_less

    facts, place = machine(), None
    if gpu is not None or vram is not None:
        facts, place = with_gpu(facts, gpu, vram), "cuda"
    planned = with_less(decide_for(recipe, facts, place), recipe, facts, place)
    _print_plan(planned, console)
    return planned


def with_gpu(facts: Machine, gpu: str | None, vram: str | None) -> Machine:
    """The machine with another GPU, as `show_plan` takes it; one elsewhere, unless it has such a GPU.

    Raises UsageError for a GPU that is not known.
    """
    from luthier.plan import parse_bytes

    chosen = named_gpu(gpu) if gpu is not None else facts.gpus[0] if facts.gpus else unnamed_gpu(0)
    if vram is not None:
        chosen = replace(chosen, total=parse_bytes(vram), free=parse_bytes(vram))
    here = any(mine.known is chosen.known for mine in facts.gpus)
    return replace(facts, gpus=(chosen,), here=here)


def _recomputed(planned: Plan) -> str:
    whole, gate_up = planned.recompute, planned.recompute_gate_up
    parts = ["all blocks" if whole is True else counted(whole, "block")] if whole else []
    parts += [f"gate|up of {counted(gate_up, 'more block' if whole else 'block')}"] if gate_up else []
    return " and ".join(parts) or "nothing"


def _in_host_memory(planned: Plan) -> str:
    parts = ["the input embedding"] if planned.offload_embedding else []
    if planned.offload:
        parts.append(f"the weights of {counted(planned.offload, 'block')}, which come as they are needed")
    if planned.offload_activations:
        parts.append(f"what {counted(planned.offload_activations, 'block')} keep for the backward pass")
    return "; ".join(parts)


def in_less_memory(planned: Plan) -> Iterator[str]:
    """Of each plan in less memory, what a step takes. One may come out a little faster, with weights in host memory: by
    so little that they are not kept there where there is room, and it is no advantage."""
    for peak, seconds in planned.less:
        takes = f"about {seconds:.3g} s a step" if seconds > planned.seconds_per_step else "a step takes no longer"
        yield f"with run.memory={math.ceil(peak * 10 / GIB) / 10}GiB {takes}"


def _print_plan(planned: Plan, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "GiB", box=None)
    table.columns[1].justify = "right"
    for name, amount in planned.parts.items():
        if amount:
            table.add_row(name, f"{amount / GIB:.2f}")
    table.add_row("[bold]peak[/]", f"[bold]{planned.peak_bytes / GIB:.2f}[/]")
    table.add_row("allowed", f"{planned.budget_bytes / GIB:.2f}")
    where = planned.device if planned.place == "cuda" else counted(planned.processes, "process", "processes")
    console.print(f"memory, on {where}")
    console.print(table)
    console.print(f"micro-batch of {planned.micro_tokens} tokens, recomputed: {_recomputed(planned)}")
    console.print(f"products in {planned.dtype}: {planned.why['dtype']}")
    path = "the transformers module" if planned.kernels == "reference" else "our decoder block"
    console.print(f"run by {path}: {planned.why['kernels']}")
    if planned.host_bytes:
        console.print(f"in host memory, {planned.host_bytes / GIB:.1f} GiB: {_in_host_memory(planned)}")
    if planned.host_bytes and planned.host_budget_bytes is None:
        console.print(f"it is pinned there: {planned.host_free_bytes / GIB:.1f} GiB of host memory have to be free")
    if planned.graphs:
        console.print(f"recorded as CUDA graphs: {planned.why['graphs']}")
    console.print(f"about {planned.seconds_per_step:.3g} s a step")
    for said in in_less_memory(planned):
        console.print(said)
    if not planned.fits:
        console.print("[bold red]does not fit[/]: " + escape("; or ".join(planned.advice)))


def show_comparison(
    *runs: Run | str | Path,
    base: bool | None = None,
    questions: str | Path | None = None,
    slices: bool = False,
    console: Console,
) -> Comparison:
    """Compares and prints the verdict, tables and one sample."""
    from luthier.evaluate.terminal import render

    comparison = compare(*runs, base=base, questions=questions, console=console)
    console.print(render(comparison, slices=slices))
    _say(console, f"report: {comparison.settings['report']}")
    return comparison


def study(
    recipe: Recipe | str | Path,
    *overrides: str,
    sizes: Sequence[int] = (),
    over: str | None = None,
    seeds: int = 3,
    folder: str | Path | None = None,
    console: Console | None = None,
) -> Findings:
    """Whether more data would help (`sizes`: numbers of rows), or which value of a setting is best (`over`, such as
    `adapter.rank=4,8,16`). `as_dict()` of it is what `study --json` prints; `folder` is where `luthier study` has it if
    left out (see `study_folder`)."""
    from luthier.evaluate.study.conduct import study as study_recipe
    from luthier.evaluate.study.conduct import wanted

    asked = wanted(",".join(map(str, sizes)) or None, over, seeds)
    found, root, name = chosen(recipe, overrides)
    place = Path(folder) if folder else study_folder(found, name, overrides)
    return study_recipe(found, asked, place, root=root, console=console or _quiet())


def study_folder(recipe: Recipe, name: str, overrides: Sequence[str]) -> Path:
    """`run.dir` where it is asked for, else beside the run that the recipe is for: RUN-study, or runs/NAME-study."""
    if recipe.run.dir is None:
        return Path("runs") / f"{name}-study"
    if any(word.startswith("run.dir=") for word in overrides):
        return Path(recipe.run.dir)
    return Path(f"{recipe.run.dir.rstrip('/')}-study")


def show_study(recipe: Recipe, asked: Wanted, folder: Path, *, root: Path | None, console: Console) -> Findings:
    """Studies and prints the sentence, a table and the curve."""
    from luthier.evaluate.study import view
    from luthier.evaluate.study.conduct import study as study_recipe

    found = study_recipe(recipe, asked, folder, root=root, console=console)
    console.print(view.render(found))
    _say(console, f"page: {folder / 'study.html'}")
    return found


def demo(overrides: Sequence[str], *, name: str | None = None, console: Console) -> Comparison:
    """A job end to end: the main one on the embedded default, or by `name` one of the four systems at toy size.

    A finished part is reused, and said so. Raises UsageError for an unknown name.
    """
    system = demos.find(name) if name else None
    changes = system.overrides(name or "", lambda line: _say(console, line)) if system else []
    run = start(system.recipe if system else "tickets", *changes, *overrides)
    if system:
        _show_changes(system.recipe, run.recipe, console)
    if run.finished:
        _say(console, f"{run.folder} is trained already: reusing it (delete the folder to start anew)")
    show_data(run, rows=1, console=console)
    fit(run, console=console)
    comparison = show_comparison(run, console=console)
    if system and system.study:
        _show_toy_study(run, system.study, console)
    if system:
        _say(console, system.meaning)
    return comparison


def _show_toy_study(run: Run, sizes: tuple[int, ...], console: Console) -> None:
    """The system's study of how much data it needs, with one seed and a few rows."""
    from luthier.evaluate.study.conduct import Wanted

    folder = run.folder.with_name(f"{run.folder.name}-study")
    _say(console, f"its study of the size of the data, on {', '.join(map(str, sizes))} rows:")
    recipe = Recipe.parse(run.recipe.dump(), "train.max_steps=null", "run.dir=null")
    show_study(recipe, Wanted(None, sizes, seeds=1), folder, root=run.root, console=console)


def _show_changes(name: str, recipe: Recipe, console: Console) -> None:
    """How a recipe differs from the shipped one of this name."""
    path = packaged(name)
    assert path is not None
    _say(console, f"the recipe {name}, with these changes:")
    for key, (shipped, here) in Recipe.load(path).diff(recipe).items():
        _say(console, f"  {key}: {_plain(here)}  (full size: {_plain(shipped)})")


def show_runs(action: str, folders: Sequence[Path], *, console: Console) -> dict[str, Any]:
    """`runs list`, `runs show RUN`, `runs diff RUN RUN`, as text and as a value."""
    if action == "diff":
        return _show_diff(*(Run.open(folder) for folder in folders), console=console)
    if action == "show":
        return _show_run(Run.open(folders[0]), console)
    found = [Run.open(path.parent) for path in sorted(Path("runs").glob("*/recipe.yaml"))]
    return _list_runs(found, console)


def summary(run: Run) -> dict[str, Any]:
    """A run in one row: state, last step, last loss, verdict."""
    steps = [record for record in run.steps() if "loss" in record]
    comparison = run.results / "compare" / "comparison.json"
    verdict = read_json(comparison).get("verdict") if comparison.exists() else None
    state = "finished" if run.finished else "resumable" if steps else "new"
    last = steps[-1] if steps else {}
    return {
        "run": str(run.folder),
        "state": state,
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "verdict": verdict,
    }


def _list_runs(found: list[Run], console: Console) -> dict[str, Any]:
    from rich.markup import escape
    from rich.table import Table

    rows = [summary(run) for run in found]
    table = Table("run", "state", "step", "loss", "verdict", box=None)
    for row in rows:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        table.add_row(escape(row["run"]), row["state"], str(row["step"]), loss, row["verdict"] or "")
    console.print(table if rows else "no runs under runs/ yet: luthier train RECIPE makes one")
    return {"runs": rows}


def _show_run(run: Run, console: Console) -> dict[str, Any]:
    result = {**summary(run), "recipe": run.recipe.model_dump(mode="json"), "manifest": run.manifest}
    for key, value in flatten({k: v for k, v in result.items() if k != "recipe"}).items():
        _say(console, f"{key.removeprefix('manifest.'):30} {_plain(value)}")
    _say(console, f"{'recipe':30} {run.folder / 'recipe.yaml'}")
    return result


def show_repro(run: Run, *, out: Path | None = None, console: Console) -> Repro:
    """Makes a finished run again, and prints what was not the same before, what came out, and a verdict."""
    from luthier.evaluate.repro import repro

    found = repro(run, out, console=console)
    for name, (old, new) in found.changes.items():
        _say(console, f"{name}: {_plain(old)} then, {_plain(new)} now")
    if not found.adapter.identical:
        _say(console, f"adapter: {found.adapter.tensor} is off by {found.adapter.largest:.2g}, and no tensor by more")
    if found.answers:
        same, count = found.answers
        _say(console, f"comparison: {same} of {count} rows are the same")
    _say(console, found.sentence)
    return found


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict) and "path" in value:  # a source of data
        return str(value["path"])
    return " ".join(map(_plain, value)) or "-" if isinstance(value, list) else str(value)


def _show_diff(mine: Run, theirs: Run, *, console: Console) -> dict[str, Any]:
    """Each key that differs above both of its values: in a table, long keys and values would be cut."""
    from rich.padding import Padding
    from rich.text import Text

    changed = mine.recipe.diff(theirs.recipe)
    console.print(Text(f"− {mine.folder}\n+ {theirs.folder}" if changed else "the recipes are equal"))
    for key, (old, new) in changed.items():
        console.print(Text(f"\n{key}", style="bold"))
        console.print(Padding(Text(f"− {old}\n+ {new}"), (0, 0, 0, 2), expand=False))
    return {"changed": {key: list(pair) for key, pair in changed.items()}}
