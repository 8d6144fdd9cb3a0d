"""The methods of PEFT keep the contract of an adapter, and PEFT reads their files."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters import files, peft
from luthier.adapters.linears import linear_names
from luthier.adapters.method import attach
from luthier.errors import AdapterError
from luthier.model.quantize import pack
from methods import IDS, check_files, check_training, llama, logits, trained, two_steps

OPTIONS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 100},
    "HIRA": {"r": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TINYLORA": {"r": 2},
    "UNILORA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 100},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
}
# By PEFT's defaults these do not start at the base model.
MOVED = {
    "C3A",
    "DEFT",
    "FOURIERFT",
    "FROD",
    "HRA",
    "UNILORA",
    "VBLORA",
    *peft.PROMPTS,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of its defaults and of what transformers renamed
        yield


def settings(method: str, **options: Any) -> recipe.Bridge:
    return recipe.Bridge(kind="peft", method=method, options=OPTIONS.get(method, {}) | options)


def one_block() -> Any:
    return llama(num_hidden_layers=1)


def bf16() -> Any:
    return llama(torch.bfloat16)


def theirs(folder: Path, ids: Tensor = IDS, make: Any = llama) -> Tensor:
    """The logits of PEFT with the adapter in `folder`, without those of virtual tokens."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(make(), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -ids.shape[1] :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [*peft.LAYERS, *peft.PROMPTS])
def test_each_method_keeps_the_contract_of_training(method: str) -> None:
    check_training(one_block, settings(method), same_start=method not in MOVED, lr=0.003)


@pytest.mark.parametrize("method", [*peft.LAYERS, *peft.PROMPTS])
def test_each_method_comes_back_from_its_file(tmp_path: Path, method: str) -> None:
    check_files(one_block, settings(method), tmp_path)


@pytest.mark.parametrize("method", [*peft.LAYERS, *peft.PROMPTS])
def test_peft_reads_our_file_with_the_same_logits(tmp_path: Path, method: str) -> None:
    ours = trained(one_block, settings(method), tmp_path, lr=0.05)
    torch.testing.assert_close(theirs(tmp_path, make=one_block), logits(ours), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(one_block()), atol=1e-3)


@pytest.mark.parametrize("method", [*peft.LAYERS, *peft.PROMPTS])
def test_in_training_a_token_depends_on_those_before_it_alone_and_on_no_random_number(method: str) -> None:
    """So how a step is cut changes nothing: promise 1."""
    module = one_block()
    adapter = attach(module, settings(method), seed=3)
    two_steps(module, adapter)
    module.train()
    once, again, part = (module(ids).logits for ids in (IDS, IDS, IDS[:, :20]))
    assert torch.equal(once, again)
    torch.testing.assert_close(part, once[:, :20], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sorted(peft.REFUSED))
def test_methods_that_would_break_a_promise_are_refused_with_the_reason(method: str) -> None:
    with pytest.raises(AdapterError, match=rf"{method} cannot be used: \w+"):
        attach(llama(), settings(method), 0)


def test_every_method_of_the_installed_peft_is_either_offered_or_refused() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} <= {*peft.LAYERS, *peft.PROMPTS, *peft.REFUSED}


@pytest.mark.parametrize("method", ["IA3", "LN_TUNING", "OFT", "VERA", "BEFT", *peft.PROMPTS])
def test_methods_run_in_bfloat16_with_float32_parameters(tmp_path: Path, method: str) -> None:
    check_training(bf16, settings(method), same_start=method not in MOVED)
    check_files(bf16, settings(method), tmp_path)


