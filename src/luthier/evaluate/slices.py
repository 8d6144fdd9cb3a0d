"""Where the gain is: the same comparison for parts of the questions, by the length of the prompt and by columns of the
data. Exploratory: the parts of one way to slice are judged as one family."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import quantiles

from luthier.data.conversation import Conversation
from luthier.evaluate.comparison import Comparison, Scored, Scores
from luthier.evaluate.metrics import words
from luthier.evaluate.statistics.correction import together
from luthier.evaluate.statistics.paired import LEAST, Paired, paired

Sliced = dict[str, dict[str, dict[str, Paired]]]
"""By name of the slicing, value and metric."""

LENGTH = "prompt length"
OTHER = "other"
BINS = 4
ENOUGH = 3 * LEAST
"""Questions that a bin of lengths should have."""


def cut(
    found: Comparison,
    scored: Scored,
    questions: Sequence[Conversation],
    columns: Sequence[str],
    pair: tuple[int, int] = (0, 1),
) -> Comparison:
    """The comparison of a pair of sides with its slices, in its rows too; a column without values is warned of."""
    by = values(questions, columns)
    for place, row in enumerate(found.rows):
        row["slices"] = {name: of[place] for name, of in by.items()}
    if absent := missing(questions, columns):
        fix = "they must be columns of the test file, named before the data was prepared (luthier data)"
        found.warnings.append(f"no question has {', '.join(absent)} of evaluate.slices: {fix}")
    names = [name for name in dict.fromkeys([found.first, "perplexity"]) if name in scored.table]
    return replace(found, slices=sliced(by, {name: scored.table[name].of_pair(*pair) for name in names}, names))


def values(questions: Sequence[Conversation], columns: Sequence[str] = ()) -> dict[str, list[str]]:
    """By name of the slicing, each question's value. What fewer than LEAST questions share is `other`; a slicing that
    does not tell questions apart is left out."""
    found = {LENGTH: _lengths([sum(words(m.content) for m in question.prompt) for question in questions])}
    found |= {name: [str(_columns(question).get(name, "")) or "none" for question in questions] for name in columns}
    pooled = {name: _pooled(of) for name, of in found.items()}
    return {name: of for name, of in pooled.items() if len(set(of)) > 1}


def missing(questions: Sequence[Conversation], columns: Sequence[str]) -> list[str]:
    """The columns that no question has a value of."""
    return [name for name in columns if not any(name in _columns(question) for question in questions)]


def sliced(by: Mapping[str, Sequence[str]], table: Mapping[str, Scores], names: Sequence[str]) -> Sliced:
    """The metrics `names` of two sides for each value of each slicing, in the order of their values."""
    return {slicing: _sliced(of, {name: table[name] for name in names}) for slicing, of in by.items()}


def apart(found: Sliced, whole: Paired, metric: str) -> list[tuple[str, str]]:
    """Slices whose interval does not hold the difference of all questions together."""
    return [
        (slicing, value)
        for slicing, of in found.items()
        for value, metrics in of.items()
        if metric in metrics and not metrics[metric].low <= whole.difference <= metrics[metric].high
    ]


def _columns(question: Conversation) -> Mapping[str, object]:
    columns: Mapping[str, object] = question.meta.get("columns", {})
    return columns


def _sliced(of: Sequence[str], table: Mapping[str, Scores]) -> dict[str, dict[str, Paired]]:
    found: dict[str, dict[str, Paired]] = {value: {} for value in _ordered(of)}
    for name, scores in table.items():
        parts = {value: [place for place, row in enumerate(scores.rows) if of[row] == value] for value in found}
        parts = {value: places for value, places in parts.items() if len(places) >= LEAST}
        base, tuned = scores.statistics(0), scores.statistics(1)
        each = [paired(scores.metric, [base[i] for i in p], [tuned[i] for i in p]) for p in parts.values()]
        for value, one in zip(parts, together(each), strict=True):
            found[value][name] = one
    return {value: metrics for value, metrics in found.items() if metrics}


def _ordered(of: Sequence[str]) -> list[str]:
    """Bins of numbers by their number, others by how many questions they have; `other` last."""
    counts = Counter(of)
    return sorted(counts, key=lambda value: (value == OTHER, _number(value), -counts[value], value))


def _number(value: str) -> int:
    """Where a bin of lengths begins; 0 for other values."""
    first = value.split(" ")[0].partition("-")[0]
    return int(first) if value.endswith(" words") and first.isdigit() else 0


def _lengths(counts: Sequence[int]) -> list[str]:
    """Each count's bin, of bins with about as many questions each: `12-40 words`."""
    bins = min(BINS, len(counts) // ENOUGH)
    if bins < 2:
        return [f"{min(counts, default=0)}-{max(counts, default=0)} words"] * len(counts)
    cuts = sorted(set(quantiles(counts, n=bins, method="inclusive")))
    placed = [bisect_left(cuts, count) for count in counts]
    ends = {place: [count for count, at in zip(counts, placed, strict=True) if at == place] for place in set(placed)}
    return [f"{min(ends[place])}-{max(ends[place])} words" for place in placed]


def _pooled(of: Sequence[str]) -> list[str]:
    counts = Counter(of)
    return [value if counts[value] >= LEAST else OTHER for value in of]
