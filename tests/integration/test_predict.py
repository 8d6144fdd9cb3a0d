"""`predict` on a tiny trained run: what files hold, what is told, stopping and going on, several processes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest

import tiny
from luthier.cli import main
from luthier.errors import UsageError
from luthier.evaluate import predict as predicting
from luthier.evaluate.predict import answers_file, predict
from luthier.runs import Run
from luthier.train.launch import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tiny.run(tmp_path_factory.mktemp("trained"), "train.epochs=1")
    train(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the trained run that a test may change."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def test_a_csv_holds_every_column_of_every_row_and_nested_values_as_json(run: Run, tmp_path: Path) -> None:
    rows = lines(
        tmp_path / "rows.jsonl",
        {"prompt": "what is\none", "note": 'café, "☕"'},
        {"prompt": "what is two", "tags": ["a", {"b": None}], "sure": True, "none": None, "unknown": nan},
    )
    predict(run, rows, tmp_path / "out.csv")
    first, second = read(tmp_path / "out.csv")
    assert (first["prompt"], first["row.note"], first["row.tags"]) == ("what is\none", 'café, "☕"', "")
    assert (second["row.tags"], second["row.sure"], second["row.none"]) == ('["a", {"b": null}]', "true", "")
    assert second["row.unknown"] == ""
    assert list(first)[:4] == ["line", "prompt", "prediction", "stopped"]


def test_what_is_packed_or_piped_is_answered_as_the_file_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lines(tmp_path / "rows.jsonl", {"prompt": "what is one\u2028plus"}, {"prompt": "what is two"})
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    predict(run, rows, tmp_path / "plain.jsonl")
    predict(run, tmp_path / "rows.jsonl.gz", tmp_path / "packed.jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.read_bytes())))
    predict(run, "-", tmp_path / "piped.jsonl")
    assert len({(tmp_path / f"{name}.jsonl").read_bytes() for name in ("plain", "packed", "piped")}) == 1
    assert [answers_file(name).name for name in ("data/rows.csv.gz", "-")] == ["rows.answers.jsonl", "answers.jsonl"]


def test_rows_are_read_as_in_training_whatever_columns_they_have_besides(run: Run, tmp_path: Path) -> None:
    """`a` and `b` beside a question look like choices."""
    rows = lines(tmp_path / "rows.jsonl", {"prompt": "what is one", "a": 1}, {"prompt": "what is two", "b": 2})
    assert predict(run, rows, tmp_path / "out.jsonl")["answered"] == 2


def test_a_file_without_a_row_that_can_be_answered_is_told_and_nothing_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\nnor this\n")
    (tmp_path / "empty.jsonl").write_text("")
    lines(tmp_path / "long.jsonl", {"prompt": "more " * 500})
    told = {
        "bad": "none of the 2 rows can be answered; the first: ",
        "empty": "holds no rows",
        "long": "long.jsonl:1: has 505 tokens, and the model reads 128; shorten it",
    }
    for name, what in told.items():
        assert (
            main(["predict", str(run.folder), str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / "out.csv")]) == 1
        )
        said = capsys.readouterr()
        assert what in said.err
        assert not (tmp_path / "out.csv").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_row_that_is_longer_than_the_model_reads_is_named_and_the_others_answered(run: Run, tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", {"prompt": "what is one"}, {"prompt": "more " * 500}, {"prompt": "what is"})
    found = predict(run, rows, tmp_path / "out.jsonl")
    assert (found["answered"], found["bad"]) == (2, 1)
    assert found["problems"] == [f"{rows}:2: has 505 tokens, and the model reads 128; shorten it"]
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == [1, 3]


def test_a_full_disk_is_told_by_what_it_keeps_from_being_written(run: Run, tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", *({"prompt": f"what is {n} plus 1", "more": 900 * "x"} for n in range(9)))
    with tiny.full_disk(100), pytest.raises(OSError, match="too large") as raised:
        predict(run, rows, tmp_path / "out.jsonl")
    assert raised.value.filename == str(run.results / "predict")
    assert predict(run, rows, tmp_path / "out.jsonl")["answered"] == 9
    with tiny.full_disk(5_000), pytest.raises(OSError, match="too large") as raised:
        predict(run, rows, tmp_path / "again.jsonl")
    assert raised.value.filename == str(tmp_path / "again.jsonl")
    assert not list(tmp_path.glob("*again*"))


def test_the_rows_themselves_are_never_overwritten(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lines(tmp_path / "rows.jsonl", {"prompt": "what is one"})
    before = rows.read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="holds the rows to answer; give another --out"):
        predict(run, "rows.jsonl", tmp_path / "rows.jsonl")
    assert rows.read_bytes() == before


@pytest.mark.parametrize("metrics", [["rougeL"], ["accuracy_likelihood", "accuracy_per_token", "accuracy"]])
def test_an_answer_to_multiple_choice_names_its_choice(run: Run, tmp_path: Path, metrics: list[str]) -> None:
    recipe = run.recipe.model_dump(mode="json")
    recipe["evaluate"]["metrics"], recipe["data"]["labels"] = metrics, "text"
    run = Run(run.folder, type(run.recipe).model_validate(recipe))
    choices = {"question": "what is one plus two", "choices": [str(number) for number in range(11)]}
    rows = lines(tmp_path / "rows.jsonl", choices, {**choices, "question": "what is two"})
    predict(run, rows, tmp_path / "out.jsonl")
    for row in read(tmp_path / "out.jsonl"):
        named = choices["choices"].index(row["prediction"]) if row["prediction"] in choices["choices"] else None
        assert row["choice"] == (None if named is None else "ABCDEFGHIJK"[named])
        assert row["choice_text"] == (None if named is None else row["prediction"])
        likeliest = {name for name in row if name.startswith("choice.")}
        assert likeliest == {f"choice.{name}" for name in metrics if name.startswith("accuracy_")}
        assert all(row[name] in list("ABCDEFGHIJK") for name in likeliest)
        if named is not None and likeliest:
            assert row["choice.accuracy_likelihood"] == row["choice"]  # a word is a token: the likeliest is said


def test_several_processes_answer_as_one_does(run: Run, tmp_path: Path) -> None:
    asked = [{"prompt": " ".join(["what is", str(i % 11), *["more"] * (i % 17)]), "id": i} for i in range(60)]
    rows = lines(tmp_path / "rows.jsonl", *asked)
    predict(run, rows, tmp_path / "one.jsonl")
    shutil.rmtree(run.results / "predict")
    run.update_manifest(decisions=run.manifest["decisions"] | {"processes": 2})
    predict(run, rows, tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert [row["row"]["id"] for row in read(tmp_path / "two.jsonl")] == list(range(60))


def test_killed_in_the_middle_it_goes_on_and_makes_no_answer_twice(run: Run, tmp_path: Path) -> None:
    asked = [{"prompt": " ".join(["what is", *f"{i:03d}", *["more"] * (i % 50)])} for i in range(400)]
    rows, out, kept = (
        lines(tmp_path / "rows.jsonl", *asked),
        tmp_path / "out.jsonl",
        run.results / "predict/answers.jsonl",
    )
    command = [sys.executable, "-m", "luthier.cli", "predict", str(run.folder), str(rows), "--out", str(out)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (kept.exists() and kept.stat().st_size):
            time.sleep(0.01)
        process.kill()
    before = len(kept.read_bytes().splitlines())
    assert not out.exists()
    assert 0 < before < 400
    assert predict(run, rows, out)["answered"] == 400
    assert not list(tmp_path.glob(".*.part"))
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert [row["prompt"] for row in read(out)] == [row["prompt"] for row in asked]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what a process reads")
def test_kept_answers_are_read_once_however_many_rows_are_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "CHUNK", 4)
    rows = lines(tmp_path / "rows.jsonl", *({"prompt": f"what is {n % 11} plus one"} for n in range(40)))
    predict(run, rows, tmp_path / "first.jsonl")  # what is read besides: the second time, no weights any more
    kept = run.results / "predict/answers.jsonl"
    little = bytes_read(lambda: predict(run, rows, tmp_path / "again.jsonl"))
    others = "".join(json.dumps({"key": f"{n:064x}", "text": "more " * 200}) + "\n" for n in range(4_000))
    kept.write_text(others + kept.read_text())
    much = bytes_read(lambda: predict(run, rows, tmp_path / "last.jsonl"))
    assert 0.9 * len(others) < much - little < 1.5 * len(others)
    assert read(tmp_path / "last.jsonl") == read(tmp_path / "first.jsonl")


def bytes_read(work: Callable[[], object]) -> int:
    """How many bytes this process asks the system for."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    work()
    return count() - before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_question_that_comes_again_in_a_later_part_of_the_file_is_answered_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(predicting, "CHUNK", 40)
    run.update_manifest(decisions=run.manifest["decisions"] | {"processes": processes})
    asked = [{"prompt": f"what is {n % 11} {'more ' * (n // 11 % 7)}plus one"} for n in range(120)]
    rows = lines(tmp_path / "rows.jsonl", *asked)
    assert predict(run, rows, tmp_path / "out.jsonl")["answered"] == 120
    keys = [json.loads(line)["key"] for line in (run.results / "predict/answers.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 77
    said = {row["prompt"]: row["prediction"] for row in read(tmp_path / "out.jsonl")}
    assert all(row["prediction"] == said[row["prompt"]] for row in read(tmp_path / "out.jsonl"))


def test_an_answer_torn_by_a_kill_is_made_again_and_no_other(run: Run, tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", *({"prompt": f"what is {n} plus one"} for n in range(9)))
    predict(run, rows, tmp_path / "first.jsonl")
    kept = run.results / "predict/answers.jsonl"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-20])
    predict(run, rows, tmp_path / "again.jsonl")
    assert sorted(kept.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
