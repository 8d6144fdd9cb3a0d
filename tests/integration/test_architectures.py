"""A dozen families of `make architectures`, each odd in its own way, and the probe that tells packed from padded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import FalconConfig, FalconForCausalLM

import toys

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import architectures
from architectures import adapter, attached, by_rows, logits, micro

from luthier import recipe
from luthier.adapters.method import attach
from luthier.data.stream import Micro
from luthier.errors import ModelError
from luthier.model import attention, layout
from luthier.model.causal import CausalModel
from luthier.recipe import Lora

# What is odd about each: nothing, a bias in the head, Conv1D, caps and windows, sinks, a scale, experts, ALiBi, its own
# attention, learned positions, an encoder run as a decoder, a recurrence, both.
FAMILIES = {
    "llama": "packed",
    "phi": "packed",
    "gpt2": "packed",
    "gemma2": "packed",
    "gpt_oss": "packed",
    "cohere": "packed",
    "qwen2_moe": "packed",
    "bloom": "padded",
    "falcon": "packed",
    "opt": "packed",
    "bert": "packed",
    "mamba": "padded",
    "jamba": "padded",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_saves_and_is_read_by_peft_as_plain_transformers_would(name: str, tmp_path: Path) -> None:
    architectures.quiet()
    assert architectures.check(name, tmp_path)["status"] == FAMILIES[name]


def model(name: str, *, recompute: bool = False, dropout: float = 0.0) -> CausalModel:
    try:
        module = toys.model(name, attention.NAME)
    except (ValueError, KeyError):  # a family that has attention of its own alone
        module = toys.model(name, "eager")
    made = CausalModel(module, attach(module, Lora(rank=4, dropout=dropout), seed=1), recompute=recompute)
    architectures.spread(made)
    return made


def gradients(made: CausalModel) -> tuple[Tensor, Tensor]:
    loss = made.loss(micro())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), torch.cat([architectures.gradient(p).flatten() for p in adapter(made).parameters()])


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "falcon", "jamba", "qwen2_moe"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(name: str, dropout: float) -> None:
    (loss, kept), (again, remade) = (gradients(model(name, recompute=r, dropout=dropout)) for r in (False, True))
    assert torch.equal(loss, again)
    assert torch.equal(kept, remade)


@pytest.mark.parametrize("name", ["falcon", "mamba", "gemma2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_promise_1_rows_together_and_one_by_one_have_the_same_loss_and_gradients(name: str, dropout: float) -> None:
    made, batch = model(name, dropout=dropout), micro()
    whole, gradient = gradients(made)
    for parameter in adapter(made).parameters():
        parameter.grad = None
    alone = sum(made.loss(row) for row in rows(batch))
    assert isinstance(alone, Tensor)
    alone.backward()  # type: ignore[no-untyped-call]
    apart = torch.cat([architectures.gradient(p).flatten() for p in adapter(made).parameters()])
    assert abs(alone - whole) <= 1e-5 * whole
    assert (apart - gradient).norm() <= 1e-5 * gradient.norm()


def rows(batch: Any) -> list[Any]:
    made = []
    for number, (start, end) in enumerate(zip(batch.bounds, batch.bounds[1:], strict=False)):
        mine = (batch.rows >= start) & (batch.rows < end)
        own = replace(batch, ids=batch.ids[start:end], positions=batch.positions[start:end], bounds=(0, end - start))
        made.append(
            replace(own, rows=batch.rows[mine] - start, targets=batch.targets[mine], samples=batch.samples[[number]])
        )
    return made


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "phi", "gptj", "bert"])
def test_the_head_of_a_family_is_found_with_its_bias_scale_and_cap(name: str) -> None:
    made = model(name)
    assert made.output is not None
    with torch.no_grad(), adapter(made).disabled():
        module = toys.model(name, "eager")
        right = by_rows(module, micro())
        assert (logits(made, micro()) - right).norm() <= 1e-5 * right.norm()


def test_a_head_that_does_more_than_we_compute_is_left_to_the_module() -> None:
    module = toys.model("llama", attention.NAME)
    head = module.lm_head

    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    head.__class__ = Squared
    made, batch = CausalModel(module, None), micro()
    assert made.output is None
    with torch.no_grad():
        assert (logits(made, batch) - by_rows(module, batch)).norm() <= 1e-5 * by_rows(module, batch).norm()


class Leaking(nn.Module):
    """Adds a little of the token before to each: within a row that is right, over the edge of one it is a leak."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return torch.cat([y[:, :1], y[:, 1:] + self.share * y[:, :-1]], 1)


@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_a_leak_between_packed_rows_is_caught_and_the_model_padded(share: float) -> None:
    module = toys.model("llama", attention.NAME)
    assert CausalModel(module, None).layout == "packed"
    module.model.layers[0].mlp.down_proj = Leaking(module.model.layers[0].mlp.down_proj, share)
    made, batch = CausalModel(module, None), micro()
    assert made.layout == "padded"
    right = by_rows(module, batch)
    with torch.no_grad():
        assert (logits(made, batch) - right).norm() <= 1e-5 * right.norm()


