"""Promise 4: a non-finite loss moves nothing, and the run says which rows it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier.errors import ModelError, NotFiniteError
from luthier.model.finite import blaming_weights
from luthier.train import checkpoint, optim
from luthier.train.launch import train


class Poisoned(tiny.Around):
    """A model for which the loss of sample 26 (of the fourth step), or if `sample` is None that step's gradient, is
    `value`."""

    def __init__(self, recipe: Any, value: float, sample: int | None) -> None:
        self.model = tiny.model(recipe)
        self.adapter, self.dtype, self.value, self.sample = self.model.adapter, self.model.dtype, value, sample

    def loss(self, micro: Any) -> torch.Tensor:
        loss = self.model.loss(micro)
        if self.sample is None and micro.step == 3 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * self.value)
        return loss * (self.value if self.sample in micro.samples.tolist() else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_tokens", [8, 1000])
def test_the_run_stops_before_the_update_and_names_the_row(tmp_path: Path, value: float, micro_tokens: int) -> None:
    recipe = tiny.recipe("train.epochs=4", "run.save.every=2")
    run = tiny.trainer(tmp_path, recipe, causal=Poisoned(recipe, value, sample=26), micro_tokens=micro_tokens)
    guilty = run.stream.step(3)[2]
    assert guilty.index == 26
    steps = iter(run)
    for _ in range(3):
        next(steps)
    weights, moments = _copies(run.adapter.state_dict()), _copies(optim.moments(run.optimizer))
    with pytest.raises(NotFiniteError, match="step 4 ") as raised:
        next(steps)
    assert raised.value.where == str(run.stream.store.origin(guilty.row))
    assert _equal(weights, run.adapter.state_dict())
    assert _equal(moments, optim.moments(run.optimizer))
    assert run.progress.step == 3


def test_a_gradient_that_is_not_finite_names_all_rows_of_the_step(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=4")
    run = tiny.trainer(tmp_path, recipe, causal=Poisoned(recipe, math.nan, sample=None))
    with pytest.raises(NotFiniteError, match="gradient norm nan") as raised:
        list(run)
    assert raised.value.where.count("rows.jsonl:") == 8


def test_the_last_checkpoint_is_sound_and_the_log_ends_before_the_step(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=4", "run.save.every=2")
    run = tiny.trainer(tmp_path, recipe, causal=Poisoned(recipe, math.nan, sample=26))
    with pytest.raises(NotFiniteError):
        list(run)
    found = checkpoint.newest(tmp_path / "checkpoints", pytest.fail)
    assert found is not None
    assert found.progress.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in found.adapter.values())
    assert "nan" not in (tmp_path / "metrics.jsonl").read_text().lower()


class Unheld(tiny.Around):
    """A model for which the held-out row 3 has a loss that is `value`, until step 6."""

    def __init__(self, recipe: Any, value: float) -> None:
        self.model = tiny.model(recipe)
        self.adapter, self.dtype, self.value = self.model.adapter, self.model.dtype, value

    def loss(self, micro: Any) -> torch.Tensor:
        poisoned = not torch.is_grad_enabled() and 3 in micro.samples.tolist() and micro.step < 6
        return self.model.loss(micro) * (self.value if poisoned else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_names_its_rows_and_is_never_the_best(tmp_path: Path, value: float) -> None:
    recipe = tiny.recipe("train.epochs=3", "evaluate.every=2", "data.heldout.rows=5", "train.patience=4")
    said: list[str] = []
    emit = lambda event: said.append(event.get("text", ""))  # noqa: E731
    run = tiny.trainer(tmp_path, recipe, held=5, causal=Unheld(recipe, value), emit=emit)
    assert [step.step for step in run][-1] == 9
    assert run.progress.best_step in (6, 8, 9)
    named = [f"the held-out loss is {value}, which judges no weights; look at rows.jsonl:4"]
    assert [text for text in said if text] == named  # once, though two evaluations met it
    records = [json.loads(line, parse_constant=pytest.fail) for line in run.journal.path.read_text().splitlines()]
    assert [record["eval_loss"] for record in records if "eval_loss" in record][:2] == [None, None]


class Narrow(torch.autograd.Function):
    """What float16 does to a gradient: above `most` nothing is left of it."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, most: float) -> torch.Tensor:
        ctx.most = most
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.where(gradient.abs() > ctx.most, math.inf, gradient), None


