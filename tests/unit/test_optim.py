"""Learning rates, AdamW, and one buffer for all gradients."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import tiny
from luthier.recipe import Train
from luthier.train import optim

STEPS = 50


def curve(**options: object) -> list[float]:
    train = Train(**{"lr": 1.0, "warmup": 0, **options})  # type: ignore[arg-type]
    return [optim.rate(train, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_starts_at_the_rate_and_never_rises_or_reaches_zero(schedule: str) -> None:
    rates = curve(schedule=schedule)
    assert rates[0] == 1.0
    assert all(a >= b > 0 for a, b in pairwise(rates))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [10, 0.2])
def test_warm_up_rises_in_equal_steps_to_the_rate(schedule: str, warmup: float) -> None:
    rates = curve(schedule=schedule, warmup=warmup)
    assert rates[:11] == pytest.approx([*[(i + 1) / 10 for i in range(10)], 1.0])


def test_linear_falls_by_the_same_amount_each_step() -> None:
    assert curve(schedule="linear") == pytest.approx([1 - i / STEPS for i in range(STEPS)])


def test_cosine_is_at_half_the_rate_half_way() -> None:
    assert curve(schedule="cosine")[STEPS // 2] == pytest.approx(0.5)


def test_wsd_is_flat_and_then_falls_over_its_share_of_the_steps() -> None:
    rates = curve(schedule="wsd", decay=0.2)
    assert rates[:41] == [1.0] * 41
    assert rates[40:] == pytest.approx([i / 10 for i in range(10, 0, -1)])


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    train = Train(lr=1.0, warmup=100)
    assert [optim.rate(train, step, 3) for step in range(3)] == pytest.approx([0.01, 0.02, 0.03])


def test_adamw_follows_its_paper() -> None:
    """Two updates of one weight, by hand: decoupled decay, bias-corrected moments."""
    weight = nn.Parameter(torch.tensor([2.0]))
    adamw = optim.optimizer([("w", weight)], Train(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)))
    expected, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate((3.0, -1.0), start=1):
        weight.grad = torch.tensor([gradient])
        adamw.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        expected -= 0.1 * 0.5 * expected
        expected -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_lora_plus_moves_b_by_its_multiple_of_a_s_rate() -> None:
    moved = {}
    for times in (1.0, 4.0):
        named = [(f"x.lora_{side}.weight", nn.Parameter(torch.zeros(3))) for side in "ABAB"]
        adamw = optim.optimizer(named, Train(lr=0.1, lora_plus=times))
        for _, weight in named:
            weight.grad = torch.ones(3)
        optim.update(adamw, 0.1)
        moved[times] = [-weight.detach()[0].item() for _, weight in named]
    assert moved[1.0] == pytest.approx([0.1] * 4)
    assert moved[4.0] == pytest.approx([0.1, 0.4, 0.1, 0.4])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_moments_go_round_trip_and_the_next_update_is_the_same(name: str) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    # More than 4,096 values, so that eight bits are used at all.
    starts = [torch.randn(64, 80), torch.randn(80, 64), torch.randn(4)]
    one, two = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    first, second = (optim.optimizer([(str(w.shape), w) for w in ws], Train(optimizer=name)) for ws in (one, two))
    gradients = [[torch.randn_like(w) for w in starts] for _ in range(2)]
    _update(first, one, gradients[0])
    saved = load(save(optim.moments(first)))  # as a checkpoint does
    for old, new in zip(one, two, strict=True):
        new.data.copy_(old.data)
    optim.restore(second, saved)
    assert (
        (saved["0.state1"].dtype == torch.uint8)
        if "8bit" in name
        else all(t.dtype != torch.uint8 for t in saved.values())
    )
    for optimizer, weights in ((first, one), (second, two)):
        _update(optimizer, weights, gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    old, new = optim.moments(first), optim.moments(second)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def _update(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    optimizer.step()


def test_moments_are_not_paged_on_a_cpu_and_the_run_says_so() -> None:
    pytest.importorskip("bitsandbytes")
    said: list[str] = []
    made = optim.optimizer([("w", nn.Parameter(torch.ones(3)))], Train(optimizer="paged_adamw_32bit"), said.append)
    assert type(made).__name__ == "AdamW32bit"
    assert "only a GPU's memory is paged" in said[0]


def test_without_bitsandbytes_plain_adamw_takes_the_place_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # what a missing module looks like to the importer
    said: list[str] = []
    made = optim.optimizer([("w", nn.Parameter(torch.ones(3)))], Train(optimizer="paged_adamw_8bit"), said.append)
    assert type(made) is torch.optim.AdamW
    assert "train.optimizer=paged_adamw_8bit needs bitsandbytes" in said[0]


def test_gradients_are_parts_of_one_buffer_that_backward_adds_to() -> None:
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(5))]
    flat = optim.flat_gradient(zip("ab", weights, strict=True))
    for _ in range(2):
        (weights[0].sum() * 2 + weights[1].sum() * 3).backward()
    assert flat.tolist() == [4.0] * 6 + [6.0] * 5


def test_gradients_of_every_B_lie_behind_those_of_every_A() -> None:
    weights = [nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0, 3.0, 4.0)]
    names = ["x.lora_A.weight", "x.lora_B.weight", "y.lora_A.weight", "y.lora_B.weight"]
    flat = optim.flat_gradient(zip(names, weights, strict=True))
    sum((w.square() / 2).sum() for w in weights).backward()  # type: ignore[union-attr]
    assert flat.tolist() == [1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 4.0, 4.0]


def test_only_the_adapter_is_given_to_the_optimizer() -> None:
    model = tiny.model(tiny.recipe())
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    assert model.adapter is not None
    assert {id(p) for p in model.adapter.parameters()} == trained
