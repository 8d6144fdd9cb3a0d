"""Runs, checkpoints, adapters and bases against each other, on tiny trained runs."""

import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from luthier import api
from luthier.errors import AdapterError, RecipeError, RunError, UsageError
from luthier.evaluate import tables
from luthier.evaluate.asking.answers import Memo, collect, sampling_of, work
from luthier.evaluate.asking.neighbours import trainings
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import by_base, entries, open_sides, with_bases
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.asking.workers import Job, fill, needed, turns
from luthier.evaluate.compare import compare
from luthier.evaluate.schema import check
from luthier.evaluate.several import _pinned, compare_several
from luthier.evaluate.slices import LENGTH
from luthier.evaluate.statistics.paired import figure
from luthier.runs import Run, read_json
from luthier.train.checkpoint import read_adapter
from luthier.train.launch import train

TEST = ("data.test=[{path: sums.jsonl}]", "data.leaks=keep", "evaluate.metrics=[rougeL, perplexity]")
KINDS = {
    "a": ("train.epochs=3", "train.seed=1"),
    "b": ("train.epochs=6", "train.seed=1", "run.save.every=10"),
    "wide": ("train.epochs=3", "adapter.rank=8"),
    "neck": ("train.epochs=3", "adapter={kind: bottleneck, size: 8}"),
    "again": ("train.epochs=3", "train.seed=2"),
}


def topic(question: str) -> str:
    return "long" if len(question.split()) > 9 else "short"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, on one base."""
    folder = tmp_path_factory.mktemp("several")
    with (folder / "sums.jsonl").open("w") as file:
        tiny.base(folder / "base")
        rows = map(json.loads, tiny.sums(folder / "plain.jsonl", 48).read_text().splitlines())
        file.writelines(json.dumps({**row, "topic": topic(row["prompt"])}) + "\n" for row in rows)
    for name, overrides in KINDS.items():
        train(tiny.run(folder, *TEST, f"run.dir={folder / name}", *overrides))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """The runs, in a copy that a test may change."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def kept(folder: Path) -> int:
    return len((folder / "answers.jsonl").read_text().splitlines())


def test_two_runs_and_their_base_say_what_each_says_alone(runs: Path) -> None:
    alone = {name: compare(Run.open(runs / name)) for name in ("a", "b")}
    found = compare_several([runs / "a", runs / "b"])
    assert [side["name"] for side in found.sides] == ["base", "a", "b"]
    assert [side["kind"] for side in found.sides] == ["base", "run", "run"]
    for row, a, b in zip(found.rows, alone["a"].rows, alone["b"].rows, strict=True):
        assert (row["base"], row["tuned"]) == (a["tuned"], b["tuned"])
        assert row["answers"] == {"base": a["base"], "a": a["tuned"], "b": b["tuned"]}
    pairs = {(pair["first"], pair["second"]): pair["metrics"]["perplexity"] for pair in found.pairs}
    assert pairs["base", "b"]["tuned"] == pytest.approx(alone["b"].metrics["perplexity"].tuned, rel=1e-6)
    assert found.metrics["perplexity"].difference == pytest.approx(pairs["a", "b"]["difference"])
    assert found.sides[2]["metrics"]["perplexity"]["score"] == pytest.approx(found.metrics["perplexity"].tuned)
    assert found.sides[1]["stopped"] == alone["a"].stopped["tuned"]
    assert (runs / "a" / "results" / "compare-b" / "report.html").exists()
    # Every answer was kept by one of the two comparisons before.
    assert kept(runs / "a" / "results" / "compare-b") == 0


def test_one_load_of_the_base_serves_every_lora_whatever_its_rank(runs: Path) -> None:
    asker, seat = Run.open(runs / "a"), Seat()
    sides = with_bases(open_sides(entries([runs / "a", runs / "wide", runs / "b"], None), seat), None)
    questions, sampling = suite(asker).questions, sampling_of(asker)
    memo = Memo(runs / "memo.jsonl")
    for turn in turns(sides, questions, sampling, needed(asker)):
        work(turn.side.subject, turn.tasks, sampling, memo, lambda label, count: None)
    assert seat.reads == 1
    for turn in turns(sides, questions, sampling, needed(asker))[1:]:
        alone = compare(Run.open(runs / turn.side.name))
        answers = collect(turn.tasks, memo, len(questions), "tuned")
        assert [answer.text for answer in answers] == [row["tuned"] for row in alone.rows]
        assert [a.nll for a in answers] == pytest.approx([row["nll"]["tuned"] for row in alone.rows], rel=1e-6)


