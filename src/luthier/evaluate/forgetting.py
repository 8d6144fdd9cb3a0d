"""What a model could do before and may have lost: general text and general questions that ship with luthier, the same
for every run, so that learning a task is not bought unseen with everything else.

Text is judged by perplexity, questions by the likelihood of their choices, as text after the template's prompt: nothing
is generated, so the leg costs little beside the comparison that it is a part of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from luthier.data.conversation import Conversation, Example, Message, Origin
from luthier.evaluate.answers import Memo, Task, choices_of, choosing, collect, likelihoods
from luthier.evaluate.comparison import Scores
from luthier.evaluate.metrics import Answer, Metric
from luthier.evaluate.metrics.choice import ACCURACY_LIKELIHOOD
from luthier.evaluate.metrics.text import PERPLEXITY
from luthier.evaluate.paired import Paired, figure, signed

if TYPE_CHECKING:
    from luthier.data.tokens import Encoder
    from luthier.evaluate.subject import Side, Subject

GENERAL: dict[str, Metric] = {"perplexity": PERPLEXITY, "accuracy": ACCURACY_LIKELIHOOD}
_NAMES = {"perplexity": "general text: perplexity", "accuracy": "general questions: accuracy"}


@dataclass(frozen=True)
class Forgetting:
    """What became of general abilities: `found` holds `perplexity` and `accuracy`, base against tuned."""

    found: dict[str, Paired]

    def as_dict(self) -> dict[str, Any]:
        return {name: {**paired.as_dict(), "title": _NAMES[name]} for name, paired in self.found.items()}

    @property
    def lines(self) -> list[str]:
        """A line each: `general text: perplexity 21.3 → 21.9 (+0.6, 95 % interval +0.3 to +0.9): worse by 2.8 %`."""
        return [_line(name, paired) for name, paired in self.found.items()]

    @property
    def warnings(self) -> list[str]:
        """One where it is evident that something was lost."""
        lost = [_line(name, paired) for name, paired in self.found.items() if paired.verdict == "worse"]
        fix = "fewer steps, a lower train.lr or some general rows in data.train lose less"
        return [f"the model has forgotten: {'; '.join(lost)}; {fix}"] if lost else []


def general_tasks(subject: Subject, side: Side, start: int) -> list[Task]:
    """What has to be known of the general passages and questions on a side; they are numbered from `start`."""
    passages = dict(enumerate(_examples(subject.encoder), start))
    choices = choices_of(subject, questions(), labels="text")
    after = start + len(passages)
    return likelihoods(subject, side, passages) + choosing(subject, side, {after + i: c for i, c in choices.items()})


def general_answers(tasks: Sequence[Task], memo: Memo, start: int, side: Side) -> list[Answer]:
    """A side's answers, those to passages first; `tasks` may hold others too, of questions before `start`."""
    mine = [replace(task, question=task.question - start) for task in tasks if task.question >= start]
    return collect(mine, memo, len(_general()), side)


def contrast(base: Sequence[Answer], tuned: Sequence[Answer]) -> Forgetting:
    """Two sides' general answers against each other."""
    scored = {name: Scores.of(metric, _general(), [base, tuned]) for name, metric in GENERAL.items()}
    return Forgetting({name: scores.best() for name, scores in scored.items()})


@cache
def passages() -> tuple[Conversation, ...]:
    """Texts of many kinds, each a document."""
    return tuple(Conversation((Message("document", values["text"]),), origin) for values, origin in _rows("passages"))


@cache
def questions() -> tuple[Conversation, ...]:
    """Easy questions of which everybody knows the answer."""
    return tuple(
        Conversation(
            (Message("user", values["question"]),),
            origin,
            references=(values["choices"][values["answer"]],),
            choices=tuple(values["choices"]),
            answer=values["answer"],
        )
        for values, origin in _rows("questions")
    )


def _general() -> tuple[Conversation, ...]:
    return passages() + questions()


def _rows(name: str) -> list[tuple[dict[str, Any], Origin]]:
    text = (files("luthier.evaluate") / "general" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [(json.loads(line), Origin(f"general/{name}.jsonl", i)) for i, line in enumerate(text.splitlines(), 1)]


def _examples(encoder: Encoder) -> list[Example]:
    """The passages as tokens, each to be foretold; but no control token, since whether a model ends a text here says
    nothing of how it reads."""
    from luthier.data.tokens import Encoder

    control = frozenset(encoder.tokenizer.control.values())
    plain = Encoder(encoder.tokenizer, encoder.template, "all").examples(passages())
    return [replace(example, supervised=[int(i not in control) for i in example.ids]) for example in plain]


def _line(name: str, paired: Paired) -> str:
    interval = f"{signed(paired.difference)}, 95 % interval {signed(paired.low)} to {signed(paired.high)}"
    said = {"worse": "worse", "better": "better"}.get(paired.verdict, "no evidence of a change")
    if name == "perplexity" and paired.verdict != "no evidence":
        said += f" by {figure(100.0 * abs(paired.difference) / paired.base)} %"
    return f"{_NAMES[name]} {figure(paired.base)} → {figure(paired.tuned)} ({interval}): {said}"
