"""On a GPU a step is begun before the one before it is told: that changes when it is computed, and not what."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from luthier.data.stream import Micro
from luthier.errors import Stopped
from luthier.train.loop import Trainer


class Told(tiny.Around):
    """Notes which steps its micro-batches are of."""

    def __init__(self, model: Any) -> None:
        self.model, self.adapter, self.dtype, self.steps = model, model.adapter, model.dtype, list[int]()

    def loss(self, micro: Micro) -> Tensor:
        return self.model.loss(micro)

    def accumulate(self, micro: Micro, scale: float) -> Tensor:
        self.steps.append(micro.step)
        return self.model.accumulate(micro, scale)


def started(folder: Path, *overrides: str, ahead: bool = True, **options: Any) -> tuple[Trainer, Told]:
    recipe = tiny.recipe("train.max_steps=6", *overrides)
    told = Told(tiny.model(recipe))
    trainer = tiny.trainer(folder, recipe, causal=told, **options)
    assert not trainer.ahead  # on a processor
    trainer.ahead = ahead
    return trainer, told


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in trainer.adapter.state_dict().values()])


@pytest.mark.parametrize("micro_tokens", [10_000, 60], ids=["one micro-batch", "several"])
def test_the_same_bits_are_learned(tmp_path: Path, micro_tokens: int) -> None:
    found = []
    for ahead in (True, False):
        trainer, told = started(tmp_path / str(ahead), ahead=ahead, micro_tokens=micro_tokens)
        steps = [trainer.step()]
        assert set(told.steps) == ({0, 1} if ahead else {0})
        steps += [trainer.step() for _ in range(5)]
        assert len(told.steps) == sum(step.micro_batches for step in steps)  # none of them twice
        found.append((weights(trainer), [(step.loss, step.grad_norm) for step in steps]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_step_is_begun_anew_where_its_cut_has_changed_since(tmp_path: Path) -> None:
    cut, told = started(tmp_path / "cut")
    cut.step()
    cut.progress.micro_tokens = 24
    cut.step()
    assert told.steps.count(1) > 2
    whole, _ = started(tmp_path / "whole", ahead=False)
    whole.step(), whole.step()
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-4, atol=1e-7)


def test_no_step_is_begun_before_an_evaluation_or_a_checkpoint(tmp_path: Path) -> None:
    seen = list[tuple[str, int]]()
    trainer, told = started(tmp_path, "evaluate.every=2", "run.save.every=3", held=4, emit=lambda event: note(event))

    def note(event: dict[str, Any]) -> None:
        seen.append((event["event"], max(told.steps)))

    assert len(list(trainer)) == 6
    begun = dict.fromkeys(range(1, 6), False)
    step = 0
    for name, reached in seen:
        step += name == "step"
        if name in ("evaluation", "checkpoint"):
            assert reached == max(0, step - 1), (name, step)
        elif name == "step" and step < 6:
            begun[step] = reached == step
    assert begun == {1: True, 2: False, 3: False, 4: False, 5: True}


def test_a_stopped_run_goes_on_as_if_it_never_had_been(tmp_path: Path) -> None:
    whole, _ = started(tmp_path / "whole", ahead=False)
    list(whole)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            trainer.interrupt.signal = signal.SIGTERM

    trainer, told = started(tmp_path / "stopped", emit=stop)
    with pytest.raises(Stopped):
        list(trainer)
    assert max(told.steps) == 3  # the fourth, of which nothing is kept
    resumed, _ = started(tmp_path / "stopped")
    assert resumed.resumed_from == 3
    list(resumed)
    assert torch.equal(weights(resumed), weights(whole))
    logged = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_seconds_of_steps_leave_nothing_out(tmp_path: Path) -> None:
    """What lasts between two steps is of the next one, which was begun before."""
    trainer, _ = started(tmp_path)
    trainer.step()
    time.sleep(0.3)
    assert trainer.step().seconds > 0.3
