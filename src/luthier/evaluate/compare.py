"""Base against tuned: same questions, same decoding, one load of the base, and a verdict with an interval."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.evaluate.answers import Memo, answers, likelihoods, sampling_of
from luthier.evaluate.comparison import Comparison, judge
from luthier.evaluate.metrics import METRICS, Answer
from luthier.evaluate.paired import LEVEL, RESAMPLES
from luthier.evaluate.report import write_report
from luthier.evaluate.subject import Side, Subject
from luthier.evaluate.suite import Suite, digest, suite
from luthier.evaluate.terminal import progress, render
from luthier.runs import Run, versions, write_atomic, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.model.generate import Sampling

__all__ = ["Comparison", "compare", "render"]


def compare(run: Run, *, name: str = "compare", console: Console | None = None) -> Comparison:
    """Compares `run` with its base on its questions, keeps everything in results/`name`, and writes report.html.

    Answers are kept as they come (answers.jsonl): stopped anywhere, the same command goes on, and answers that were
    made under the same settings are not made again. Raises RunError for a run without questions or without an adapter.
    """
    asked, folder, started = suite(run), run.results / name, time.monotonic()
    metrics = run.recipe.evaluate.metrics
    needs = {METRICS.get(metric).needs for metric in metrics}  # an unknown name is told before anything is loaded
    with progress(console) as bar:
        subject = bar.wait("loading the model", lambda: Subject.open(run))
        memo, sampling = Memo(folder / "answers.jsonl"), sampling_of(run)

        def answered_by(side: Side) -> list[Answer]:
            given = [Answer() for _ in asked.questions]
            if "text" in needs:
                advance = bar.advance(f"{side} answers", len(given))
                given = answers(subject, side, asked.questions, sampling, memo, advance)
            if "nll" in needs:
                advance = bar.advance(f"{side} likelihoods", len(given))
                given = likelihoods(subject, side, asked.questions, given, memo, advance)
            return given

        base, tuned = answered_by("base"), answered_by("tuned")
        found = bar.wait("scoring", lambda: judge(asked.questions, base, tuned, metrics))
    found = replace(found, settings=_settings(run, asked, subject, sampling, time.monotonic() - started))
    if asked.source == "held-out":
        found.warnings.append("there is no test set: these are the held-out rows of the training file")
    _keep(found, folder)
    write_report(run, name)
    return found


def _settings(run: Run, asked: Suite, subject: Subject, sampling: Sampling, seconds: float) -> dict[str, Any]:
    """What was compared and how: enough to do it again and to see what differed."""
    return {
        **subject.facts,
        "source": asked.source,
        "questions": asked.digest,
        "decoding": asdict(sampling),
        "template": digest(subject.encoder.template.spec()),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "run": str(run.folder),
    }


def _keep(found: Comparison, folder: Path) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    write_atomic(folder / "rows.jsonl", "".join(lines))
    write_json(folder / "comparison.json", found.as_dict())
