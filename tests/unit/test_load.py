"""What is wrong with a model's folder is said before anything is loaded, all at once, and nothing in it is run."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from luthier import recipe
from luthier.errors import ModelError
from luthier.machine import Machine
from luthier.model import load

Break = Callable[[Path], Any]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder in two shards, its weights the same each time."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.config()).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in pristine.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def model(base: Path | str, **options: Any) -> recipe.Model:
    return recipe.Model(base=str(base), **options)


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def climbing_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    first = next(iter(tree["weight_map"]))
    tree["weight_map"][first] = "../outside.safetensors"
    index.write_text(json.dumps(tree))


def renamed_tensor(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data.replace(b"model.", b"nodel.", 1))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "an empty config": (lambda f: (f / "config.json").write_text(""), "config.json is empty"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "config.json is empty or not"),
    "a deep config": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json is empty or not"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a pointer as tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a git-lfs"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
    "a hollow index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "an index that climbs": (climbing_index, "not a file of the folder"),
    "no shard": (lambda f: shard(f).unlink(), "00001-of.* is missing"),
    "a pointer as shard": (lambda f: shard(f).write_bytes(POINTER), "00001-of.* git-lfs pointer"),
    "an empty shard": (lambda f: shard(f).write_bytes(b""), "00001-of.* is empty"),
    "a torn shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-1]), "00001-of.* is torn"),
    "a hostile header": (lambda f: shard(f).write_bytes(struct.pack("<Q", 2**60) + b"{}"), "00001-of.* no safetensors"),
    "a shard that lacks a tensor": (renamed_tensor, "00001-of.* lacks"),
    "only pickles": (only_pickles, "never loaded.*convert the weights"),
    "quantised weights": (lambda f: edit(f, quantization_config={"bits": 4}), "quantised"),
    "weights in another tool's bits": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq"}),
        "quantised by gptq; luthier reads unquantised ones and bitsandbytes 4-bit.*unquantised folder",
    ),
    "weights in bitsandbytes' 8 bits": (
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "quantised by bitsandbytes in 8 bits",
    ),
    "a sentencepiece tokenizer alone": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "tokenizer.json is missing, and tokenizer.model alone is not read; make tokenizer.json with",
    ),
    "code of its own": (lambda f: edit(f, model_type="mine", auto_map={"AutoConfig": "m.C"}), "trust_remote_code"),
    "an attention from a repository": (lambda f: edit(f, _attn_implementation="evil/kernel"), "fetch and run code"),
    "an internal attention": (lambda f: edit(f, _attn_implementation_internal="sdpa"), "fetch and run code"),
    "a nested attention": (lambda f: edit(f, text_config={"attn_implementation": "a/b"}), "fetch and run code"),
    "a billion layers": (lambda f: edit(f, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "a vocabulary of words": (lambda f: edit(f, vocab_size="many"), "vocab_size = many"),
    "layers below zero": (lambda f: edit(f, num_hidden_layers=-1), "num_hidden_layers = -1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_what_is_wrong(name: str, folder: Path) -> None:
    damage, reason = BROKEN[name]
    load.model_folder(model(folder))
    damage(folder)
    with pytest.raises(ModelError, match=reason):
        load.model_folder(model(folder))
    with pytest.raises(ModelError, match=reason):
        load.model_config(model(folder))


def test_a_config_alone_is_enough_for_a_plan_unless_it_says_what_cannot_be_loaded(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert load.model_config(model(folder))["model_type"] == "llama"
    edit(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="quantised by gptq"):
        load.model_config(model(folder))


def test_all_that_is_missing_is_listed_at_once(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError) as caught:
        load.model_folder(model(folder))
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    for name in [*shards, "tokenizer.json"]:
        assert f"{name} is missing" in str(caught.value)


def test_a_pickle_under_a_safe_name_is_never_executed(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (canary.touch, ())

    for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.model"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load.model_folder(model(folder))
    assert not canary.exists()


def test_a_known_architecture_with_code_of_its_own_runs_as_transformers_has_it(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')")
    edit(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    chosen = model(load.model_folder(model(folder)))
    loaded = load.load_causal(folder, chosen, device="cpu", dtype=torch.float32, attention="sdpa")
    assert type(loaded).__module__.startswith("transformers.")


def test_a_good_folder_loads_frozen_and_equal(folder: Path, pristine: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(pristine)
    loaded = load.load_causal(folder, model(folder), device="cpu", dtype=torch.float32, attention="sdpa")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    half = load.load_causal(folder, model(folder), device="cpu", dtype=torch.bfloat16, attention="sdpa")
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_do_not_fill_the_model_are_refused(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks the weights model\.layers\.2.* and 6 more"):
        load.load_causal(folder, model(folder), device="cpu", dtype=torch.float32, attention="sdpa")


def test_a_weight_of_another_shape_is_named_with_both_shapes_and_nothing_else(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(folder, intermediate_size=80)
    wanted = (
        r"layers\.0\.mlp\.down_proj\.weight has shape \[\d+, \d+\], and by config.json \[\d+, 80\] \(6 such\); fetch"
    )
    with pytest.raises(ModelError, match=wanted):
        load.load_causal(folder, model(folder), device="cpu", dtype=torch.float32, attention="sdpa")
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_an_unknown_architecture_is_refused_in_one_line(folder: Path) -> None:
    edit(folder, model_type="unheard-of")
    with pytest.raises(ModelError, match="transformers cannot load it") as caught:
        load.load_causal(folder, model(folder), device="cpu", dtype=torch.float32, attention="sdpa")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", ["./nowhere", "/no/such/folder", "a/b/c", "../x", ""])
def test_a_path_that_is_not_there_is_not_looked_up_on_a_hub(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match="no such folder"):
        load.model_folder(model(base))


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load.model_folder(model(folder / "config.json"))


def test_a_hub_out_of_reach_is_explained_in_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    with pytest.raises(ModelError, match=r"cannot be reached.*smollm2-135m") as caught:
        load.model_folder(model("some-org/some-model"), said.append)
    assert "\n" not in str(caught.value)
    assert len(said) == 1


def test_a_snapshot_tells_its_commit() -> None:
    assert load.loaded_revision(Path("hub/models--a--b/snapshots/abc123")) == "abc123"
    assert load.loaded_revision(Path("my/model")) is None


SLOW = Machine(cores=2, busy=0, memory=8, available=6, flags=("avx2", "avx512f"), compiler=None)
FAST = replace(SLOW, flags=("avx512_bf16", "avx512_fp16"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_the_processor_multiplies_is_as_the_recipe_says(name: str) -> None:
    assert load.dtype_name(name, "cpu", FAST) == (name, "as the recipe says")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_cpu_that_does_not_multiply_a_dtype_takes_float32_and_names_what_it_stands_for(name: str) -> None:
    dtype, why = load.dtype_name(name, "cpu", SLOW)
    assert dtype == "float32"
    assert f"in place of {name}" in why
    assert load.dtype_name(name, "cuda", SLOW) == (name, "as the recipe says")


@pytest.mark.parametrize(("facts", "name"), [(FAST, "bfloat16"), (SLOW, "float32")])
def test_auto_is_decided_by_the_processor_and_says_why(facts: Machine, name: str) -> None:
    dtype, why = load.dtype_name("auto", "cpu", facts)
    assert dtype == name
    assert "processor" in why


def test_whole_numbers_without_a_word_on_their_scales_are_refused(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: (weights[name] * 127).to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"quantised weights.*{re.escape(name)}"):
        load.model_folder(recipe.Model(base=str(folder)))
