"""Promises 2 and 3: stop anywhere, go on as if nothing had been; run out of memory, and redo the same step."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from luthier.errors import MemoryPlanError, RunError, Stopped
from luthier.train import checkpoint
from luthier.train.interrupt import Interrupt
from luthier.train.loop import Trainer

OPTIONS = ("train.epochs=4", "run.save.every=2", "evaluate.every=3")


def trainer(folder: Path, *overrides: str, **options: Any) -> Trainer:
    return tiny.trainer(folder, tiny.recipe(*OPTIONS, *overrides), held=5, **options)


def state(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's files."""
    last = checkpoint.published(folder / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in last.iterdir()}


def figures(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between equal runs: times and memory."""
    changing = ("seconds", "tokens_per_second", "peak_bytes")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in changing} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    list(trainer(folder))
    return folder


class Killed(BaseException):
    """The end of the process, as far as the loop can tell."""


def run_until(run: Trainer, step: int, *acts: Callable[[], None]) -> None:
    """Does `acts` after `step` was made and logged, one a step."""
    for made in run:
        if 0 <= made.step - step < len(acts):
            acts[made.step - step]()


def die() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_twice() -> None:
    terminate()
    terminate()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("death", [1, 5, 8, 11])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path: Path, whole: Path, death: int) -> None:
    """Mid-epoch (3 steps an epoch), with dropout, shuffling, a schedule and evaluations."""
    with pytest.raises(Killed):
        run_until(trainer(tmp_path), death, die)
    resumed = trainer(tmp_path)
    assert resumed.resumed_from >= death - 2
    assert resumed.resumed_from % 2 == 0 or resumed.resumed_from % 3 == 0
    list(resumed)
    assert state(tmp_path) == state(whole)
    assert figures(tmp_path) == figures(whole)


def test_rates_of_their_own_survive_a_stop(tmp_path: Path) -> None:
    """LoRA+ groups the parameters anew; the moments must find theirs."""
    options = ("train.lora_plus=8", "adapter.rslora=true")
    list(trainer(tmp_path / "whole", *options))
    with pytest.raises(Killed):
        run_until(trainer(tmp_path / "torn", *options), 5, die)
    list(trainer(tmp_path / "torn", *options))
    assert state(tmp_path / "torn") == state(tmp_path / "whole")


@pytest.mark.parametrize(("act", "code"), [(terminate, 143), (press_ctrl_c, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, whole: Path, act: Callable[[], None], code: int
) -> None:
    with pytest.raises(Stopped, match="after step 5 of 12") as stopped:
        run_until(trainer(tmp_path), 5, act)
    assert stopped.value.exit_code == code
    resumed = trainer(tmp_path)
    assert resumed.resumed_from == 5
    list(resumed)
    assert state(tmp_path) == state(whole)
    assert figures(tmp_path) == figures(whole)


@pytest.mark.parametrize(
    ("ignored", "act", "other", "code"),
    [(signal.SIGINT, press_ctrl_c, terminate, 143), (signal.SIGTERM, terminate, press_ctrl_c, 130)],
)
def test_a_signal_that_the_parent_ignores_ends_nothing_and_the_other_does(
    tmp_path: Path, ignored: signal.Signals, act: Callable[[], None], other: Callable[[], None], code: int
) -> None:
    """A script's background job is started so."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped, match="after step 6 of 12") as stopped:
            run_until(trainer(tmp_path), 5, act, other)
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)
    assert stopped.value.exit_code == code


def test_a_signal_during_an_evaluation_loses_nothing(tmp_path: Path, whole: Path) -> None:
    """The evaluation is given up, the checkpoint knows that it is due, and the resumed run begins with it."""
    recipe = tiny.recipe(*OPTIONS)

    class Signalling(tiny.Around):
        def __init__(self) -> None:
            self.model = tiny.model(recipe)
            self.adapter, self.signalled = self.model.adapter, False

        def loss(self, micro: Any) -> torch.Tensor:
            if not torch.is_grad_enabled() and micro.step == 6 and not self.signalled:
                self.signalled = True
                terminate()
            return self.model.loss(micro)

    with pytest.raises(Stopped, match="after step 6"):
        list(tiny.trainer(tmp_path, recipe, held=5, causal=Signalling()))
    assert figures(tmp_path)[-1]["step"] == 6
    assert "eval_loss" not in figures(tmp_path)[-1]
    list(trainer(tmp_path))
    assert state(tmp_path) == state(whole)
    assert figures(tmp_path) == figures(whole)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            terminate_twice()

    with pytest.raises(Stopped) as stopped:
        list(trainer(tmp_path, emit=emit))
    assert stopped.value.exit_code == 143
    assert "after step" not in str(stopped.value)
    assert trainer(tmp_path).resumed_from == 4


def test_a_signal_is_no_error_of_what_it_interrupts() -> None:
    """A broken file, a tracker that fails: much is taken for one that raises an Exception."""
    with pytest.raises(Stopped) as stopped, Interrupt(at_once=True), suppress(Exception):
        terminate()
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("the disk is full")])
def test_a_clean_up_that_fails_after_a_signal_does_not_hide_the_signal(error: Exception) -> None:
    with pytest.raises(Stopped) as stopped, Interrupt(at_once=True):
        terminated_with_clean_up(error)
    assert stopped.value.exit_code == 143


