"""Our block on a GPU against the fp32 reference on a CPU: dense and packed weights, with and without recompute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.data.stream import Micro
from luthier.kernels import fused, pointwise
from luthier.model import attention, families
from luthier.model.causal import CausalModel
from luthier.model.load import norms_in_float32
from luthier.model.quantize import quantize_module
from luthier.train.optim import flat_gradient

pytestmark = pytest.mark.gpu
VOCAB = 1000
ADAPTER = recipe.Lora(rank=8, alpha=16)
ODD = recipe.Lora(rank=3, alpha=5, ranks={"q_proj": 5, "up_proj": 1}, alphas={"v_proj": 7})
NF4 = recipe.FourBit(kind="nf4")
SPECIAL: dict[str, dict[str, Any]] = {
    "falcon": {"bias": True, "alibi": False},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "attn_logit_softcapping": None, "query_pre_attn_scalar": 64, "sliding_window": 1024},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1024},
    "glm": {"head_dim": 64, "attention_bias": True},
    "glm4": {"head_dim": 64, "attention_bias": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
}


def base(dtype: torch.dtype, family: str = "llama") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "sliding_window": None,
        **SPECIAL.get(family, {}),
    }
    how = "sdpa" if family == "falcon" else attention.NAME
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation=how)
    for parameter in made.parameters():
        if parameter.dim() == 1:  # norms and biases, which are 1 and 0 at the start
            parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.1))
    return made.to(dtype).eval()


def model(module: Any, kernels: Any, adapter: recipe.Lora = ADAPTER, **options: Any) -> CausalModel:
    lora = attach(module, adapter, seed=3)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.layers.values():
        values = torch.empty(layer.B.shape).normal_(0, 0.05, generator=generator)
        layer.B.data.copy_(values)
    return CausalModel(module, lora, kernels=kernels, **options)


def micro(lengths: tuple[int, ...] = (70, 2, 515, 33)) -> Micro:
    tokens, bounds = sum(lengths), (0, *torch.tensor(lengths).cumsum(0).tolist())
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])
    learned = ((positions > 0) & (ids % 2 == 0)).nonzero()[:, 0]
    return Micro(ids, positions, bounds, learned - 1, ids[learned], torch.arange(len(lengths)) + 40, step=2)


def gradients(made: CausalModel, batch: Micro) -> tuple[float, Tensor]:
    assert made.adapter is not None
    for parameter in made.adapter.parameters():
        parameter.grad = None
    loss = made.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in made.adapter.parameters()]
    return float(loss.detach()), torch.cat([g.flatten().float().cpu() for g in flat])


def wanted(packed: bool, family: str = "llama", adapter: recipe.Lora = ADAPTER) -> tuple[float, Tensor]:
    """fp32 on the CPU; with packed weights, of the values they unpack to in bfloat16."""
    module = base(torch.bfloat16, family)
    if packed:
        other = copy.deepcopy(module)
        for name in quantize_module(other, NF4, torch.bfloat16):
            module.get_submodule(name).weight.data.copy_(other.get_submodule(name).dequantize())
    return gradients(model(module.float(), "reference", adapter), micro())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernels", ["reference", "eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_the_reference(packed: bool, kernels: str, recompute: bool) -> None:
    module = base(torch.bfloat16)
    if packed:
        quantize_module(module, NF4, torch.bfloat16)
    loss, gradient = gradients(model(module.cuda(), kernels, recompute=recompute), micro())
    expected_loss, expected = wanted(packed)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert float((gradient - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's linear layers have biases
@pytest.mark.parametrize("weights", ["dense", "unpacked each time", "kept unpacked"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [16, 8])
def test_products_with_adapters_in_them_are_those_of_the_reference(
    family: str, weights: str, dropout: float, rank: int
) -> None:
    """Ranks of q, k and v that take more than 64 columns, and such that leave some of 64 free; one is odd."""
    from luthier.train.reproducible import reproducible

    adapter = recipe.Lora(rank=rank, alpha=12, dropout=dropout, ranks={"k_proj": 3 * rank - 1}, alphas={"v_proj": 7})
    module, packed = base(torch.bfloat16, family), weights != "dense"
    if packed:
        quantize_module(module, NF4, torch.bfloat16)
    made = model(module.cuda(), "compiled", adapter, unpacked=2 if weights == "kept unpacked" else 0)
    with reproducible("cuda"):
        found, again = (gradients(made, micro()) for _ in range(2))
    assert torch.equal(found[1], again[1])
    expected = wanted(packed, family, adapter)
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 0.03


@pytest.mark.parametrize("weights", ["dense", "unpacked each time"])
def test_adapters_that_change_or_are_switched_off_do_so_in_the_products(weights: str) -> None:
    module, packed = base(torch.bfloat16), weights != "dense"
    if packed:
        quantize_module(module, NF4, torch.bfloat16)
    made = model(module.cuda(), "compiled")
    assert made.adapter is not None
    with torch.no_grad():
        first = made.loss(micro())
        for parameter in made.adapter.parameters():
            parameter.mul_(2)
        changed = made.loss(micro())
        with made.adapter.disabled():
            without = made.loss(micro())
        for parameter in made.adapter.parameters():
            parameter.mul_(0.5)
        assert torch.equal(made.loss(micro()), first)
    with made.adapter.disabled(), torch.no_grad():
        plain = CausalModel(made.module, made.adapter, kernels="reference").loss(micro())
    assert float(without) == pytest.approx(float(plain), rel=2e-3)
    assert len({float(first), float(changed), float(without)}) == 3


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_family_has_the_loss_and_gradients_of_the_reference(family: str, packed: bool, recompute: bool) -> None:
    module = base(torch.bfloat16, family)
    if packed:
        quantize_module(module, NF4, torch.bfloat16)
    loss, gradient = gradients(model(module.cuda(), "compiled", recompute=recompute), micro())
    expected_loss, expected = wanted(packed, family)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert float((gradient - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_exact_in_float32(family: str) -> None:
    found = gradients(model(base(torch.float32, family).cuda(), "compiled"), micro())
    expected = gradients(model(base(torch.float32, family), "reference"), micro())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_norms_that_are_finer_than_the_products(family: str) -> None:
    module = base(torch.bfloat16, family).cuda()
    norms_in_float32(module, torch.bfloat16)
    loss, gradient = gradients(model(module, "compiled"), micro())
    expected_loss, expected = wanted(False, family)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert float((gradient - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_float32_is_exact(kernels: str) -> None:
    found = gradients(model(base(torch.float32).cuda(), kernels), micro())
    expected = gradients(model(base(torch.float32), "reference"), micro())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-4


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_dropout_draws_the_same_masks_as_on_a_cpu(kernels: str) -> None:
    adapter = recipe.Lora(rank=8, alpha=16, dropout=0.3)
    found = gradients(model(base(torch.float32).cuda(), kernels, adapter), micro())
    expected = gradients(model(base(torch.float32), "reference", adapter), micro())
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 1e-4


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_the_same_step_gives_the_same_bits(kernels: str) -> None:
    from luthier.train.reproducible import reproducible

    with reproducible("cuda"):
        made = model(base(torch.bfloat16).cuda(), kernels)
        first, second = (gradients(made, micro((1500, 900, 700)))[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("adapter", [ADAPTER, ODD], ids=["alike", "odd"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_that_are_added_to_one_buffer_are_those_that_autograd_adds(
    adapter: recipe.Lora, recompute: bool
) -> None:
    from luthier.train.reproducible import reproducible

    def learned(made: CausalModel, flat: bool) -> Tensor:
        assert made.adapter is not None
        if flat:
            flat_gradient(made.adapter.named_parameters())
        for lengths in ((70, 2, 515, 33), (300, 40)):
            made.loss(micro(lengths)).backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten().cpu() for p in made.adapter.parameters() if p.grad is not None])

    options: dict[str, Any] = {"adapter": adapter, "recompute": recompute}
    with reproducible("cuda"):
        plain, flat = (learned(model(base(torch.bfloat16).cuda(), "compiled", **options), how) for how in (False, True))
    assert torch.equal(plain, flat)
    expected = learned(model(base(torch.float32), "reference", adapter), False)
    assert float((flat - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("heads", "turned"), [(40, 64), (12, 32), (72, 32), (34, 16), (1, 40)])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_heads_are_turned_in_place_as_on_a_cpu(heads: int, turned: int, neighbours: bool, back: bool) -> None:
    """`turned` pairs of the 128 features of each head; what lies beside the heads is left alone."""
    torch.manual_seed(0)
    whole, cos, sin = torch.randn(300, heads + 8, 128).bfloat16(), torch.randn(300, turned), torch.randn(300, turned)
    made, twin = whole.cuda(), whole.float()
    fused.turn(made[:, :heads], cos.cuda(), sin.cuda(), back, neighbours)
    pointwise.turn(twin[:, :heads], cos, sin, back, neighbours)
    assert float((made.cpu().float() - twin).norm() / twin.norm()) < 3e-3
    assert torch.equal(made[:, heads:].cpu(), whole[:, heads:])
