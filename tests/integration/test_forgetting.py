"""The forgetting leg of a comparison on a tiny run, and what ships for it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from math import exp, log
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.cli import main
from luthier.evaluate.asking.answers import Memo
from luthier.evaluate.asking.sides import pair_of
from luthier.evaluate.asking.subject import Subject
from luthier.evaluate.asking.workers import Job, fill
from luthier.evaluate.compare import compare
from luthier.evaluate.forgetting import FEW_PASSAGES, FEW_QUESTIONS, Forgetting, general
from luthier.evaluate.metrics.text import PERPLEXITY
from luthier.evaluate.several import compare_several
from luthier.evaluate.statistics.paired import paired
from luthier.runs import Run
from luthier.train.launch import train

ON = ("data.test=[{path: sums.jsonl}]", "data.leaks=keep", "evaluate.forgetting=true", "evaluate.rows=6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tiny.run(tmp_path_factory.mktemp("trained"), *ON)
    train(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def scaled(run: Run, factor: float) -> None:
    """Multiplies the adapter's update."""
    path = run.adapter / "adapter_model.safetensors"
    tensors = {name: tensor * (factor if "lora_B" in name else 1.0) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_general_passages_are_weighed_as_a_plain_forward_pass_does(run: Run) -> None:
    found, subject = compare(run).forgetting, Subject.open(run)
    assert found is not None
    control = set(subject.encoder.tokenizer.control.values())
    total, tokens = 0.0, 0
    for passage in general("cpu")[:FEW_PASSAGES]:
        ids = next(ids for ids, _ in subject.encoder.tokenizer.encode([passage.messages[0].content]))
        with subject.side("tuned"):
            logits = subject.model.module(torch.tensor([ids])).logits[0, :-1].float()
        assert not control & set(ids)
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    assert found.found["perplexity"].tuned == pytest.approx(exp(total / tokens), rel=1e-4)


def test_a_model_that_reads_worse_than_before_is_told_and_the_verdict_stays(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(run, -1.0)  # what it learned, turned round
    assert main(["compare", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    perplexity = found["forgetting"]["perplexity"]
    assert perplexity["verdict"] == "worse"
    assert perplexity["low"] > 0.0
    assert perplexity["n"] == FEW_PASSAGES
    assert found["forgetting"]["accuracy"]["n"] == FEW_QUESTIONS
    warning = next(warning for warning in found["warnings"] if warning.startswith("the model has forgotten: "))
    assert "general text: perplexity" in warning
    assert found["verdict"] == found["metrics"][found["metric"]]["verdict"]


def test_a_model_that_did_not_change_has_forgotten_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(run, 0.0)
    assert main(["compare", str(run.folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "general text: perplexity" in said
    assert "): no evidence of a change" in said
    assert "has forgotten" not in said


def test_of_several_sides_the_two_that_stand_for_the_whole_are_asked(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "other")
    alone, found = compare(run).forgetting, compare_several([run.folder, tmp_path / "other"])
    assert alone is not None
    assert found.forgetting is not None
    assert found.forgetting.found["perplexity"].base == pytest.approx(alone.found["perplexity"].tuned)
    assert found.forgetting.found["perplexity"].difference == 0.0
    assert found.contamination is not None
    assert len(found.contamination.rows) == 6


def test_without_the_leg_nothing_general_is_asked(run: Run) -> None:
    recipe = run.recipe.model_copy(update={"evaluate": run.recipe.evaluate.model_copy(update={"forgetting": False})})
    found = compare(Run(run.folder, recipe))
    assert found.as_dict()["forgetting"] == {}
    assert found.forgetting is None


def test_several_processes_ask_the_general_questions_too(run: Run) -> None:
    alone = compare(run, name="alone").forgetting
    done = Job(str(run.folder), str(run.results / "together"), tuple(pair_of(run)), general=True)
    fill(done, 2, lambda label, count: None)  # without the parent, which does what its workers leave undone
    kept = Memo(run.results / "together" / "answers.jsonl").keys()
    together = compare(run, name="together").forgetting
    assert kept == Memo(run.results / "alone" / "answers.jsonl").keys()
    assert alone is not None
    assert together is not None
    assert together.found["perplexity"].tuned == pytest.approx(alone.found["perplexity"].tuned, rel=1e-5)


def test_what_ships_is_whole_balanced_and_without_repetition() -> None:
    asked = general("cuda")
    passages, questions = asked[:40], asked[40:]
    assert {passage.messages[0].role for passage in passages} == {"document"}
    assert all(
        60 <= len(passage.messages[0].content.split()) <= 120 or "\n" in passage.messages[0].content
        for passage in passages
    )
    assert len({passage.messages[0].content for passage in passages}) == 40
    assert len({question.messages[0].content for question in questions}) == len(questions) == 120
    assert all(len(set(question.choices)) == 4 for question in questions)
    assert Counter(question.answer for question in questions) == dict.fromkeys(range(4), 30)
    few = general("cpu")
    assert few == passages[:FEW_PASSAGES] + questions[:FEW_QUESTIONS]
    assert Counter(question.answer for question in few[FEW_PASSAGES:]) == dict.fromkeys(range(4), FEW_QUESTIONS // 4)


def test_a_loss_is_told_in_per_cent_of_the_perplexity() -> None:
    base, tuned = ([(100.0 * log(each) + i % 7, 100.0) for i in range(40)] for each in (20.0, 21.0))
    (line,) = Forgetting({"perplexity": paired(PERPLEXITY, base, tuned)}).lines
    assert line.startswith("general text: perplexity 20.6 → 21.6 (+1.0, 95 % interval +1.0 to +1.0)")
    assert line.endswith("): worse by 5.0 %")
