"""A study of the tiny model through the real command line, with real worker processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import luthier as package
import tiny
from luthier.cli import main
from luthier.data.prepare import Prepared
from luthier.errors import RecipeError, UsageError
from luthier.evaluate.study.cells import scores_of
from luthier.evaluate.study.conduct import Wanted, _halve, _known, wanted
from luthier.machine import machine, memory_kills
from luthier.model.load import load_tokenizer, model_folder
from luthier.recipe import Recipe
from luthier.runs import Run
from luthier.train.launch import train

SIZES = ("--sizes", "0,8,16", "--seeds", "2")


def luthier(*words: str) -> tuple[int, str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def written(folder: Path) -> Path:
    """A recipe for the tiny model, with test rows of its own."""
    tiny.sums(folder / "sums.jsonl", 40)
    tiny.base(folder / "base")
    recipe = folder / "sums.yaml"
    recipe.write_text(f"""
        model: {{base: {folder / "base"}, compute: float32}}
        data: {{train: [{{path: sums.jsonl}}], test: [{{path: sums.jsonl}}], leaks: keep, heldout: {{rows: 4}},
               clean: {{duplicates: keep}}, length: 64}}
        adapter: {{rank: 4, dropout: 0.1}}
        train: {{lr: 0.01, samples_per_step: 4, epochs: 2}}
        evaluate: {{samples: 0, generate: {{max_new_tokens: 4}}, metrics: [exact_match, perplexity]}}
        run: {{memory: 4GiB, kernels: reference, threads: 1, processes: 1}}
    """)
    return recipe


class Study:
    """A finished study, and what it printed."""

    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.found = folder, json.loads(out)

    def cell(self, name: str) -> Run:
        return Run.open(self.folder / "cells" / name)

    def adapters(self) -> dict[str, bytes]:
        paths = self.folder.glob("cells/*/adapter/adapter_model.safetensors")
        return {path.parts[-3]: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def study(recipe: Path) -> Study:
    folder = recipe.parent / "first"
    code, out, err = luthier("study", str(recipe), *SIZES, "--json", f"run.dir={folder}", "run.processes=2")
    assert code == 0, err
    return Study(folder, out)


def test_json_has_a_point_for_each_size_the_base_first(study: Study) -> None:
    assert [point["size"] for point in study.found["points"]] == [0, 8, 16]
    for point in study.found["points"][1:]:
        assert len(point["seed_scores"]) == 2
        assert point["score"] == pytest.approx(sum(point["seed_scores"]) / 2)
        assert point["low"] <= point["score"] <= point["high"]
        assert point["validation_low"] <= point["validation_loss"] <= point["validation_high"]
    assert {"fit", "verdict", "sentence"} <= study.found.keys()
    assert study.found["verdict"] in ("more helps", "helps", "no evidence", "worse")


def test_a_cell_has_the_bits_of_its_recipe_trained_alone(study: Study, tmp_path: Path) -> None:
    """Both the first cell of a worker and one that came after another on the same base."""
    for name in study.adapters():
        alone = Run.create(
            Recipe.load(study.folder / "cells" / name / "recipe.yaml", f"run.dir={tmp_path / name}"),
            root=study.cell(name).root,
        )
        train(alone)
        assert (alone.adapter / "adapter_model.safetensors").read_bytes() == study.adapters()[name]


def test_cells_of_a_seed_are_nested_and_all_are_held_against_the_same_rows(study: Study) -> None:
    cells = [study.cell(name).recipe for name in ("size-00008-seed-17", "size-00008-seed-18", "size-00016-seed-17")]
    assert [cell.data.rows for cell in cells] == [8, 8, 16]
    assert [cell.train.seed for cell in cells] == [17, 18, 17]
    assert {cell.split_seed for cell in cells} == {17}


def test_the_data_is_prepared_once_and_every_cell_has_it(study: Study) -> None:
    shared = (study.folder / "data" / "train" / "ids").stat()
    for name in study.adapters():
        assert (study.cell(name).data / "train" / "ids").stat().st_ino == shared.st_ino


def test_the_base_answers_once_for_all_cells(study: Study) -> None:
    lines = [json.loads(line) for line in (study.folder / "answers.jsonl").read_text().splitlines()]
    keys = [line["key"] for line in lines]
    assert len(keys) == len(set(keys))
    answers = [line for line in lines if "text" in line]
    assert len(answers) % 5 == 0  # four cells and the base


def test_a_cell_is_a_run_with_a_report_and_can_be_compared(study: Study) -> None:
    run = study.cell("size-00016-seed-18")
    assert "exact match" in run.report.read_text()
    before = (study.folder / "answers.jsonl").stat().st_size
    code, out, err = luthier("compare", str(run.folder), "--json")
    assert code == 0, err
    assert (study.folder / "answers.jsonl").stat().st_size == before  # every answer was there
    mine = next(cell for cell in study.found["cells"] if cell["folder"] == "cells/size-00016-seed-18")
    assert json.loads(out)["metrics"]["exact_match"]["tuned"] == pytest.approx(mine["score"])
    assert study.found["points"][0]["score"] == pytest.approx(json.loads(out)["metrics"]["exact_match"]["base"])


def test_the_validation_loss_is_the_held_out_loss_of_training(study: Study) -> None:
    for point in study.found["points"][1:]:
        for seed, loss in zip(point["seeds"], point["seed_validation_losses"], strict=True):
            steps = study.cell(f"size-{point['size']:05d}-seed-{seed}").steps()
            assert loss == pytest.approx(
                [record["eval_loss"] for record in steps if "eval_loss" in record][-1], rel=1e-4
            )


def test_the_page_shows_the_curve_and_links_to_each_report(study: Study) -> None:
    page = (study.folder / "study.html").read_text()
    assert "cells/size-00008-seed-17/report.html" in page
    assert "without training" in page
    assert "<svg" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_study_that_is_done_is_left_as_it_is_and_more_seeds_and_sizes_add_cells(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(study.folder, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/adapter/*")}
    command = ["study", str(study.folder.parent / "sums.yaml"), "--json", f"run.dir={folder}", "run.processes=2"]
    code, out, err = luthier(*command, *SIZES)
    assert code == 0, err
    assert json.loads(out)["points"] == study.found["points"]
    code, out, err = luthier(*command, "--sizes", "4,16", "--seeds", "1")
    assert code == 0, err
    assert [point["seeds"] for point in json.loads(out)["points"]] == [[], [17], [17, 18], [17, 18]]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def decided(folder: Path, over: str | None = None, values: Any = (8, 16), *overrides: str) -> tuple[Any, list[str]]:
    """What study.json holds of decisions, and what was said of them, when this is studied there."""
    said: list[str] = []
    whole = Run(folder, Recipe.load(folder.parent / "sums.yaml", f"run.dir={folder}", "run.processes=2", *overrides))
    prepared = Prepared.open(whole.data, load_tokenizer(model_folder(whole.recipe.model), whole.recipe.adapter))
    return _known(whole, Wanted(over, values), prepared, machine(), said.append), said


def marked(study: Study, copy: Path, *, dtype: str = "float32", without: str = "") -> dict[str, Any]:
    """A copy of a study whose decisions can be told from new ones; made by a version that knew no setting `without`."""
    shutil.copytree(study.folder, copy)
    shutil.copy(study.folder.parent / "sums.yaml", copy.parent)
    shutil.copy(study.folder.parent / "sums.jsonl", copy.parent)
    there = json.loads((copy / "study.json").read_text())
    there["decided"]["kinds"]["sizes"]["micro_tokens"] = 77
    there["decided"]["asked"].pop(without, None)
    for manifest in copy.glob("cells/*/manifest.json"):
        values = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(values | {"decisions": {**values["decisions"], "dtype": dtype}}))
    (copy / "study.json").write_text(json.dumps(there))
    return dict(there["decided"]["kinds"])


def test_decisions_of_an_older_version_are_kept_for_the_cells_that_are_left(study: Study, tmp_path: Path) -> None:
    before = marked(study, tmp_path / "copy", without="graphs")
    found, said = decided(tmp_path / "copy")
    assert (found["kinds"], said) == (before, [])


def test_cells_of_a_study_that_is_run_otherwise_say_so_and_keep_their_dtype(study: Study, tmp_path: Path) -> None:
    marked(study, tmp_path / "copy", dtype="bfloat16")
    found, said = decided(tmp_path / "copy", None, (8, 16), "run.micro_tokens=55")
    assert (found["kinds"]["sizes"]["micro_tokens"], found["kinds"]["sizes"]["dtype"]) == (55, "bfloat16")
    assert said == [
        "the recipe's section `run` has changed: cells that have begun go on as they did, the others take it"
    ]


def test_new_values_are_decided_beside_those_that_are_known(study: Study, tmp_path: Path) -> None:
    marked(study, tmp_path / "copy")
    first, _ = decided(tmp_path / "copy", "adapter.rank", (2, 4))
    second, said = decided(tmp_path / "copy", "adapter.rank", (4, 8))
    assert list(second["kinds"]) == ["sizes", "2", "4", "8"]
    assert {**second["kinds"], "8": None} == {**first["kinds"], "8": None}
    assert (first["kinds"]["sizes"]["micro_tokens"], said) == (77, [])


def test_another_study_in_the_same_folder_is_refused_with_what_differs(study: Study, recipe: Path) -> None:
    place = f"run.dir={study.folder}"
    code, _, err = luthier("study", str(recipe), *SIZES, place, "train.lr=0.1")
    assert code == 1
    assert "holds another study (train.lr: 0.01 there, 0.1 now)" in err
    code, _, err = luthier("study", str(recipe), "--over", "adapter.rank=2,4", place)
    assert code == 1
    assert "goes over the size of the data there, adapter.rank now" in err
    code, _, err = luthier("study", str(recipe), "--sizes", "8,37", place)
    assert code == 2
    assert "--sizes asks for 37 rows, and 36 are left to learn from" in err


def test_a_study_killed_at_any_time_goes_on_where_it_was(study: Study, recipe: Path, tmp_path: Path) -> None:
    """Killed twice: all of it, in the middle of a cell; then its worker alone, which the parent notices."""
    folder = tmp_path / "killed"
    words = ["study", str(recipe), *SIZES, f"run.dir={folder}", "run.save.every=1"]
    first = subprocess.Popen([sys.executable, "-m", "luthier", *words], stdout=subprocess.PIPE, text=True)
    wait(lambda: any(folder.glob("cells/*/checkpoints/step-0000000[2-6]")))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not any(folder.glob("cells/*/results/study.json"))
    second = subprocess.Popen([sys.executable, "-m", "luthier", *words], stdout=subprocess.PIPE, text=True)
    wait(lambda: any(folder.glob("cells/*/results/study.json")))
    kills = memory_kills()
    os.kill(worker(folder), signal.SIGKILL)
    done = [path.parents[1].name for path in folder.glob("cells/*/results/study.json")]
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0
    assert "going on from step" in said
    if kills is not None and memory_kills() == kills:  # else it may have been for want of memory
        assert "a process was killed (SIGKILL), but not by the kernel for want of memory; going on as before" in said
    there = Study(folder, (folder / "findings.json").read_text())
    assert there.adapters().keys() == study.adapters().keys()
    assert all(there.adapters()[name] == study.adapters()[name] for name in done)
    assert [point["seeds"] for point in there.found["points"]] == [[], [17, 18], [17, 18]]


def test_a_study_whose_worker_is_killed_each_time_says_so_after_as_many_restarts_as_a_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = tiny.deadly(tmp_path / "deadly", "luthier.evaluate.study.cells")
    monkeypatch.setenv("PYTHONPATH", str(deadly), prepend=os.pathsep)
    code, out, err = luthier("study", str(recipe), "--sizes", "8", "--seeds", "1", f"run.dir={tmp_path / 'killed'}")
    assert code == 1
    assert re.search(r"a process was killed .*, 5 times now; .+", err)
    assert out.count("a process was killed") == 4
    assert len((deadly / "starts").read_text().splitlines()) == 5


def test_where_fewer_cells_are_left_than_there_are_workers_memory_is_not_sought_in_workers_that_are_none(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cage: Path
) -> None:
    marked(study, tmp_path / "copy")
    cell = Run.open(tmp_path / "copy" / "cells" / "size-00008-seed-17")
    scores_of(cell).unlink()
    cell.update_manifest(decisions=cell.manifest["decisions"] | {"micro_tokens": 800})
    deadly = tiny.deadly(tmp_path / "deadly", "luthier.evaluate.study.cells", cage)
    monkeypatch.setenv("PYTHONPATH", str(deadly), prepend=os.pathsep)
    place = f"run.dir={tmp_path / 'copy'}"
    code, out, err = luthier("study", str(tmp_path / "sums.yaml"), *SIZES, "run.processes=2", place)
    assert (code, "the kernel killed a process for want of memory, 5 times now" in err) == (1, True), err
    assert re.findall("going on with (.*)", out) == [f"{tokens} tokens at a time" for tokens in (400, 200, 100, 50)]


def test_only_cells_that_are_not_scored_get_half_the_tokens_and_without_one_there_is_nothing_to_halve(
    study: Study, tmp_path: Path
) -> None:
    marked(study, tmp_path / "copy")
    whole = Run(tmp_path / "copy", Recipe.load(tmp_path / "sums.yaml"))
    cells = [Run.open(path.parent) for path in sorted(whole.folder.glob("cells/*/recipe.yaml"))]
    assert _halve(cells, whole) is None  # all of them are scored, and the base is not
    scores_of(cells[1]).unlink()
    cells[1].update_manifest(decisions=cells[1].manifest["decisions"] | {"micro_tokens": 80})
    before = [cell.manifest["decisions"]["micro_tokens"] for cell in cells]
    assert _halve(cells, whole) == 40
    assert [cell.manifest["decisions"]["micro_tokens"] for cell in cells] == [before[0], 40, *before[2:]]


def wait(true: Any) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worker(folder: Path) -> int:
    """The process that holds a cell, as its lock says."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for lock in folder.glob("cells/*/.lock"):
            words = lock.read_text().split()
            if words and not (lock.parent / "results" / "study.json").exists():
                return int(words[1])
        time.sleep(0.01)
    raise AssertionError("no process took a cell")


def test_a_setting_is_studied_in_the_same_way_and_one_that_diverges_is_told(recipe: Path, tmp_path: Path) -> None:
    place = f"run.dir={tmp_path / 'rates'}"
    code, out, err = luthier(
        "study", str(recipe), "--over", "train.lr=0.01,1e30", "--seeds", "1", "--json", place, "train.max_steps=3"
    )
    assert code == 0, err
    found = json.loads(out)
    assert [point["value"] for point in found["points"]] == [0.01, 1e30]
    assert found["points"][1]["score"] is None
    assert found["points"][1]["failed"] == [17]
    assert (found["verdict"], found["winner"]) == ("no winner", None)
    assert found["base"]["score"] == pytest.approx(0.0, abs=100.0)
    assert any("diverged" in warning for warning in found["warnings"])
    assert (tmp_path / "rates" / "cells" / "lr-0.01-seed-17" / "report.html").exists()


def test_the_terminal_shows_the_sentence_a_table_and_the_curve(study: Study, recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = luthier("study", str(recipe), *SIZES, f"run.dir={study.folder}", "run.processes=2")
    assert code == 0
    assert " ".join(study.found["sentence"].split()) in " ".join(out.split())
    assert "●" in out
    assert all(len(line) <= 60 for line in out.splitlines() if not line.startswith("page: "))


@pytest.mark.parametrize(
    ("sizes", "over", "seeds", "said"),
    [
        ("1,x", None, 3, "no list of numbers"),
        ("0", None, 3, "no size to train on"),
        ("8", "adapter.rank=4,8", 3, "are two studies"),
        (None, "adapter.rank", 3, "over the size of the data, or a key of adapter or train"),
        (None, "train.seed=1,2", 3, "seeds --seeds"),
        (None, "data.rows=1,2", 3, "sizes are --sizes"),
        (None, "adapter.rank=4,4", 3, "fewer than two values"),
        ("8", None, 0, "no number of seeds"),
    ],
)
def test_what_cannot_be_studied_is_refused_with_what_to_write(sizes: Any, over: Any, seeds: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wanted(sizes, over, seeds)


@pytest.mark.parametrize("over", ["adapter.rank=4,x", "train.lrr=1,2"])
def test_a_value_that_cannot_be_is_refused_before_anything_is_written(recipe: Path, tmp_path: Path, over: str) -> None:
    code, _, err = luthier("study", str(recipe), "--over", over, f"run.dir={tmp_path / 'none'}")
    assert (code, "Traceback" in err) == (1, False), err
    assert over.partition("=")[0] in err
    assert not list(tmp_path.iterdir())


def test_python_studies_a_recipe_with_its_changes_where_the_command_line_does(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(study, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    recipe, asked = tmp_path / "sums.yaml", {"sizes": (8, 16), "seeds": 2}
    for given in (recipe, Recipe.load(recipe)):
        found = package.study(given, f"run.dir={tmp_path / 'copy'}", "run.processes=2", **asked)
        assert found.as_dict()["points"] == study.found["points"]
        with pytest.raises(RecipeError, match="unknown metric 'rogue'"):
            package.study(given, "evaluate.metrics=[exact_match,rogue]", **asked)
    assert not (tmp_path / "runs").exists()


def test_python_takes_a_run_for_its_recipe_and_changes_of_a_recipe_that_is_one(study: Study, tmp_path: Path) -> None:
    run = package.start(Recipe.load(study.folder.parent / "sums.yaml"), f"run.dir={tmp_path / 'run'}", "train.lr=0.5")
    assert (run.folder, run.recipe.train.lr) == (tmp_path / "run", 0.5)
    again = package.start(run.folder, "evaluate.rows=3")
    assert (again.folder, again.recipe.train.lr, again.recipe.evaluate.rows) == (run.folder, 0.5, 3)


def test_values_may_be_lists() -> None:
    found = wanted(None, "adapter.targets=all-linear,[q_proj,v_proj]", 2)
    assert found == Wanted("adapter.targets", ("all-linear", ["q_proj", "v_proj"]), 2)
    assert wanted("800, 200,0,200", None, 1).values == (200, 800)
