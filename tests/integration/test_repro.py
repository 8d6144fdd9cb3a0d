"""`runs repro` on tiny runs: equal, within noise, different, and what is told before anything is trained."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.cli import main
from luthier.errors import DataError, RunError
from luthier.evaluate.compare import compare
from luthier.evaluate.repro import Curves, changes, curves, follows, judge, repro, weights
from luthier.machine import machine
from luthier.runs import Run
from luthier.train.launch import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    run = tiny.run(folder, "data.test=[{path: sums.jsonl}]", "data.leaks=keep")
    train(run)
    compare(run)
    return run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, with its data file, that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copy(finished.root / "sums.jsonl", tmp_path)
    copy = Run.open(tmp_path / "run")
    copy.update_manifest(root=str(tmp_path))
    return copy


def test_a_run_made_again_is_equal(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "repro", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "equal"
    assert found["sentence"] == "equal: the same adapter and the same 24 rows of the comparison, bit for bit"
    assert found["adapter"]["identical"]
    assert found["loss"]["identical"]
    assert found["answers"] == {"same": 24, "rows": 24}
    assert found["changes"] == {}
    assert json.loads((run.folder.with_name("run-repro") / "results" / "repro.json").read_text()) == found


def test_the_template_keeps_the_day_of_the_run(run: Run) -> None:
    """A chat template that says the day renders other tokens tomorrow."""
    path = run.data / "template.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"template": made["template"] | {"date": "2020-02-29"}}))
    repro(run)
    again = json.loads((run.folder.with_name("run-repro") / "data" / "template.json").read_text())
    assert again["template"]["date"] == "2020-02-29"


def test_a_stopped_repetition_goes_on(run: Run) -> None:
    found = repro(run)
    again = Run.open(run.folder.with_name("run-repro"))
    shutil.rmtree(again.adapter)
    shutil.rmtree(again.checkpoints / "step-00000010", ignore_errors=True)
    manifest = {name: value for name, value in again.manifest.items() if name != "result"}
    (again.folder / "manifest.json").write_text(json.dumps(manifest))
    assert repro(run).as_dict() == found.as_dict()
    assert again.manifest["result"]["resumed_from"] > 0


class Impatient(io.StringIO):
    """Where things are shown to somebody who has seen enough."""

    def write(self, text: str) -> int:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("action", "then"), [("repro", "goes on where it was"), ("show", "begins anew")])
def test_an_interrupted_repetition_says_that_it_goes_on(
    run: Run, action: str, then: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Impatient())
    assert main(["runs", action, str(run.folder)]) == 130
    assert capsys.readouterr().err.endswith(f"luthier: interrupted; the same command {then}\n")


def test_other_sums_of_the_same_numbers_are_within_noise(run: Run) -> None:
    """Micro-batches of another size: the same arithmetic in another order."""
    run.update_manifest(decisions=run.manifest["decisions"] | {"micro_tokens": 32})
    found = repro(run)
    assert found.verdict == "within noise"
    assert not found.adapter.identical
    assert 0.0 < found.adapter.largest < 0.01
    assert 0.0 < found.loss.largest < found.loss.tolerance == pytest.approx(2.4e-4, rel=0.02)
    assert found.metrics.keys() >= {"rougeL", "perplexity"}


def test_another_learning_rate_is_different_and_an_exit_code(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.01", "lr: 0.011"))
    assert main(["runs", "repro", str(run.folder), "--out", str(run.folder / "again")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "different: the loss of step " in said
    assert "(rounding may do 0.00024)" in said


@pytest.mark.parametrize(
    ("spoil", "what"), [(Path.unlink, "is missing"), (lambda p: p.write_text("{}"), "has changed")]
)
def test_data_that_is_not_there_any_more_is_told_before_anything_is_done(run: Run, spoil: Any, what: str) -> None:
    spoil(run.root / "sums.jsonl")
    with pytest.raises(DataError, match=rf"sums.jsonl: {what}[^;]*; put back what the run had"):
        repro(run)
    assert not run.folder.with_name("run-repro").exists()


def test_an_unfinished_run_or_another_run_in_the_way_is_told(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "other")
    with pytest.raises(RunError, match="is not a repetition of this run"):
        repro(run, tmp_path / "other")
    shutil.rmtree(run.adapter)
    with pytest.raises(RunError, match="is not finished"):
        repro(run)


def test_versions_that_differ_are_listed(run: Run) -> None:
    run.update_manifest(versions=run.manifest["versions"] | {"torch": "1.0"})
    found = repro(run)
    assert found.changes == {"version of torch": ("1.0", torch.__version__)}
    assert found.verdict == "equal"


def test_whatever_decides_how_steps_are_computed_is_listed(run: Run, tmp_path: Path) -> None:
    again = Run.open(shutil.copytree(run.folder, tmp_path / "again"))
    decided = run.manifest["decisions"]
    again.update_manifest(decisions=decided | {"graphs": True, "graph_price": 512.0})
    assert changes(run, again) == {"decision: graphs": (None, True), "decision: graph_price": (None, 512.0)}


def test_a_run_that_was_not_compared_is_judged_by_adapter_and_curve(run: Run) -> None:
    shutil.rmtree(run.results)
    found = repro(run)
    assert found.sentence == "equal: the same adapter, bit for bit"
    assert found.answers is None
    assert not found.metrics


def test_other_answers_of_the_same_adapter_are_not_equal(run: Run) -> None:
    repro(run)
    again = Run.open(run.folder.with_name("run-repro"))
    path = again.results / "compare" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | ({"tuned": "other"} if i == 3 else {})) + "\n" for i, row in enumerate(rows))
    )
    assert judge(run, again).verdict == "within noise"
    assert judge(run, again).answers == (23, 24)


def test_a_gain_outside_the_interval_is_different(run: Run) -> None:
    repro(run)
    again = Run.open(run.folder.with_name("run-repro"))
    path = again.results / "compare" / "comparison.json"
    found = json.loads(path.read_text())
    found["metrics"]["perplexity"]["difference"] = found["metrics"]["perplexity"]["high"] + 0.01
    path.write_text(json.dumps(found))
    tensors = load_file(again.adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor * (1 + 1e-6) for name, tensor in tensors.items()}, again.adapter / "adapter_model.safetensors"
    )
    assert judge(run, again).verdict == "different"
    assert "perplexity gains" in judge(run, again).sentence


def test_a_curve_is_compared_step_by_step() -> None:
    assert curves({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0}, 0.1).identical
    assert curves({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.3}, 0.1) == Curves(
        False, pytest.approx(0.2), 2, 0.1, [(1, 2.0, 2.0), (2, 1.0, 1.3)]
    )
    longer = curves({1: 2.0}, {1: 2.0, 2: 1.0}, 0.1)
    assert (longer.close, longer.step) == (False, 2)


def test_adapters_are_compared_to_the_bit() -> None:
    zero = torch.zeros(2)
    assert weights({"a": zero}, {"a": zero}).identical
    assert not weights({"a": zero}, {"a": -zero}).identical  # minus zero is equal, and another bit
    assert weights({"a": torch.ones(4), "b": zero}, {"a": torch.ones(4) * 1.5, "b": zero}).largest == pytest.approx(0.5)
    assert weights({"a": zero}, {"b": zero}).largest == float("inf")


def test_decisions_are_followed_only_where_they_can_be(run: Run) -> None:
    decided, facts = run.manifest["decisions"], replace(machine(), gpus=(), compiler=None, available=1 << 40)
    assert follows(decided, facts)
    assert not follows(decided | {"place": "cuda"}, facts)
    assert not follows(decided | {"kernels": "compiled"}, facts)
    assert not follows(decided | {"processes": facts.cores + 1}, facts)
    assert not follows(decided, replace(facts, available=1 << 20))
