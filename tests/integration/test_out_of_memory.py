"""Promise 2, everywhere: whichever operation of a pass finds no memory, its step is made again and learns the same, and
a held-out loss is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from luthier.data.stream import Micro
from luthier.errors import MemoryPlanError
from luthier.model.causal import CausalModel, Kernels
from luthier.train.engines.local import Local
from scarce import Scarce, Small


class Watched:
    """A model of whose passes those of one step find memory scarce."""

    def __init__(self, model: CausalModel, step: int, memory: Scarce | Small) -> None:
        self.model, self.step, self.memory = model, step, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def accumulate(self, micro: Micro, scale: float) -> Tensor:
        if micro.step != self.step:
            return self.model.accumulate(micro, scale)
        with self.memory:
            return self.model.accumulate(micro, scale)

    def loss(self, micro: Micro) -> Tensor:
        """Of held-out rows."""
        with self.memory:
            return self.model.loss(micro)


def learned(folder: Path, kernels: Kernels, step: int, at: int, ahead: bool = False) -> tuple[Tensor, int]:
    """All of the adapter's values after two steps, and how many operations the passes of `step` had."""
    recipe, memory = tiny.recipe("train.max_steps=2"), Scarce(at)
    causal = Watched(tiny.model(recipe, kernels=kernels, recompute=True), step, memory)
    trainer = tiny.trainer(folder, recipe, micro_tokens=24, causal=causal)
    trainer.ahead = ahead
    halved = [trainer.step().step for _ in range(2)] and trainer.progress.micro_tokens < 24
    assert halved == (0 <= at < memory.count and not ahead)
    return torch.cat([tensor.flatten() for tensor in trainer.adapter.state_dict().values()]), memory.count


@pytest.mark.parametrize("kernels", ["reference", "eager"])
@pytest.mark.parametrize("step", [0, 1])
def test_wherever_memory_runs_out_the_same_is_learned(tmp_path: Path, kernels: Kernels, step: int) -> None:
    wanted, count = learned(tmp_path / "whole", kernels, step, at=-1)
    # The first operations of a run lay out what later ones find, and the last of a pass hand its gradients over.
    for at in sorted({*range(0 if step else 8), *range(0, count, count // 5), count - 1}):
        found, _ = learned(tmp_path / str(at), kernels, step, at)
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), at


def test_a_step_that_was_begun_ahead_and_found_no_memory_is_begun_anew(tmp_path: Path) -> None:
    wanted, count = learned(tmp_path / "whole", "eager", 1, at=-1, ahead=True)
    for at in (0, count // 20):  # of the first micro-batch
        found, operations = learned(tmp_path / str(at), "eager", 1, at, ahead=True)
        assert operations > count  # it was tried again, and found memory
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), at


def held_out_loss(folder: Path, kernels: Kernels, at: int) -> tuple[float, int]:
    """That of a model that learned nothing, and how many operations its passes had."""
    recipe, memory, notes = tiny.recipe("train.samples_per_step=2"), Scarce(at), list[Any]()
    causal = Watched(tiny.model(recipe, kernels=kernels), 0, memory)
    trainer = tiny.trainer(folder, recipe, micro_tokens=64, causal=causal, held=12, emit=notes.append)  # 8, and 4
    trainer.evaluate()
    tokens, said = trainer.progress.micro_tokens, [note["text"] for note in notes if note["event"] == "note"]
    assert said == ([f"out of memory; from here on {tokens} tokens at a time"] if at >= 0 else [])
    assert tokens <= (32 if at >= 0 else 64)
    assert trainer.progress.best_loss is not None
    return trainer.progress.best_loss, memory.count


@pytest.mark.parametrize("kernels", ["reference", "eager"])
def test_wherever_memory_runs_out_the_held_out_loss_is_the_same(tmp_path: Path, kernels: Kernels) -> None:
    wanted, count = held_out_loss(tmp_path / "whole", kernels, at=-1)
    for at in sorted({*range(4), *range(0, count, count // 6), count - 1}):
        found, _ = held_out_loss(tmp_path / str(at), kernels, at)
        assert found == pytest.approx(wanted, rel=1e-6), at


class Elsewhere(Local):
    """Another process of the run finds no memory, once, and says no `times` times where this one says yes."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times

    def highest(self, value: int) -> int:
        if value is False and self.times:
            self.times -= 1
            return True
        return value


def test_a_process_takes_a_held_out_loss_again_where_another_one_has_to(tmp_path: Path) -> None:
    alone, one_of_two = (
        tiny.trainer(tmp_path / name, tiny.recipe(), micro_tokens=64, held=9, engine=engine)
        for name, engine in (("alone", Local()), ("two", Elsewhere()))
    )
    alone.evaluate(), one_of_two.evaluate()
    assert one_of_two.progress.micro_tokens < alone.progress.micro_tokens
    assert one_of_two.progress.best_loss == pytest.approx(alone.progress.best_loss, rel=1e-6)


def test_a_row_that_does_not_fit_by_itself_is_named_with_what_helps(tmp_path: Path) -> None:
    def told(recompute: str, learns: bool) -> str:
        recipe = tiny.recipe(f"run.recompute={recompute}")
        causal = Watched(tiny.model(recipe), 0, Small(0))
        trainer = tiny.trainer(tmp_path, recipe, causal=causal, held=9)
        with pytest.raises(MemoryPlanError, match=r"rows\.jsonl:\d+: a row of \d+ tokens does not fit") as raised:
            trainer.step() if learns else trainer.evaluate()
        return raised.value.fix

    assert told("auto", learns=True) == "set data.length lower, or run.recompute=true"
    assert told("true", learns=True) == "set data.length lower"
    # Held-out rows are read without gradients: there is nothing to recompute.
    assert told("auto", learns=False) == "set data.length lower, or close other programs"


@pytest.mark.parametrize(("times", "fewer"), [(1, False), (2, True)])
def test_all_processes_take_fewer_tokens_where_one_has_nothing_else_to_let_go(
    times: int, fewer: bool, tmp_path: Path
) -> None:
    class Full(Watched):
        def keep_less(self, free: Any) -> bool:
            return True

    recipe, engine = tiny.recipe(), Elsewhere(times)
    causal = Full(tiny.model(recipe), 0, Scarce(-1))
    trainer = tiny.trainer(tmp_path, recipe, micro_tokens=64, causal=causal, held=9, engine=engine)
    trainer.evaluate()
    assert engine.times == 0
    assert (trainer.progress.micro_tokens < 64) == fewer
