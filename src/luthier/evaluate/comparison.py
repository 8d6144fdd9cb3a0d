"""What two sides' answers say: scores, paired intervals, the gain that is not length, and a verdict. Values in, values
out: no model, no file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.data.conversation import Conversation
from luthier.errors import RecipeError
from luthier.evaluate.metrics import METRICS, Answer, Metric, Statistics, resolved, words
from luthier.evaluate.statistics.paired import FEW, LEAST, Paired, Verdict, explain, figure, limits, paired

if TYPE_CHECKING:
    from luthier.evaluate.contamination import Contamination
    from luthier.evaluate.forgetting import Forgetting
    from luthier.evaluate.ranking import Decision
    from luthier.recipe import MetricEntry


@dataclass(frozen=True)
class Comparison:
    """What a comparison found. `as_dict()` is what `compare --json` prints and `comparison.json` holds.

    Attributes:
        first: name of the metric that decides.
        known: the metrics themselves, by name.
        metrics: by name, with the best of several references; `means`: the same with the mean over references (only
            metrics and questions that have several).
        matched: the deciding ROUGE with both answers cut, question by question, to the shorter one's word count.
        rows: one record per question, as in rows.jsonl.
        sides: what is known of each side, JSON values: the base, the tuned one, and others where several are compared.
        pairs: every side against every other, JSON values.
        slices: by name of the slicing, value and metric.
        decision: what is said where more than a base and its adapter are compared.
        seeds: sides that differ in their seed alone as one recipe: its spread, and pairs of recipes, JSON values.
        forgetting: what became of general text and questions; None where they were not asked.
        contamination: questions that the training rows give away; None where there are none.
    """

    first: str
    known: dict[str, Metric]
    metrics: dict[str, Paired]
    means: dict[str, Paired]
    matched: dict[str, Paired]
    lengths: dict[str, float]
    stopped: dict[str, float]
    warnings: list[str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    sides: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    slices: dict[str, dict[str, dict[str, Paired]]] = field(default_factory=dict)
    seeds: dict[str, Any] = field(default_factory=dict)
    decision: Decision | None = None
    forgetting: Forgetting | None = None
    contamination: Contamination | None = None

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict if self.decision else self.metrics[self.first].verdict

    @property
    def sentence(self) -> str:
        if self.decision:
            return self.decision.sentence
        return explain(self.known[self.first], self.metrics[self.first])

    @property
    def names(self) -> tuple[str, str]:
        """Of the two sides whose answers stand as base and tuned; of seeds of one recipe the first."""
        first, second = [unit.sides[0] for unit in self.decision.pair] if self.decision else (0, 1)
        return (self.sides[first]["name"], self.sides[second]["name"]) if self.sides else ("base", "tuned")

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "metric": self.first,
            "metrics": {name: {**p.as_dict(), **self._described(name)} for name, p in self.metrics.items()},
            "means": {name: p.as_dict() for name, p in self.means.items()},
            "matched": {name: p.as_dict() for name, p in self.matched.items()},
            "lengths": self.lengths,
            "stopped": self.stopped,
            "warnings": self.warnings,
            "settings": self.settings,
            "sides": self.sides,
            "pairs": self.pairs,
            "seeds": self.seeds,
            "winner": self.decision.winner if self.decision else None,
            "pair": list(self.names),
            "forgetting": self.forgetting.as_dict() if self.forgetting else {},
            "contamination": self.contamination.as_dict() if self.contamination else {},
            "slices": {
                slicing: {value: {name: p.as_dict() for name, p in metrics.items()} for value, metrics in of.items()}
                for slicing, of in self.slices.items()
            },
        }

    def _described(self, name: str) -> dict[str, str]:
        return {"title": self.known[name].title, "unit": self.known[name].unit}


def judge(
    questions: Sequence[Conversation], base: Sequence[Answer], tuned: Sequence[Answer], metrics: Sequence[MetricEntry]
) -> Comparison:
    """Compares given answers; questions and both sides' answers are in the same order. The first metric decides.

    Raises RecipeError where the deciding metric can score no question.
    """
    return contrast(questions, score(questions, [base, tuned], metrics))


def contrast(questions: Sequence[Conversation], scored: Scored, base: int = 0, tuned: int = 1) -> Comparison:
    """Compares two of the scored sides, given by their places."""
    first, table, sides = scored.first, scored.table, (scored.answers[base], scored.answers[tuned])
    found = {name: scores.best(base, tuned) for name, scores in table.items()}
    matched, stopped = _matched(first, table, questions, *sides), _stopped(*sides)
    warnings = [*scored.warnings, *_blind(first, questions)]
    return Comparison(
        first=first,
        known={name: scores.metric for name, scores in table.items()},
        metrics=found,
        means={name: scores.mean(base, tuned) for name, scores in table.items() if scores.several},
        matched=matched,
        lengths=_lengths(questions, *sides),
        stopped=stopped,
        warnings=[*warnings, *_warnings(found[first], table[first].metric, matched, stopped)],
        rows=_rows(questions, *sides, {name: scores.of_pair(base, tuned) for name, scores in table.items()}),
    )


@dataclass(frozen=True)
class Scored:
    """The answers of several sides to the same questions, and their scores by metric. `first` is the metric that
    decides; a metric that can score no question is left out, with a warning."""

    first: str
    answers: list[Sequence[Answer]]
    table: dict[str, Scores]
    warnings: list[str]


def score(
    questions: Sequence[Conversation], sides: Sequence[Sequence[Answer]], metrics: Sequence[MetricEntry]
) -> Scored:
    """Scores each side's answers once. Raises RecipeError where the deciding metric can score no question."""
    table = {name: Scores.of(metric, questions, sides) for name, metric in resolved(metrics).items()}
    first = next(iter(table))
    if not table[first].rows:
        raise _undecided(table[first].metric)
    warnings = [f"{name} is left out: {s.metric.lacks}" for name, s in table.items() if not s.rows]
    warnings += [_not_finite(s.metric, questions[rows[0]], len(rows)) for s in table.values() if (rows := s.not_finite)]
    table = {name: scores for name, scores in table.items() if scores.rows}
    return Scored(first, list(sides), table, warnings)