@pytest.mark.parametrize("kernels", ["reference", "eager"])
def test_an_adapter_that_has_had_its_turn_leaves_no_trace(runs: Path, kernels: str) -> None:
    for name in ("a", "wide"):
        run = Run.open(runs / name)
        run.update_manifest(decisions=run.manifest["decisions"] | {"kernels": kernels})
    first, second = open_sides(entries([runs / "a", runs / "wide"], None), Seat())
    prompt = first.subject.encoder.prompts(suite(Run.open(runs / "a")).questions[:1])[0]

    def logits(subject: object) -> list[float]:
        with subject.side("tuned"):  # type: ignore[attr-defined]
            return list(subject.model.module(torch.tensor([prompt])).logits[0, -1].tolist())  # type: ignore[attr-defined]

    before, other = logits(first.subject), logits(second.subject)
    assert before != other
    assert logits(first.subject) == before


def test_adapters_that_change_the_base_have_it_read_again_and_never_two_of_it(runs: Path) -> None:
    seat = Seat()
    sides = open_sides(entries([runs / "a", runs / "neck"], None), seat)
    first, second = (side.subject for side in sides)
    assert first.base == second.base
    reads_at_its_end: list[int] = []
    weakref.finalize(first.model.module, lambda: reads_at_its_end.append(seat.reads))
    assert second.model.module is not None
    assert seat.reads == 2
    assert reads_at_its_end == [1]  # the first was gone before the second was there


def test_sides_of_two_bases_come_one_base_after_the_other(runs: Path) -> None:
    shutil.copytree(runs / "base", runs / "other")
    for name in ("wide", "again"):
        recipe = runs / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(Run.open(runs / name).recipe.model.base), str(runs / "other")))
    seat = Seat()
    sides = open_sides(entries([runs / name for name in ("a", "wide", "b", "again")], None), seat)
    assert [side.name for side in by_base(sides)] == ["a", "b", "wide", "again"]
    assert [side.name for side in with_bases(sides, None)] == ["a", "wide", "b", "again"]
    assert [side.name for side in with_bases(sides, True)][:2] == ["base of a", "base of wide"]
    for side in by_base(sides):
        side.subject.model  # noqa: B018
    assert seat.reads == 2


def test_a_checkpoint_of_the_last_step_answers_as_the_adapter_does(runs: Path) -> None:
    run = Run.open(runs / "b")
    newest = max(run.checkpoints.glob("step-*"))
    found = compare_several([newest])
    assert [side["name"] for side in found.sides] == ["base", f"b@{int(newest.name[5:])}"]
    assert found.sides[1]["folder"] == str(newest)
    assert [row["tuned"] for row in found.rows] == [row["tuned"] for row in compare(run).rows]
    assert not list((run.results / f"compare-{found.sides[1]['name']}").glob(".pinned-*"))


def test_a_checkpoint_that_its_run_deletes_meanwhile_stays_readable(runs: Path) -> None:
    folder = max((runs / "b" / "checkpoints").glob("step-*"))
    tensors = read_adapter(folder)
    with _pinned(entries([folder], None), runs / "results") as (entry,):
        shutil.rmtree(folder)
        assert entry.given == str(folder)
        held = read_adapter(Path(entry.folder))
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensors[name]) for name in tensors)
    assert list((runs / "results").iterdir()) == []


def test_an_adapter_made_elsewhere_takes_template_and_decisions_of_the_first_run(runs: Path) -> None:
    foreign = runs / "foreign"
    shutil.copytree(runs / "wide" / "adapter", foreign)
    (foreign / "luthier.json").unlink()
    found = compare_several([runs / "a", foreign])
    alone = compare(Run.open(runs / "wide"))
    assert [side["kind"] for side in found.sides] == ["base", "run", "adapter"]
    assert [row["tuned"] for row in found.rows] == [row["tuned"] for row in alone.rows]
    with pytest.raises(UsageError, match=r"no run is among them.*--questions RUN"):
        compare_several([foreign])
    assert [side["name"] for side in compare_several([foreign], questions=runs / "a").sides] == ["base", "foreign"]
    config = read_json(foreign / "adapter_config.json")
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"does not name its base model; write its base into adapter_config\.json"):
        compare_several([runs / "a", foreign])


