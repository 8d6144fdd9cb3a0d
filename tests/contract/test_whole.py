"""What is trained whole beside a LoRA keeps the adapter's contract: biases, modules, and rows of new tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from luthier import recipe
from luthier.adapters import files
from luthier.adapters.method import attach
from luthier.data.tokens import Tokenizer
from luthier.errors import AdapterError, ModelError
from luthier.model.causal import build
from luthier.model.load import load_tokenizer
from methods import IDS, check_files, check_training, llama, logits, trained, two_steps, weights

NEW = {"new_tokens": ["aspirin", "<|step|>"]}
BESIDE: list[dict[str, Any]] = [
    {"bias": "all"},
    {"bias": "lora_only", "targets": ["q_proj", "up_proj"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"modules_to_save": ["model.norm"], "bias": "all", "targets": ["q_proj"]},
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights
        yield


def settings(**changes: Any) -> recipe.Lora:
    return recipe.Lora(**({"rank": 4} | changes))


def untied(dtype: torch.dtype = torch.float32) -> Any:
    module = llama(dtype, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return module


def tied() -> Any:
    return llama(tie_word_embeddings=True, attention_bias=True)


def bf16() -> Any:
    return untied(torch.bfloat16)


def grown(make: Any = untied) -> Any:
    """The base with rows for two more tokens, which are the mean of those it has."""
    module = make()
    module.resize_token_embeddings(92, mean_resizing=False)
    for table in (module.model.embed_tokens, module.lm_head):
        table.weight.data[90:] = table.weight.data[:90].float().mean(0).to(table.weight.dtype)
    return module


def theirs(folder: Path, base: Any, ids: Tensor = IDS) -> Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base, str(folder)).eval(), ids)


@pytest.mark.parametrize("beside", BESIDE, ids=str)
@pytest.mark.parametrize("make", [untied, tied, bf16], ids=lambda make: make.__name__)
def test_what_is_beside_a_lora_keeps_the_contract_of_training(make: Any, beside: dict[str, Any]) -> None:
    check_training(make, settings(**beside))


@pytest.mark.parametrize("beside", BESIDE, ids=str)
def test_it_comes_back_from_its_file_and_peft_reads_it(tmp_path: Path, beside: dict[str, Any]) -> None:
    wanted = logits(trained(untied, settings(**beside), tmp_path, lr=0.05))
    assert not torch.allclose(wanted, logits(untied()), atol=1e-2)
    torch.testing.assert_close(theirs(tmp_path, untied()), wanted, rtol=1e-4, atol=1e-4)
    check_files(untied, settings(**beside), tmp_path)


def test_biases_are_those_that_the_recipe_names() -> None:
    def named(**changes: Any) -> set[str]:
        names = attach(untied(), settings(targets=["q_proj"], **changes), 0).state_dict()
        return {
            name.removeprefix("base_model.model.model.layers.0.") for name in names if "bias" in name and "s.0" in name
        }

    assert named() == set()
    assert named(bias="lora_only") == {"self_attn.q_proj.base_layer.bias"}
    rest = {f"self_attn.{side}_proj.bias" for side in "kvo"} | {
        f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")
    }
    assert named(bias="all") == rest | {"self_attn.q_proj.base_layer.bias"}


def test_biases_of_layers_that_are_not_adapted_are_not_those_of_the_adapted_ones() -> None:
    make = partial(llama, attention_bias=True)
    assert attach(make(), settings(bias="all", targets=["up_proj"]), 0).state_dict()
    with pytest.raises(AdapterError, match="no adapted layer has a bias"):
        attach(make(), settings(bias="lora_only", targets=["up_proj"]), 0)


def test_a_file_of_peft_may_ask_for_biases_of_a_base_that_has_none(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, bias="lora_only", target_modules=["q_proj"], init_lora_weights=False
    )
    made = get_peft_model(llama(), config)
    made.save_pretrained(str(tmp_path))
    read, tensors = files.load(tmp_path)
    module = llama()
    attach(module, read, 0).load_state_dict(tensors)
    torch.testing.assert_close(logits(module), logits(made), rtol=1e-5, atol=1e-5)


def test_a_saved_head_that_was_tied_leaves_the_embedding_alone() -> None:
    module = tied()
    adapter = attach(module, settings(modules_to_save=["lm_head"]), 0)
    before = weights(module)["model.embed_tokens.weight"]
    two_steps(module, adapter)
    assert torch.equal(module.model.embed_tokens.weight, before)
    assert not torch.equal(module.lm_head.weight, before)
    assert not adapter.foldable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_heat"]}, r"modules_to_save: no module is called 'lm_heat'.*'lm_head'"),
        ({"modules_to_save": ["mlp"]}, "has low-rank updates too"),
        ({"modules_to_save": ["rotary_emb"]}, "'rotary_emb' has no weights to train"),
        ({"modules_to_save": ["norm", "act_fn"]}, "'act_fn' has no weights to train"),
        ({"bias": "all"}, "adapter.bias: all: no layer of this model has a bias to train; leave it out"),
        ({"bias": "lora_only"}, "adapter.bias: lora_only: no adapted layer has a bias to train"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_beside_a_lora_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(llama(), settings(**changes), 0)


@pytest.mark.parametrize("make", [untied, tied, bf16], ids=lambda make: make.__name__)
def test_new_tokens_start_as_the_mean_and_their_rows_alone_are_trained(make: Any) -> None:
    module, plain = make(), logits(grown(make))
    adapter = attach(module, settings(**NEW), 3)
    assert torch.equal(logits(module), plain)
    tables = {id(t): t.weight.detach().clone() for t in (module.model.embed_tokens, module.lm_head)}
    ids = torch.tensor([[1, 90, 5, 91, 8, 90, 91]])
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=0.01)
    losses = []
    for _ in range(3):
        loss = module(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    for table in (module.model.embed_tokens, module.lm_head):
        assert torch.equal(table.weight[:90], tables[id(table)][:90])
        assert not (table.weight[90:] == tables[id(table)][90:]).all(1).any()
    rows = [name for name in adapter.state_dict() if name.endswith("trainable_tokens_delta")]
    assert len(rows) == (1 if make is tied else 2)
    with adapter.disabled():
        assert torch.equal(logits(module), plain)
    assert sum(p.numel() for p in adapter.parameters()) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("make", [untied, tied], ids=lambda make: make.__name__)
def test_peft_reads_the_rows_of_new_tokens(tmp_path: Path, make: Any) -> None:
    module = make()
    adapter = attach(module, settings(**NEW), 3)
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    files.save(adapter, tmp_path, base="b", revision=None, extra={})
    ids = torch.tensor([[1, 90, 5, 91, 8, 90, 91]])
    torch.testing.assert_close(theirs(tmp_path, grown(make), ids), logits(module, ids), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_knows_new_tokens_by_what_they_look_like(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "base")
    old = load_tokenizer(base)
    new = load_tokenizer(base, settings(**NEW))
    assert [new.id("aspirin"), new.id("<|step|>")] == [old.vocab_size, old.vocab_size + 1]
    assert new.vocab_size == old.vocab_size + 2
    assert new.ids(["what aspirin is"])[0][1] == new.id("aspirin")
    assert new.id("<|step|>") not in new.ids(["what <|step|> is"])[0]  # a control token is never read from text
    assert new.control["<|step|>"] == new.id("<|step|>")
    new.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.spec["data"], again.control, again.names) == (new.spec["data"], new.control, new.names)
    for wrong in (["what"], ["a", "a"]):
        with pytest.raises(ModelError, match="is no new token"):
            load_tokenizer(base, settings(new_tokens=wrong))
    with pytest.raises(ModelError, match="has no token 'nothing'"):
        old.id("nothing")


def test_transformers_reads_the_saved_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(tiny.base(tmp_path / "base"), settings(**NEW))
    tokenizer.save(tmp_path / "saved")
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert read.convert_tokens_to_ids(["aspirin", "<|step|>"]) == [tokenizer.id("aspirin"), tokenizer.id("<|step|>")]


def test_a_run_trains_new_tokens_saves_them_and_reads_them_back(tmp_path: Path) -> None:
    """One path: the tokens are in the data, the embedding grows or has room, and the adapter's folder has all."""
    from luthier.evaluate.asking.subject import Subject
    from luthier.train.launch import train

    run = tiny.run(tmp_path, "adapter.new_tokens=[banana]", "train.epochs=1", "evaluate.samples=0")
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    rows = [{**row, "completion": "banana " + row["completion"]} for row in rows]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    train(run, progress=lambda event: None)
    settings, tensors = files.load(run.adapter)
    assert isinstance(settings, recipe.Lora)
    assert settings.new_tokens == ["banana"]
    subject = Subject.open(run)
    token = subject.encoder.tokenizer.id("banana")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    row = subject.model.module.get_input_embeddings().weight[token]
    assert torch.equal(row.float(), tensors[name][0])
    base = build(
        run.recipe.model, None, folder=tmp_path / "base", kernels="reference", recompute=False, seed=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    known = base.module.get_input_embeddings().weight[:token]
    assert not torch.allclose(row, known.mean(0), atol=1e-4)


def test_rows_whose_names_are_lost_are_refused(tmp_path: Path) -> None:
    module = llama()
    files.save(attach(module, settings(**NEW), 3), tmp_path, base="b", revision=None, extra={})
    with pytest.raises(AdapterError, match=r"tokenizer\.json: does not name the tokens"):
        files.load(tmp_path)
