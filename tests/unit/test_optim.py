"""Learning rates, AdamW, and one buffer for all gradients."""

import math
import sys
from itertools import pairwise
from typing import Any

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


Named = list[tuple[str, nn.Parameter]]
GO = torch.zeros(())


def made(named: Named, **options: Any) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """The gradient of the parameters, and what updates them."""
    gradient = optim.flat_gradient(named)
    return gradient, optim.optimizer(named, gradient, Train(**options))


def test_adamw_follows_its_paper() -> None:
    """Two updates of one weight, by hand: decoupled decay, bias-corrected moments."""
    weight = nn.Parameter(torch.tensor([2.0]))
    gradient, adamw = made([("w", weight)], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99))
    expected, m, v = 2.0, 0.0, 0.0
    for t, slope in enumerate((3.0, -1.0), start=1):
        gradient.fill_(slope)
        optim.update(adamw, 0.1, GO)
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        expected -= 0.1 * 0.5 * expected
        expected -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_lora_plus_moves_b_by_its_multiple_of_a_s_rate() -> None:
    moved = {}
    for times in (1.0, 4.0):
        named = [(f"x.lora_{side}.weight", nn.Parameter(torch.zeros(3))) for side in "ABAB"]
        gradient, adamw = made(named, lr=0.1, lora_plus=times)
        gradient.fill_(1.0)
        optim.update(adamw, 0.1, GO)
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
    (gradient, first), (other, second) = (made([(str(w.shape), w) for w in ws], optimizer=name) for ws in (one, two))
    optim.update(first, 0.1, GO)
    gradient.normal_()
    optim.update(first, 0.1, GO)
    saved = load(save(optim.moments(first)))  # as a checkpoint does
    for old, new in zip(one, two, strict=True):
        new.data.copy_(old.data)
    optim.restore(second, saved)
    assert (
        (saved["0.state1"].dtype == torch.uint8)
        if "8bit" in name
        else all(t.dtype != torch.uint8 for t in saved.values())
    )
    other.copy_(gradient.normal_())
    for optimizer in (first, second):
        optim.update(optimizer, 0.1, GO)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert same(optim.moments(first), optim.moments(second))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_moments_are_there_before_the_first_update(name: str) -> None:
    """So a rehearsal takes the memory that a step takes."""
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(64, 80))
    _, optimizer = made([("w", weight)], optimizer=name)
    begun = copies(optim.moments(optimizer))
    optim.update(optimizer, 0.1, GO)
    assert begun["0.step"] == 0
    assert {name: tensor.shape for name, tensor in begun.items()} == {
        name: tensor.shape for name, tensor in optim.moments(optimizer).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lora() -> Named:
    """Parameters as an adapter names and orders them: each A is followed by its B."""
    generator, shapes = torch.Generator().manual_seed(0), ((4, 32), (48, 4), (4, 48), (32, 4))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(f"{i // 2}.lora_{'AB'[i % 2]}.weight", nn.Parameter(value)) for i, value in enumerate(values)]


class Apart:
    """torch's AdamW of each parameter by itself, in groups as checkpoints count them, beside ours of equal values."""

    def __init__(self, times: float) -> None:
        options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
        self.apart, self.joined = lora(), lora()
        self.gradient, self.ours = made(self.joined, lora_plus=times, **options)
        A, B = ([p for name, p in self.apart if f"lora_{side}" in name] for side in "AB")
        groups = [[p for _, p in self.apart]] if times == 1.0 else [A, B]
        ways = [{"params": group, "lr": 0.1 * (1.0, times)[i]} for i, group in enumerate(groups)]
        self.theirs = torch.optim.AdamW(ways, **options, fused=True)  # type: ignore[arg-type]
        self.counted = [p for group in groups for p in group]

    def update(self) -> None:
        self.gradient.normal_()
        for (_, parameter), (_, twin) in zip(self.apart, self.joined, strict=True):
            assert twin.grad is not None
            parameter.grad = twin.grad.clone()
        self.theirs.step()
        optim.update(self.ours, 0.1, GO)

    def equal(self) -> bool:
        return all(torch.equal(p, twin) for (_, p), (_, twin) in zip(self.apart, self.joined, strict=True))

    def written(self) -> dict[str, torch.Tensor]:
        """What luthier wrote when it updated each parameter by itself."""
        states = enumerate(self.theirs.state[p] for p in self.counted)
        return {f"{i}.{name}": value.clone() for i, state in states for name, value in state.items()}


