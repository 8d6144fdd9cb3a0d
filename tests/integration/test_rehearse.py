"""Promise 2: the worst step is run before the first one, and changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from luthier.errors import MemoryPlanError
from luthier.train.loop import Trainer
from luthier.train.rehearse import rehearse, worst


def state(trainer: Trainer) -> list[Any]:
    found: list[Any] = [p.detach().clone() for p in trainer.adapter.parameters()]
    found.append(torch.get_rng_state())
    for values in trainer.optimizer.state.values():
        found += [copy.deepcopy(value) for value in values.values()]
    return [*found, [group["lr"] for group in trainer.optimizer.param_groups], trainer.progress]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_rehearsal_changes_no_bit(tmp_path: Path, steps: int) -> None:
    trainer = tiny.trainer(tmp_path, tiny.recipe("train.weight_decay=0.1"))
    for _ in range(steps):
        trainer.step()
    before = state(trainer)
    assert rehearse(trainer) > 0
    assert same(state(trainer), before)
    assert not trainer.gradient.any()


def test_training_after_a_rehearsal_is_training_without_one(tmp_path: Path) -> None:
    losses = []
    for name in ("with", "without"):
        trainer = tiny.trainer(tmp_path / name, tiny.recipe())
        trainer.step()
        if name == "with":
            rehearse(trainer)
        losses.append([trainer.step().loss for _ in range(2)])
    assert losses[0] == losses[1]


def test_the_worst_micro_batch_is_full_of_longest_rows_and_all_supervised(tmp_path: Path) -> None:
    store = tiny.rows(tmp_path)
    longest = int(store.lengths.max())
    micro = worst(store, 2 * longest + 3)
    assert micro.bounds == (0, longest, 2 * longest, 2 * longest + 3)
    assert len(micro.rows) == len(micro.ids) - 3
    assert torch.equal(micro.targets, micro.ids[micro.rows + 1])
    assert not torch.equal(micro.ids[:longest], micro.ids[longest : 2 * longest])


class Small(tiny.Around):
    """A model for which `room` tokens are the most that memory holds."""

    def __init__(self, model: Any, room: int) -> None:
        self.model, self.room, self.adapter = model, room, model.adapter

    def loss(self, micro: Any) -> Tensor:
        if len(micro.ids) > self.room:
            raise MemoryError
        loss: Tensor = self.model.loss(micro)
        return loss


def test_a_rehearsal_that_runs_out_of_memory_halves_the_budget_before_anything_is_trained(tmp_path: Path) -> None:
    chosen = tiny.recipe()
    trainer = tiny.trainer(tmp_path, chosen, micro_tokens=96, causal=Small(tiny.model(chosen), room=50))
    weights = [p.detach().clone() for p in trainer.adapter.parameters()]
    rehearse(trainer)
    assert trainer.progress.micro_tokens == 48
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.adapter.parameters(), strict=True))


class Tight(Small):
    """One that can make room for a few tokens more."""

    steps = 3

    def keep_less(self, free: Any) -> bool:
        if "recompute" not in free:
            return False
        self.steps -= 1
        self.room += 10
        return self.steps >= 0


@pytest.mark.parametrize(("recompute", "tokens"), [("auto", 96), ("false", 48)])
def test_a_rehearsal_that_runs_out_of_memory_keeps_less_first_where_the_recipe_lets_it(
    tmp_path: Path, recompute: str, tokens: int
) -> None:
    chosen = tiny.recipe(f"run.recompute={recompute}")
    trainer = tiny.trainer(tmp_path, chosen, micro_tokens=96, causal=Tight(tiny.model(chosen), room=70))
    rehearse(trainer)
    assert trainer.progress.micro_tokens == tokens


def test_a_row_that_never_fits_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    chosen = tiny.recipe()
    trainer = tiny.trainer(tmp_path, chosen, micro_tokens=96, causal=Small(tiny.model(chosen), room=5))
    with pytest.raises(MemoryPlanError, match=r"rows\.jsonl"):
        rehearse(trainer)
