"""Every row of a file answered, into jsonl or csv."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import TYPE_CHECKING, Any, TextIO

from luthier.data.conversation import Conversation, Origin, Row, to_json
from luthier.errors import DataError, LuthierError, UsageError
from luthier.evaluate.asking.answers import Places, collect, sampling_of
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import Opened, open_sides, pair_of
from luthier.evaluate.asking.suite import answerable
from luthier.evaluate.asking.workers import Job, done, turns
from luthier.evaluate.metrics import Answer, Metric, resolved
from luthier.evaluate.metrics.choice import parse_choice
from luthier.evaluate.terminal import Bar, progress
from luthier.runs import Run, naming, read_json, sync_folder
from luthier.strict import dumps, finite

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.data.formats import Detection
    from luthier.evaluate.asking.subject import Subject

Json = dict[str, Any]
Bad = Callable[[Origin, LuthierError], None]
Write = Callable[[Json], None]
Asked = tuple[Row, Conversation]

CHUNK = 1024
"""Rows that are held in memory at a time."""
SAMPLE = 64
"""Rows that are looked at to find the format."""
NAMED = 20
"""Bad rows that are named to the reader; all are counted."""


@dataclass
class Problems:
    """Rows that have no answer: how many, and what is wrong with the first of them."""

    count: int = 0
    first: list[LuthierError] = field(default_factory=list)

    def add(self, origin: Origin, error: LuthierError) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(error)


def predict(
    run: Run, file: str | Path, out: str | Path, *, base: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Answers the rows of `file` with `run` (or its base) and writes `out`, .jsonl or .csv, in the order of the rows.

    Rows need no answers of their own. A row that cannot be read, or not by the model, is reported, counted and left
    out. Answers are kept in the run as they come: stopped anywhere, the same command makes only those that are missing.
    `out` appears whole. On a CPU several processes answer where training had several.

    Returns `answered`, `bad` (their count), `problems` (the first bad rows, file:line: what) and `out`. Raises
    UsageError for another kind of `out` or one that is `file`, DataError where no row of the file can be answered.
    """
    out, problems = Path(out), Problems()
    writer = _writer(out, str(file))
    rows = _converted(run, str(file), problems.add)
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    first = next(chunks, [])  # a file that is no data is told before the model is loaded
    side = open_sides([pair_of(run)[0 if base else 1]], Seat(), run)[0]
    answered, places = 0, Places(run.results / "predict" / "answers.jsonl")
    with _whole(out) as target, writer(target) as write, progress(console) as bar:
        for chunk in chain([first], chunks):
            asked = _readable(chunk, side.subject, problems.add)
            for record in _answered(asked, run, side, places, bar):
                write(record)
            answered += len(asked)
        if not answered:
            raise _nothing(str(file), problems)
    named = [str(error) for error in problems.first]
    _report(problems.count, named, console)
    return {"answered": answered, "bad": problems.count, "problems": named, "out": str(out)}


def answers_file(file: str) -> Path:
    """Where the answers to `file` go unless told otherwise: `rows.answers.jsonl` for data/rows.csv.gz, here."""
    name = Path(file).name
    for suffix in (".gz", ".zst"):
        name = name.removesuffix(suffix)
    return Path("answers.jsonl" if file == "-" else f"{Path(name).stem}.answers.jsonl")


def _converted(run: Run, file: str, bad: Bad) -> Iterator[Asked]:
    """The file's rows as the recipe reads and cleans training rows; answers are not asked for. Bad ones go to `bad`."""
    from luthier.data.clean import Cleaner
    from luthier.data.formats import converter
    from luthier.data.sources import read
    from luthier.recipe import Source

    data = run.recipe.data
    rows = read(Source(path=file), bad=bad)
    if not (sample := list(islice(rows, SAMPLE))):
        return
    convert = converter(data, _detection(run, sample), answers=False)
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


def _detection(run: Run, sample: Sequence[Row]) -> Detection:
    """The format that the run's rows had where its columns are there, so that a further column changes nothing; else
    what the recipe says or the rows show."""
    from luthier.data.formats import Detection, resolve

    known = {name for row in sample for name in row.values}
    report = run.data / "report.json"
    for file in read_json(report)["files"] if report.exists() else []:
        there = {part: columns for part, columns in file["columns"].items() if known >= _names(columns)}
        found = Detection(file["format"], there)
        if found.fits(answers=False):
            return found
    return resolve(run.recipe.data, sample, answers=False)


def _names(columns: str | list[str]) -> set[str]:
    return {columns} if isinstance(columns, str) else set(columns)


def _readable(chunk: Sequence[Asked], subject: Subject, bad: Bad) -> list[Asked]:
    """The rows that the template can write and that leave the model room for an answer."""
    window, readable = _window(subject.run), []
    for row, question in chunk:
        try:
            length = len(subject.encoder.prompts([question])[0])
            if window and length >= window:
                what = f"has {length:,} tokens, and the model reads {window:,}"
                raise DataError(what, where=str(row.origin), fix="shorten it")
        except LuthierError as error:
            bad(row.origin, error)
        else:
            readable.append((row, question))
    return readable


def _window(run: Run) -> int | None:
    """The most tokens that the model reads, where its config says."""
    from luthier.model.load import model_config

    config = model_config(run.recipe.model)
    names = ("max_position_embeddings", "n_positions", "seq_length")
    return next((config[name] for name in names if config.get(name)), None)


