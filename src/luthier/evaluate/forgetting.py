"""What a model could do before and may have lost: general text and general questions that ship with luthier, the same
for every run, so that learning a task is not bought unseen with everything else.

Text is judged by perplexity, questions by the likelihood of their choices, as text after the template's prompt. Nothing
is generated; on a CPU the first few of each are asked, so that they cost a small part of a comparison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from luthier.data.conversation import Conversation, Example, Message, Origin
from luthier.evaluate.asking.answers import Memo, Task, Text, choices_of, choosing, collect, likelihoods, located
from luthier.evaluate.comparison import Scores
from luthier.evaluate.metrics import Answer, Metric
from luthier.evaluate.metrics.choice import ACCURACY_LIKELIHOOD
from luthier.evaluate.metrics.text import PERPLEXITY
from luthier.evaluate.statistics.paired import Paired, figure, signed

if TYPE_CHECKING:
    from luthier.data.tokens import Encoder
    from luthier.evaluate.asking.subject import Side, Subject

GENERAL: dict[str, Metric] = {"perplexity": PERPLEXITY, "accuracy": ACCURACY_LIKELIHOOD}
FEW_PASSAGES, FEW_QUESTIONS = 12, 40
"""As many as cost about a sixth of the demonstration's comparison (docs/log.md)."""
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


def general(place: str) -> tuple[Conversation, ...]:
    """The general passages, then the questions, that a model which computes in `place` is asked."""
    few = place == "cpu"
    return _passages()[: FEW_PASSAGES if few else None] + _questions()[: FEW_QUESTIONS if few else None]


def general_tasks(subject: Subject, side: Side, start: int) -> list[Task]:
    """What has to be known of the general passages and questions on a side; they are numbered from `start`."""
    asked = general(subject.place)
    texts = [conversation for conversation in asked if _is_text(conversation)]
    examples = dict(enumerate(map(Text.of, _examples(subject.encoder, texts)), start))
    choices = {start + i: found for i, found in choices_of(subject, asked, labels="text").items()}
    tasks = likelihoods(subject, side, examples) + choosing(subject, side, choices)
    return located(tasks, [conversation.origin for conversation in asked], start)


def general_answers(subject: Subject, side: Side, tasks: Sequence[Task], memo: Memo, start: int) -> list[Answer]:
    """A side's answers to `general`; `tasks` may hold others too, of questions before `start`."""
    mine = [replace(task, question=task.question - start) for task in tasks if task.question >= start]
    return collect(mine, memo, len(general(subject.place)), side)


def forgetting(place: str, base: Sequence[Answer], tuned: Sequence[Answer]) -> Forgetting:
    """Two sides' answers to `general(place)` against each other; by accuracy alone where they cut text into tokens
    differently, since perplexity counts by token."""
    alike = all(b.targets == t.targets for b, t in zip(base, tuned, strict=True))
    metrics = {name: metric for name, metric in GENERAL.items() if alike or metric.needs != "nll"}
    scored = {name: Scores.of(metric, general(place), [base, tuned]) for name, metric in metrics.items()}
    return Forgetting({name: scores.best() for name, scores in scored.items()})


@cache
def _passages() -> tuple[Conversation, ...]:
    return tuple(Conversation((Message("document", values["text"]),), origin) for values, origin in _rows("passages"))


@cache
def _questions() -> tuple[Conversation, ...]:
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


def _is_text(conversation: Conversation) -> bool:
    return conversation.messages[0].role == "document"


def _rows(name: str) -> list[tuple[dict[str, Any], Origin]]:
    text = (files("luthier.evaluate") / "general" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [(json.loads(line), Origin(f"general/{name}.jsonl", i)) for i, line in enumerate(text.splitlines(), 1)]


def _examples(encoder: Encoder, texts: Sequence[Conversation]) -> list[Example]:
    """The texts as tokens, each to be foretold; but no control token, since whether a model ends a text here says
    nothing of how it reads."""
    from luthier.data.tokens import Encoder

    control = frozenset(encoder.tokenizer.control.values())
    plain = Encoder(encoder.tokenizer, encoder.template, "all").examples(texts)
    return [replace(example, supervised=[int(i not in control) for i in example.ids]) for example in plain]


def _line(name: str, paired: Paired) -> str:
    interval = f"{signed(paired.difference)}, 95 % interval {signed(paired.low)} to {signed(paired.high)}"
    said = {"worse": "worse", "better": "better"}.get(paired.verdict, "no evidence of a change")
    if name == "perplexity" and paired.verdict != "no evidence":
        said += f" by {figure(100.0 * abs(paired.difference) / paired.base)} %"
    return f"{_NAMES[name]} {figure(paired.base)} → {figure(paired.tuned)} ({interval}): {said}"
