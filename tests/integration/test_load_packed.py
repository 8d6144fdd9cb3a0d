"""Weights arrive packed: the model is what plain loading and packing make, and host memory never holds it whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import recipe
from luthier.errors import ModelError
from luthier.model import load, quantize

IDS = torch.arange(3, 23)[None]
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"intermediate_size": 96, "num_key_value_heads": 2},
    "falcon": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "phi": SIZES | {"intermediate_size": 96},
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": SIZES | {"intermediate_size": 96},
    "bloom": {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mixtral": SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 2},
}
KINDS = {
    "nf4": recipe.FourBit(kind="nf4"),
    "fp4": recipe.FourBit(kind="fp4", double=False),
    "int8": recipe.EightBit(kind="int8"),
}


def made(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny model of random weights, in small shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **options})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any) -> Any:
    chosen = recipe.Model(base=str(folder), **options)
    return load.load_causal(folder, chosen, device="cpu", dtype=dtype, attention=attention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_on_arrival_makes_what_packing_afterwards_makes(family: str, kind: str, tmp_path: Path) -> None:
    folder = made(family, tmp_path)
    expected = loaded(folder)
    quantize.quantize_module(expected, KINDS[kind], torch.float32)
    found = loaded(folder, quantize=KINDS[kind])
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name].float(), theirs[name].float())] == []
    assert any(isinstance(layer, quantize.PackedLinear) for layer in found.modules())
    assert not any(p.requires_grad or p.is_meta for p in found.parameters())
    assert not hasattr(found.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)


def test_the_head_is_never_packed(tmp_path: Path) -> None:
    found = loaded(made("llama", tmp_path), quantize=KINDS["nf4"])
    assert type(found.lm_head) is torch.nn.Linear


def test_a_model_whose_config_cuts_layers_off_is_refused_by_their_names(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    with pytest.raises(ModelError, match=r"layers that its config does not have: model\.layers\.1\."):
        loaded(folder)


def test_a_weight_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    for options in ({}, {"quantize": KINDS["nf4"]}):
        with pytest.raises(ModelError):
            loaded(folder, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_head_in_float32_leave_the_rest_in_the_compute_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for family in ("llama", "gpt_neox", "gpt2"):  # the last has its head tied to the embedding
        folder = made(family, tmp_path / family, dtype)
        kept = loaded(folder, dtype, quantize=KINDS["nf4"], norms="float32")
        norms = [layer for layer in kept.modules() if load._is_norm(layer)]
        assert len(norms) >= 5
        assert {p.dtype for layer in norms for p in layer.parameters()} == {torch.float32}
        assert kept.get_output_embeddings().weight.dtype == torch.float32
        seen: set[torch.dtype] = set()
        for layer in kept.modules():
            if isinstance(layer, quantize.PackedLinear):
                layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0].dtype))
        with torch.no_grad():
            logits = kept(IDS).logits
            expected = loaded(folder, torch.float32, quantize=KINDS["nf4"])(IDS).logits
        assert seen == {dtype}
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() < 16 * torch.finfo(dtype).eps * expected.norm()


def test_a_family_that_has_no_place_for_our_attention_gets_another(tmp_path: Path) -> None:
    names = {
        family: loaded(made(family, tmp_path / family), attention="packed").config._attn_implementation
        for family in ("llama", "bloom")
    }
    assert names == {"llama": "luthier_packed", "bloom": "sdpa"} or names["bloom"] == "eager"


@pytest.fixture(scope="module", params=["double", "single"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint in 4 bits that transformers and bitsandbytes wrote, and their model."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Rows of whole blocks: of others bitsandbytes' own CPU kernel does not read what it has written.
    plain = made("llama", tmp_path_factory.mktemp("plain"), hidden_size=256, intermediate_size=320)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param == "double",
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("stored")
    theirs.save_pretrained(folder, max_shard_size="100KB")
    for name, text in {"tokenizer.json": '{"model": {}}', "tokenizer_config.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder, theirs.train()  # elsewhere bitsandbytes multiplies in bfloat16 on processors that have it


def as_stored(folder: Path) -> recipe.Model:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    kind = recipe.FourBit(kind="nf4", double=config["bnb_4bit_use_double_quant"])
    return recipe.Model(base=str(folder), quantize=kind)


def test_weights_stored_in_4_bits_are_taken_as_they_are(stored: tuple[Path, Any]) -> None:
    folder, theirs = stored
    chosen = as_stored(folder)
    assert load.model_folder(chosen) == folder
    ours: Any = load.load_causal(folder, chosen, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        a, b = ours(IDS).logits, theirs(IDS).logits
    assert (a - b).norm() < 1e-5 * b.norm()
    packed = ours.model.layers[0].mlp.down_proj
    assert torch.equal(packed.weight, theirs.model.layers[0].mlp.down_proj.weight.data)


def test_a_recipe_that_asks_for_other_bits_than_are_stored_is_refused(stored: tuple[Path, Any]) -> None:
    folder, _ = stored
    for other in (None, recipe.EightBit(kind="int8"), recipe.FourBit(kind="fp4")):
        with pytest.raises(ModelError, match=r"quantised already: set model.quantize to \{kind: nf4, double"):
            load.model_folder(recipe.Model(base=str(folder), quantize=other))


def test_a_damaged_part_of_a_stored_weight_is_refused_by_its_name(stored: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = stored
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t[:-1] if n.endswith("absmax") else t for n, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj\.weight|_proj\.weight.*4 bits"):
        load.load_causal(tmp_path, as_stored(tmp_path), device="cpu", dtype=torch.float32)


def test_a_tensor_that_several_threads_read_is_the_one_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    from luthier.model import weights

    monkeypatch.setattr(weights, "_PIECE", 1000)
    shapes: dict[str, tuple[int, ...]] = {"wide": (30, 421), "one": (), "none": (0, 4), "odd": (3333,)}
    tensors = {
        f"{name} {dtype}": torch.randint(0, 200, shape).to(dtype)
        for name, shape in shapes.items()
        for dtype in weights._DTYPES.values()
    }
    tensors["rare"] = torch.rand(30, 40).to(torch.float8_e4m3fn)  # safetensors reads it
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    with weights.handles([tmp_path / "a.safetensors"], copied=True) as found:
        assert found.keys() == tensors.keys()
        assert sum(isinstance(handle, weights.Handle) for handle in found.values()) == len(tensors) - 1
        for name, tensor in load_file(tmp_path / "a.safetensors").items():
            read = found[name][...]
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.float(), tensor.float())


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from luthier.model import weights

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path, {"format": "pt"})
    with weights.handles([path], copied=True) as found:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(OSError, match="ends within x"):
            found["x"][...]


@pytest.mark.parametrize("ahead", [0, 5000, 1 << 20])
def test_tensors_are_what_they_are_in_whatever_order_they_are_taken(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    from safetensors.torch import save_file

    from luthier.model import weights

    monkeypatch.setattr(weights, "_PIECE", 1000)
    tensors = {f"layer.{i}": torch.full((i * 37,), i) for i in range(30)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    names = [*tensors, *random.Random(0).sample(list(tensors), 30), "layer.7", "layer.7"]
    with weights.handles([tmp_path / "a.safetensors"], copied=True, ahead=ahead) as found:
        for name in names:
            assert torch.equal(found[name][...], tensors[name])


def test_what_comes_next_is_read_before_it_is_asked_for_and_no_more(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from luthier.model import weights

    save_file({f"layer.{i}": torch.zeros(1000, dtype=torch.uint8) for i in range(12)}, tmp_path / "a.safetensors")
    with weights.handles([tmp_path / "a.safetensors"], copied=True, ahead=3000) as found:
        for i in range(12):
            found[f"layer.{i}"][...]
            begun = found["layer.0"].reading._begun
            assert list(begun) == [f"layer.{following}" for following in range(i + 1, 12)][:3]


MEASURE = """
import sys
from pathlib import Path
import torch
from luthier import recipe
from luthier.model import attention, load, quantize, weights
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
torch.set_num_threads(1)
chosen = recipe.Model(base=sys.argv[1], quantize={"kind": "nf4"})
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
module = load.load_causal(Path(sys.argv[1]), chosen, device="cpu", dtype=torch.bfloat16)
held = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
print(resident("VmHWM") - before, held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_stays_near_one_shard_and_the_packed_model(tmp_path: Path) -> None:
    shards = written_in_shards(tmp_path, layers=12, shards=6)
    assert sum(shards) > 300e6
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert held < sum(shards) / 3
    assert held < grown <= 1.3 * (max(shards) + held)


def written_in_shards(folder: Path, layers: int, shards: int) -> list[int]:
    """Random weights of a Llama in bfloat16; the sizes of the files in bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    places = {name: f"model-{i * shards // len(empty)}.safetensors" for i, name in enumerate(empty)}
    for file in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == file]
        tensors = {name: torch.empty(empty[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return [path.stat().st_size for path in folder.glob("*.safetensors")]
