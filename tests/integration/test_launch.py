"""From a run folder to a trained one: what is recorded, and what happens to the processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import tiny
from luthier.adapters import files
from luthier.data.prepare import heldout_conversations
from luthier.errors import AdapterError, LuthierError, ModelError, RecipeError, RunError, Stopped
from luthier.machine import memory_kills
from luthier.runs import Run, refusal
from luthier.train.group import rebuilt
from luthier.train.launch import decisions_of, is_same, prepare_data, train

HERE = Path(__file__)


class At:
    """A tracker that does something to its process, or to its parent, once: when step 4 is logged."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.mark = folder / "acted"

    def log(self, record: dict[str, Any]) -> None:
        if record["step"] == 4 and not self.mark.exists():
            self.mark.touch()
            self.act()

    def act(self) -> None: ...

    def close(self) -> None:
        pass


class KilledBySomeone(At):
    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KilledByTheKernel(At):
    """Moves into a group of processes that may have 8 MiB more, and takes 64."""

    def act(self) -> None:
        (Path(os.environ["LUTHIER_TEST_CAGE"]) / "cgroup.procs").write_text(str(os.getpid()))
        b"x" * (64 << 20)


class Terminated(At):
    def act(self) -> None:
        os.kill(os.getppid(), signal.SIGTERM)


class Crashed(At):
    def act(self) -> None:
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)


def two(tmp_path: Path, *overrides: str) -> Run:
    return tiny.run(tmp_path, "run.engine=ddp", "run.processes=2", "run.save.every=2", *overrides)


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in run.steps() if "loss" in record]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    run = tiny.run(tmp_path_factory.mktemp("local"))
    return run, train(run)


@pytest.fixture(autouse=True)
def _trackers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]))


def test_the_result_has_its_promised_keys(local: tuple[Run, dict[str, Any]]) -> None:
    run, result = local
    keys = {"run", "steps", "resumed_from", "loss", "tokens_per_second", "peak_bytes", "predicted_peak_bytes"}
    assert keys <= result.keys()
    assert result["steps"] == len(losses(run)) == 9
    assert result["resumed_from"] == 0
    assert json.loads(json.dumps(result)) == result


def test_the_run_folder_holds_all_that_was_decided_and_made(local: tuple[Run, dict[str, Any]]) -> None:
    run, result = local
    assert run.manifest["decisions"]["engine"] == "local"
    assert run.manifest["result"] == result
    assert run.finished
    adapter, tensors = files.load(run.adapter)
    assert adapter.rank == 4
    assert len(tensors) == 28
    assert files.load_extra(run.adapter)["template"]["supervise"] == "answers"


