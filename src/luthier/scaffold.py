"""`luthier init`: a commented recipe from a person's own file."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.view import shape
from luthier.errors import DataError, RecipeError
from luthier.recipe import Data, Model, Recipe, Source

if TYPE_CHECKING:
    from luthier.data.conversation import Conversation
    from luthier.data.formats import Detection
    from luthier.data.tokens import Encoder

_SAMPLE = 2000  # rows looked at for lengths
_SMALL = 500_000_000  # weights under which a model wants the higher learning rate

_TEMPLATE = """\
# Written by `luthier init` from {name}: {rows} rows looked at, format "{format}".
# Every key and its default: docs/reference/recipe.md. Next: luthier data {out}

# what is learned: a change here is another experiment
model: {{base: {base}}}
adapter: {{kind: lora, rank: 16, alpha: 32, dropout: 0.0, targets: all-linear}}
data:
  train: [{{path: {train}}}]
  test: {test}
  heldout: {heldout:<27}# {heldout_for}
  format: {format}
  columns: {columns}
{instruction}  template: auto                      # the tokenizer's own chat template
  supervise: {supervise:<25}# which tokens carry loss: answers, last, all
  length: {length:<28}# longer rows are dropped and counted{length_note}
train: {{samples_per_step: 8, epochs: {epochs}, lr: {lr}, schedule: linear, warmup: 0.05, seed: 17}}
evaluate:
  metrics: {metrics}   # the first decides the verdict
  generate: {{max_new_tokens: {new_tokens}, temperature: 0}}