def test_positions_that_are_counted_on_are_caught() -> None:
    module = toys.model("llama", attention.NAME)
    rotary = module.model.rotary_emb.forward
    module.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    assert CausalModel(module, None).layout == "packed"  # rotary embedding knows differences alone
    module = toys.model("gpt2", attention.NAME)
    module.transformer.wpe.register_forward_pre_hook(lambda _, ids: (torch.arange(ids[0].shape[-1])[None],))
    assert CausalModel(module, None).layout == "padded"


def test_a_model_that_sees_what_it_should_predict_is_refused() -> None:
    with pytest.raises(ModelError, match="is_decoder"):
        CausalModel(toys.model("bert", is_decoder=False), None)


def test_an_adapter_that_the_block_does_not_compute_is_refused() -> None:
    module = toys.model("llama", attention.NAME)
    lora = attach(module, recipe.Lora(rank=4, dora=True), seed=0)
    with pytest.raises(ModelError, match="does not compute this adapter"):
        CausalModel(module, lora, kernels="eager")


def test_rows_of_like_length_share_a_rectangle_and_little_of_it_is_empty() -> None:
    batch = micro()
    parts = layout.rectangles(batch)
    assert [part.ids.shape for part in parts] == [(1, 23), (1, 14), (1, 9), (1, 4)]
    places = torch.cat([part.rows for part in parts])
    assert sorted(places.tolist()) == list(range(len(batch.rows)))
    near = replace(batch, bounds=(0, 12, 25, 50), samples=batch.samples[:3])
    assert [tuple(part.ids.shape) for part in layout.rectangles(near)] == [(1, 25), (2, 13)]


def test_the_check_itself_can_fail(tmp_path: Path) -> None:
    toys.save("llama", tmp_path)
    mine = attached(tmp_path, "all-linear")
    other = attached(tmp_path, "all-linear")
    assert other.output is not None
    other.output = replace(other.output, scale=1.001)
    with pytest.raises(architectures.Disagreement):
        architectures.agree("logits", logits(other, micro()), logits(mine, micro()))


def falcon(*, recompute: bool = False, **changes: Any) -> CausalModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "multi_query": True}
    config = FalconConfig(**{**sizes, **changes})
    module = FalconForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    lora = attach(module, Lora(rank=2, dropout=0.1), 0)
    for layer in lora.layers.values():
        layer.B.data.normal_(0, 0.1)
    return CausalModel(module, lora, recompute=recompute)


def test_one_key_head_for_all_queries_reaches_attention_as_many() -> None:
    """Falcon leaves it to be broadcast, for which torch has no fused kernel."""
    seen: list[tuple[int, int]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is F.scaled_dot_product_attention:
                seen.append((args[0].shape[1], args[1].shape[1]))
            return function(*args, **(kwargs or {}))

    made = falcon()
    attention.within(made.module, Watch())
    made.module(torch.arange(12)[None])
    assert seen == [(8, 8)] * 2


def two_rows() -> Micro:
    ids, positions = torch.arange(12), torch.cat([torch.arange(5), torch.arange(7)])
    rows = torch.tensor([1, 3, 8, 10])
    return Micro(ids, positions, (0, 5, 12), rows, ids[rows + 1], torch.tensor([0, 1]), step=0)


@pytest.mark.parametrize(
    ("recompute", "changes"),
    [(False, {}), (True, {}), (True, {"new_decoder_architecture": True, "num_kv_heads": 2})],
)
def test_a_family_that_calls_torch_s_attention_itself_is_packed(recompute: bool, changes: dict[str, Any]) -> None:
    batch, found = two_rows(), []
    for way in ("packed", "padded"):
        made = falcon(recompute=recompute, **changes)
        assert made.layout == "packed"
        assert made.adapter is not None
        made.layout = way
        loss = made.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.flatten() for p in made.adapter.parameters() if p.grad is not None]
        found.append(torch.cat([loss.detach()[None], *gradients]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-5


@pytest.mark.parametrize(("alibi", "masks"), [(False, 0), (True, 4)])
def test_only_a_mask_that_says_more_than_causal_reaches_torch(alibi: bool, masks: int) -> None:
    """Falcon always has one made, and with any torch takes its slow path; alibi's says how far away tokens are, too."""
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is F.scaled_dot_product_attention:
                seen.append(args[3])
            return function(*args, **(kwargs or {}))

    made = falcon(alibi=alibi)
    attention.within(made.module, Watch())
    with torch.no_grad():
        made.loss(two_rows())
    assert [mask is not None for mask in seen] == [True] * masks  # two layers of two rows