def test_sides_of_one_name_are_called_by_their_folders_and_none_is_called_base(runs: Path) -> None:
    for name in ("more/a", "more/base"):
        shutil.copytree(runs / "a", runs / name)
    same, other, base = (runs / name for name in ("a", "more/a", "more/base"))
    assert [entry.name for entry in entries([same, other, base], None)] == [str(same), str(other), str(base)]
    assert [entry.name for entry in entries([same, runs / "wide"], None)] == ["a", "wide"]


def test_what_is_no_side_is_told_before_anything_is_loaded(runs: Path) -> None:
    with pytest.raises(UsageError, match="is no run, checkpoint or adapter"):
        compare_several([runs / "a", runs / "base"])
    with pytest.raises(UsageError, match=r"is no run, .*; name one or several of the runs in it: .*/a, .*/wide$"):
        compare_several([runs / "a", runs])
    with pytest.raises(RunError, match="is not a run folder"):
        compare_several([runs / "a", runs / "nothing"])
    with pytest.raises(UsageError, match="is given twice"):
        compare_several([runs / "a", runs / "a" / "adapter"])
    with pytest.raises(UsageError, match="nothing to compare it with"):
        compare_several([runs / "a"], base=False)
    with pytest.raises(RunError, match=r"is no checkpoint \(any more\); there are step-"):
        compare_several([runs / "b" / "checkpoints" / "step-00000001"])
    shutil.rmtree(runs / "b" / "adapter")
    with pytest.raises(RunError, match=r"has no adapter yet.*or take a checkpoint: .*step-"):
        compare_several([runs / "a", runs / "b"])


def test_runs_of_other_rows_are_told_and_the_first_run_s_questions_are_asked(runs: Path) -> None:
    tiny.sums(runs / "sums.jsonl", 30)
    shutil.rmtree(runs / "again")
    train(tiny.run(runs, *TEST, f"run.dir={runs / 'again'}", "train.epochs=1"))
    found = compare_several([runs / "a", runs / "again"])
    assert len(found.rows) == len(suite(Run.open(runs / "a")).questions)
    assert any("has other test rows than" in warning for warning in found.warnings)
    assert any("learned from other files than" in warning for warning in found.warnings)
    other = compare_several([runs / "a", runs / "b"], questions=runs / "again")
    assert len(other.rows) == len(suite(Run.open(runs / "again")).questions) != len(found.rows)
    assert (runs / "a" / "results" / "compare-b-on-again" / "comparison.json").exists()