def _answered(asked: Sequence[Asked], run: Run, side: Opened, places: Places, bar: Bar) -> Iterator[Json]:
    """A record for each row, in their order. `places` are those of the answers that are kept."""
    questions = [question for _, question in asked]
    metrics = {name: metric for name, metric in resolved(run.recipe.evaluate.metrics).items() if _chooses(metric)}
    needs = {"text", *(metric.needs for metric in metrics.values() if any(q.choices for q in questions))}
    wanted, folder = turns([side], questions, sampling_of(run), needs), places.path.parent
    lines = places.lines({task.key for task in wanted[0].tasks})
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), _file_of(map(_line, questions), folder) as these, _file_of(lines, folder) as known:
        job = Job(
            str(run.folder),
            str(folder),
            (side.entry,),
            questions=these,
            needs=tuple(sorted(needs)),
            others=(known,),
            start=places.read,
        )
        memo = done(job, run, wanted, bar)
    answers = collect(wanted[0].tasks, memo, len(questions), side.side)
    for (row, question), answer in zip(asked, answers, strict=True):
        yield _record(row, question, answer, metrics)


@contextmanager
def _file_of(lines: Iterable[bytes], folder: Path) -> Iterator[str]:
    """The name of a file that holds them while the block lasts."""
    with NamedTemporaryFile("wb", dir=folder, suffix=".part") as file:
        file.writelines(lines)
        file.flush()
        yield file.name


def _line(question: Conversation) -> bytes:
    return dumps(to_json(question)).encode() + b"\n"


def _chooses(metric: Metric) -> bool:
    return metric.needs in ("choices", "unasked")


def _record(row: Row, question: Conversation, answer: Answer, metrics: dict[str, Metric]) -> Json:
    return {
        "line": row.origin.line,
        "prompt": question.prompt[-1].content,
        "prediction": answer.text,
        "stopped": answer.stopped,
        **(_choice(question, answer, metrics) if question.choices else {}),
        "row": row.values,
    }


def _choice(question: Conversation, answer: Answer, metrics: dict[str, Metric]) -> Json:
    """The choice that the answer names, by its letter and its text, and the one that each likelihood metric takes."""
    named = parse_choice(answer.text or "", question.choices)
    likeliest = {f"choice.{name}": _letter(_taken(metric, question, answer)) for name, metric in metrics.items()}
    return {"choice": _letter(named), "choice_text": None if named is None else question.choices[named], **likeliest}


def _taken(metric: Metric, question: Conversation, answer: Answer) -> int | None:
    """The choice for which `metric` would give points, were it the right one."""
    right = (replace(question, answer=i) for i in range(len(question.choices)))
    return next((i for i, one in enumerate(right) if any(s[0] for s in metric.score(one, answer))), None)


def _letter(index: int | None) -> str | None:
    return None if index is None else chr(ord("A") + index)


@contextmanager
def _whole(out: Path) -> Iterator[TextIO]:
    """A file to write that becomes `out` when the block ends well."""
    part = out.with_name(f".{out.name}.part")
    try:
        file = part.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", where=str(out), fix="give another --out") from error
    try:
        with naming(out), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
        sync_folder(out.parent)
    finally:
        part.unlink(missing_ok=True)


def _writer(out: Path, file: str) -> Callable[[TextIO], AbstractContextManager[Write]]:
    if out.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"cannot write '{out.suffix}' files", where=str(out), fix="give --out a .jsonl or .csv file")
    if out.exists() and Path(file).exists() and out.samefile(file):
        raise UsageError("holds the rows to answer", where=str(out), fix="give another --out")
    return _jsonl if out.suffix == ".jsonl" else _csv


@contextmanager
def _jsonl(file: TextIO) -> Iterator[Write]:
    def write(record: Json) -> None:
        file.write(dumps(record, ensure_ascii=False) + "\n")

    yield write


@contextmanager
def _csv(file: TextIO) -> Iterator[Write]:
    """Rows may have columns that no row before them had, so they wait on disk until all names are known."""
    names: dict[str, None] = {}
    with TemporaryFile("w+", encoding="utf-8", dir=Path(file.name).parent) as waiting:

        def write(record: Json) -> None:
            flat = _flat(record)
            names.update(dict.fromkeys(flat))
            waiting.write(dumps(flat) + "\n")

        yield write
        waiting.seek(0)
        table = csv.DictWriter(file, sorted(names, key=lambda name: name.startswith("row.")))
        table.writeheader()
        table.writerows(map(json.loads, waiting))


def _flat(record: Json) -> dict[str, str]:
    """A record as cells. The row's own columns follow ours as `row.NAME`, so that none can hide another; what is no
    text is written as JSON."""
    own = {f"row.{name}": value for name, value in record["row"].items()}
    cells = {name: value for name, value in record.items() if name != "row"} | own
    return {name: _cell(value) for name, value in cells.items()}


def _cell(value: Any) -> str:
    value = finite(value)
    if value is None:
        return ""
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)


def _nothing(file: str, problems: Problems) -> LuthierError:
    if problems.count == 1:
        return problems.first[0]
    what = f"none of the {problems.count:,} rows can be answered; the first: {problems.first[0]}"
    return DataError(what, where=file)


def _report(count: int, named: list[str], console: Console | None) -> None:
    if console is None or not count:
        return
    console.print(f"{'1 row has' if count == 1 else f'{count:,} rows have'} no answer:", markup=False)
    for problem in named:
        console.print(f"  {problem}", markup=False)
    if count > len(named):
        console.print(f"  … and {count - len(named):,} more")