@pytest.mark.parametrize("method", peft.PROMPTS)
@pytest.mark.parametrize("layers", [1, 2])
def test_left_padded_generation_is_that_of_each_row_alone(method: str, layers: int) -> None:
    """With a cache, token by token, as our reference decoder does it."""
    module = llama(num_hidden_layers=layers)
    two_steps(module, attach(module, settings(method), seed=3))
    short, long = IDS[:, :6], IDS[:, 10:19]
    ids = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with torch.no_grad():
        cache = None
        for made in range(3):
            seen, new = (mask.cumsum(-1) - 1).clamp(min=0), 9 if made == 0 else 1
            out = module(
                input_ids=ids[:, -new:],
                attention_mask=mask,
                position_ids=seen[:, -new:],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            for row, alone in ((0, ids[:1, 3:]), (1, ids[1:])):
                torch.testing.assert_close(out.logits[row, -1], logits(module, alone)[0, -1], rtol=1e-4, atol=1e-4)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize("method", peft.PROMPTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_virtual_tokens_come_before_each_row_of_a_micro_batch(method: str, recompute: bool, tmp_path: Path) -> None:
    """The loss of a pack is the sum of those of its rows, and so is its gradient, which recomputing leaves alone."""
    import tiny
    from luthier.data.stream import Sample, collate
    from luthier.model.causal import CausalModel

    def gradients(groups: list[list[int]], again: bool) -> tuple[float, list[Tensor]]:
        module = llama(vocab_size=tiny.VOCAB)
        adapter = attach(module, settings(method), seed=3)
        model = CausalModel(module, adapter, recompute=again)
        assert model.layout == "padded"
        losses = [model.loss(collate(store, [Sample(row, row, 0) for row in group], 0)) for group in groups]
        sum(losses).backward()  # type: ignore[union-attr]
        return float(sum(losses)), [p.grad for p in adapter.parameters()]  # type: ignore[misc]

    store = tiny.rows(tmp_path, count=4)
    loss, wanted = gradients([[0], [1], [2], [3]], False)
    packed, found = gradients([[0, 1, 2, 3]], recompute)
    assert packed == pytest.approx(loss, rel=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_packed_rows_would_share_virtual_tokens_and_are_refused() -> None:
    module = llama()
    attach(module, settings("PROMPT_TUNING"), 0)
    positions = torch.cat([torch.arange(19), torch.arange(20)])[None]
    with pytest.raises(AdapterError, match="cannot be packed"):
        module(IDS, position_ids=positions)


def test_p_tuning_as_peft_saves_it_is_read_as_the_prompts_it_made(tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, get_peft_model

    made = get_peft_model(llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    made.save_pretrained(str(tmp_path))
    read, tensors = files.load(tmp_path)
    module = llama()
    attach(module, read, 0).load_state_dict(tensors)
    torch.testing.assert_close(logits(module), theirs(tmp_path), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_saved_gives_its_logits(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    made = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)).eval()
    made.save_pretrained(str(tmp_path))
    read, tensors = files.load(tmp_path)
    module = llama()
    attach(module, read, 0).load_state_dict(tensors)
    torch.testing.assert_close(logits(module), logits(made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("IA4", {}, r"no method of PEFT .* 'IA4'.*'IA3'"),
        ("ia3", {}, r"no method of PEFT .* 'ia3'.*did you mean 'IA3'"),
        ("lora", {}, "LORA cannot be used: write kind: lora"),
        ("IA3", {"target_module": ["k_proj"]}, r"options\.target_module: IA3 has no such option.*'target_modules'"),
        ("OFT", {"peft_type": "LORA"}, "no such option"),
        ("OFT", {"module_dropout": 0.1}, r"options\.module_dropout: .*how a step is cut"),
        ("OFT", {"target_modules": ["nothing"]}, "PEFT says: .*nothing"),
        ("VERA", {"r": "eight"}, r"options: VERA cannot be built with r='eight' \(PEFT says: .*\); change its options"),
        ("VERA", {"r": 0}, r"VERA cannot be built with r=0 \(PEFT says: ZeroDivisionError"),
        ("IA3", {"target_modules": "[", "feedforward_modules": []}, r"IA3 cannot be built with target_modules='\['"),
        ("P_TUNING", {"encoder_hidden_size": -1}, r"P_TUNING cannot be built with .*encoder_hidden_size=-1"),
        ("PROMPT_TUNING", {"num_virtual_tokens": None}, r"options\.num_virtual_tokens: is missing"),
        ("PROMPT_TUNING", {"num_virtual_tokens": -3}, r"num_virtual_tokens: -3 is no number of tokens; write a number"),
        ("P_TUNING", {"num_virtual_tokens": 2.5}, r"num_virtual_tokens: 2\.5 is no number of tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_attached_says_what_to_write(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(llama(), settings(method, **options), 0)


@pytest.mark.parametrize("method", peft.PROMPTS)
def test_virtual_tokens_leave_room_for_a_row(method: str) -> None:
    make = partial(llama, max_position_embeddings=64)
    attach(make(), settings(method, num_virtual_tokens=63), 0)
    with pytest.raises(AdapterError, match=r"64 virtual tokens leave no room for a row: the model has 64 positions"):
        attach(make(), settings(method, num_virtual_tokens=64), 0)


def packed(kind: str) -> Any:
    module, chosen = one_block(), recipe.Model(base="b", quantize={"kind": kind}).quantize
    for name in linear_names(module):
        weight = module.get_submodule(name).weight.detach()
        module.set_submodule(name, pack(weight, None, chosen, torch.float32))
    return module


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", [*peft.LAYERS, *peft.PROMPTS])
def test_each_method_takes_packed_weights_or_says_that_it_does_not(method: str, kind: str) -> None:
    if method in (*peft.PROMPTS, "LN_TUNING"):
        return check_training(partial(packed, kind), settings(method), same_start=method not in MOVED)
    with pytest.raises(AdapterError, match=f"adapter.method: {method} does not take packed weights; leave model.quant"):
        attach(packed(kind), settings(method), 0)


def test_names_that_match_nothing_are_not_blamed_on_packed_weights() -> None:
    with pytest.raises(AdapterError, match=r"OFT cannot be built with target_modules.*nothing.*not found"):
        attach(packed("nf4"), settings("OFT", target_modules=["nothing"]), 0)


def test_a_file_without_a_type_is_refused(tmp_path: Path) -> None:
    trained(llama, settings("IA3"), tmp_path)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert config.pop("peft_type") == "IA3"
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="says no 'peft_type'"):
        files.load(tmp_path)


def test_building_a_method_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    attach(llama(), settings("BOFT"), 0)
    assert "CXX" not in os.environ


def test_start_values_depend_on_the_seed_and_leave_the_generator_alone() -> None:
    module = llama()
    before = torch.get_rng_state()
    one = attach(module, settings("OFT", init_weights=False), 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    same, other = (attach(llama(), settings("OFT", init_weights=False), seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_without_peft_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it then fails
    with pytest.raises(AdapterError, match=r"pip install luthier\[peft\]"):
        attach(llama(), settings("IA3"), 0)


@pytest.mark.parametrize("method", peft.PROMPTS)
def test_a_run_with_virtual_tokens_is_planned_trained_and_read_back(tmp_path: Path, method: str) -> None:
    import tiny
    from luthier.evaluate.asking.subject import Subject
    from luthier.train.launch import train

    chosen = settings(method).model_dump_json()
    run = tiny.run(tmp_path, f"adapter={chosen}", "train.epochs=1")
    assert train(run, progress=lambda event: None)["steps"] > 0
    model = Subject.open(run).model
    _, tensors = files.load(run.adapter)
    assert model.adapter is not None
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.adapter.state_dict().items())