def test_runs_of_one_recipe_under_several_seeds_are_one_side_of_the_verdict(runs: Path) -> None:
    found = compare_several([runs / "a", runs / "again", runs / "wide"])
    (recipe,) = found.seeds["recipes"]
    assert [found.sides[place]["name"] for place in recipe["sides"]] == ["a", "again"]
    scores = [found.sides[place]["metrics"]["rougeL"]["score"] for place in recipe["sides"]]
    assert recipe["metrics"]["rougeL"]["scores"] == pytest.approx(scores)
    assert found.metrics["rougeL"].method == "seeds"
    noise = recipe["metrics"]["rougeL"]
    assert noise["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    (line,) = tables.spread(found)
    assert line.startswith(f"{recipe['name']}: ROUGE-L {figure(scores[0])}, {figure(scores[1])}; mean ")
    assert line.endswith(f"standard deviation {figure(noise['spread'])} from seed to seed")
    assert any("differ in their seed alone" in warning for warning in found.warnings)


def test_several_processes_say_what_one_says(runs: Path) -> None:
    alone = compare_several([runs / "a", runs / "wide"])
    shutil.rmtree(runs / "a" / "results")
    asker = Run.open(runs / "a")
    sides = with_bases(open_sides(entries([runs / "a", runs / "wide"], None), Seat()), None)
    folder = asker.results / "compare-wide"
    seen = set[str]()
    fill(Job(str(asker.folder), str(folder), tuple(s.entry for s in sides)), 2, lambda label, count: seen.add(label))
    before = kept(folder)
    together = compare_several([runs / "a", runs / "wide"])
    assert kept(folder) == before  # nothing was left to do
    assert [row["answers"] for row in together.rows] == [row["answers"] for row in alone.rows]
    assert seen == {f"{name} {kind}" for name in ("base", "a", "wide") for kind in ("answers", "likelihoods")}


def test_columns_slice_a_comparison_whether_named_before_the_data_was_prepared_or_after(runs: Path) -> None:
    after = Run.open(runs / "a")
    after.update_manifest(root=str(runs))
    evaluate = after.recipe.evaluate.model_copy(update={"slices": ["topic"]})
    found = compare(Run(after.folder, after.recipe.model_copy(update={"evaluate": evaluate})))
    shutil.rmtree(runs / "again")
    before = tiny.run(runs, *TEST, f"run.dir={runs / 'again'}", "evaluate.slices=[topic]", "train.epochs=1")
    train(before)
    asked = suite(before).questions
    topics = [row["slices"]["topic"] for row in found.rows]
    assert topics == [question.meta["columns"]["topic"] for question in asked]
    assert topics == [topic(question.messages[0].content) for question in asked]
    assert set(found.slices) == {"topic", LENGTH}
    assert sum(by["rougeL"].n for by in found.slices["topic"].values()) == len(asked)
    (runs / "sums.jsonl").unlink()  # what was prepared with the data stays; what was not is said to be missing
    assert [q.meta["columns"]["topic"] for q in suite(before).questions] == topics
    again = compare(Run(after.folder, after.recipe.model_copy(update={"evaluate": evaluate})))
    assert any("no question has topic" in warning for warning in again.warnings)


def test_perplexity_is_not_compared_over_different_tokens(runs: Path) -> None:
    from luthier.evaluate.metrics import Answer
    from luthier.evaluate.several import judged

    asker = Run.open(runs / "a")
    sides = open_sides(entries([runs / "a", runs / "wide"], None), Seat())
    questions = suite(asker).questions
    answers = {
        side.name: [Answer("3", True, 1, nll=2.0, targets=count) for _ in questions]
        for side, count in zip(sides, (2, 3), strict=True)
    }
    found = judged(asker, questions, sides, answers, asker.results)
    assert set(found.metrics) == {"rougeL"}
    assert any("perplexity is left out" in warning for warning in found.warnings)
    evaluate = asker.recipe.evaluate.model_copy(update={"metrics": ["perplexity"]})
    asker = Run(asker.folder, asker.recipe.model_copy(update={"evaluate": evaluate}))
    with pytest.raises(RecipeError, match="these sides cut the same text into different tokens"):
        judged(asker, questions, sides, answers, asker.results)


def test_what_compare_prints_for_machines_is_what_its_schema_says(runs: Path) -> None:
    for folders in (["a"], ["a", "b"], ["a", "again", "wide"]):
        found = api.compare(*(runs / name for name in folders)).as_dict()
        check(json.loads(json.dumps(found, allow_nan=False)))
    del found["sides"][0]["metrics"]
    with pytest.raises(ValueError, match="metrics"):
        check(found)


def luthier(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "luthier.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(what: Iterator[bool]) -> None:
    deadline = time.monotonic() + 120
    while not next(what):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Takes two trainings of some seconds: a comparison has to begin while one of them goes on.
def test_comparing_a_checkpoint_of_a_run_that_trains_leaves_its_losses_as_they_are(
    trained: Path, tmp_path: Path
) -> None:
    for name in ("base", "sums.jsonl"):
        (tmp_path / name).symlink_to(trained / name)
    long = ("train.epochs=15", "run.save.every=5", "run.save.keep=1000")
    undisturbed, watched = (tiny.run(tmp_path, *TEST, *long, f"run.dir={tmp_path / name}") for name in ("calm", "busy"))
    train(undisturbed)
    with luthier("train", str(watched.folder)) as process:
        first = watched.checkpoints / "step-00000005"
        until(iter(lambda: first.exists() or process.poll() is not None, None))
        (near,) = trainings([watched])
        assert near.process == process.pid
        found = compare_several([first])
        shutil.rmtree(found.settings["report"].removesuffix("report.html"))
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert [side["name"] for side in found.sides] == ["base", "busy@5"]
    assert [step["loss"] for step in watched.steps() if "loss" in step] == [
        step["loss"] for step in undisturbed.steps() if "loss" in step
    ]
    tensors = [run.adapter / "adapter_model.safetensors" for run in (watched, undisturbed)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
