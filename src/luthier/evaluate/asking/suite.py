"""The questions of a comparison: a run's test rows, or its held-out rows where it has no test set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from typing import Any, Literal

from luthier.data.conversation import Conversation, Message, Origin
from luthier.data.prepare import heldout_conversations, test_conversations, with_columns
from luthier.data.sources import read
from luthier.errors import DataError, RunError
from luthier.recipe import Source
from luthier.runs import Run, read_json


@dataclass(frozen=True)
class Suite:
    """Questions in a fixed order. `source` is where they come from; `heldout` rows chose nothing but were watched."""

    questions: list[Conversation]
    source: Literal["test", "held-out"]

    @property
    def digest(self) -> str:
        """SHA-256 of the questions, references included; columns that they are sliced by are no part of them."""
        found = hashlib.sha256()
        for before, question in zip(chain("[", repeat(", ")), self.questions, strict=False):  # a list's JSON, in parts
            found.update((before + _json(asdict(replace(question, meta={})))).encode())
        found.update(b"]" if self.questions else b"[]")
        return found.hexdigest()


def suite(run: Run) -> Suite:
    """The questions of `run`, the first `evaluate.rows` of them. Raises RunError where it has none."""
    if not (run.data / "test.jsonl").exists():
        raise RunError("holds no prepared data", where=str(run.folder), fix=f"run luthier data {run.folder} first")
    rows: int | None = run.recipe.evaluate.rows
    if test := test_conversations(run.data):
        return Suite(_with_columns(run, test[:rows], run.recipe.data.test), "test")
    if heldout := heldout_conversations(run.data):
        return Suite(_with_columns(run, heldout[:rows], run.recipe.data.train), "held-out")
    fix = "name test rows in data.test, or set some aside with data.heldout.fraction=0.1, and train"
    raise RunError("has neither test rows nor held-out rows to compare on", where=str(run.folder), fix=fix)


def _with_columns(run: Run, questions: list[Conversation], sources: Sequence[Source]) -> list[Conversation]:
    """The questions with the columns that they are sliced by. Those that were named after the data was prepared are
    read from its files, as long as these are what they were."""
    names, there = run.recipe.evaluate.slices, {name for q in questions for name in q.meta.get("columns", {})}
    if there.issuperset(names):
        return questions
    known = {file["path"]: file["sha256"] for file in read_json(run.data / "report.json")["files"]}
    values: dict[Origin, dict[str, Any]] = {}
    for source in sources:
        seen = hashlib.sha256()
        try:
            rows = {row.origin: row.values for row in read(source, root=run.root, digest=seen, bad=lambda *_: None)}
        except DataError:
            continue  # it is gone; the comparison says which columns have no values
        values |= rows if seen.hexdigest() == known.get(source.path) else {}
    return [with_columns(question, values.get(question.origin, {}), names) for question in questions]


def answered(question: Conversation) -> Conversation | None:
    """The question with its first reference as the answer, whose likelihood perplexity asks for; None without one."""
    if question.messages and question.messages[-1].role in ("assistant", "document", "rendered"):
        return question
    if not question.references:
        return None
    return replace(question, messages=(*question.messages, Message("assistant", question.references[0])))


def answerable(question: Conversation) -> bool:
    """Whether it ends in a turn that a model can answer."""
    return bool(question.prompt) and question.prompt[-1].role in ("user", "tool")


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, in hexadecimal."""
    return hashlib.sha256(_json(value).encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
