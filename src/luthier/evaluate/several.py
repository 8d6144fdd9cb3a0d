"""Runs, checkpoints, adapters and bases against each other: the same questions, one base in memory at a time."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.evaluate.asking.answers import collect, sampling_of
from luthier.evaluate.asking.neighbours import is_there
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import Entry, Opened, asker_of, entries, open_sides, with_bases
from luthier.evaluate.asking.suite import digest, suite
from luthier.evaluate.asking.workers import Job, done, needed, turns
from luthier.evaluate.compare import keep, note_source, settings, with_forgetting
from luthier.evaluate.comparison import Comparison, check_decides, contrast, score
from luthier.evaluate.contamination import with_contamination
from luthier.evaluate.harness import check_installed, tasks_of, with_tasks
from luthier.evaluate.judge import with_opinions
from luthier.evaluate.metrics import Answer, resolved
from luthier.evaluate.page.report import write_report
from luthier.evaluate.ranking import Unit, decide, described, noise, pairs
from luthier.evaluate.slices import cut
from luthier.evaluate.terminal import progress
from luthier.runs import Run, read_json

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.data.conversation import Conversation

PINNED = ".pinned-"


def compare_several(
    folders: Sequence[str | Path],
    *,
    base: bool | None = None,
    questions: str | Path | None = None,
    console: Console | None = None,
) -> Comparison:
    """Compares runs, checkpoints and PEFT adapters on the questions of the first run, or of the run `questions`.

    `base`: whether the untouched base is a side too; None: where all sides share one. Sides with the same base share
    its weights; others come one after the other. Of two sides the verdict says whether the second is better than the
    first; of more, whether one is better than all others. Runs that differ in their seed alone are then one recipe.

    Everything is kept in results/compare-NAMES of the first run, report.html included. Raises UsageError for a folder
    that is no side, RunError for a run without questions, RecipeError for a deciding metric that cannot tell.
    """
    paths, started = [Path(folder) for folder in folders], time.monotonic()
    asker = Run.open(questions) if questions else asker_of(paths)
    found = entries(paths, asker, base)
    asked, needs = suite(asker), needed(asker)
    check_decides(asked.questions, asker.recipe.evaluate.metrics[0])
    check_installed(asker.recipe.evaluate.harness)
    home = next((Run.open(e.run) for e in found if e.kind != "adapter"), asker)
    folder = home.results / _name([entry.name for entry in found], asker if questions else None)
    with _pinned(found, folder) as pinned:
        sides = with_bases(open_sides(pinned, Seat(), asker), base)
        general, entered = asker.recipe.evaluate.forgetting, tuple(side.entry for side in sides)
        job = Job(str(asker.folder), str(folder), entered, others=_others(sides), general=general)
        wanted = turns(sides, asked.questions, sampling_of(asker), needs, general=general)
        with progress(console) as bar:
            memo = done(job, asker, wanted, bar)
            count = len(asked.questions)
            answers = {t.side.name: collect(t.tasks, memo, count, t.side.side) for t in wanted}
            result = bar.wait("scoring", lambda: judged(asker, asked.questions, sides, answers, folder))
    if general:
        pair = [next(turn for turn in wanted if turn.side.name == name) for name in result.names]
        result = with_forgetting(result, pair, memo, count)
    result.warnings[:0] = _differences(asker, sides)
    made = settings(asker, asked, sides[0].subject, time.monotonic() - started)
    result = replace(result, settings=made | {"report": str(folder / "report.html")})
    note_source(result, asked)
    keep(result, folder)
    write_report(home, folder.name, folder / "report.html")
    return result


def judged(
    asker: Run,
    questions: Sequence[Conversation],
    sides: Sequence[Opened],
    answers: dict[str, list[Answer]],
    folder: Path,
) -> Comparison:
    """What the answers of the sides say, in the order of `sides`. Judges' replies and
    the scores of lm-eval's tasks are kept in `folder`."""
    names, bases = [side.name for side in sides], [side.name for side in sides if side.entry.kind == "base"]
    metrics, warnings = _comparable(asker, [answers[name] for name in names])
    tasks = tasks_of(asker, sides, folder)
    opinions, said = with_opinions(metrics, questions, [answers[name] for name in names], names, folder)
    scored = score(questions, opinions, metrics)
    everything = replace(scored, table=scored.table | tasks)
    alone, recipes = [Unit(name, (place,)) for place, name in enumerate(names)], by_recipe(sides)
    every = pairs(everything, alone, bases)
    units = alone if len(names) - len(bases) < 3 or len(recipes) < 2 else recipes
    repeated = len(recipes) < len(alone)
    among = pairs(everything, recipes, bases) if repeated and len(recipes) > 1 else []
    between = every if units is alone else among or every
    decision = decide(scored, units, between, bases)
    places = decision.pair[0].sides[0], decision.pair[1].sides[0]
    found = with_tasks(contrast(questions, scored, *places), tasks, *places)
    asked = [pair for pair in between if (pair.first, pair.second) == tuple(unit.name for unit in decision.pair)]
    found = replace(found, metrics=asked[0].metrics) if asked else found
    found = with_contamination(found, scored, questions, [side.subject.run for side in sides], *places)
    found.warnings[:0] = [*warnings, *said, *_same_recipe(recipes)]
    for place, row in enumerate(found.rows):
        row["answers"] = {name: answers[name][place].text for name in names}
    return replace(
        cut(found, scored, questions, asker.recipe.evaluate.slices, places),
        decision=decision,
        sides=[{**side.about, **described(everything, place)} for place, side in enumerate(sides)],
        pairs=[pair.as_dict(scored.first) for pair in every],
        seeds={"recipes": noise(everything, recipes), "pairs": [pair.as_dict(scored.first) for pair in among]},
    )


