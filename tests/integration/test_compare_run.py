"""compare, predict and chat on a trained tiny run, end to end."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.cli import main
from luthier.data.conversation import Conversation, Message, Origin, to_json
from luthier.errors import DataError, MemoryPlanError, RecipeError, RunError, UsageError
from luthier.evaluate.asking.answers import Memo, Task, Text, _rest, chunks, plan, sampling_of, work
from luthier.evaluate.asking.sides import pair_of
from luthier.evaluate.asking.subject import Subject
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.asking.workers import Job, fill, processes, share
from luthier.evaluate.compare import compare
from luthier.evaluate.predict import predict
from luthier.machine import machine
from luthier.model.generate import Sampling, generate
from luthier.model.load import load_causal
from luthier.model.quantize import PackedLinear
from luthier.recipe import FourBit
from luthier.runs import Run
from luthier.serve.chat import Talk, chat
from luthier.train.launch import train
from scarce import Scarce, Small

TEST = "data.test=[{path: sums.jsonl}]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tiny.run(tmp_path_factory.mktemp("trained"), TEST, "data.leaks=keep", "train.epochs=4")
    train(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the trained run that a test may change."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def results(run: Run) -> Path:
    return run.results / "compare"


def test_compare_writes_verdict_rows_and_report(run: Run) -> None:
    found = compare(run)
    written = json.loads((results(run) / "comparison.json").read_text())
    rows = [json.loads(line) for line in (results(run) / "rows.jsonl").read_text().splitlines()]
    assert written["verdict"] == found.verdict
    assert written["settings"]["source"] == "test"
    assert len(rows) == len(suite(run).questions) == 24
    assert {"prompt", "references", "base", "tuned", "scores", "words", "stopped"} <= set(rows[0])
    assert found.sentence.partition(": ")[2][1:].split(" (")[0] in run.report.read_text()


def test_a_metric_that_can_decide_nothing_is_told_before_anything_is_answered(run: Run) -> None:
    evaluate = run.recipe.evaluate.model_copy(update={"metrics": ["accuracy", "rougeL"]})  # no question has choices
    run = Run(run.folder, run.recipe.model_copy(update={"evaluate": evaluate}))
    with pytest.raises(RecipeError, match="'accuracy' decides the verdict but can score no question"):
        compare(run)
    assert not results(run).exists()


def test_a_likelihood_is_the_same_with_an_answer_and_alone(run: Run, tmp_path: Path) -> None:
    subject, sampling, questions = Subject.open(run), sampling_of(run), suite(run).questions
    results, calls = [], []
    for needs in ({"text", "nll"}, {"nll"}):
        tasks = plan(subject, questions, sampling, needs=needs)
        memo = Memo(tmp_path / f"{len(results)}.jsonl")
        work(subject, tasks, sampling, memo, lambda label, count: calls.append((label, count)))
        results.append({task.key: memo[task.key] for task in tasks if task.text})
    together, alone = results
    assert together.keys() == alone.keys()
    assert len(alone) == 48
    for key, result in alone.items():
        assert together[key]["targets"] == result["targets"]
        assert together[key]["nll"] == pytest.approx(result["nll"], rel=1e-5)
    told = {label: sum(c for name, c in calls if name == label) for label, _ in calls}
    assert told == {"base answers": 24, "tuned answers": 24, "base likelihoods": 48, "tuned likelihoods": 48}


@pytest.mark.parametrize("in_flight", [None, 4096])
def test_packed_weights_are_unpacked_while_answers_are_made_but_take_no_memory_that_was_counted(
    run: Run, tmp_path: Path, in_flight: int | None
) -> None:
    model = run.recipe.model.model_copy(update={"quantize": FourBit(kind="nf4")})
    subject = Subject.open(Run(run.folder, run.recipe.model_copy(update={"model": model})))
    packed = [layer for layer in subject.model.module.modules() if isinstance(layer, PackedLinear)]
    seen: list[set[bool]] = []

    def look(label: str, count: int) -> None:
        seen.append({layer.kept is not None for layer in packed})

    tasks = plan(subject, suite(run).questions, sampling_of(run))
    work(subject, tasks, sampling_of(run), Memo(tmp_path / "answers.jsonl"), look, in_flight=in_flight)
    assert len(seen) == 48
    assert all(kept == {in_flight is None} for kept in seen)
    assert all(layer.kept is None for layer in packed)


def test_a_row_with_an_earlier_answer_is_weighed_whole() -> None:
    def rest(supervised: list[int]) -> list[int]:
        return _rest(Text(array("i", range(1, 7)), bytes(supervised)), array("i", [1, 2, 3, 4]))

    assert rest([0, 0, 0, 0, 1, 1]) == [5, 6]
    assert rest([0, 0, 0, 0, 1, 0]) == [5]
    assert rest([0, 1, 0, 0, 1, 1]) == []
    assert rest([0, 1, 1, 0, 0, 0]) == []


def choosing(run: Run, *choices: str, metrics: tuple[str, ...]) -> Run:
    """The run with multiple-choice questions to compare on, answered by the text of the choice."""
    asked = [
        Conversation(
            (Message("user", f"what is {a} plus {b}"), Message("assistant", choices[a % len(choices)])),
            Origin("choices.jsonl", 3 * a + b + 1),
            references=(choices[a % len(choices)],),
            choices=choices,
            answer=a % len(choices),
        )
        for a in range(3)
        for b in range(3)
    ]
    (run.data / "test.jsonl").write_text("".join(json.dumps(to_json(question)) + "\n" for question in asked))
    tree = run.recipe.model_dump(mode="json")
    tree["data"]["labels"] = "text"
    tree["evaluate"]["metrics"] = metrics
    return Run(run.folder, type(run.recipe).model_validate(tree))


@pytest.mark.parametrize("kernels", ["reference", "eager"])
@pytest.mark.parametrize("metrics", [("accuracy_likelihood",), ("accuracy_per_token", "rougeL", "perplexity")])
def test_the_likelihood_of_a_choice_is_that_of_a_plain_forward_pass(
    run: Run, metrics: tuple[str, ...], kernels: str
) -> None:
    choices = ("3", "4 more", "5 plus 1 more")
    run.update_manifest(decisions=run.manifest["decisions"] | {"kernels": kernels})
    run = choosing(run, *choices, metrics=metrics)
    found, subject = compare(run), Subject.open(run)
    tokenizer = subject.encoder.tokenizer
    for row, prompt in zip(found.rows, subject.encoder.prompts(suite(run).questions), strict=True):
        rests = [ids for ids, _ in tokenizer.encode(choices)]  # words apart, and no end of turn
        assert row["choices_nll"]["targets"] == [len(rest) for rest in rests] == [1, 2, 4]
        for side in ("base", "tuned"):
            plain = []
            for rest in rests:
                with subject.side(side):
                    logits = subject.model.module(torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1]
                plain.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(rest), reduction="sum")))
            assert row["choices_nll"][side] == pytest.approx(plain, rel=1e-5)
            scores = [nll / len(rest) for nll, rest in zip(plain, rests, strict=True)] if "per" in metrics[0] else plain
            right = choices[scores.index(min(scores))] == row["references"][0]
            assert row["scores"][metrics[0]][side] == 100.0 * right


def test_where_a_choice_begins_another_the_end_of_the_turn_counts(run: Run) -> None:
    run = choosing(run, "3", "3 more", metrics=("accuracy_likelihood",))
    asked = suite(run).questions
    tasks = plan(Subject.open(run), asked, sampling_of(run), needs={"choices"})
    ends = Subject.open(run).encoder.tokenizer.control["<|end|>"]
    assert len(tasks) == 2 * len(asked)
    assert all([rest[-1] for rest in task.choices or ()] == [ends, ends] for task in tasks)


def test_the_precision_of_training_is_that_of_its_answers(run: Run) -> None:
    run.update_manifest(decisions=run.manifest["decisions"] | {"dtype": "bfloat16"})
    subject = Subject.open(run)
    assert subject.facts["dtype"] == "bfloat16"
    assert subject.model.dtype == torch.bfloat16


def test_elsewhere_the_precision_is_what_that_place_makes_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a GPU in float16, answered on a processor without, and on one with, its products."""
    from luthier import machine

    run.update_manifest(decisions=run.manifest["decisions"] | {"dtype": "float16", "place": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_FLAGS", ())
    assert Subject.open(run).facts["dtype"] == "float32"
    run.update_manifest(decisions=run.manifest["decisions"] | {"place": "cpu"})
    assert Subject.open(run).facts["dtype"] == "float16"


def test_the_base_side_is_the_model_without_an_adapter(run: Run) -> None:
    found = compare(run)
    subject = Subject.open(run)
    bare = load_causal(Path(run.recipe.model.base), run.recipe.model, device="cpu", dtype=torch.float32)
    prompts = subject.encoder.prompts(suite(run).questions)
    from luthier.model.causal import CausalModel

    made = generate(CausalModel(bare, None), prompts, Sampling(max_new_tokens=4), subject.encoder.stop_ids)
    assert [row["base"] for row in found.rows] == [subject.encoder.decode(one.ids) for one in made]
    assert any(row["base"] != row["tuned"] for row in found.rows)


def test_perplexity_is_exp_of_the_mean_loss_of_a_plain_forward_pass(run: Run) -> None:
    found = compare(run).metrics["perplexity"]
    subject = Subject.open(run)
    total, tokens = 0.0, 0
    for example in subject.encoder.examples(suite(run).questions):
        with subject.side("tuned"):
            logits = subject.model.module(torch.tensor([example.ids])).logits[0, :-1].float()
        targets = torch.where(torch.tensor(example.supervised[1:]) == 1, torch.tensor(example.ids[1:]), -100)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += sum(example.supervised[1:])
    assert found.tuned == pytest.approx(exp(total / tokens), rel=1e-5)


def test_our_block_and_the_transformers_module_say_the_same(run: Run) -> None:
    reference = compare(run, name="reference")
    run.update_manifest(decisions=run.manifest["decisions"] | {"kernels": "eager"})
    eager = compare(run, name="eager")
    assert [row["tuned"] for row in eager.rows] == [row["tuned"] for row in reference.rows]
    assert [row["nll"]["base"] for row in eager.rows] == pytest.approx(
        [row["nll"]["base"] for row in reference.rows], rel=1e-5
    )


def test_an_untrained_adapter_is_no_evidence(run: Run) -> None:
    weights = run.adapter / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    found = compare(run)
    assert found.verdict == "no evidence"
    assert all(row["base"] == row["tuned"] for row in found.rows)
    assert {p.difference for p in found.metrics.values()} == {0.0}


def test_a_stopped_comparison_goes_on_and_ends_the_same(run: Run) -> None:
    whole = compare(run)
    kept = results(run) / "answers.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    torn = [b"spoilt\n", *lines[: len(lines) // 2], lines[-1][:17]]  # killed while writing
    kept.write_bytes(b"".join(torn))
    assert compare(run).rows == whole.rows
    assert sorted(kept.read_bytes().splitlines(keepends=True)) == sorted([b"spoilt\n", *lines])


def test_answers_to_long_prompts_are_kept_in_small_parts_on_a_cpu() -> None:
    lengths = [20_000, 5000, 5000, 5000, *[600] * 30, *[20] * 200]
    tasks = [Task("base", i, str(i), prompt=array("i", [1] * length)) for i, length in enumerate(lengths)]
    parts = [[len(task.prompt or []) for task in chunk] for chunk in chunks(tasks, 10, "cpu")]
    assert parts == [[20_000], [5000] * 3, [600] * 26, [600] * 4 + [20] * 22, [20] * 128, [20] * 50]
    assert [len(part) for part in chunks(tasks, 10, "cuda")] == [234]


@pytest.mark.parametrize("needs", [["text", "nll"], ["choices"]])
def test_a_question_without_memory_is_named_and_answers_before_it_are_kept(
    run: Run, tmp_path: Path, needs: list[str]
) -> None:
    subject, sampling, advanced = Subject.open(run), Sampling(max_new_tokens=4), list[int]()
    questions = [replace(question, choices=("one", "two")) for question in suite(run).questions]
    tasks = plan(subject, questions, sampling, sides=["base"], needs=needs)

    def asked(name: str, memory: Scarce) -> Memo:
        memo = Memo(tmp_path / name)
        with memory:
            work(subject, tasks, sampling, memo, lambda label, count: advanced.append(count), in_flight=1)
        return memo

    asked("loaded", Scarce(-1))
    whole = Scarce(-1)
    wanted = asked("whole", whole)
    keys = wanted.keys()
    advanced.clear()
    with pytest.raises(MemoryPlanError, match=r"^sums\.jsonl:\d+: a prompt of \d+ tokens "):
        asked("kept", Scarce(whole.count // 2, times=10**9))
    kept = Memo(tmp_path / "kept").keys()
    assert 0 < len(kept) < len(keys)
    assert len(kept) == sum(advanced)
    ended = asked("kept", Scarce(-1))
    assert [ended[key] for key in keys] == [wanted[key] for key in keys]
    assert len(keys) == sum(advanced)


# Starts the command: what a process has kept when it is killed is seen from outside alone.
def test_a_killed_comparison_has_kept_its_answers_and_goes_on_from_them(run: Run) -> None:
    lines = (run.data / "test.jsonl").read_text().splitlines(keepends=True)
    asked = [json.loads(line) for line in lines * 16]
    for number, question in enumerate(asked):
        question["messages"][0]["content"] += " more" * (10 * (number // len(lines)) // 3)
    (run.data / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    command = [sys.executable, "-m", "luthier", "compare", str(run.folder), "--json"]
    kept = results(run) / "answers.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (kept.exists() and kept.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    before = kept.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    compare(run)
    after = kept.read_bytes()
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert after.startswith(before)
    assert 0 < before.count(b"\n") < len(keys) / 2  # of one side some, and not yet all
    assert len(keys) == len(set(keys))


def test_an_interrupted_comparison_says_that_it_goes_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)  # while it loads the model
    try:
        assert main(["compare", str(run.folder)]) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert capsys.readouterr().err.endswith("luthier: interrupted; the same command goes on where it was\n")


def test_answers_are_not_made_twice_and_need_no_model_then(run: Run) -> None:
    compare(run)
    before = (results(run) / "answers.jsonl").read_bytes()
    (run.adapter / "adapter_config.json").write_text("{")
    compare(run)
    assert (results(run) / "answers.jsonl").read_bytes() == before


def test_a_new_adapter_gets_new_answers_and_the_base_keeps_its_own(run: Run) -> None:
    compare(run)
    before = len((results(run) / "answers.jsonl").read_text().splitlines())
    weights = run.adapter / "adapter_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    compare(run)
    assert len((results(run) / "answers.jsonl").read_text().splitlines()) == before + before // 2


def test_two_processes_say_what_one_says(run: Run) -> None:
    alone = compare(run, name="alone")
    run.update_manifest(decisions=run.manifest["decisions"] | {"processes": 2})
    assert processes(run, 1000) == min(2, machine().cores)
    seen: list[tuple[str, int]] = []
    job = Job(str(run.folder), str(run.results / "together"), tuple(pair_of(run)))
    fill(job, 2, lambda label, done: seen.append((label, done)))
    kept = (run.results / "together" / "answers.jsonl").read_bytes()
    together = compare(run, name="together")
    assert (run.results / "together" / "answers.jsonl").read_bytes() == kept  # nothing was left for the parent
    assert [row["tuned"] for row in together.rows] == [row["tuned"] for row in alone.rows]
    assert [r["nll"]["base"] for r in together.rows] == pytest.approx([r["nll"]["base"] for r in alone.rows], rel=1e-5)
    assert {label for label, _ in seen} == {f"{s} {k}" for s in ("base", "tuned") for k in ("answers", "likelihoods")}


def test_every_task_has_exactly_one_worker(run: Run) -> None:
    tasks = plan(Subject.open(run), suite(run).questions, sampling_of(run), needs={"text", "nll"})
    shared = [task.key for rank in range(3) for task in share(tasks, rank, 3)]
    assert sorted(shared) == sorted({task.key for task in tasks})


def test_few_tasks_or_a_gpu_are_one_process(run: Run) -> None:
    run.update_manifest(decisions=run.manifest["decisions"] | {"processes": 2})
    assert processes(run, 20) == 1
    run.update_manifest(decisions=run.manifest["decisions"] | {"place": "cuda"})
    assert processes(run, 1000) == 1


def test_another_decoding_is_another_answer(run: Run, tmp_path: Path) -> None:
    memo = Memo(tmp_path / "answers.jsonl")
    subject, asked = Subject.open(run), suite(run).questions[:4]
    for length in (1, 3):
        sampling = Sampling(max_new_tokens=length)
        work(subject, plan(subject, asked, sampling, sides=["tuned"]), sampling, memo, lambda label, done: None)
    assert len(memo.keys()) == 2 * len({tuple(prompt) for prompt in subject.encoder.prompts(asked)})


def test_without_a_test_set_the_held_out_rows_are_used_and_said_so(run: Run) -> None:
    (run.data / "test.jsonl").write_text("")
    found = compare(run)
    assert found.settings["source"] == "held-out"
    assert found.metrics["rougeL"].n == 4
    assert any("there is no test set" in warning for warning in found.warnings)


def test_compare_takes_as_many_rows_as_the_recipe_says(run: Run) -> None:
    short = Run(
        run.folder, run.recipe.model_copy(update={"evaluate": run.recipe.evaluate.model_copy(update={"rows": 7})})
    )
    assert len(compare(short).rows) == 7


def test_a_run_without_an_adapter_or_data_says_what_to_do(run: Run) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(RunError, match=r"has no adapter yet; finish it: luthier train"):
        compare(run)
    shutil.rmtree(run.data)
    with pytest.raises(RunError, match=r"holds no prepared data; run luthier data"):
        compare(run)


def asked(folder: Path) -> Path:
    path = folder / "ask.jsonl"
    rows = [json.dumps({"prompt": f"what is {a} plus two", "id": i}) for i, a in enumerate(("one", "two", "six"))]
    path.write_text("\n".join([*rows, '{"prompt": 3}', "not json", rows[0]]) + "\n")
    return path


def test_predict_answers_every_readable_row_in_order_and_reports_the_others(run: Run, tmp_path: Path) -> None:
    result = predict(run, asked(tmp_path), tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (result["answered"], result["bad"]) == (4, 2)
    assert [row["line"] for row in rows] == [1, 2, 3, 6]
    assert [row["row"]["id"] for row in rows] == [0, 1, 2, 0]
    assert rows[0]["prediction"] == rows[3]["prediction"]
    assert any("ask.jsonl:4" in problem for problem in result["problems"])


def test_predict_writes_csv_with_the_row_s_own_columns(run: Run, tmp_path: Path) -> None:
    predict(run, asked(tmp_path), tmp_path / "out.csv", base=True)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["line", "prompt", "prediction", "stopped", "row.prompt", "row.id"]
    assert [row["row.id"] for row in rows] == ["0", "1", "2", "0"]


def test_predict_again_makes_no_answer_again(run: Run, tmp_path: Path) -> None:
    kept = run.results / "predict" / "answers.jsonl"
    predict(run, asked(tmp_path), tmp_path / "out.jsonl")
    before, first = kept.read_bytes(), (tmp_path / "out.jsonl").read_bytes()
    predict(run, asked(tmp_path), tmp_path / "out.jsonl")
    assert kept.read_bytes() == before
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_predict_refuses_what_it_cannot_write_or_read_before_loading_a_model(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(UsageError, match=r"cannot write '.xlsx' files"):
        predict(run, asked(tmp_path), tmp_path / "out.xlsx")
    with pytest.raises(DataError):
        predict(run, tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_chat_answers_as_compare_did(run: Run) -> None:
    found = compare(run)
    row = next(row for row in found.rows if row["stopped"]["tuned"])
    out = io.StringIO()
    chat(run, lines=[row["prompt"][-1]["content"]], out=out)
    assert out.getvalue().strip() == row["tuned"]


def test_chat_shows_both_sides_each_with_its_own_history(run: Run) -> None:
    out = io.StringIO()
    chat(run, both=True, lines=["what is one", "/reset", "/help", "what is one", "/quit", "never read"], out=out)
    first, reset, help_, *again = (out.getvalue().split("\n")[i] for i in (0, 2, 3, 4))
    assert first.startswith("base: ")
    assert reset == "starting over"
    assert help_.startswith("/reset")
    assert again == [first]
    assert out.getvalue().count("tuned: ") == 2


def test_a_conversation_remembers_what_was_given_when_the_reader_stops(run: Run) -> None:
    talk = Talk(Subject.open(run), "base", Sampling(max_new_tokens=9))
    pieces = talk.answer("what is two plus two")
    first = next(pieces)
    pieces.close()
    assert [message.role for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[-1].content == first.strip()


def test_streamed_pieces_are_the_whole_answer(run: Run) -> None:
    subject, sampling = Subject.open(run), Sampling(max_new_tokens=9)
    question = suite(run).questions[0]
    with subject.side("base"):
        made = generate(subject.model, subject.encoder.prompts([question]), sampling, subject.encoder.stop_ids)
    assert "".join(Talk(subject, "base", sampling).answer(question.prompt[-1].content)) == subject.encoder.decode(
        made[0].ids
    )


def test_a_conversation_longer_than_the_model_reads_says_so_and_goes_on(run: Run) -> None:
    out = io.StringIO()
    chat(run, lines=["more " * 200, "what is one"], out=out)
    assert "as long as the model can read; /reset starts over" in out.getvalue().splitlines()[0]
    assert len(out.getvalue().splitlines()) == 2


def test_a_turn_that_finds_no_memory_is_forgotten_and_answered_with_what_helps(run: Run) -> None:
    talk = Talk(Subject.open(run), "base", Sampling(max_new_tokens=9))
    list(talk.answer("what is one"))
    (first, *_), nothing = talk.messages, Small(100)
    with nothing, pytest.raises(MemoryPlanError, match=r"a prompt of .* tokens and up to 9 .*; /reset starts over$"):
        list(talk.answer("what is two"))
    assert [message.role for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[0] is first
    talk.reset()
    with nothing, pytest.raises(MemoryPlanError, match=r"; shorten it, or close other programs$"):
        list(talk.answer("what is two"))
    assert not talk.messages


def test_chat_reads_a_pipe(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli", "chat", str(run.folder), "--both"],
        input="what is one plus two\n",
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert done.stdout.startswith("base: ")
    assert done.stdout.splitlines()[1].startswith("tuned: ")


@pytest.mark.parametrize("kernels", ["reference", "eager"])
def test_a_calibrated_choice_is_weighed_against_the_same_template_with_nothing_asked(run: Run, kernels: str) -> None:
    choices = ("3", "4 more", "5 plus 1 more")
    run.update_manifest(decisions=run.manifest["decisions"] | {"kernels": kernels})
    run = choosing(run, *choices, metrics=("accuracy_calibrated", "accuracy_per_character", "accuracy_likelihood"))
    found, subject = compare(run), Subject.open(run)
    control, tokenizer = subject.encoder.tokenizer.control, subject.encoder.tokenizer
    start, end = control["<|start|>"], control["<|end|>"]
    role = [ids for ids, _ in tokenizer.encode(["user", "assistant"])]
    nothing = [start, *role[0], end, start, *role[1]]
    rests = [ids for ids, _ in tokenizer.encode(choices)]
    for side in ("base", "tuned"):
        plain = []
        for rest in rests:
            with subject.side(side):
                logits = subject.model.module(torch.tensor([nothing + rest])).logits[0, len(nothing) - 1 : -1]
            plain.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(rest), reduction="sum")))
        for row in found.rows:
            assert row["unasked_nll"][side] == pytest.approx(plain, rel=1e-5)
            gains = [asked - bare for asked, bare in zip(row["choices_nll"][side], plain, strict=True)]
            norms = [nll / len(text) for nll, text in zip(row["choices_nll"][side], choices, strict=True)]
            for name, scores in (("accuracy_calibrated", gains), ("accuracy_per_character", norms)):
                right = choices[scores.index(min(scores))] == row["references"][0]
                assert row["scores"][name][side] == 100.0 * right
