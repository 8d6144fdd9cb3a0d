"""Base against tuned: same questions, same decoding, one load of the base, and a verdict with an interval."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.evaluate.asking.answers import collect, sampling_of
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import Opened, asker_of, entries, open_sides, pair_of
from luthier.evaluate.asking.subject import Subject
from luthier.evaluate.asking.suite import Suite, digest, suite
from luthier.evaluate.asking.workers import Job, done, needed, turns
from luthier.evaluate.comparison import Comparison, check_decides, contrast, score
from luthier.evaluate.contamination import with_contamination
from luthier.evaluate.forgetting import forgetting, general_answers
from luthier.evaluate.harness import check_installed, tasks_of, with_tasks
from luthier.evaluate.judge import with_opinions
from luthier.evaluate.page.report import write_report
from luthier.evaluate.ranking import Pair, described
from luthier.evaluate.slices import cut, missing
from luthier.evaluate.statistics.paired import LEVEL, RESAMPLES
from luthier.evaluate.terminal import progress, render
from luthier.recipe import Recipe
from luthier.runs import Run, replacing, versions, write_atomic, write_json
from luthier.strict import dumps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from luthier.data.conversation import Conversation
    from luthier.evaluate.asking.answers import Memo
    from luthier.evaluate.asking.workers import Turn
    from luthier.evaluate.metrics import Answer

__all__ = ["Comparison", "compare", "render"]


def compare(run: Run, *, name: str = "compare", console: Console | None = None) -> Comparison:
    """Compares `run` with its base on its questions, keeps everything in results/`name`, and writes report.html.

    Answers are kept as they come (answers.jsonl): stopped anywhere, the same command goes on, and answers that were
    made under the same settings are not made again. Raises RunError for a run without questions or without an adapter,
    RecipeError for a deciding metric that can score none of the questions.
    """
    needs = needed(run)  # an unknown metric is told before anything is loaded
    asked, folder, started = suite(run), run.results / name, time.monotonic()
    check_decides(asked.questions, run.recipe.evaluate.metrics[0])  # before hours of answering, not after
    check_installed(run.recipe.evaluate.harness)
    general, sampling = run.recipe.evaluate.forgetting, sampling_of(run)
    job = Job(str(run.folder), str(folder), tuple(pair_of(run)), general=general)
    wanted = turns(open_sides(job.entries, Seat(), run), asked.questions, sampling, needs, general=general)
    with progress(console) as bar:
        memo = done(job, run, wanted, bar)
        answers = [collect(turn.tasks, memo, len(asked.questions), turn.side.side) for turn in wanted]
        sides = [turn.side for turn in wanted]
        found = bar.wait("scoring", lambda: _judged(run, asked.questions, sides, answers, folder))
    if general:
        found = with_forgetting(found, wanted, memo, len(asked.questions))
    found = replace(
        found,
        settings=settings(run, asked, wanted[0].side.subject, time.monotonic() - started) | {"report": str(run.report)},
    )
    note_source(found, asked)
    keep(found, folder)
    write_report(run, name)
    return found


def ask_otherwise(
    folders: Sequence[Path],
    changes: Sequence[str],
    *,
    base: bool | None = None,
    questions: str | Path | None = None,
) -> None:
    """Keeps changes to `evaluate` (`evaluate.key=value`) in the recipe of the run that asks `folders`, which may be
    `questions`; `base` as in `compare_several`. Raises what comparing them would before an answer, and RecipeError for
    columns to slice by that no question has; the recipe is then as it was."""
    asker = Run.open(questions) if questions else asker_of(folders)
    recipe = Recipe.load(asker.folder / "recipe.yaml", f"run.dir={json.dumps(str(asker.folder))}", *changes)
    changed = Run(asker.folder, recipe)
    new = [name for name in recipe.evaluate.slices if name not in asker.recipe.evaluate.slices]
    needed(changed)
    asked = suite(changed).questions
    check_decides(asked, recipe.evaluate.metrics[0])
    check_installed(recipe.evaluate.harness)
    if absent := missing(asked, new):
        fix = "name columns that its rows had when the data was prepared, and still have"
        raise RecipeError(f"no question of {asker.folder} has {', '.join(absent)}", where="evaluate.slices", fix=fix)
    open_sides(entries(folders, changed, base), Seat(), changed)
    write_atomic(asker.folder / "recipe.yaml", recipe.dump())


def _judged(
    run: Run,
    questions: Sequence[Conversation],
    sides: Sequence[Opened],
    answers: Sequence[Sequence[Answer]],
    folder: Path,
) -> Comparison:
    names, tasks = [side.name for side in sides], tasks_of(run, sides, folder)
    judged, said = with_opinions(run.recipe.evaluate.metrics, questions, answers, names, folder)
    scored = score(questions, judged, run.recipe.evaluate.metrics)
    found = with_contamination(contrast(questions, scored), scored, questions, [run])
    found = with_tasks(found, tasks)
    found.warnings.extend(said)
    everything = replace(scored, table=scored.table | tasks)
    return replace(
        cut(found, scored, questions, run.recipe.evaluate.slices),
        sides=[{**side.about, **described(everything, place)} for place, side in enumerate(sides)],
        pairs=[Pair("base", "tuned", found.metrics).as_dict(found.first)],
    )


def with_forgetting(found: Comparison, pair: Sequence[Turn], memo: Memo, start: int) -> Comparison:
    """With what two sides say to general text and questions, which come after the first `start` of their tasks."""
    base, tuned = (general_answers(t.side.subject, t.side.side, t.tasks, memo, start) for t in pair)
    forgotten = forgetting(pair[0].side.subject.place, base, tuned)
    return replace(found, forgetting=forgotten, warnings=[*found.warnings, *forgotten.warnings])


def note_source(found: Comparison, asked: Suite) -> None:
    if asked.source == "held-out":
        found.warnings.append("there is no test set: these are the held-out rows of the training file")


def settings(run: Run, asked: Suite, subject: Subject, seconds: float) -> dict[str, Any]:
    """What was compared and how: enough to do it again and to see what differed."""
    return {
        **subject.facts,
        "place": subject.place,
        "source": asked.source,
        "questions": asked.digest,
        "decoding": asdict(sampling_of(run)),
        "template": digest(subject.encoder.template.spec()),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "run": str(run.folder),
    }


def keep(found: Comparison, folder: Path) -> None:
    """Writes rows.jsonl and comparison.json."""
    with replacing(folder / "rows.jsonl") as file:
        file.writelines((dumps(row, ensure_ascii=False) + "\n").encode() for row in found.rows)
    write_json(folder / "comparison.json", found.as_dict())