def by_recipe(sides: Sequence[Opened]) -> list[Unit]:
    """The sides, finished runs that differ in their seed alone as one."""
    groups: dict[str, list[int]] = {}
    for place, side in enumerate(sides):
        groups.setdefault(_recipe(side) if side.entry.kind == "run" else f"side {place}", []).append(place)
    return [Unit(_together([sides[place].name for place in group]), tuple(group)) for group in groups.values()]


def _recipe(side: Opened) -> str:
    learned = side.subject.run.recipe.learned()
    return digest({**learned, "evaluate": None, "train": {**learned["train"], "seed": None}})


def _together(names: Sequence[str]) -> str:
    """A name for seeds of one recipe: what their names begin with."""
    if len(names) == 1:
        return names[0]
    shared = "".join(
        letters[0] for letters in takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    )
    begin = re.sub(r"[\W_]*(seed|s)?[\W_]*\d*$", "", shared) or "+".join(names)
    return f"{begin} ({len(names)} seeds)"


def _same_recipe(recipes: Sequence[Unit]) -> list[str]:
    if len(recipes) and all(len(unit.sides) < 2 for unit in recipes):
        return []
    names = ", ".join(unit.name for unit in recipes if len(unit.sides) > 1)
    return [f"{names}: runs of one recipe that differ in their seed alone; what they differ by is chance"]


def _comparable(asker: Run, answers: Sequence[Sequence[Answer]]) -> tuple[list[Any], list[str]]:
    """The recipe's metrics that mean the same on all sides, and what to say of the others.

    Raises RecipeError where that is not the first.
    """
    metrics = list(asker.recipe.evaluate.metrics)
    if not _cut_apart(answers):
        return metrics, []
    kept = [m for m in metrics if next(iter(resolved([m]).values())).needs != "nll"]
    what = "perplexity counts by token, and these sides cut the same text into different tokens"
    if not kept or kept[0] is not metrics[0]:
        fix = f"let another metric decide in {asker.folder / 'recipe.yaml'}, such as rougeL"
        raise RecipeError(what, where="evaluate.metrics", fix=fix)
    return kept, [f"perplexity is left out: {what.partition(', and ')[2]}"] if kept != metrics else []


def _cut_apart(answers: Sequence[Sequence[Answer]]) -> bool:
    return any(len({side.targets for side in row if side.nll is not None}) > 1 for row in zip(*answers, strict=True))


def _name(names: Sequence[str], asker: Run | None) -> str:
    """Of the results folder: the sides that stand beside the first, and whose questions they were asked."""
    others = "-".join(names[1:] or names) + (f"-on-{asker.folder.resolve().name}" if asker else "")
    name = re.sub(r"[^\w@.+-]+", "_", f"compare-{others}")
    return name if len(name) <= 100 else f"{name[:80]}-{digest(others)[:12]}"


def _others(sides: Sequence[Opened]) -> tuple[str, ...]:
    """All answers that were kept with any of these runs."""
    folders = {side.subject.stored.run.results for side in sides}
    return tuple(sorted(str(path) for folder in folders for path in folder.glob("*/answers.jsonl")))


def _differences(asker: Run, sides: Sequence[Opened]) -> list[str]:
    """What the reader must know: runs that learned from other rows, or were meant for other questions."""
    said = []
    for run in {str(side.subject.run.folder): side.subject.run for side in sides}.values():
        for part, what in (("test", "has other test rows than"), ("train", "learned from other files than")):
            if _files(run, part) != _files(asker, part):
                said.append(f"{run.folder} {what} {asker.folder}, whose questions are asked")
    return said


def _files(run: Run, part: str) -> list[str]:
    report = run.data / "report.json"
    files = read_json(report)["files"] if report.exists() else []
    return sorted(file["sha256"] for file in files if file["part"] == part)


@contextmanager
def _pinned(found: Sequence[Entry], folder: Path) -> Iterator[list[Entry]]:
    """The sides with every checkpoint held by a second name of its files, so that a run that trains on may delete its
    own while it is compared."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PINNED}*"):
        if not is_there(int(left.name.removeprefix(PINNED))):
            shutil.rmtree(left, ignore_errors=True)
    pins = folder / f"{PINNED}{os.getpid()}"
    try:
        yield [_pin(entry, pins / str(place)) for place, entry in enumerate(found)]
    finally:
        shutil.rmtree(pins, ignore_errors=True)


def _pin(entry: Entry, into: Path) -> Entry:
    if entry.kind != "checkpoint":
        return entry
    from luthier.train.checkpoint import hold

    return replace(entry, folder=str(hold(Path(entry.folder), into)), given=entry.folder)