def test_a_run_that_has_begun_keeps_its_dtype_when_it_is_run_otherwise(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    prepared = prepare_data(run)
    made = decisions_of(run, prepared)
    run.update_manifest(decisions=made.as_dict() | {"dtype": "bfloat16"}, asked=None)
    assert decisions_of(run, prepared).dtype == "float32"  # not begun
    run.update_manifest(decisions=made.as_dict() | {"dtype": "bfloat16"}, asked=None)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert decisions_of(run, prepared).dtype == run.manifest["decisions"]["dtype"] == "bfloat16"


def test_decisions_of_an_older_version_are_kept_and_those_for_another_number_of_blocks_are_not(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    prepared = prepare_data(run)
    decisions_of(run, prepared)
    asked, decisions = run.manifest["asked"], run.manifest["decisions"] | {"micro_tokens": 77}
    older = {key: value for key, value in asked.items() if key not in ("graphs", "recompute_gate_up")}
    run.update_manifest(asked=older, decisions=decisions)
    assert decisions_of(run, prepared).micro_tokens == 77
    for before, now, kept in ((True, True, True), (True, 1, False), (1, True, False)):
        assert is_same(asked | {"recompute": before}, asked | {"recompute": now}) == kept


def test_a_changed_file_is_prepared_again_until_the_run_has_begun(tmp_path: Path) -> None:
    run, said = tiny.run(tmp_path), []
    before = prepare_data(run, said.append)
    assert prepare_data(run, said.append).report == before.report
    assert said == []
    rows = (tmp_path / "sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_text("".join(rows[:-2]))
    assert prepare_data(run, said.append).report["rows"]["read"] == before.report["rows"]["read"] - 2
    assert said == ["sums.jsonl changed since the data was prepared: preparing it again"]
    run.metrics.write_text('{"step": 1}\n')
    (tmp_path / "sums.jsonl").write_text("".join(rows[:-4]))
    assert prepare_data(run, said.append).report["rows"]["read"] == before.report["rows"]["read"] - 2
    assert "goes on with the rows it began with" in said[1]


def test_samples_are_given_at_each_evaluation(local: tuple[Run, dict[str, Any]]) -> None:
    run, _ = local
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    evaluations = [record["step"] for record in run.steps() if "eval_loss" in record]
    assert [sample["step"] for sample in samples] == evaluations == [2, 4, 6, 8, 9]
    assert all(sample["reference"] and "answer" in sample for sample in samples)
    asked = {c.messages[-2].content for c in heldout_conversations(run.data)}
    assert {sample["prompt"] for sample in samples} <= asked, "the question alone, without the template's marks"


def test_a_finished_run_is_not_trained_again(local: tuple[Run, dict[str, Any]]) -> None:
    run, result = local
    events: list[dict[str, Any]] = []
    again = train(Run.open(run.folder), progress=events.append)
    assert again == result | {"resumed_from": result["steps"]}
    assert [event["event"] for event in events] == ["note"]


def test_a_run_that_is_being_trained_cannot_be_trained_by_another(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    with run.lock(), pytest.raises(RunError, match="is in use by process"):
        train(run)


@pytest.mark.slow
@pytest.mark.usefixtures("cage")
def test_a_worker_that_the_kernel_kills_for_memory_is_started_again_with_half_the_tokens(
    tmp_path: Path, local: tuple[Run, dict[str, Any]]
) -> None:
    run = two(tmp_path, "run.micro_tokens=42", "run.track=['test_launch:KilledByTheKernel']")
    events: list[dict[str, Any]] = []
    result = train(run, progress=events.append)
    assert run.manifest["decisions"]["micro_tokens"] == 21  # the longest row, too
    said = "the kernel killed a process for want of memory; going on with 21 tokens at a time"
    assert {"event": "note", "text": said} in events
    assert result["resumed_from"] == 2
    assert losses(run) == pytest.approx(losses(local[0]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(memory_kills() is None, reason="this kernel does not count what it kills for want of memory")
def test_a_worker_that_someone_kills_is_started_again_with_as_many_tokens(
    tmp_path: Path, local: tuple[Run, dict[str, Any]]
) -> None:
    run = two(tmp_path, "run.micro_tokens=42", "run.track=['test_launch:KilledBySomeone']")
    events: list[dict[str, Any]] = []
    kills = memory_kills()
    result = train(run, progress=events.append)
    if memory_kills() != kills:
        pytest.skip("the kernel killed a process of others meanwhile")
    assert run.manifest["decisions"]["micro_tokens"] == 42
    said = "a process was killed (SIGKILL), but not by the kernel for want of memory; going on with 42 tokens at a time"
    assert {"event": "note", "text": said} in events
    assert result["resumed_from"] == 2
    assert losses(run) == pytest.approx(losses(local[0]), rel=1e-6)


def test_what_is_killed_each_time_is_begun_again_four_times_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.run(tmp_path, "run.engine=ddp", "run.processes=1")
    deadly = tiny.deadly(tmp_path / "deadly", "luthier.train.worker")
    monkeypatch.setenv("PYTHONPATH", str(deadly), prepend=os.pathsep)
    with pytest.raises(RunError, match=r"a process was killed .*, 5 times now; .+"):
        train(run)
    assert len((deadly / "starts").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_signal_reaches_all_processes_and_the_run_goes_on_from_there(
    tmp_path: Path, local: tuple[Run, dict[str, Any]]
) -> None:
    run = two(tmp_path, "run.track=['test_launch:Terminated']")
    with pytest.raises(Stopped) as stopped:
        train(run)
    assert stopped.value.exit_code == 143
    result = train(run)
    assert 4 <= result["resumed_from"] <= 9
    assert losses(run) == pytest.approx(losses(local[0]), rel=1e-6)


@pytest.mark.slow
def test_a_worker_that_crashes_ends_the_others_and_its_last_words_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"exit code 7 \(the last words\)"):
        train(two(tmp_path, "run.track=['test_launch:Crashed']"))


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_same_error_here(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown tracker 'tensorbord'"):
        train(two(tmp_path, "run.track=['tensorbord']"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its tokens would have no rows in the embedding."""
    made = tiny.run(tmp_path)
    config = tiny.config()
    config.vocab_size = 12
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="tokens that the model lacks"):
        train(made)


def test_a_start_that_failed_leaves_the_folder_to_the_corrected_recipe(tmp_path: Path) -> None:
    wrong = tiny.run(tmp_path, "adapter.targets=[q_prj]", "train.max_steps=1")
    with pytest.raises(AdapterError, match="did you mean 'q_proj'"):
        train(wrong)
    report = (wrong.data / "report.json").stat().st_mtime_ns
    right = tiny.run(tmp_path, "adapter.targets=[q_proj]", "train.max_steps=1")
    assert train(right)["steps"] == 1
    assert (right.data / "report.json").stat().st_mtime_ns == report, (
        "the data stays: it does not depend on the targets"
    )
    with pytest.raises(RunError, match="another recipe"):
        tiny.run(tmp_path, "adapter.targets=[k_proj]", "train.max_steps=1")


@pytest.mark.parametrize(
    ("size", "named"),
    [(400, "."), (2_100, "data"), (1_500, "metrics.jsonl"), (3_000, "checkpoints"), (30_000, "checkpoints")],
)
def test_a_disk_that_fills_up_is_named_and_with_room_again_the_run_ends_as_if_it_never_had(
    tmp_path: Path, size: int, named: str, local: tuple[Run, dict[str, Any]]
) -> None:
    every = ["run.save.every=100", "evaluate.every=100"] if named == "metrics.jsonl" else ["run.save.every=2"]
    tiny.sums(tmp_path / "sums.jsonl")
    tiny.base(tmp_path / "base")
    if named in ("metrics.jsonl", "checkpoints"):
        run = tiny.run(tmp_path, *every)
        decisions_of(run, prepare_data(run))
    with tiny.full_disk(size), pytest.raises((LuthierError, OSError)) as raised:
        train(tiny.run(tmp_path, *every))
    told = refusal(raised.value) if isinstance(raised.value, OSError) else raised.value
    assert isinstance(told, LuthierError)
    assert (Path(told.where), "File too large" in told.what) == (tmp_path / "run" / named, True)
    assert "the same command" in told.fix or told.fix == "set run.dir to another folder"
    assert not list(tmp_path.rglob("*.tmp"))
    train(run := tiny.run(tmp_path, *every))
    assert losses(run) == losses(local[0])
    weights = [one.adapter / "adapter_model.safetensors" for one in (run, local[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_process_that_finds_the_disk_full_says_so_itself() -> None:
    work = "lambda emit: open('/dev/full', 'wb', buffering=0).write(b'x')"
    told = "from luthier.runs import naming\nfrom luthier.train.group import report\nimport sys\n"
    code = f"{told}def work(emit):\n  with naming('there'): ({work})(emit)\nsys.exit(report(work))"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    error = rebuilt(json.loads(worker.stdout.readline()))
    worker.wait(timeout=60)  # before its stdin is closed: it would end at once
    worker.communicate()
    assert (worker.returncode, type(error)) == (1, RunError)
    assert str(error).startswith("there: the disk takes no more (No space left on device); make room")


def test_an_adapter_is_there_once_all_of_its_files_are(tmp_path: Path, local: tuple[Run, dict[str, Any]]) -> None:
    shutil.copytree(local[0].folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.finished
    (run.adapter / files.CONFIG).unlink()
    assert not run.finished
