"""Promise 1: a step is a set of samples. How it is cut never changes what is learned, dropout included."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from luthier.data.stream import Sample, collate
from luthier.train import optim
from luthier.train.engines.local import Local
from luthier.train.launch import train
from luthier.train.step import Step

STEPS = 8
WHOLE = 10_000  # tokens: all rows of a step in one micro-batch
ALONE = 8  # tokens: every row by itself, that is, unpacked


def losses(folder: Path, **options: Any) -> list[Step]:
    recipe = tiny.recipe(f"train.max_steps={STEPS}", f"adapter.dropout={options.pop('dropout', 0.1)}")
    how = {name: options.pop(name) for name in ("kernels", "recompute") if name in options}
    return list(tiny.trainer(folder, recipe, causal=tiny.model(recipe, **how), **options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    return losses(tmp_path_factory.mktemp("whole"), micro_tokens=WHOLE)


@pytest.mark.parametrize(
    ("micro_tokens", "recompute", "micro_batches"),
    [(60, False, {2, 3}), (ALONE, False, {8}), (60, True, {2, 3}), (WHOLE, True, {1})],
    ids=["three rows a micro-batch", "unpacked", "recomputed", "whole and recomputed"],
)
def test_the_cut_of_a_step_does_not_change_what_is_learned(
    tmp_path: Path, whole: list[Step], micro_tokens: int, recompute: bool, micro_batches: set[int]
) -> None:
    cut = losses(tmp_path, micro_tokens=micro_tokens, recompute=recompute)
    assert {step.micro_batches for step in cut} <= micro_batches
    assert [step.loss for step in cut] == pytest.approx([step.loss for step in whole], rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_tokens", [60, WHOLE])
def test_our_block_learns_what_the_transformers_module_learns(
    tmp_path: Path, whole: list[Step], micro_tokens: int, recompute: bool
) -> None:
    ours = losses(tmp_path, micro_tokens=micro_tokens, kernels="eager", recompute=recompute)
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in whole], rel=1e-6)


def test_dropout_is_on_and_matters(tmp_path: Path, whole: list[Step]) -> None:
    """Without this the tests above would hold for want of noise."""
    without = losses(tmp_path, micro_tokens=WHOLE, dropout=0.0)
    assert max(abs(a.loss - b.loss) for a, b in zip(without, whole, strict=True)) > 1e-3


def test_the_gradient_of_a_cut_step_is_that_of_the_whole_step(tmp_path: Path) -> None:
    gradients = []
    for tokens in (WHOLE, 60, ALONE):
        trainer = tiny.trainer(tmp_path / str(tokens), tiny.recipe("train.max_norm=null"), micro_tokens=tokens)
        for _ in range(3):  # past the first step, where A has no gradient yet
            trainer.step()
        gradients.append(trainer.gradient.clone())
    scale = gradients[0].norm()
    assert all(torch.linalg.vector_norm(g - gradients[0]) / scale < 1e-5 for g in gradients[1:])


@pytest.mark.parametrize("path", ["packed", "padded", "eager", "compiled"])
def test_a_micro_batch_in_which_nothing_is_supervised_adds_nothing(tmp_path: Path, path: Any) -> None:
    """As the share of one process, or a cut, may be."""
    model = tiny.model(tiny.recipe(), kernels=path if path in ("eager", "compiled") else "reference")
    model.layout = path if path == "padded" else "packed"
    assert model.adapter is not None
    gradient = optim.flat_gradient(model.adapter.named_parameters())
    micro = collate(tiny.rows(tmp_path), [Sample(row, row, epoch=0) for row in range(4)], step=0)
    model.accumulate(model.ready(micro), 1.0)
    before, bare = gradient.clone(), replace(micro, rows=micro.rows[:0], targets=micro.targets[:0])
    assert model.accumulate(model.ready(bare), 1.0) == 0
    assert torch.equal(gradient, before)
    assert before.any()
    with torch.no_grad(), model.adapter.disabled():
        assert model.loss(bare) == 0


class Counting(Local):
    """One process, that counts how often a step's rows are packed."""

    packed = 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        self.packed += 1
        return super().share(lengths)


def test_the_rows_of_the_next_step_are_packed_before_a_step_ends_and_no_step_s_twice(tmp_path: Path) -> None:
    engine = Counting()
    trainer = tiny.trainer(tmp_path, tiny.recipe("train.max_steps=3"), engine=engine)
    assert [(step.step, engine.packed) for step in trainer] == [(1, 2), (2, 3), (3, 3)]


def test_what_was_made_ready_ahead_of_its_turn_is_learned_as_what_was_not(tmp_path: Path) -> None:
    model = tiny.model(tiny.recipe(), kernels="eager")
    micro = collate(tiny.rows(tmp_path), [Sample(row, row, epoch=0) for row in range(4)], step=0)
    ready = model.ready(micro)
    assert len(ready.ids) == len(micro.ids) - 4  # nobody sees the last token of a row
    assert model.ready(ready) is ready
    assert torch.equal(model.loss(ready), model.loss(micro))


def test_a_mean_of_means_would_fail_this(tmp_path: Path, whole: list[Step]) -> None:
    """The usual mistake, dividing each micro-batch by its own targets, is far outside the tolerance."""

    class MeanOfMeans(tiny.Around):
        def __init__(self, model: Any) -> None:
            self.model, self.adapter = model, model.adapter

        def loss(self, micro: Any) -> torch.Tensor:
            loss: torch.Tensor = self.model.loss(micro)
            return loss / len(micro.targets) * 20

    recipe = tiny.recipe(f"train.max_steps={STEPS}")
    runs = [
        list(tiny.trainer(tmp_path / str(n), recipe, causal=MeanOfMeans(tiny.model(recipe)), micro_tokens=n))
        for n in (WHOLE, ALONE)
    ]
    assert [a.loss for a in runs[0]] != pytest.approx([b.loss for b in runs[1]], rel=1e-3)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    one = tiny.run(tmp_path, f"run.dir={tmp_path / 'one'}")
    two = tiny.run(tmp_path, f"run.dir={tmp_path / 'two'}", "run.engine=ddp", "run.processes=2")
    results = [train(run) for run in (one, two)]
    curves = [[record["loss"] for record in run.steps() if "loss" in record] for run in (one, two)]
    held = [[record["eval_loss"] for record in run.steps() if "eval_loss" in record] for run in (one, two)]
    assert results[0]["steps"] == results[1]["steps"] == len(curves[0])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert held[1] == pytest.approx(held[0], rel=1e-6)
    assert [r["tokens"] for r in one.steps() if "loss" in r] == [r["tokens"] for r in two.steps() if "loss" in r]