@pytest.mark.parametrize("times", [1.0, 4.0])
def test_updating_all_as_one_has_the_bits_of_updating_each_by_itself(times: float) -> None:
    both = Apart(times)
    for _ in range(5):
        both.update()
        assert both.equal()


@pytest.mark.parametrize("times", [1.0, 4.0])
def test_a_checkpoint_holds_the_moments_of_each_parameter_and_older_ones_are_read(times: float) -> None:
    both = Apart(times)
    both.update()
    assert same(optim.moments(both.ours), both.written())
    later = Apart(times)
    later.update()
    assert not same(optim.moments(later.ours), both.written())
    optim.restore(later.ours, both.written())
    assert same(optim.moments(later.ours), both.written())


def test_weights_that_are_loaded_into_an_adapter_are_those_that_are_updated() -> None:
    model = tiny.model(tiny.recipe())
    assert model.adapter is not None
    gradient, adamw = made(list(model.adapter.named_parameters()), weight_decay=0.0)
    loaded = {name: torch.randn_like(tensor) for name, tensor in model.adapter.state_dict().items()}
    model.adapter.load_state_dict({name: tensor.clone() for name, tensor in loaded.items()})
    gradient.fill_(1.0)
    optim.update(adamw, 0.25, GO)
    moved = model.adapter.state_dict()
    assert all(torch.allclose(moved[name], loaded[name] - 0.25, atol=1e-6) for name in loaded)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("loss", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_no_bit_changes_where_the_loss_or_the_norm_is_not_finite(name: str, loss: float, slope: float) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    named = lora()
    gradient, optimizer = made(named, optimizer=name, weight_decay=0.1)
    for trained in (False, True):
        if trained:
            finished(optimizer, gradient.normal_(), 1.0)
        before = {name: p.detach().clone() for name, p in named} | copies(optim.moments(optimizer))
        gradient.normal_()[3] = slope
        told = finished(optimizer, gradient, loss)
        assert not all(math.isfinite(value) for value in told)
        assert same(before, {name: p.detach() for name, p in named} | optim.moments(optimizer))
    finished(optimizer, gradient.normal_(), 1.0)
    assert not torch.equal(before[named[0][0]], named[0][1])


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def finished(
    optimizer: torch.optim.Optimizer, gradient: torch.Tensor, loss: float, max_norm: float | None = 1.0
) -> list[float]:
    return optim.finish(optimizer, gradient, torch.tensor(loss, dtype=torch.float64), lr=0.1, max_norm=max_norm)()


def test_a_gradient_is_cut_to_the_norm_only_where_it_is_longer() -> None:
    gradient, adamw = made(lora())
    slopes = gradient.normal_().clone()
    norm = float(torch.linalg.vector_norm(slopes))
    for limit in (None, 2 * norm, norm, norm / 3, 1e-3):
        gradient.copy_(slopes)
        assert finished(adamw, gradient, 0.75, max_norm=limit) == [0.75, norm]
        cut = limit is not None and norm > limit
        assert torch.equal(gradient, slopes * (limit / norm) if cut else slopes)  # type: ignore[operator]
    assert finished(adamw, gradient.zero_(), 0.75) == [0.75, 0.0]
    assert not gradient.any()


def test_moments_are_not_paged_on_a_cpu_and_the_run_says_so() -> None:
    pytest.importorskip("bitsandbytes")
    said: list[str] = []
    named = [("w", nn.Parameter(torch.ones(3)))]
    made = optim.optimizer(named, optim.flat_gradient(named), Train(optimizer="paged_adamw_32bit"), said.append)
    assert type(made).__name__ == "AdamW32bit"
    assert "only a GPU's memory is paged" in said[0]


def test_without_bitsandbytes_plain_adamw_takes_the_place_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # what a missing module looks like to the importer
    said: list[str] = []
    named = [("w", nn.Parameter(torch.ones(3)))]
    made = optim.optimizer(named, optim.flat_gradient(named), Train(optimizer="paged_adamw_8bit"), said.append)
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
