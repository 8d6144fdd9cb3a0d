"""Questions that were given away: training rows with the same text or nearly, which were trained on all the same.

`luthier data` looks for them and drops such rows; `data.leaks: keep` lets them in. A score on questions that were
learned by heart says little, so it is given without them too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.data.conversation import Conversation
from luthier.data.store import TokenStore
from luthier.evaluate.comparison import Comparison, Scored, Scores
from luthier.evaluate.statistics.paired import Paired, explain
from luthier.runs import Run


@dataclass(frozen=True)
class Contamination:
    """What the training rows give away.

    Attributes:
        rows: places of the questions in question, `total` how many were asked.
        exact: how many of them are there word for word; the others nearly.
        without: by name of the deciding metric, its score on the other questions; empty where there are none.
        said: that score as a sentence.
    """

    rows: tuple[int, ...]
    total: int
    exact: int
    without: dict[str, Paired]
    said: str

    def as_dict(self) -> dict[str, Any]:
        without = {name: paired.as_dict() for name, paired in self.without.items()}
        return {"questions": len(self.rows), "exact": self.exact, "rows": list(self.rows), "without": without}

    @property
    def warning(self) -> str:
        count, near = len(self.rows), len(self.rows) - self.exact
        nearly = f", {near} of them nearly" if near else ""
        what = f"{count} of {self.total} questions ({count / self.total:.0%}) are in the training data{nearly}"
        return f"{what} (data.leaks: keep); {self.said}"


def with_contamination(
    found: Comparison,
    scored: Scored,
    questions: Sequence[Conversation],
    runs: Sequence[Run],
    base: int = 0,
    tuned: int = 1,
) -> Comparison:
    """With a warning where rows that one of the `runs` was trained on give questions away."""
    kinds = {origin: kind for run in runs for origin, kind in given_away(run).items()}
    rows = tuple(i for i, question in enumerate(questions) if str(question.origin) in kinds)
    if not rows:
        return found
    scores = _without(scored.table[scored.first], rows)
    without = {scored.first: scores.best(base, tuned)} if scores.rows else {}
    exact = sum(kinds[str(questions[i].origin)] != "near" for i in rows)
    said = "no other question is left to compare on"
    if without:
        said = f"without them {explain(scores.metric, without[scored.first])}"
    told = Contamination(rows, len(questions), exact, without, said)
    return replace(found, contamination=told, warnings=[told.warning, *found.warnings])


def given_away(run: Run) -> dict[str, str]:
    """The test rows (file:line) that rows which `run` learned from give away, and how: `prompt`, `text` or `near`, an
    exact one rather than a near one."""
    leaks = _leaks(run.data / "leaks.jsonl") if run.recipe.data.leaks == "keep" else []
    if not leaks:
        return {}
    store = TokenStore.open(run.data / "train")
    learned = {str(store.origin(row)) for row in range(len(store))}
    kept = [leak for leak in leaks if f"{leak['file']}:{leak['line']}" in learned]
    return {leak["of"]: leak["kind"] for leak in sorted(kept, key=lambda leak: leak["kind"] != "near")}


def _leaks(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _without(scores: Scores, rows: Sequence[int]) -> Scores:
    """The scores of the other questions."""
    kept = [place for place, row in enumerate(scores.rows) if row not in set(rows)]
    sides = [[side[place] for place in kept] for side in scores.sides]
    return replace(scores, rows=[scores.rows[place] for place in kept], sides=sides)