class Overflowing(tiny.Around):
    dtype = torch.float16

    def __init__(self, recipe: Any, most: float) -> None:
        self.model = tiny.model(recipe)
        self.adapter, self.most = self.model.adapter, most

    def loss(self, micro: Any) -> torch.Tensor:
        loss: torch.Tensor = Narrow.apply(self.model.loss(micro), self.most if micro.step >= 2 else math.inf)
        return loss


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gradient_out_of_float16_s_range_is_scaled_and_its_step_redone(tmp_path: Path, ahead: bool) -> None:
    """The scale is a power of two, so that in float32 the run is the one without an overflow, bit for bit."""
    recipe = tiny.recipe("train.epochs=2")
    plain = tiny.trainer(tmp_path / "plain", recipe)
    scaled = tiny.trainer(tmp_path / "scaled", recipe, causal=Overflowing(recipe, most=2.0**-7))
    scaled.ahead = ahead
    assert [step.loss for step in plain] == [step.loss for step in scaled]
    assert scaled.progress.scale == 2.0**-8
    assert _equal(plain.adapter.state_dict(), scaled.adapter.state_dict())
    resumed = tiny.trainer(tmp_path / "scaled", recipe, causal=Overflowing(recipe, most=2.0**-7))
    assert resumed.progress.scale == 2.0**-8


def test_a_loss_that_is_not_finite_is_not_tried_again_with_other_scales(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=2")
    poisoned = Poisoned(recipe, math.nan, sample=26)
    poisoned.dtype = torch.float16
    run = tiny.trainer(tmp_path, recipe, causal=poisoned)
    with pytest.raises(NotFiniteError, match="step 4 "):
        list(run)
    assert run.progress.scale == 1


def test_no_scale_saves_a_gradient_that_is_never_finite(tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=2")
    with pytest.raises(NotFiniteError, match="step 3 "):
        list(tiny.trainer(tmp_path, recipe, causal=Overflowing(recipe, most=0.0)))


@pytest.mark.parametrize("kernels", ["reference", "eager"])
def test_a_run_in_float16_learns_what_one_in_float32_does_from_whatever_scale(tmp_path: Path, kernels: Any) -> None:
    recipe = tiny.recipe("train.epochs=2")
    exact = tiny.trainer(tmp_path / "exact", recipe, causal=tiny.model(recipe, kernels=kernels))
    half = tiny.trainer(tmp_path / "half", recipe, causal=tiny.model(recipe, kernels=kernels, dtype=torch.float16))
    half.progress.scale = 2.0**24  # beyond float16 itself
    begin = _copies(exact.adapter.state_dict())
    losses = [step.loss for step in exact]
    assert [step.loss for step in half] == pytest.approx(losses, rel=1e-3)
    assert 1 < half.progress.scale < 2.0**16
    changes = [torch.cat([(x - begin[k]).flatten() for k, x in t.adapter.state_dict().items()]) for t in (exact, half)]
    assert (changes[0] - changes[1]).norm() < 0.1 * changes[0].norm()


def poisoned(folder: Path, value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
    """The tiny base, one value of one weight replaced."""
    path = tiny.base(folder) / "model.safetensors"
    weights = load_file(path)
    weights[name][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "how", ["run.kernels=eager", "model.quantize={kind: nf4}", "model.quantize={kind: int8}", "adapter.init=pissa"]
)
def test_a_base_that_is_not_finite_is_blamed_itself_and_not_the_rows(tmp_path: Path, value: float, how: str) -> None:
    poisoned(tmp_path / "base", value)
    tiny.sums(tmp_path / "sums.jsonl")
    message = r"model\.safetensors: the base itself holds .*not finite: 1 of 1,536 in model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(ModelError, match=message):
        train(tiny.run(tmp_path, "run.kernels=auto", how), progress=lambda event: None)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_weight_beyond_the_range_of_the_compute_dtype_is_named(tmp_path: Path) -> None:
    folder = poisoned(tmp_path / "base", 1e6)
    large = pytest.raises(ModelError, match=r"up_proj\.weight has values that are too large for float16; set model")
    with large, blaming_weights(folder, torch.float16):
        raise NotFiniteError("loss nan")
    with pytest.raises(NotFiniteError, match="loss nan"), blaming_weights(folder, torch.float32):
        raise NotFiniteError("loss nan")


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
