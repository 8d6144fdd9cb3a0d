"""Every row of a file answered, into jsonl or csv."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from luthier.data.conversation import Conversation, Origin, Row
from luthier.errors import DataError, UsageError
from luthier.evaluate.answers import Memo, collect, plan, sampling_of, work
from luthier.evaluate.metrics import Answer
from luthier.evaluate.subject import Side, Subject
from luthier.evaluate.suite import answerable
from luthier.evaluate.terminal import progress
from luthier.runs import Run, sync_folder

if TYPE_CHECKING:
    from rich.console import Console

Json = dict[str, Any]
Bad = Callable[[Origin, DataError], None]

CHUNK = 1024
"""Rows that are held in memory at a time."""
SAMPLE = 64
"""Rows that are looked at to find the format."""
NAMED = 20
"""Bad rows that are named to the reader; all are counted."""


def predict(
    run: Run, file: str | Path, out: str | Path, *, base: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Answers the rows of `file` with `run` (or its base) and writes `out`, .jsonl or .csv, in the order of the rows.

    Rows need no answers of their own. A row that cannot be read is reported, counted and left out. Answers are kept in
    the run as they come: stopped anywhere, the same command makes only those that are missing. `out` appears whole.

    Returns `answered`, `bad` (their count), `problems` (the first bad rows, file:line: what) and `out`. Raises
    UsageError for another kind of `out`, DataError where the file as a whole cannot be read.
    """
    out, side = Path(out), _side(base)
    writer = _writer(out)
    problems: list[str] = []
    rows = _converted(run, str(file), lambda origin, error: problems.append(str(error)))
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    first = next(chunks, [])  # a file that is no data is told before the model is loaded
    subject, sampling = Subject.open(run), sampling_of(run)
    memo, answered = Memo(run.results / "predict" / "answers.jsonl"), 0
    with _whole(out) as target, progress(console) as bar:
        bar.start(f"{side} answers", None)
        write = writer(target)
        for chunk in chain([first], chunks):
            questions = [question for _, question in chunk]
            tasks = plan(subject, questions, sampling, sides=[side])
            work(subject, tasks, sampling, memo, bar.advance)
            for (row, question), answer in zip(chunk, collect(tasks, memo, len(chunk), side), strict=True):
                write(_record(row, question, answer))
            answered += len(chunk)
    _report(problems, console)
    return {"answered": answered, "bad": len(problems), "problems": problems[:NAMED], "out": str(out)}


def _side(base: bool) -> Side:
    return "base" if base else "tuned"


def _converted(run: Run, file: str, bad: Bad) -> Iterator[tuple[Row, Conversation]]:
    """The file's rows as the recipe reads and cleans training rows; answers are not asked for. Bad ones go to `bad`."""
    from luthier.data.clean import Cleaner
    from luthier.data.formats import converter, resolve
    from luthier.data.sources import read
    from luthier.recipe import Source

    data = run.recipe.data
    rows = read(Source(path=file), bad=bad)
    sample = list(islice(rows, SAMPLE))
    convert = converter(data, resolve(data, sample, answers=False), answers=False)
    clean = Cleaner(data.clean)
    for row in chain(sample, rows):
        try:
            question = clean(convert(row))
            if not answerable(question):
                raise DataError("asks nothing", where=str(row.origin), fix="give a prompt that ends in a user's turn")
        except DataError as error:
            bad(row.origin, error)
        else:
            yield row, question


def _record(row: Row, question: Conversation, answer: Answer) -> Json:
    return {
        "line": row.origin.line,
        "prompt": question.prompt[-1].content,
        "prediction": answer.text,
        "stopped": answer.stopped,
        "row": row.values,
    }


@contextmanager
def _whole(out: Path) -> Iterator[TextIO]:
    """A file to write that becomes `out` when the block ends well."""
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", where=str(out), fix="give another --out") from error
    finally:
        part.unlink(missing_ok=True)


def _writer(out: Path) -> Callable[[TextIO], Callable[[Json], None]]:
    if out.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"cannot write '{out.suffix}' files", where=str(out), fix="give --out a .jsonl or .csv file")
    return _jsonl if out.suffix == ".jsonl" else _csv


def _jsonl(file: TextIO) -> Callable[[Json], None]:
    def write(record: Json) -> None:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

    return write


def _csv(file: TextIO) -> Callable[[Json], None]:
    """The row's own columns follow ours as `row.NAME`, so that none can hide another."""
    table: list[csv.DictWriter[str]] = []

    def write(record: Json) -> None:
        flat = {k: v for k, v in record.items() if k != "row"}
        flat |= {f"row.{name}": value for name, value in record["row"].items()}
        if not table:
            table.append(csv.DictWriter(file, list(flat)))
            table[0].writeheader()
        try:
            table[0].writerow(flat)
        except ValueError as error:
            where = f"line {record['line']}"
            raise DataError("has columns that the first row lacks", where=where, fix="write .jsonl instead") from error

    return write


def _report(problems: list[str], console: Console | None) -> None:
    if console is None or not problems:
        return
    console.print(f"{len(problems)} rows could not be read and have no answer:", markup=False)
    for problem in problems[:NAMED]:
        console.print(f"  {problem}", markup=False)