def check_decides(questions: Sequence[Conversation], entry: MetricEntry) -> None:
    """Raises RecipeError where a metric could score none of the questions, whatever the answers."""
    (metric,) = resolved([entry]).values()
    anything = Answer(
        nll=0.0,
        targets=1,
        choices=(0.0,),
        choice_tokens=(1,),
        choice_characters=(1,),
        unasked=(0.0,),
        preferences={metric.name: 50.0},
    )
    if not any(metric.score(q, replace(anything, text=next(iter(q.references), ""))) for q in questions):
        raise _undecided(metric)


def _undecided(metric: Metric) -> RecipeError:
    what = f"'{metric.name}' decides the verdict but can score no question"
    return RecipeError(what, where="evaluate.metrics", fix=metric.lacks)


def _not_finite(metric: Metric, first: Conversation, count: int) -> str:
    rows = "a row has" if count == 1 else f"{count} rows have"
    return f"{metric.title} is not judged: {rows} no finite figure, the first {first.origin}"


@dataclass(frozen=True)
class Scores:
    """One metric's scores, one per reference, for the questions (`rows`, indices) that all sides can be scored on:
    `sides[side][row]`."""

    metric: Metric
    rows: list[int]
    sides: list[list[list[Statistics]]]

    @classmethod
    def of(cls, metric: Metric, questions: Sequence[Conversation], sides: Sequence[Sequence[Answer]]) -> Scores:
        found = [[_score(metric, q, a) for q, a in zip(questions, side, strict=True)] for side in sides]
        rows = [i for i, scores in enumerate(zip(*found, strict=True)) if all(scores)]
        return cls(metric, rows, [[side[i] for i in rows] for side in found])

    @property
    def not_finite(self) -> list[int]:
        """The questions of which a side has a statistic that is no finite number."""
        sides = zip(*self.sides, strict=True)
        return [
            row
            for row, scores in zip(self.rows, sides, strict=True)
            if not all(map(isfinite, chain.from_iterable(chain.from_iterable(scores))))
        ]

    @property
    def several(self) -> bool:
        return any(len(scores) > 1 for scores in self.sides[0])

    def best(self, base: int = 0, tuned: int = 1) -> Paired:
        """By the best of several references."""
        return paired(self.metric, self.statistics(base), self.statistics(tuned))

    def mean(self, base: int = 0, tuned: int = 1) -> Paired:
        """By the mean over several references."""
        means = ([_mean(scores) for scores in self.sides[side]] for side in (base, tuned))
        return paired(self.metric, *means)

    def statistics(self, side: int) -> list[Statistics]:
        """Of the best reference, in the order of `rows`."""
        return [self.metric.best(scores) for scores in self.sides[side]]

    def of_pair(self, base: int, tuned: int) -> Scores:
        return replace(self, sides=[self.sides[base], self.sides[tuned]])


def _mean(scores: list[Statistics]) -> Statistics:
    return tuple(fmean(column) for column in zip(*scores, strict=True))


def _score(metric: Metric, question: Conversation, answer: Answer) -> list[Statistics]:
    return [] if getattr(answer, metric.needs) is None else metric.score(question, answer)


