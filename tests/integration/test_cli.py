"""The real command line on a tiny model and a file of sums: what each verb prints, leaves behind and exits with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import tiny
from luthier.cli import main
from luthier.recipe import Recipe

BASE, DATA, TEST = "a base", "my [rows].jsonl", "asked later.jsonl"  # names that shells, YAML and rich stumble over
RECIPE, RUN = "my [rows].yaml", "runs/my [rows]"
SMALL = ["run.engine=local", "run.kernels=eager", "run.threads=1", "train.max_steps=2", "run.memory=4GiB"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def luthier(*words: str) -> Done:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with a model, rows and test rows, as a person has them."""
    folder = tmp_path_factory.mktemp("desk")
    tiny.base(folder / BASE)
    tiny.sums(folder / DATA)
    questions = [{"prompt": f"more plus {a} is what", "completion": str(a)} for a in range(6)]
    (folder / TEST).write_text("".join(json.dumps(q) + "\n" for q in questions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def journey(desk: Path) -> dict[str, Done]:
    """Every verb of the path, once, in order."""
    steps = {
        "init": ["init", BASE, DATA, "--test", TEST],
        "data": ["data", RECIPE, "--json", *SMALL],
        "plan": ["plan", RECIPE, "--json", *SMALL],
        "train": ["train", RECIPE, "--json", *SMALL],
        "again": ["train", RECIPE, "--json", *SMALL],
        "compare": ["compare", RUN, "--json"],
        "predict": ["predict", RUN, TEST, "--json", "--out", "answers [1].csv"],
    }
    return {name: luthier(*words) for name, words in steps.items()}


def test_init_writes_a_recipe_that_parses_and_names_the_next_command(journey: dict[str, Done], desk: Path) -> None:
    done = journey["init"]
    assert done.code == 0, done.err
    assert f"wrote {RECIPE}; next: luthier data '{RECIPE}'" in done.out
    recipe = Recipe.load(desk / RECIPE)
    assert (recipe.model.base, recipe.data.train[0].path, recipe.data.test[0].path) == (BASE, DATA, TEST)
    assert recipe.run.dir == RUN


def test_init_never_overwrites(journey: dict[str, Done], desk: Path) -> None:
    before = (desk / RECIPE).read_bytes()
    done = luthier("init", BASE, DATA)
    assert done.code == 1
    assert "--out" in done.err
    assert (desk / RECIPE).read_bytes() == before


def test_init_says_where_it_cannot_write(desk: Path) -> None:
    done = luthier("init", BASE, DATA, "--out", "no/such/folder.yaml")
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert "no/such/folder.yaml" in done.err


def test_init_gives_answers_the_room_that_99_percent_of_them_need(desk: Path) -> None:
    rows = [{"prompt": "what is", "completion": " ".join(["1"] * (60 if i == 7 else 3))} for i in range(200)]
    (desk / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert luthier("init", BASE, "uneven.jsonl").code == 0
    assert Recipe.load(desk / "uneven.yaml").evaluate.generate.max_new_tokens == 8


def test_init_sets_rows_aside_to_compare_on_where_there_is_no_test_file(journey: dict[str, Done], desk: Path) -> None:
    assert luthier("init", BASE, DATA, "--out", "alone.yaml").code == 0
    assert Recipe.load(desk / "alone.yaml").data.heldout.rows == 24 // 4
    assert Recipe.load(desk / RECIPE).data.heldout.rows == 0


def test_data_prints_the_stable_keys(journey: dict[str, Done], desk: Path) -> None:
    report = journey["data"].json
    assert {"rows", "tokens", "duplicates", "leaks", "lengths"} <= report.keys()
    assert {"read", "kept", "dropped"} <= report["rows"].keys()
    assert report["rows"]["read"] == 24 == report["rows"]["kept"] + sum(report["rows"]["dropped"].values())
    assert {"total", "supervised", "cut"} <= report["tokens"].keys()
    assert f"{RUN}/data/data.html" in journey["data"].err
    assert (desk / RUN / "data" / "data.html").is_file()


def test_plan_prints_the_stable_keys(journey: dict[str, Done]) -> None:
    plan = journey["plan"].json
    assert {"peak_bytes", "parts", "fits", "micro_tokens", "recompute", "seconds_per_step"} <= plan.keys()
    assert plan["fits"] is True
    assert "micro-batch of" in journey["plan"].err


def test_a_plan_that_does_not_fit_exits_with_1_and_advice(journey: dict[str, Done]) -> None:
    done = luthier("plan", RECIPE, "run.memory=1MiB")
    assert done.code == 1
    assert "does not fit" in done.out + done.err


def test_train_prints_the_stable_keys(journey: dict[str, Done], desk: Path) -> None:
    result = journey["train"].json
    assert result.keys() >= {"tokens_per_second", "peak_bytes", "predicted_peak_bytes", "loss"}
    assert (result["run"], result["steps"], result["resumed_from"]) == (RUN, 2, 0)
    assert (desk / RUN / "adapter" / "adapter_model.safetensors").is_file()


def test_a_second_train_reuses_and_says_so(journey: dict[str, Done]) -> None:
    again = journey["again"]
    assert again.json == journey["train"].json | {"resumed_from": 2}
    assert "trained already" in again.err


def test_compare_prints_the_stable_keys(journey: dict[str, Done], desk: Path) -> None:
    comparison = journey["compare"].json
    assert comparison["verdict"] in ("better", "no evidence", "worse")
    assert {"rougeL", "perplexity"} <= comparison["metrics"].keys()
    for scores in comparison["metrics"].values():
        assert {"base", "tuned", "difference", "low", "high", "n"} <= scores.keys()
    assert comparison["metrics"]["rougeL"]["n"] == 6
    assert (desk / RUN / "report.html").is_file()


def test_a_trained_run_can_be_asked_for_other_metrics(journey: dict[str, Done]) -> None:
    asked = luthier("compare", RUN, "evaluate.metrics=[exact_match]", "--json").json
    assert list(asked["metrics"]) == ["exact_match"]
    assert luthier("runs", "show", RUN, "--json").json["recipe"]["evaluate"]["metrics"] == ["exact_match"]


@pytest.mark.parametrize(
    "words",
    [
        [RUN, "runs/nope", "evaluate.metrics=[bleu]"],
        [RUN, "evaluate.metrics=[bleu]", "--questions", "runs/nope"],
        [RUN, "evaluate.metrics=[choice]"],
        [RUN, "evaluate.slices=[topic]"],
    ],
    ids=" ".join,
)
def test_a_comparison_that_cannot_be_made_changes_no_recipe(journey: dict[str, Done], words: list[str]) -> None:
    before = Path(RUN, "recipe.yaml").read_bytes()
    done = luthier("compare", *words)
    assert (done.code, "Traceback" in done.err) == (1, False), done.err
    assert Path(RUN, "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("side", ["", "/checkpoints/{}"], ids=["run", "checkpoint"])
def test_a_side_alone_is_refused_before_anything_is_written(journey: dict[str, Done], desk: Path, side: str) -> None:
    checkpoint = min((desk / RUN / "checkpoints").glob("step-*")).name
    before = {path: path.stat().st_mtime_ns for path in (desk / RUN).rglob("*")}
    done = luthier("compare", RUN + side.format(checkpoint), "--no-base", "evaluate.metrics=[rouge2]")
    assert (done.code, done.out) == (2, "")
    assert "is one side, and there is nothing to compare it with; name another, or leave --no-base out" in done.err
    assert {path: path.stat().st_mtime_ns for path in (desk / RUN).rglob("*")} == before


def test_the_run_that_asks_is_asked_otherwise_whatever_stands_first(journey: dict[str, Done], desk: Path) -> None:
    checkpoint = min((desk / RUN / "checkpoints").glob("step-*"))
    shutil.copytree(desk / RUN / "adapter", desk / "elsewhere")
    for first in (f"{RUN}/checkpoints/{checkpoint.name}", "elsewhere"):
        metric = "exact_match" if first == "elsewhere" else "rouge1"
        asked = luthier("compare", first, RUN, f"evaluate.metrics=[{metric}]", "--json").json
        assert list(asked["metrics"]) == [metric]
        assert Recipe.load(desk / RUN / "recipe.yaml").evaluate.metrics == [metric]


def test_predict_answers_every_row(journey: dict[str, Done], desk: Path) -> None:
    assert journey["predict"].json["answered"] == 6
    assert len((desk / "answers [1].csv").read_text().splitlines()) == 7
    (desk / "one.jsonl").write_text('{"prompt": "what is 1"}\n')
    assert luthier("predict", RUN, "one.jsonl", "--out", "one.csv").out == "1 answer in one.csv\n"


def test_runs_list_show_and_diff(journey: dict[str, Done], desk: Path) -> None:
    listed = luthier("runs", "--json").json["runs"]
    assert [(row["run"], row["state"], row["step"]) for row in listed] == [(RUN, "finished", 2)]
    shown = luthier("runs", "show", RUN)
    assert shown.code == 0, shown.err
    assert "finished" in shown.out
    assert "{" not in shown.out  # no raw dictionaries
    assert luthier("data", RECIPE, *SMALL, "train.lr=0.5", "run.dir=runs/other").code == 0
    changed = luthier("runs", "diff", RUN, "runs/other", "--json").json["changed"]
    assert changed["train.lr"] == [2e-4, 0.5]
    told = [line.rstrip() for line in luthier("runs", "diff", RUN, "runs/other").out.splitlines()]
    assert told[told.index("train.lr") :][:3] == ["train.lr", "  − 0.0002", "  + 0.5"]
    assert RUN in luthier("runs", "list").out


def test_a_run_folder_stands_for_its_recipe(journey: dict[str, Done]) -> None:
    assert luthier("train", RUN, "--json").json["run"] == RUN


def test_overrides_may_stand_behind_flags(journey: dict[str, Done]) -> None:
    words = ["plan", RECIPE, "run.memory=4GiB"]
    assert luthier(*words, "--json", "run.micro_tokens=64").json["micro_tokens"] == 64


@pytest.mark.parametrize(
    "words",
    [
        ["compare", RUN, "--questions", RUN, "evaluate.metrics=[rouge2]", "--json"],
        ["compare", "--json", "--questions", RUN, RUN, "evaluate.metrics=[rouge2]"],
        ["compare", RUN, "evaluate.metrics=[rouge2]", "--json", "--questions", RUN],
    ],
    ids=" ".join,
)
def test_flags_sides_and_changes_of_a_comparison_stand_in_any_order(journey: dict[str, Done], words: list[str]) -> None:
    assert list(luthier(*words).json["metrics"]) == ["rouge2"]


@pytest.mark.parametrize(
    "words",
    [
        ["run.micro_tokens=64", RECIPE, "--json", "run.memory=4GiB"],
        ["--json", "run.micro_tokens=64", "run.memory=4GiB", RECIPE],
        ["run.memory=4GiB", "--json", RECIPE, "run.micro_tokens=64"],
    ],
    ids=" ".join,
)
def test_changes_may_stand_before_the_recipe(journey: dict[str, Done], words: list[str]) -> None:
    assert luthier("plan", *words).json["micro_tokens"] == 64


def test_a_run_may_stand_behind_a_flag(journey: dict[str, Done]) -> None:
    assert luthier("runs", "show", "--json", RUN).json["run"] == RUN
    assert luthier("runs", "diff", RUN, "--json", RUN).json["changed"] == {}


def test_doctor_keeps_the_brackets_of_extras(desk: Path) -> None:
    done = luthier("doctor")
    assert done.code == 0, done.err
    assert "luthier[hub]" in done.out
    assert {"versions", "machine", "choices", "optional"} <= luthier("doctor", "--json").json.keys()


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["tran", RECIPE], 2, "unknown verb 'tran'; did you mean 'train'?"),
        (["runs", "lst"], 2, "unknown action 'lst'; did you mean 'list'?"),
        (["runs", "forget"], 2, "unknown action 'forget'; known: list, show, diff"),
        (["train"], 2, "`luthier train` needs RECIPE; see luthier train --help"),
        (["train", "train.lr=1"], 2, "`luthier train` needs RECIPE; see luthier train --help"),
        (["init"], 2, "`luthier init` needs BASE and DATA; see"),
        (["init", TEST, BASE], 2, f"luthier init '{BASE}' '{TEST}'?"),
        (["plan", RECIPE, "--vram"], 2, "--vram needs a value behind it"),
        (["data", RECIPE, "--rows", "many"], 2, "--rows takes a whole number, not 'many'"),
        (["runs", "list", RUN], 2, "takes no run folder"),
        (["train", RECIPE, "--train.lr=1"], 2, "without dashes: train.lr=1"),
        (["train", RECIPE, "lr=1"], 1, "lr: unknown key; here it is `train.lr`"),
        (["train", DATA], 1, "it looks like data: luthier init BASE 'my [rows].jsonl'"),
        (["compare", RECIPE], 1, "is not a run folder; runs here"),
        (["compare", RUN, "train.lr=1"], 2, "`compare` changes evaluate.key=value alone, not train.lr=1"),
        (["train", RECIPE, "--jsn"], 2, "--jsn"),
        (["--json", "train", RECIPE], 2, "luthier train … --json"),
        (["predict", RUN, TEST, "--json", "evaluate.generate.top_p=1"], 2, "recipe.yaml of the run"),
        (["predict", RUN, TEST, "--questions", RUN], 2, "`predict` does not take '--questions"),
        (["doctor", "all"], 2, "`doctor` does not take 'all'; see luthier doctor --help"),
        (["runs", "show"], 2, "takes 1 run"),
        (["train", RECIPE, "train.lr"], 2, "section.key=value"),
        (["train", RECIPE, "train.lrr=1"], 1, "lr"),
        (["train", RECIPE, "train.learning_rate=1"], 1, "here it is `train.lr`"),
        (["train", RECIPE, "run.engine=ddpp"], 1, "run.engine"),
        (["train", RECIPE, "evaluate.metrics=[rougel]"], 1, "unknown metric 'rougel'; did you mean 'rougeL'"),
        (["compare", RUN, "evaluate.metrics=[rougel]"], 1, "unknown metric 'rougel'; did you mean 'rougeL'"),
        (["compare", "evaluate.metrics=[rougeL]"], 2, "luthier compare RUN evaluate.key=value"),
        (["train", "nowhere.yaml"], 1, "luthier init"),
        (["compare", "runs/nowhere"], 1, "runs here"),
        (["predict", RUN, "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["init", BASE, "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["init", "no/such/base", "broken.jsonl"], 1, "broken.jsonl:2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_with_a_hint_and_no_traceback(
    journey: dict[str, Done], desk: Path, words: list[str], code: int, hint: str
) -> None:
    (desk / "broken.jsonl").write_text('{"prompt": "what is", "completion": "1"}\n{"prompt": "what\n')
    done = luthier(*words)
    assert done.code == code, done.err
    assert hint in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_broken_row_is_named_by_file_and_line(desk: Path) -> None:
    (desk / "broken.jsonl").write_text('{"prompt": "what is", "completion": "1"}\n{"prompt": "what\n')
    (desk / "broken.yaml").write_text(f"model: {{base: {BASE}}}\ndata: {{train: [{{path: broken.jsonl}}]}}\n")
    for verb in ("data", "train"):
        done = luthier(verb, "broken.yaml", "--json")
        assert (done.code, done.out) == (1, "")
        assert "broken.jsonl:2" in done.err


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as a full disk does")
def test_a_full_disk_is_said_in_a_line(desk: Path) -> None:
    tiny.sums(desk / "many.jsonl", 800)
    (desk / "full.yaml").write_text(f"model: {{base: {BASE}}}\ndata: {{train: [{{path: many.jsonl}}]}}\n")
    limit = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    verb = "from luthier.cli import main\nsys.exit(main(['data', 'full.yaml', 'run.dir=full']))"
    done = subprocess.run([sys.executable, "-c", limit + verb], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("luthier: full/data: the disk takes no more (File too large); make room")
    assert luthier("data", "full.yaml", "run.dir=full", "--json").code == 0


ENDED = """
import os, signal, sys
from luthier import cli, doctor
{0}
def examine(console):
    try:
        os.kill(os.getpid(), signal.{1})
        signal.pause()
    finally:
        {2}
doctor.examine = examine
sys.argv = ["luthier", "doctor"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("name", "again", "code", "said"),
    [
        ("SIGINT", "pass", 130, "luthier: interrupted; the same command begins anew\n"),
        ("SIGTERM", "pass", 143, "luthier: interrupted; the same command begins anew\n"),
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130, ""),
    ],
)
def test_a_signal_ends_any_verb_and_a_second_one_the_process(name: str, again: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDED.format("", name, again)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


EARLY = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "{0}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["luthier", "doctor"]
from {1} import {2}
sys.exit({2}())
"""


@pytest.mark.parametrize("importing", ["typing", "luthier.cli", "luthier.registry", "difflib"])
def test_ctrl_c_while_the_command_is_still_imported_is_a_line(importing: str) -> None:
    command = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]["luthier"]
    module, _, name = command.partition(":")
    code = EARLY.format(importing, module, name)
    if importing == "difflib":  # while the words are read
        code = code.replace('"doctor"', '"doktor"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "luthier: interrupted\n")


def test_ctrl_c_is_ignored_where_the_parent_ignores_it_as_in_a_background_job_of_a_script() -> None:
    code = ENDED.format("", "SIGINT", "pass").replace("signal.pause()", "return {}")
    script = 'trap "" INT; exec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", script, sys.executable, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_process_ends_is_no_traceback(name: str) -> None:
    late = f"import atexit; atexit.register(lambda: (os.kill(os.getpid(), signal.{name}), signal.pause()))"
    code = ENDED.format(late, "SIGINT", "pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (128 + signal.Signals[name], False)


def test_the_handlers_of_a_program_that_calls_us_are_its_own_again() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert luthier("runs", "list", "--json").code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_installed_command_prints_one_json_object_and_exits_as_it_should(journey: dict[str, Done]) -> None:
    command, quiet = [sys.executable, "-m", "luthier.cli"], {**os.environ, "OMP_NUM_THREADS": "1"}
    plan = subprocess.run([*command, "plan", RECIPE, "--json", *SMALL], capture_output=True, text=True, env=quiet)
    assert Done(plan.returncode, plan.stdout, plan.stderr).json["fits"] is True
    wrong = subprocess.run([*command, "data", "nowhere.yaml"], capture_output=True, text=True, env=quiet)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "Traceback" not in wrong.stderr


@pytest.fixture(scope="module")
def unloadable(desk: Path, journey: dict[str, Done]) -> None:
    """Copies of the base: `packed` says that another tool has quantised it, `pickled` has pickles for weights."""
    for name in ("packed", "pickled"):
        shutil.copytree(BASE, name)
    config = json.loads(Path("packed/config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    Path("packed/config.json").write_text(json.dumps(config))
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.init=loftq", "adapter.init=loftq starts from what quantisation takes"),
        ("adapter.new_tokens=[what]", "adapter.new_tokens: 'what' is no new token"),
        ("model.base=packed", "the weights are quantised by gptq"),
        ("model.base=pickled", "its weights are pickle files"),
        ("adapter.ranks={q_prj: 4}", "adapter.ranks: no linear layer is called 'q_prj'"),
        ("run.offload=1", "run.offload: 1: blocks stream from host memory to a CUDA GPU"),
        ("adapter.bias=all", "adapter.bias: all: no layer of this model has a bias to train"),
    ],
)
@pytest.mark.usefixtures("unloadable")
def test_what_training_refuses_is_not_said_to_fit(override: str, message: str) -> None:
    for verb in ("plan", "train"):
        done = luthier(verb, RECIPE, "run.dir=runs/refused", *SMALL, "run.kernels=auto", override)
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1