def terminated_with_clean_up(error: Exception) -> None:
    try:
        terminate()
    finally:
        fail_wrapped(error)


def fail_wrapped(error: Exception) -> None:
    """As our own code does: what the system said is told as ours."""
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        raise error  # noqa: B904


def test_an_error_without_a_signal_is_what_it_is() -> None:
    with pytest.raises(RunError), Interrupt(at_once=True):
        fail_wrapped(RunError("the disk is full"))


def test_the_handlers_of_before_are_back_after_a_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    list(trainer(tmp_path, "train.max_steps=1"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(Killed):
        run_until(trainer(tmp_path), 9, die)
    newest = checkpoint.published(tmp_path / "checkpoints")[-1]
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    said: list[dict[str, Any]] = []
    resumed = trainer(tmp_path, emit=said.append)
    assert 0 < resumed.resumed_from < int(newest.name[-8:])
    assert "optimizer.safetensors" in said[0]["text"]
    list(resumed)
    assert figures(tmp_path) == figures(whole)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    list(trainer(tmp_path))
    before = state(tmp_path), figures(tmp_path)
    again = trainer(tmp_path)
    assert list(again) == []
    assert again.resumed_from == 12
    assert (state(tmp_path), figures(tmp_path)) == before


class Small(tiny.Around):
    """A model on a device that holds `most` tokens, and fails forward or backward with more. Not the first `spared`
    times, so that half-made gradients are there when it does."""

    def __init__(self, recipe: Any, most: int, error: Exception, where: str, spared: int = 0) -> None:
        self.model = tiny.model(recipe)
        self.adapter, self.most, self.error, self.where, self.spared = self.model.adapter, most, error, where, spared

    def loss(self, micro: Any) -> torch.Tensor:
        loss = self.model.loss(micro)
        if len(micro.ids) <= self.most:
            return loss
        if self.spared:
            self.spared -= 1
        elif self.where == "forward":
            raise self.error
        else:
            loss.register_hook(self._fail)
        return loss

    def _fail(self, gradient: torch.Tensor) -> None:
        raise self.error


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError(ALLOCATOR),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_running_out_of_memory_redoes_the_same_step_in_smaller_pieces(
    tmp_path: Path, error: Exception, where: str
) -> None:
    recipe = tiny.recipe("train.max_steps=6")
    calm = list(tiny.trainer(tmp_path / "calm", recipe, micro_tokens=1000))
    small = tiny.trainer(tmp_path / "small", recipe, micro_tokens=60, causal=Small(recipe, 30, error, where, spared=1))
    steps = list(small)
    assert small.progress.micro_tokens <= 30
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in calm], rel=1e-6)


def test_the_smaller_budget_outlives_the_process(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.max_steps=6")
    small = tiny.trainer(tmp_path, recipe, micro_tokens=1000, causal=Small(recipe, 50, MemoryError(), "forward"))
    list(small)
    assert tiny.trainer(tmp_path, recipe, micro_tokens=1000).progress.micro_tokens == small.progress.micro_tokens


def test_a_row_that_does_not_fit_by_itself_is_named(tmp_path: Path) -> None:
    recipe = tiny.recipe()
    with pytest.raises(MemoryPlanError, match=r"rows\.jsonl:\d+: a row of \d+ tokens"):
        list(tiny.trainer(tmp_path, recipe, causal=Small(recipe, 4, MemoryError(), "forward")))


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    recipe = tiny.recipe()
    with pytest.raises(RuntimeError, match="something else"):
        list(tiny.trainer(tmp_path, recipe, causal=Small(recipe, 4, RuntimeError("something else"), "forward")))


class Judged(tiny.Around):
    """A model whose evaluation losses are given."""

    def __init__(self, recipe: Any, losses: list[float]) -> None:
        self.model = tiny.model(recipe)
        self.adapter, self.losses = self.model.adapter, losses

    def loss(self, micro: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self.model.loss(micro)
        return torch.tensor(self.losses[micro.step // 2 - 1]) * len(micro.targets)


def test_the_best_weights_are_kept_however_long_ago_they_were(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=4", "evaluate.every=2", "run.save.every=2", "run.save.keep=1")
    causal = Judged(recipe, [3.0, 1.0, 2.0, 1.5, 1.2, 1.1])
    run = tiny.trainer(tmp_path, recipe, held=3, causal=causal)
    for step in run:
        if step.step == 4:
            best = {name: tensor.clone() for name, tensor in run.adapter.state_dict().items()}
    assert run.progress.best_step == 4
    assert not all(torch.equal(best[name], tensor) for name, tensor in run.adapter.state_dict().items())
    run.keep_best()
    assert all(torch.equal(best[name], tensor) for name, tensor in run.adapter.state_dict().items())


def test_training_stops_early_for_want_of_improvement(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=4", "evaluate.every=2", "data.heldout.rows=3", "train.patience=2")
    run = tiny.trainer(tmp_path, recipe, held=3, causal=Judged(recipe, [3.0, 1.0, 2.0, 1.5, 0.5, 0.1]))
    assert [step.step for step in run][-1] == 8
    assert run.finished
