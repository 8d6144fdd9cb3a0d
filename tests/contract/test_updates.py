"""The adapters' values and gradients in one piece of memory: parameters are given what autograd would give them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_block import ALL, config, error, gradients, micro, model
from torch import Tensor

from luthier import recipe
from luthier.adapters.method import Noise
from luthier.data.stream import Micro
from luthier.kernels.place import noticing, planned_for
from luthier.kernels.rectangles import Copies, Rectangle, one_by_one
from luthier.model.causal import CausalModel
from luthier.model.trace import outline
from luthier.train import optim

ODD = recipe.Lora(rank=3, alpha=5, ranks={"q_proj": 5, "up_proj": 1}, alphas={"v_proj": 7})
DROPPING = recipe.Lora(rank=4, alpha=6, dropout=0.3)


def parameters(made: CausalModel) -> list[Tensor]:
    assert made.adapter is not None
    return list(made.adapter.parameters())


def buffer(made: CausalModel) -> Tensor:
    assert made.adapter is not None
    return optim.flat_gradient(made.adapter.named_parameters())


def learn(made: CausalModel, *lengths: tuple[int, ...]) -> list[Tensor | None]:
    """The gradients that these micro-batches add up to."""
    for batch in map(micro, lengths):
        made.loss(batch).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for parameter in parameters(made)]


def same(ones: list[Tensor | None], others: list[Tensor | None]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [ALL, ODD, DROPPING], ids=["alike", "odd", "dropping"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_that_are_added_to_one_buffer_have_the_bits_of_those_that_autograd_adds(
    adapter: recipe.Lora, dtype: torch.dtype, recompute: bool
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "recompute": recompute}
    plain, flat = (model("llama", "eager", adapter, **options) for _ in range(2))
    total = buffer(flat)
    batches = (7, 2, 150), (30, 60)
    assert same(learn(plain, *batches), learn(flat, *batches))
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in parameters(plain))
    assert float(total.norm()) > 0


def test_on_a_gpu_one_launch_takes_the_values_of_all_layers_and_one_a_block_its_gradients() -> None:
    """Without data, where launches can be counted."""
    options: dict[str, Any] = {"kernels": "compiled", "recompute": False, "capability": (9, 0)}
    made = outline(config("llama").to_dict(), recipe.Model(base="b"), ODD, dtype=torch.bfloat16, **options)
    tokens, launched = torch.zeros(70, dtype=torch.int64, device="meta"), Counter[str]()
    batch = Micro(tokens, tokens, (0, 30, 70), tokens, tokens, tokens[:2], step=0)
    assert made.decoder is not None
    with planned_for((9, 0)), noticing(lambda kernel, tensors: launched.update([kernel])):
        hidden = made.decoder.hidden(batch, None)
        assert launched["rectangles"] == 1
        hidden.sum().backward()  # type: ignore[no-untyped-call]
    assert launched["rectangles"] == 1 + len(made.decoder.blocks)


@pytest.mark.parametrize(
    ("adapter", "capability", "products"),
    [
        (recipe.Lora(rank=8, alpha=8), (9, 0), 4),
        (recipe.Lora(rank=8, alpha=8), (8, 0), 0),
        (recipe.Lora(rank=3, alpha=3), (9, 0), 2),  # of one adapter each: in others ranks begin between 16 bytes
        (recipe.Lora(rank=24, alpha=8), (9, 0), 0),  # more than a program holds
    ],
)
def test_on_hopper_adapters_take_what_they_need_of_a_gradient_in_one_reading(
    adapter: recipe.Lora, capability: tuple[int, int], products: int
) -> None:
    options: dict[str, Any] = {"kernels": "compiled", "recompute": False, "capability": capability}
    made = outline(config("llama").to_dict(), recipe.Model(base="b"), adapter, dtype=torch.bfloat16, **options)
    tokens, launched = torch.zeros(70, dtype=torch.int64, device="meta"), Counter[str]()
    batch = Micro(tokens, tokens, (0, 30, 70), tokens, tokens, tokens[:2], step=0)
    assert made.decoder is not None
    with planned_for(capability), noticing(lambda kernel, tensors: launched.update([kernel])):
        made.decoder.hidden(batch, None).sum().backward()  # type: ignore[no-untyped-call]
    assert launched["adapted"] == launched["adapted_sums"] == products * len(made.decoder.blocks)


@pytest.mark.parametrize(
    ("family", "changes", "adapter", "taken"),
    [
        ("llama", {}, {}, True),
        ("phi", {}, {"rank": 3}, True),
        ("falcon", {}, {"targets": ["dense_4h_to_h"], "rank": 16}, True),
        ("gemma", {}, {"dropout": 0.1}, False),  # which gives the adapter other hidden values
        ("llama", {}, {"rank": 24}, False),  # more than a program holds
        ("llama", {}, {"targets": ["up_proj"]}, False),
        ("llama", {"intermediate_size": 88}, {}, False),
        ("llama", {"dtype": torch.float32}, {}, False),
        ("llama", {"capability": (8, 0)}, {}, False),
        ("llama", {"capability": (10, 0)}, {}, False),
    ],
)
def test_on_hopper_the_gradient_of_the_A_that_reads_the_activation_is_taken_with_the_activation_s(
    family: str, changes: dict[str, Any], adapter: dict[str, Any], taken: bool
) -> None:
    given = {"dtype": torch.bfloat16, "capability": (9, 0)} | changes
    options = {key: given.pop(key) for key in ("dtype", "capability")}
    sizes, lora = config(family, **given).to_dict(), recipe.Lora(**{"rank": 8, "alpha": 8} | adapter)
    made = outline(sizes, recipe.Model(base="b"), lora, kernels="compiled", recompute=False, **options)
    tokens, launched = torch.zeros(70, dtype=torch.int64, device="meta"), Counter[str]()
    batch = Micro(tokens, tokens, (0, 30, 70), tokens, tokens, tokens[:2], step=0)
    assert made.decoder is not None
    with planned_for(options["capability"]), noticing(lambda kernel, tensors: launched.update([kernel])):
        made.decoder.hidden(batch, Noise(0, 0, tokens, tokens)).sum().backward()  # type: ignore[no-untyped-call]
    blocks = len(made.decoder.blocks)
    assert launched["activate_backward_dA"] == launched["dA_sums"] == (blocks if taken else 0)
    assert launched["activate_backward"] == (0 if taken else blocks)


def test_autograd_is_given_the_gradients_where_they_have_no_place() -> None:
    made = model("llama", "eager")
    wanted = gradients(made, micro())[1]
    for parameter in parameters(made):
        parameter.grad = None
    found = torch.autograd.grad(made.loss(micro()), parameters(made))
    assert torch.equal(torch.cat([g.flatten() for g in found]), wanted)
    again = torch.autograd.grad(made.loss(micro((9, 20))), parameters(made))
    assert torch.equal(torch.cat([g.flatten() for g in found]), wanted), "the next backward pass wrote into these"
    assert not torch.equal(again[0], found[0])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("place", [lambda p: None, torch.zeros_like, torch.ones_like], ids=["none", "zeros", "ones"])
def test_gradients_whose_place_is_taken_away_before_the_backward_pass_are_learned_from(place: Any, whole: bool) -> None:
    """As `optimizer.zero_grad()` does, which many call between the two."""
    made = model("llama", "eager")
    wanted = learn(model("llama", "eager"), (7, 40))
    total = buffer(made)
    loss = made.loss(micro((7, 40)))
    for parameter in parameters(made)[: None if whole else 3]:
        parameter.grad = place(parameter)
    before = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters(made)]
    loss.backward()  # type: ignore[no-untyped-call]
    expected = [b + g for b, g in zip(before, wanted, strict=True) if g is not None]
    assert same([parameter.grad for parameter in parameters(made)], [*expected])
    assert bool(total.any()) is not whole


def test_gradients_that_get_a_place_before_the_backward_pass_are_added_there() -> None:
    made = model("llama", "eager")
    wanted = learn(model("llama", "eager"), (7, 40))
    loss = made.loss(micro((7, 40)))
    total = buffer(made)
    loss.backward()  # type: ignore[no-untyped-call]
    assert same([parameter.grad for parameter in parameters(made)], wanted)
    assert total.any()


def test_two_losses_in_one_backward_pass_are_both_learned_from() -> None:
    made = model("llama", "eager")
    wanted = sum((gradients(made, micro(lengths))[1] for lengths in ((7, 40), (9, 20))), torch.zeros(()))
    total = buffer(made)
    (made.loss(micro((7, 40))) + made.loss(micro((9, 20)))).backward()
    assert error(torch.cat([g.flatten() for p in parameters(made) if (g := p.grad) is not None]), wanted) < 1e-6
    assert float(total.norm()) > 0


@pytest.mark.parametrize("flat", [False, True])
def test_a_disabled_layer_between_others_is_left_alone(flat: bool) -> None:
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    made, reference = model("llama", "eager", ODD), model("llama", "reference", ODD)
    total = buffer(made) if flat else None
    learn(made, (9,))  # all were enabled before
    for one in (made, reference):
        assert one.adapter is not None
        for name in names:
            one.adapter.layers[name].enabled = False
        for parameter in parameters(one) if total is None else ():
            parameter.grad = None
    if total is not None:
        total.zero_()
    found, wanted = learn(made, (7, 150)), learn(reference, (7, 150))
    assert [g is None or not g.any() for g in found] == [g is None for g in wanted]
    assert sum(g is None for g in wanted) == 4
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
    assert all(error(a, b) < 1e-5 for a, b in pairs)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_pass_without_gradient_before_changes_none(mode: Any) -> None:
    made, fresh = model("llama", "eager", ODD), model("llama", "eager", ODD)
    assert made.adapter is not None
    with mode():
        before = made.loss(micro())
        with made.adapter.disabled():
            assert not torch.equal(made.loss(micro()), before)
    assert same(learn(made, (7, 150)), learn(fresh, (7, 150)))
    with mode():
        assert torch.equal(made.loss(micro()), before)


def by_address(rectangles: Sequence[Rectangle], *, add: bool) -> Copies:
    """As a GPU's kernel copies, which is told where values lie, and not whose they are."""
    return one_by_one([rectangle._replace(source=rectangle.source.detach()) for rectangle in rectangles], add=add)


def test_values_that_move_to_other_memory_are_found_there() -> None:
    made = model("llama", "eager")
    assert made.adapter is not None
    assert made.decoder is not None
    made.decoder.updates.copies = by_address
    with torch.no_grad():
        apart = model("llama", "eager").loss(micro())
        optim.optimizer(made.adapter.named_parameters(), buffer(made), recipe.Train())  # puts them side by side
        assert torch.equal(made.loss(micro()), apart)
        for parameter in parameters(made):
            parameter.data = parameter.detach() * 2
        assert not torch.equal(made.loss(micro()), apart)


def test_scales_of_a_product_that_differ_are_each_their_own() -> None:
    made, reference = model("llama", "eager", ODD), model("llama", "reference", ODD)
    assert error(gradients(made, micro())[1], gradients(reference, micro())[1]) < 1e-5
