"""Full fine-tuning keeps the contract of an adapter: all weights, or those of the last blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import recipe
from luthier.adapters.method import attach
from luthier.errors import AdapterError
from methods import IDS, check_files, check_training, llama, logits, two_steps


def settings(blocks: Any = "all") -> recipe.Full:
    return recipe.Full(kind="none", blocks=blocks)


def tied(dtype: torch.dtype = torch.float32) -> Any:
    return llama(dtype, tie_word_embeddings=True)


def bf16(tie: bool = True) -> Any:
    return llama(torch.bfloat16, tie_word_embeddings=tie)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("make", [llama, tied, bf16, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("blocks", ["all", 1])
def test_full_fine_tuning_keeps_the_contract_of_training(make: Any, blocks: Any) -> None:
    check_training(make, settings(blocks))


@pytest.mark.parametrize("make", [llama, bf16], ids=lambda make: make.__name__)
@pytest.mark.parametrize("blocks", ["all", 1])
def test_full_fine_tuning_comes_back_from_its_file(tmp_path: Path, make: Any, blocks: Any) -> None:
    check_files(make, settings(blocks), tmp_path)


def test_tensors_have_the_names_of_the_models_own_checkpoint() -> None:
    full = attach(tied(), settings(), 0)
    assert full.state_dict().keys() == dict(tied().named_parameters()).keys()
    assert "lm_head.weight" not in full.state_dict()


def test_the_last_blocks_come_with_the_final_norm_and_an_untied_head() -> None:
    names = set(attach(llama(tie_word_embeddings=False), settings(1), 0).state_dict())
    assert {name for name in names if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}
    assert set(attach(tied(), settings(1), 0).state_dict()) == names - {"lm_head.weight"}
    assert {n for n in attach(gpt2(), settings(1), 0).state_dict() if ".h.1." not in n} == {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }


def test_more_blocks_than_the_model_has_are_an_error() -> None:
    with pytest.raises(AdapterError, match="has 2 blocks, not 3"):
        attach(llama(), settings(3), 0)


def test_updates_too_small_for_bfloat16_add_up() -> None:
    """64 updates of 2⁻¹² move a weight of 1 by 2⁻⁶, which one of them alone cannot in bfloat16."""
    module = bf16()
    full = attach(module, settings(), 0)
    norm = full.state_dict()["model.norm.weight"]
    for _ in range(64):
        norm += 2**-12
    assert module.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(module.model.norm.weight, torch.full((32,), 1 + 2**-6, dtype=torch.bfloat16))


def test_bfloat16_computes_in_bfloat16_and_learns_what_float32_learns() -> None:
    losses = [two_steps(module, attach(module, settings(), 0)) for module in (tied(), bf16())]
    assert logits(bf16()).dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


def test_both_uses_of_a_tied_weight_give_it_a_gradient() -> None:
    """Embedding and head are one weight: ids that occur are embedded, and all rows of the head are scored."""
    gradients = []
    for module in (tied(), bf16()):
        full = attach(module, settings(), 0)
        module(IDS, labels=IDS).loss.backward()
        gradient = dict(full.named_parameters())["model.embed_tokens.weight"].grad
        assert gradient is not None
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.1, atol=2e-3)
    assert (gradients[0].abs().sum(1) > 0).all()


def test_quantised_weights_cannot_be_trained_whole() -> None:
    module = llama()
    linear = module.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.up_proj\.weight is quantised.*leave model.quantize out"):
        attach(module, settings(), 0)
    attach(module, settings(1), 0)  # the last block is not
