"""Test questions that stand in the training data are told in the comparison, with the score without them."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from statistics import fmean

import pytest

import tiny
from luthier.evaluate.compare import compare
from luthier.evaluate.contamination import given_away
from luthier.runs import Run
from luthier.train.launch import train

QUESTIONS = [
    "what is 1 plus 2 more more",
    "what is 3 plus 1",
    "what is 0 plus 4 more",
    "what is 2 plus 2 more more more",
]
NEAR = (
    "what is one plus one plus two plus more plus two plus one more plus 6 more plus one plus 7 plus 8 plus 9 plus 10"
)


def trained(folder: Path, *overrides: str) -> Run:
    """A run whose 24 training rows give two or three of seven questions away."""
    tiny.sums(folder / "sums.jsonl")
    learned = [json.loads(line)["prompt"] for line in (folder / "sums.jsonl").read_text().splitlines()]
    asked = [*QUESTIONS, learned[3], learned[5], f"{NEAR} plus"]
    rows = [{"prompt": question, "completion": "3"} for question in asked]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "sums.jsonl").open("a") as more:
        more.write(json.dumps({"prompt": NEAR, "completion": "4"}) + "\n")
    tiny.base(folder / "base")
    run = tiny.run(folder, "data.test=[{path: test.jsonl}]", "data.heldout.rows=0", "train.epochs=1", *overrides)
    train(run)
    return run


def test_what_was_kept_is_told_with_the_score_without_it(tmp_path: Path) -> None:
    run = trained(tmp_path, "data.leaks=keep", "evaluate.metrics=[perplexity]")
    given = given_away(run)
    assert {key.rpartition("/")[2]: kind != "near" for key, kind in given.items()}.items() >= {
        "test.jsonl:5": True,
        "test.jsonl:6": True,
        "test.jsonl:7": False,
    }.items()
    found = compare(run)
    told = found.as_dict()["contamination"]
    assert (told["questions"], told["exact"]) == (len(given), sum(kind != "near" for kind in given.values()))
    assert set(told["rows"]) >= {4, 5, 6}
    clean = [row for i, row in enumerate(found.rows) if i not in told["rows"]]
    wanted = exp(fmean(log(row["scores"]["perplexity"]["tuned"]) for row in clean))  # of answers of one length
    assert told["without"]["perplexity"]["tuned"] == pytest.approx(wanted, rel=1e-5)
    assert found.metrics["perplexity"].tuned != pytest.approx(wanted, rel=1e-3)
    assert found.warnings[0].startswith(f"{len(given)} of 7 questions (")
    near = f"{len(given) - told['exact']} of them nearly"
    assert f"are in the training data, {near} (data.leaks: keep); without them " in found.warnings[0]


def test_what_was_dropped_is_no_contamination(tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert (run.data / "leaks.jsonl").read_text()
    assert compare(run).as_dict()["contamination"] == {}


def test_where_every_question_is_given_away_nothing_is_left_to_say(tmp_path: Path) -> None:
    run = tiny.run(tmp_path, "data.test=[{path: sums.jsonl}]", "data.leaks=keep", "data.heldout.rows=0")
    train(run)
    found = compare(run)
    assert found.as_dict()["contamination"]["without"] == {}
    assert "no other question is left to compare on" in found.warnings[0]