def _matched(
    first: str,
    table: dict[str, Scores],
    questions: Sequence[Conversation],
    base: Sequence[Answer],
    tuned: Sequence[Answer],
) -> dict[str, Paired]:
    """The gain that is not length: ROUGE with both answers cut to the same number of words."""
    rouge = [name for name in (first, "rougeL", *table) if name.startswith("rouge") and name in table][:1]
    cuts = [min(words(b.text or ""), words(t.text or "")) for b, t in zip(base, tuned, strict=True)]
    sides = [[Answer(first_words(a.text or "", k)) for a, k in zip(side, cuts, strict=True)] for side in (base, tuned)]
    return {name: Scores.of(table[name].metric, questions, sides).best() for name in rouge}


def first_words(text: str, count: int) -> str:
    """The text up to its `count`-th word, inner white space kept."""
    position = 0
    for _, word in zip(range(count), text.split(), strict=False):
        position = text.index(word, position) + len(word)
    return text[:position]


def _lengths(questions: Sequence[Conversation], base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, float]:
    """Mean words of an answer on each side and of a reference."""
    said = {name: [words(a.text) for a in answers] for name, answers in _spoken(base, tuned).items()}
    said["reference"] = [words(reference) for q in questions for reference in q.references]
    return {name: round(fmean(counts), 1) for name, counts in said.items() if counts}


def _stopped(base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, float]:
    """Share of answers that ended by themselves, 0..1."""
    return {name: round(fmean(a.stopped for a in said), 4) for name, said in _spoken(base, tuned).items()}


def _spoken(base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, list[_Spoken]]:
    sides = {"base": base, "tuned": tuned}
    spoken = {name: [_Spoken(a.text, a.stopped) for a in side if a.text is not None] for name, side in sides.items()}
    return {name: said for name, said in spoken.items() if said}


class _Spoken(NamedTuple):
    text: str
    stopped: bool


def _warnings(found: Paired, metric: Metric, matched: dict[str, Paired], stopped: dict[str, float]) -> list[str]:
    said = []
    if found.n < LEAST:
        said.append(f"{found.n} questions cannot carry a verdict, whatever the answers: give at least {FEW}")
    elif found.n < FEW:
        width = f"{figure(found.high - found.low)} {metric.unit}".rstrip()
        said.append(f"only {found.n} questions: the interval is {width} wide; {FEW} or more say much more")
    if limit := limits(metric, found):
        said.append(limit)
    for name, same in matched.items():
        if found.verdict == "better" and same.verdict != "better":
            title = METRICS.get(name).title
            said.append(f"with both answers cut to the same length {title} shows no gain: it may be length alone")
    cut = 1.0 - stopped.get("tuned", 1.0)
    if cut > 0.1:
        fix = "raise evaluate.generate.max_new_tokens, or train longer"
        said.append(f"{cut:.0%} of the tuned answers did not stop by themselves: {fix}")
    return said


def _blind(first: str, questions: Sequence[Conversation]) -> list[str]:
    """A warning where ROUGE cannot see the references: it counts the letters a-z and digits, and no other script."""
    references = [reference for question in questions for reference in question.references]
    unseen = [reference for reference in references if not re.search("[a-z0-9]", reference.lower())]
    if not first.startswith("rouge") or len(unseen) <= 0.1 * len(references):
        return []
    fix = "let perplexity or exact_match decide (evaluate.metrics)"
    return [f"ROUGE counts only a-z and digits, which {len(unseen)} of {len(references)} references lack: {fix}"]


def _rows(
    questions: Sequence[Conversation], base: Sequence[Answer], tuned: Sequence[Answer], table: dict[str, Scores]
) -> list[dict[str, Any]]:
    scores: list[dict[str, dict[str, float]]] = [{} for _ in questions]
    for name, column in table.items():
        for index, *pair in zip(column.rows, *map(column.statistics, (0, 1)), strict=True):
            base_figure, tuned_figure = map(column.metric.figure, pair)
            scores[index][name] = {"base": round(base_figure, 4), "tuned": round(tuned_figure, 4)}
    return [_row(*parts) for parts in zip(questions, base, tuned, scores, strict=True)]


def _row(question: Conversation, base: Answer, tuned: Answer, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "origin": str(question.origin),
        "prompt": [{"role": m.role, "content": m.content} for m in question.prompt],
        "references": list(question.references),
        "choices": list(question.choices),
        "base": base.text,
        "tuned": tuned.text,
        "scores": scores,
        "words": {
            "base": words(base.text or ""),
            "tuned": words(tuned.text or ""),
            "references": [words(reference) for reference in question.references],
        },
        "stopped": {"base": base.stopped, "tuned": tuned.stopped},
        "nll": {"base": base.nll, "tuned": tuned.nll, "targets": base.targets},
        "choices_nll": {"base": base.choices, "tuned": tuned.choices, "targets": list(base.choice_tokens)},
        "unasked_nll": {"base": base.unasked, "tuned": tuned.unasked},
    }
