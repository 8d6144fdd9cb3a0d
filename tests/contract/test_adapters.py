"""The contract of an adapter: starts as the base model, and its files are PEFT's, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters import files
from luthier.adapters.lora import Lora, attach
from luthier.errors import AdapterError

# PEFT asks transformers a question by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.arange(1, 40)[None] % 90


def module(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=90, **(sizes | changes))).eval()


def trained(base: Any, **changes: Any) -> Lora:
    lora = attach(base, recipe.Adapter(**({"rank": 4, "alpha": 6.0} | changes)), seed=3)
    for layer in lora.layers.values():
        layer.B.data.normal_(0, 0.1)
    return lora


def logits(base: Any) -> Tensor:
    with torch.no_grad():
        return base(IDS).logits  # type: ignore[no-any-return]


def saved(folder: Path, **changes: Any) -> tuple[Path, Any]:
    base = module()
    files.save(trained(base, **changes), folder, base="some/base", revision="abc", extra={"template": "plain"})
    return folder, base


def test_a_new_adapter_is_the_base_model() -> None:
    base, plain = module(), module()
    lora = attach(base, recipe.Adapter(rank=4), seed=3)
    assert torch.equal(logits(base), logits(plain))
    assert lora.count == sum(p.numel() for p in base.parameters() if p.requires_grad)


def test_start_values_depend_on_seed_and_name_alone() -> None:
    one, some = attach(module(), recipe.Adapter(), 3), attach(module(), recipe.Adapter(targets=["v_proj"]), 3)
    other = attach(module(), recipe.Adapter(), 4)
    for name, layer in some.layers.items():
        assert torch.equal(layer.A, one.layers[name].A)
        assert not torch.equal(layer.A, other.layers[name].A)
    bound = 32**-0.5
    assert 0.9 * bound < some.layers["model.layers.0.self_attn.v_proj"].A.abs().max() <= bound


def test_all_linear_leaves_the_head_alone() -> None:
    assert "lm_head" not in attach(module(tie_word_embeddings=False), recipe.Adapter(), 0).layers
    assert len(attach(module(), recipe.Adapter(), 0).layers) == 14


def test_a_target_that_matches_nothing_is_named_with_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"'q_prj'.*'q_proj'"):
        attach(module(), recipe.Adapter(targets=["q_prj"]), 0)


def test_disabled_inside_disabled_stays_disabled_until_the_outer_end() -> None:
    base = module()
    lora = trained(base)
    with lora.disabled():
        with lora.disabled():
            pass
        assert torch.equal(logits(base), logits(module()))
    assert not torch.equal(logits(base), logits(module()))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["model.layers.1.mlp.up_proj"]], ids=str)
def test_peft_loads_our_files_and_gives_the_same_logits(tmp_path: Path, targets: Any) -> None:
    from peft import PeftModel

    folder, ours = saved(tmp_path, targets=targets)
    theirs = PeftModel.from_pretrained(module(), folder)
    assert sum("lora_A" in n for n, _ in theirs.named_parameters()) == sum("A" in n for n, _ in lora_tensors(ours))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


def test_peft_reads_a_rank_stabilised_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    folder, ours = saved(tmp_path, rslora=True, rank=9)
    config = json.loads((folder / files.CONFIG).read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 6, 9)
    theirs = PeftModel.from_pretrained(module(), folder)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    adapter, _ = files.load(folder)
    assert (adapter.rslora, adapter.alpha) == (True, 6.0)


def lora_tensors(base: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in base.named_parameters() if n.endswith((".A", ".B"))]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "r": 16}, {"target_modules": "all-linear"}, {"target_modules": r".*\.1\..*q_proj"}],
    ids=str,
)
def test_a_peft_adapter_gives_its_logits_and_trains_on(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    theirs = get_peft_model(module(), LoraConfig(task_type="CAUSAL_LM", **(settings | options))).eval()
    theirs.save_pretrained(tmp_path)
    adapter, tensors = files.load(tmp_path)
    ours = module()
    lora = attach(ours, adapter, seed=0)
    lora.load_state_dict(tensors)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    loss = ours(IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        for parameter in lora.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert ours(IDS, labels=IDS).loss < loss


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder, base = saved(tmp_path, dropout=0.25)
    adapter, tensors = files.load(folder)
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (4, 6.0, 0.25)
    lora = attach(module(), adapter, seed=9)
    lora.load_state_dict(tensors)
    for (name, one), (_, other) in zip(lora.state_dict().items(), trained_state(base), strict=True):
        assert torch.equal(one, other), name
    assert files.load_extra(folder) == {"template": "plain"}
    config = json.loads((folder / files.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "abc")
    assert not list(folder.glob("*.part"))


def trained_state(base: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted(lora_tensors(base), key=lambda pair: list(dict(base.named_parameters())).index(pair[0]))


def test_an_adapter_of_another_base_changes_nothing(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    adapter, tensors = files.load(folder)
    for wrong, message in (({"hidden_size": 64}, "has shape"), ({"intermediate_size": 64}, "has shape")):
        lora = attach(module(**wrong), adapter, seed=0)
        before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
        with pytest.raises(AdapterError, match=message):
            lora.load_state_dict(tensors)
        assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state_dict().items())


def test_missing_and_foreign_layers_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    adapter, tensors = files.load(folder)
    lora = attach(module(), adapter, seed=0)
    name = next(iter(tensors))
    with pytest.raises(AdapterError, match="lacks"):
        lora.load_state_dict({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(AdapterError, match="has a layer that this model"):
        lora.load_state_dict(tensors | {"base_model.model.x.lora_A.weight": torch.ones(4, 2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, value: float) -> None:
    base = module()
    lora = trained(base)
    lora.layers["model.layers.1.mlp.up_proj"].B.data[0, 0] = value
    files.save(lora, tmp_path, base="b", revision=None, extra={})
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.lora_B.*not finite"):
        files.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "not of rank 8"),
        ({"r": 0}, "'r' should be a positive number"),
        ({"lora_alpha": None}, "'lora_alpha'"),
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
    ids=str,
)
def test_what_luthier_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder, _ = saved(tmp_path)
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        files.load(folder)


@pytest.mark.parametrize("name", [files.CONFIG, files.WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    folder, _ = saved(tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(data[: len(data) // 2] if damage == "torn" else b"")
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
        files.load(folder)
