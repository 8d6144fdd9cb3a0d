"""lm-eval's tasks over a trained tiny run, from a local task file, beside lm-eval's own model on the same weights."""

import io
import json
from math import exp
from pathlib import Path
from typing import Any

import pytest

import tiny
from luthier.errors import RecipeError
from luthier.evaluate.asking.answers import Memo
from luthier.evaluate.asking.subject import Subject
from luthier.evaluate.compare import compare
from luthier.evaluate.harness import model_of, scores
from luthier.evaluate.several import compare_several
from luthier.evaluate.statistics.paired import figure
from luthier.evaluate.terminal import render
from luthier.runs import Run
from luthier.train.launch import train

pytest.importorskip("lm_eval")

ASKED = [{"ask": f"what is {a} plus {b}", "wrong": str(9 - a), "right": str(a + b)} for a in range(4) for b in range(3)]
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: "{{{{[wrong, right]}}}}"
doc_to_target: 1
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: f1}}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{ask}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
SAY = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{ask}}}}"
doc_to_target: "{{{{right}}}}"
generation_kwargs: {{until: ["is"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = tiny.run(tmp_path_factory.mktemp("harness"), "data.test=[{path: sums.jsonl}]", "data.leaks=keep")
    train(made)
    return made


def task(folder: Path, text: str) -> str:
    data = folder / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    path = folder / f"{text.split()[1]}.yaml"
    path.write_text(text.format(data=data))
    return str(path)


def printed(shown: Any) -> str:
    from rich.console import Console

    console = Console(width=100, record=True, quiet=False, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def request(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0)


def peer(run: Run) -> Any:
    """lm-eval's own model on the base's folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=run.recipe.model.base, dtype="float32", device="cpu", batch_size=4)


def test_each_kind_of_request_is_answered_as_lm_eval_s_own_model_does(run: Run) -> None:
    theirs, subject = peer(run), Subject.open(run)
    contexts = [f"{a} {b} {c}" for a in tiny.WORDS for b in tiny.WORDS[:8] for c in tiny.WORDS[:3]]
    with subject.side("base"):
        mine = model_of(subject)
        said = mine.generate_until([request(context, {"max_gen_toks": 2, "until": []}) for context in contexts])
        context, greedy = next((c, t) for c, t in zip(contexts, said, strict=True) if len(t.split()) == 2)
        first, second = greedy.split()
        pairs = [(context, f" {text}") for text in (first, greedy, f"{first} {first} is", second, "what is more")]
        pairs += [("", "what is"), ("more", " " + "more " * 3)]
        weighed = mine.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
        texts = [request("what is 3 plus 4 more"), request(" ".join(tiny.WORDS[i * i % 15] for i in range(300)))]
        rolled = mine.loglikelihood_rolling(texts)
        cut = mine.generate_until([request(context, {"max_gen_toks": 2, "until": [second]})])
    wanted = theirs.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert [loss for loss, _ in weighed] == pytest.approx([loss for loss, _ in wanted], rel=1e-4)
    assert [is_greedy for _, is_greedy in weighed] == [is_greedy for _, is_greedy in wanted]
    assert [is_greedy for _, is_greedy in weighed[:3]] == [True, True, False]
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4)
    peers = theirs.generate_until([request(context, {"max_gen_toks": 2, "until": []})], disable_tqdm=True)
    assert (peers[0].split(), cut[0].split()) == (greedy.split(), [first])


def test_tasks_of_three_kinds_stand_among_the_metrics_and_decide_nothing(run: Run, tmp_path: Path) -> None:
    tasks = [task(tmp_path, text) for text in (CHOOSE, READ, SAY)]
    evaluate = run.recipe.evaluate.model_copy(update={"harness": tasks, "forgetting": False, "metrics": ["rougeL"]})
    asking = Run(run.folder, run.recipe.model_copy(update={"evaluate": evaluate}))
    found = compare(asking)
    names = ["choose/acc", "choose/acc_norm", "read/word_perplexity", "say/exact_match"]
    assert list(found.metrics) == ["rougeL", *names]
    assert found.first == "rougeL"
    assert {found.metrics[name].n for name in names} == {len(ASKED)}
    assert [found.metrics[name].higher for name in names] == [True, True, False, True]
    assert found.as_dict()["metrics"]["choose/acc"]["title"] == "choose/acc"
    assert "choose/acc" in run.report.read_text()
    kept = (run.results / "compare" / "harness.jsonl").read_bytes()
    assert compare(asking).metrics == found.metrics
    assert (run.results / "compare" / "harness.jsonl").read_bytes() == kept


def test_the_sides_differ_by_the_adapter_and_a_task_s_figure_is_lm_eval_s(run: Run, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    subject, path = Subject.open(run), task(tmp_path, READ)
    memo = Memo(tmp_path / "memo.jsonl")
    base, tuned = (scores(subject, side, [path], None, memo)["read/word_perplexity"] for side in ("base", "tuned"))
    manager = TaskManager(include_defaults=False)
    tasks = list(manager.load([path])["tasks"].values())
    theirs = simple_evaluate(model=peer(run), tasks=tasks, bootstrap_iters=0, task_manager=manager)["results"]["read"]
    sums = [sum(column) for column in zip(*base["statistics"], strict=True)]
    assert exp(sums[0] / sums[1]) == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
    assert base["statistics"] != tuned["statistics"]
    assert len(scores(subject, "base", [path], 5, memo)["read/word_perplexity"]["statistics"]) == 5


def test_every_side_of_several_does_the_tasks_once(tmp_path: Path) -> None:
    overrides = ("data.test=[{path: sums.jsonl}]", "data.leaks=keep", f"evaluate.harness=[{task(tmp_path, CHOOSE)}]")
    for name, epochs in (("short", 1), ("long", 4)):
        train(tiny.run(tmp_path, *overrides, f"run.dir={tmp_path / name}", f"train.epochs={epochs}"))
    alone = {name: compare(Run.open(tmp_path / name)) for name in ("short", "long")}
    found = compare_several([tmp_path / "short", tmp_path / "long"])
    by_side = {side["name"]: side["metrics"]["choose/acc_norm"]["score"] for side in found.sides}
    of_alone = {name: one.metrics["choose/acc_norm"] for name, one in alone.items()}
    assert of_alone["short"].base == of_alone["long"].base != of_alone["long"].tuned
    assert by_side == {"base": of_alone["short"].base, **{name: one.tuned for name, one in of_alone.items()}}
    for pair in found.pairs:
        one = pair["metrics"]["choose/acc_norm"]
        assert (one["base"], one["tuned"], one["n"]) == (by_side[pair["first"]], by_side[pair["second"]], len(ASKED))
    assert found.metrics["choose/acc_norm"].difference == pytest.approx(by_side["long"] - by_side["short"])
    assert found.metrics["choose/acc_norm"].difference != 0.0
    assert (tmp_path / "short" / "results" / "compare-long" / "harness.jsonl").read_bytes() == b""
    shown = printed(render(found))
    told = [line.split() for line in shown.splitlines() if line.startswith(("score by", "choose/acc_norm"))]
    assert told[1:] == [["score", "by", *by_side], ["choose/acc_norm", *map(figure, by_side.values())]]
    page = Path(found.settings["report"]).read_text()
    cells = "".join(f"<td>{figure(score)}</td>" for score in by_side.values())
    assert f'<th scope="row">choose/acc_norm</th>{cells}' in page


def test_a_task_that_is_not_known_is_told_by_its_name(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.harness: 'nowhere.yaml' cannot be had"):
        scores(Subject.open(run), "base", ["nowhere.yaml"], None, Memo(tmp_path / "memo.jsonl"))
