"""The questions of a comparison: a run's test rows, or its held-out rows where it has no test set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from luthier.data.conversation import Conversation, Message
from luthier.data.prepare import heldout_conversations, test_conversations
from luthier.errors import RunError
from luthier.runs import Run


@dataclass(frozen=True)
class Suite:
    """Questions in a fixed order. `source` is where they come from; `heldout` rows chose nothing but were watched."""

    questions: list[Conversation]
    source: Literal["test", "held-out"]

    @property
    def digest(self) -> str:
        """SHA-256 of the questions, references included."""
        return digest([asdict(question) for question in self.questions])


def suite(run: Run) -> Suite:
    """The questions of `run`, the first `evaluate.rows` of them. Raises RunError where it has none."""
    if not (run.data / "test.jsonl").exists():
        raise RunError("holds no prepared data", where=str(run.folder), fix=f"run luthier data {run.folder} first")
    rows: int | None = run.recipe.evaluate.rows
    if test := test_conversations(run.data):
        return Suite(test[:rows], "test")
    if heldout := heldout_conversations(run.data):
        return Suite(heldout[:rows], "held-out")
    fix = "name test rows in data.test, or set some aside with data.heldout.fraction=0.1, and train"
    raise RunError("has neither test rows nor held-out rows to compare on", where=str(run.folder), fix=fix)


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
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
