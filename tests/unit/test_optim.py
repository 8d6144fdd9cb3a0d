"""Learning rates, AdamW, and one buffer for all gradients."""

import math
from itertools import pairwise

import pytest
import torch
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
        for group in adamw.param_groups:
            group["lr"] = 0.1 * group["times"]  # as the loop does
        for _, weight in named:
            weight.grad = torch.ones(3)
        adamw.step()
        moved[times] = [-weight.detach()[0].item() for _, weight in named]
    assert moved[1.0] == pytest.approx([0.1] * 4)
    assert moved[4.0] == pytest.approx([0.1, 0.4, 0.1, 0.4])


def test_the_moments_go_round_trip() -> None:
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    first, second = (optim.optimizer([(str(w.shape), w) for w in weights], Train()) for _ in range(2))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    first.step()
    optim.restore(second, optim.moments(first))
    old, new = optim.moments(first), optim.moments(second)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_gradients_are_parts_of_one_buffer_that_backward_adds_to() -> None:
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(5))]
    flat = optim.flat_gradient(weights)
    for _ in range(2):
        (weights[0].sum() * 2 + weights[1].sum() * 3).backward()
    assert flat.tolist() == [4.0] * 6 + [6.0] * 5


def test_only_the_adapter_is_given_to_the_optimizer() -> None:
    model = tiny.model(tiny.recipe())
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    assert model.lora is not None
    assert {id(p) for p in model.lora.parameters()} == trained