# how it is run: a change here leaves the loss curve where it is
run: {{dir: {folder}, save: {{every: 25, keep: 2}}}}
"""


def scaffold(
    base: str, data: Path, *, test: Path | None = None, out: str | None = None, say: Callable[[str], Any] = print
) -> Path:
    """Writes a recipe for `data` and returns its path. Never overwrites a file.

    Raises DataError where the file's format cannot be told, RecipeError where the recipe exists already.
    """
    path = Path(out or f"{_stem(data)}.yaml")
    if path.exists():
        raise RecipeError("is there already", where=str(path), fix="choose another name with --out, or delete it")
    detection, conversations = _look(data)
    if test:
        detection = _with_test(detection, test)
    say(f"{data}: {shape(detection.format, detection.columns)}")
    lengths = _lengths(base, conversations, detection, say)
    fields = _fields(base, data, test, path, detection, conversations, lengths)
    text = _TEMPLATE.format(**fields)
    Recipe.parse(text, name=str(path))
    _write_new(path, text)
    return path


def _write_new(path: Path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        fix = "choose another place with --out"
        raise RecipeError(f"cannot be written ({error.strerror})", where=str(path), fix=fix) from error


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or "recipe"


def _look(data: Path) -> tuple[Detection, list[Conversation]]:
    """The format of a file and its first rows; rows that cannot be read are left for `luthier data` to report."""
    from luthier.data.formats import converter, detect
    from luthier.data.sources import read

    rows = list(islice(read(Source(path=str(data))), _SAMPLE))
    detection = detect(rows)
    convert = converter(Data(train=[Source(path=str(data))]), detection)
    conversations = []
    for row in rows:
        try:
            conversations.append(convert(row))
        except DataError:
            continue
    if not conversations:
        convert(rows[0])  # raises, naming line and field
    return detection, conversations


def _with_test(detection: Detection, test: Path) -> Detection:
    """The detection with the columns that only the test file has, such as several reference summaries.

    Raises DataError if the test file cannot be read or has another shape than the training file.
    """
    from luthier.data.formats import detect
    from luthier.data.sources import read

    found = detect(list(islice(read(Source(path=str(test))), 50)))
    if found.format != detection.format:
        raise DataError(
            f"looks like '{found.format}' but the training file like '{detection.format}'",
            where=str(test),
            fix="give both files one shape, or write data.format and data.columns by hand",
        )
    parts = {*detection.columns, *found.columns}
    columns = {part: _either(detection.columns.get(part), found.columns.get(part)) for part in sorted(parts)}
    return replace(detection, columns=columns)


def _either(first: str | list[str] | None, second: str | list[str] | None) -> str | list[str]:
    """One column map for both files: the columns of the first, then those that only the second has."""
    names = [name for part in (first, second) if part for name in ([part] if isinstance(part, str) else part)]
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else unique


def _lengths(
    base: str, conversations: Sequence[Conversation], detection: Detection, say: Callable[[str], Any]
) -> tuple[int, int] | None:
    """(tokens of the longest row, tokens that 99 % of the answers keep to), or None without a tokenizer in reach.

    One long answer does not make every answer slow: generation is paid for by the token.
    """
    from luthier.data.templates import load_template
    from luthier.data.tokens import Encoder
    from luthier.errors import LuthierError
    from luthier.model.load import load_tokenizer, model_folder

    try:
        tokenizer = load_tokenizer(model_folder(Model(base=base), say))
    except LuthierError as error:
        say(f"lengths not measured: {error}")
        return None
    supervise = "all" if detection.format == "document" else "answers"
    encoder: Encoder = Encoder(tokenizer, load_template("auto", tokenizer), supervise, None)
    examples = encoder.examples(conversations)
    answers = sorted(len(e.ids) - e.prompt for e in examples)
    return max(len(e.ids) for e in examples), answers[math.ceil(0.99 * len(answers)) - 1]


def _fields(
    base: str,
    data: Path,
    test: Path | None,
    out: Path,
    detection: Detection,
    conversations: Sequence[Conversation],
    lengths: tuple[int, int] | None,
) -> dict[str, Any]:
    longest, answer = lengths or (1024, 256)
    small = base == "smollm2-135m"
    documents = detection.format == "document"
    instruction = _instruction(detection)
    return {
        "name": data.name,
        "rows": len(conversations),
        "out": shlex.quote(str(out)),
        "base": _scalar(base),
        "train": _relative(data, out),
        "test": f"[{{path: {_relative(test, out)}}}]"
        if test
        else "[]                            # a file to compare on",
        "heldout": "{fraction: 0.05}" if test else f"{{rows: {_enough(len(conversations))}}}",
        "heldout_for": "of the training rows, for the loss curve" if test else _set_aside(len(conversations)),
        "format": detection.format,
        "columns": _inline(detection.columns),
        "instruction": f"  instruction: {instruction}\n" if instruction else "",
        "supervise": "all" if documents else "answers",
        "length": min(2048, -(-longest * 9 // 8 // 32) * 32),
        "length_note": f"; the longest seen has {longest}" if lengths else "; not measured yet",
        "epochs": 3 if len(conversations) < 200 else 2 if len(conversations) < 1000 else 1,
        "lr": "1.0e-3" if small else "2.0e-4",
        "metrics": _metrics(detection, documents),
        "new_tokens": max(8, min(512, -(-answer * 5 // 4 // 8) * 8)),
        "folder": _scalar(f"runs/{_stem(out)}"),
    }


def _enough(rows: int) -> int:
    """Rows to set aside where nothing else is there to compare on: a verdict wants 30 or more, learning the rest."""
    return min(100, max(rows // 4, min(1, rows - 1)))


def _set_aside(rows: int) -> str:
    if rows < 2:
        return "of one row none can be set aside; a test file is wanted to compare on"
    few = "; too few to tell small differences" if _enough(rows) < 30 else ""
    return f"set aside, for the loss curve and to compare on: there is no test file{few}"


def _metrics(detection: Detection, documents: bool) -> str:
    if documents:
        return "[perplexity]"
    if detection.format in ("multiple-choice", "listed-choices"):
        return "[accuracy, perplexity]"
    return "[rougeL, rouge1, rouge2, rougeLsum, exact_match, perplexity]"


def _instruction(detection: Detection) -> str | None:
    """A sentence to put before each document, where the format has none of its own."""
    if detection.format != "summary":
        return None
    column = str(detection.columns.get("document", "text"))
    what = {"dialogue": "conversation", "dialog": "conversation", "article": "article"}.get(column.lower(), "text")
    return f"Summarize the following {what}."


def _relative(path: Path, out: Path) -> str:
    """A data path as the recipe should have it: relative to the recipe's folder where that is no detour."""
    relative = os.path.relpath(path.resolve(), out.resolve().parent)
    return _inline(str(path.resolve()) if relative.startswith("../..") else relative)


def _scalar(text: str) -> str:
    """A string as YAML: as it is where that reads back the same, else quoted."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else _inline(text)


def _inline(value: Any) -> str:
    """A value as one line of YAML. JSON is YAML, and quotes whatever needs it."""
    import json

    return json.dumps(value, ensure_ascii=False)
