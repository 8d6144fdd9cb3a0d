"""Bottleneck adapters keep the contract of an adapter, in families whose blocks are built in different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from luthier import recipe
from luthier.adapters import files
from luthier.adapters.method import attach
from luthier.errors import AdapterError
from methods import IDS, check_files, check_training, llama, logits, trained, two_steps


def settings(**changes: Any) -> recipe.Bottleneck:
    return recipe.Bottleneck(**({"kind": "bottleneck", "size": 8} | changes))


def bf16() -> Any:
    return llama(torch.bfloat16)


def family(name: str) -> Any:
    """A tiny model of a family: 2 blocks, width 32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
    more: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "mixtral": {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "bloom": {"n_layer": 2, "n_head": 4},
        "phi": {"intermediate_size": 48},
        "gpt_neox": {"intermediate_size": 48},
        "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
        "falcon": {},
    }
    torch.manual_seed(0)
    # Token 2 and up are in our batch; some families would pad with them.
    config = CONFIG_MAPPING[name](**{**sizes, **more[name], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [llama, bf16], ids=lambda make: make.__name__)
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_bottlenecks_keep_the_contract_of_training(make: Any, activation: str) -> None:
    check_training(make, settings(activation=activation))


@pytest.mark.parametrize("make", [llama, bf16], ids=lambda make: make.__name__)
def test_bottlenecks_come_back_from_their_file(tmp_path: Path, make: Any) -> None:
    check_files(make, settings(activation="silu", dropout=0.25), tmp_path)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert (config["size"], config["activation"], config["dropout"]) == (8, "silu", 0.25)


PLACES = {
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "mixtral": ["self_attn.o_proj", "mlp"],
    "mpt": ["attn.out_proj", "ffn.down_proj"],
    "gptj": ["attn.out_proj", "mlp.fc_out"],
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "gemma2": ["self_attn.o_proj", "mlp.down_proj"],
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
}


@pytest.mark.parametrize("name", PLACES)
def test_each_family_has_one_after_attention_and_one_after_the_mlp(name: str) -> None:
    module = family(name)
    plain = logits(module)
    adapter = attach(module, settings(), seed=3)
    assert torch.equal(logits(module), plain)
    assert [place.split(".1.", 1)[1] for place in adapter.layers if ".1." in place] == PLACES[name]  # type: ignore[attr-defined]
    assert len(adapter.layers) == 4  # type: ignore[attr-defined]
    first, last = two_steps(module, adapter)
    assert last < first


def test_the_bottleneck_is_the_papers_formula_before_the_residual_addition() -> None:
    module = llama(num_hidden_layers=1)
    block = module.model.layers[0]
    adapter: Any = attach(module, settings(activation="relu"), seed=3)
    two_steps(module, adapter)
    state = adapter.state_dict()
    seen: dict[str, Any] = {}
    block.mlp.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    block.register_forward_hook(lambda m, args, out: seen.update(y=out))
    block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(residual=args[0]))
    logits(module)
    with torch.no_grad():
        z = F.linear(F.silu(block.mlp.gate_proj(seen["x"])) * block.mlp.up_proj(seen["x"]), block.mlp.down_proj.weight)
        down, up = (
            [state[f"model.layers.0.mlp.down_proj.bottleneck.{side}.{part}"] for part in ("weight", "bias")]
            for side in ("down", "up")
        )
        expected = seen["residual"] + z + F.linear(torch.relu(F.linear(z, *down)), *up)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-6)


def test_start_values_depend_on_seed_and_place_alone() -> None:
    one, same, other = (attach(llama(), settings(), seed).state_dict() for seed in (3, 3, 4))
    name = "model.layers.1.self_attn.o_proj.bottleneck.down.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("layers.1", "layers.0")])
    assert 0.9 * 32**-0.5 < one[name].abs().max() <= 32**-0.5


def test_dropout_depends_on_the_tokens_and_not_on_their_order() -> None:
    module = llama()
    adapter = attach(module, settings(dropout=0.5), seed=3)
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.1)
    adapter.noise.samples, adapter.noise.positions = torch.zeros(39, dtype=torch.int64), torch.arange(39)
    dropped = module(IDS).logits
    torch.testing.assert_close(dropped, module(IDS).logits, rtol=0, atol=0)
    evaluated = logits(module)
    assert not torch.allclose(dropped, evaluated, atol=1e-3)
    adapter.noise.samples, adapter.noise.positions = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    torch.testing.assert_close(module(IDS[:, :20]).logits, dropped[:, :20], rtol=1e-5, atol=1e-5)


def test_a_block_without_attention_or_mlp_is_an_error_that_lists_what_it_has() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"swirl": torch.nn.Linear(4, 4)})])

    with pytest.raises(AdapterError, match=r"layers\.0 \(swirl\).*kind: lora"):
        attach(Odd(), settings(), 0)


@pytest.mark.parametrize("change", [{"size": 0}, {"activation": "tanh"}, {"dropout": 1.5}], ids=str)
def test_a_damaged_config_is_refused_by_key(tmp_path: Path, change: dict[str, Any]) -> None:
    trained(llama, settings(), tmp_path)
    path = tmp_path / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=f"'{next(iter(change))}' cannot be"):
        files.load(tmp_path)
