"""The contract of an adapter: starts as the base model, merges, and its files are PEFT's, both ways.

METHODS has a row for each variant of LoRA; a new one is a new row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters import files
from luthier.adapters.linears import dense_weight, linear_names
from luthier.adapters.lora import Lora, attach
from luthier.adapters.merge import merge, merged
from luthier.adapters.method import Noise
from luthier.errors import AdapterError
from luthier.kernels.dropout import dropout_mask
from luthier.model.quantize import PackedLinear, pack
from methods import IDS, check_files, check_training, llama, logits, two_steps

# PEFT asks transformers a question by its old name, and tells Conv1D from nn.Linear by itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=90, n_positions=64)).eval()


@dataclass(frozen=True)
class Method:
    """`ours` are the recipe's options, `theirs` PEFT's. A method that is not exact starts as the base model but for
    rounding."""

    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Any] = llama
    exact: bool = True

    @property
    def settings(self) -> recipe.Lora:
        return recipe.Lora(**({"rank": 4, "alpha": 6.0} | self.ours))

    def peft(self, folder: Path) -> Any:
        """A model of PEFT's with an adapter that is not the identity, saved to `folder`."""
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | self.theirs
        theirs = get_peft_model(self.make(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        shake(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(folder)
        return theirs


PATTERNS = {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 6}
METHODS = {
    "lora": Method(),
    "names": Method({"targets": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "one layer": Method(
        {"targets": ["model.layers.1.mlp.up_proj"]}, {"target_modules": ["model.layers.1.mlp.up_proj"]}
    ),
    "pattern": Method({"targets": r".*\.1\..*[qv]_proj"}, {"target_modules": r".*\.1\..*[qv]_proj"}),
    "ranks and alphas": Method(
        {"ranks": PATTERNS, "alphas": {"v_proj": 12.0}}, {"rank_pattern": PATTERNS, "alpha_pattern": {"v_proj": 12}}
    ),
    "rslora": Method({"rslora": True, "rank": 9}, {"use_rslora": True, "r": 9}),
    "gaussian": Method({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "dora": Method({"dora": True}, {"use_dora": True}),
    "pissa": Method({"init": "pissa"}, {"init_lora_weights": "pissa"}, exact=False),
    "olora": Method({"init": "olora"}, {"init_lora_weights": "olora"}, exact=False),
    "pissa, rslora, ranks": Method(
        {"init": "pissa", "rslora": True, "ranks": PATTERNS},
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": PATTERNS},
        exact=False,
    ),
    "pissa, dora": Method(
        {"init": "pissa", "dora": True}, {"init_lora_weights": "pissa", "use_dora": True}, exact=False
    ),
    "Conv1D": Method(make=gpt2),
    "Conv1D, dora": Method({"dora": True}, {"use_dora": True}, make=gpt2),
    "Conv1D, pissa": Method(
        {"init": "pissa"}, {"init_lora_weights": "pissa", "fan_in_fan_out": True}, make=gpt2, exact=False
    ),
}
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def shake(parameters: Any) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape)


def shaken(module: Any, settings: recipe.Lora | None = None) -> Lora:
    """An adapter that is not the identity."""
    lora = attach(module, settings or recipe.Lora(rank=4, alpha=6.0), seed=3)
    shake(lora.parameters())
    return lora


def saved(folder: Path, settings: recipe.Lora | None = None, make: Callable[[], Any] = llama) -> tuple[Path, Any]:
    base = make()
    files.save(shaken(base, settings), folder, base="some/base", revision="abc", extra={"template": "plain"})
    return folder, base


def restored(module: Any, folder: Path) -> Lora:
    settings, tensors = files.load(folder)
    assert isinstance(settings, recipe.Lora)
    lora = attach(module, settings, seed=9)
    lora.load_state_dict(tensors)
    return lora


def assert_near(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)


# What holds for each method.


@each
def test_a_new_adapter_is_the_base_model(method: Method) -> None:
    base, plain = method.make(), logits(method.make())
    lora = attach(base, method.settings, seed=3)
    torch.testing.assert_close(logits(base), plain, rtol=0, atol=0 if method.exact else 2e-6)
    assert sum(p.numel() for p in lora.parameters()) == sum(p.numel() for p in base.parameters() if p.requires_grad)


@each
def test_training_moves_the_adapter_alone_and_disabled_it_is_the_base_model(method: Method) -> None:
    check_training(method.make, method.settings, same_start=method.exact)


@each
def test_its_files_give_it_back(method: Method, tmp_path: Path) -> None:
    if method.exact:
        check_files(method.make, method.settings, tmp_path)
    else:  # twice the rank, which rounds differently
        folder, base = saved(tmp_path, method.settings, method.make)
        module = method.make()
        assert restored(module, folder).settings.init == "default"
        assert_near(logits(module), logits(base))


@each
def test_its_state_resumes_bit_for_bit(method: Method) -> None:
    one, other = method.make(), method.make()
    before, after = (attach(module, method.settings, seed=3) for module in (one, other))
    two_steps(one, before)
    for layer in after.layers.values():
        if layer.start_A is not None:
            layer.start_A.zero_()  # another machine may round it differently
    after.load_state_dict({name: tensor.clone() for name, tensor in before.state_dict().items()})
    assert torch.equal(logits(one), logits(other))
    assert two_steps(one, before) == two_steps(other, after)
    assert torch.equal(logits(one), logits(other))


@each
def test_merged_it_answers_the_same_and_unmerged_it_is_what_it_was(method: Method) -> None:
    base = method.make()
    lora = shaken(base, method.settings)
    tuned, weights = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    with merged(base, lora) as losses:
        assert_near(logits(base), tuned)
        assert not [m for m in base.modules() if m in lora.layers.values()]
        assert losses.keys() == lora.layers.keys()
        assert max(losses.values()) < 1e-6
    assert torch.equal(logits(base), tuned)
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
    merge(base, lora)
    assert_near(logits(base), tuned)
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in method.make().named_parameters()]


@each
def test_peft_reads_its_file_and_gives_the_same_logits(method: Method, tmp_path: Path) -> None:
    from peft import PeftModel

    folder, ours = saved(tmp_path, method.settings, method.make)
    theirs = PeftModel.from_pretrained(method.make(), folder)
    assert_near(logits(theirs), logits(ours))
    assert (logits(ours) - logits(method.make())).abs().max() > 1e-2
    theirs.merge_and_unload()


@each
def test_a_file_of_pefts_gives_its_logits_and_trains_on_as_there(method: Method, tmp_path: Path) -> None:
    theirs = method.peft(tmp_path)
    ours = method.make()
    restored(ours, tmp_path)
    assert_near(logits(ours), logits(theirs))
    before = logits(ours)
    for module in (ours, theirs):
        descend(module)
    assert (logits(ours) - before).abs().max() > 1e-3
    assert_near(logits(ours), logits(theirs), atol=5e-5)


def descend(module: Any) -> None:
    """Two steps down the gradient of what is trained."""
    for _ in range(2):
        module(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
                    parameter.grad = None


# Starts.


def test_start_values_depend_on_seed_and_name_alone() -> None:
    one, some = attach(llama(), recipe.Lora(), 3), attach(llama(), recipe.Lora(targets=["v_proj"]), 3)
    other = attach(llama(), recipe.Lora(), 4)
    for name, layer in some.layers.items():
        assert torch.equal(layer.A, one.layers[name].A)
        assert not torch.equal(layer.A, other.layers[name].A)
    bound = 32**-0.5
    assert 0.9 * bound < some.layers["model.layers.0.self_attn.v_proj"].A.abs().max() <= bound


def test_gaussian_values_have_a_deviation_of_one_over_the_rank() -> None:
    lora = attach(llama(), recipe.Lora(rank=8, init="gaussian"), 3)
    assert 0.12 < float(torch.cat([layer.A.detach().flatten() for layer in lora.layers.values()]).std()) < 0.13


@pytest.mark.parametrize("rows", [True, False], ids=["wide", "tall"])
def test_pissa_takes_the_largest_singular_values(rows: bool) -> None:
    name = "model.layers.0.mlp.down_proj" if rows else "model.layers.0.mlp.up_proj"
    layer = attach(llama(), recipe.Lora(rank=3, alpha=7.0, init="pissa"), 3).layers[name]
    whole = torch.linalg.svdvals(layer.base.weight)
    rest = torch.linalg.svdvals(layer.base.weight - layer.scale * layer.B @ layer.A)
    torch.testing.assert_close(rest[:-3], whole[3:], rtol=1e-4, atol=1e-5)
    assert rest[-3:].max() < 1e-5
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_needs_as_many_rows_as_its_rank(init: Any) -> None:
    wanted = r"rank 20 is more than .*\.0\.self_attn\.k_proj has, 16; .* at most 16, or adapter\.ranks={k_proj: 16}"
    with pytest.raises(AdapterError, match=wanted):
        attach(llama(), recipe.Lora(rank=20, init=init), 0)
    attach(llama(), recipe.Lora(rank=20), 0)


def test_a_row_of_zeros_has_no_direction_and_stays_finite() -> None:
    def make() -> Any:
        module = llama()
        module.model.layers[0].mlp.up_proj.weight.data[3] = 0
        return module

    check_training(make, recipe.Lora(rank=4, dora=True))


# Layers that keep their weight in another form.


def quantised(kind: str) -> Any:
    module, settings = llama(), TypeAdapter(recipe.Quantize).validate_python({"kind": kind})
    for name in linear_names(module):
        linear = module.get_submodule(name)
        module.set_submodule(name, pack(linear.weight.detach(), None, settings, torch.float32))
    return module


@pytest.mark.parametrize(("kind", "low", "high"), [("nf4", 0.03, 0.3), ("int8", 1e-3, 1e-2)])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_a_quantised_base_is_adapted_as_it_is(options: dict[str, Any], kind: str, low: float, high: float) -> None:
    settings, make = recipe.Lora(**({"rank": 4} | options)), partial(quantised, kind)
    assert len(linear_names(make())) == 14
    check_training(make, settings, same_start="init" not in options)
    base = make()
    lora = shaken(base, settings.model_copy(update={"targets": ["up_proj"]}))
    tuned, plain = logits(base), logits(make())
    with merged(base, lora) as losses:
        assert all(low < loss < high for loss in losses.values())
        assert (logits(base) - tuned).norm() < max(losses.values()) * tuned.norm()
        assert isinstance(base.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)
    assert torch.equal(logits(base), tuned)
    with lora.disabled():
        assert torch.equal(logits(base), plain)


def test_loftq_starts_nearer_to_the_weights_before_quantisation() -> None:
    dense, base = llama(), quantised("nf4")
    lora = attach(base, recipe.Lora(rank=4, init="loftq"), 0, lambda name: dense.get_submodule(name).weight)
    for name, layer in lora.layers.items():
        weight = dense.get_submodule(name).weight
        lost, left = weight - dense_weight(layer.base), weight - layer.merged()
        torch.testing.assert_close(left.norm(), torch.linalg.svdvals(lost)[4:].norm(), rtol=1e-3, atol=0)
    with lora.disabled():
        assert torch.equal(logits(base), logits(quantised("nf4")))


@pytest.mark.parametrize(
    ("kind", "original", "message"),
    [
        (None, None, "not quantised; set model.quantize"),
        ("nf4", None, "not at hand"),
        ("nf4", lambda name: None, "not at hand"),
    ],
)
def test_loftq_says_what_it_lacks(kind: str | None, original: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(quantised(kind) if kind else llama(), recipe.Lora(init="loftq"), 0, original)


def test_our_block_folds_plain_updates_alone() -> None:
    assert attach(llama(), recipe.Lora(rslora=True, dropout=0.1, ranks={"q_proj": 2}), 0).foldable
    for options in ({"dora": True}, {"init": "olora"}):
        assert not attach(llama(), recipe.Lora(**options), 0).foldable
    assert not attach(gpt2(), recipe.Lora(), 0).foldable
    assert attach(quantised("nf4"), recipe.Lora(), 0).foldable
    assert not attach(quantised("int8"), recipe.Lora(), 0).foldable


# Dropout.


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
def test_dropout_falls_where_pefts_does(options: dict[str, Any], tmp_path: Path) -> None:
    method = Method(options, {f"use_{key}": value for key, value in options.items()})
    theirs = method.peft(tmp_path).train()
    settings, tensors = files.load(tmp_path)
    ours = llama()
    lora = attach(ours, settings.model_copy(update={"dropout": 0.3}), seed=1)
    lora.load_state_dict(tensors)
    lora.noise.samples, lora.noise.positions = torch.zeros(39, dtype=torch.int64), torch.arange(39)
    for name, layer in lora.layers.items():
        theirs.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = Masked(layer)
    assert_near(ours(IDS).logits, theirs(IDS).logits)
    assert (ours(IDS).logits - logits(ours)).abs().max() > 1e-2


class Masked(nn.Module):
    """Dropout with the masks of one of our layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.masks = [layer.noise, layer.index, layer.dropout]

    def forward(self, x: Tensor) -> Tensor:
        noise, index, p = self.masks
        return noise.drop(x, index, p)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(10, 8), (1, 10, 8), (2, 5, 8)], ids=str)
def test_masks_follow_tokens_in_any_shape(shape: tuple[int, ...]) -> None:
    samples, positions = torch.arange(10) // 5, torch.arange(10) % 5
    noise, x = Noise(1, 2, samples, positions), torch.ones(shape)
    flat = dropout_mask(1, 2, samples, positions, 3, 8, 0.5, torch.float32)
    assert torch.equal(noise.drop(x, 3, 0.5).view(10, 8), flat)
    with torch.no_grad():
        assert noise.drop(x, 3, 0.5) is x


def test_a_layer_that_sees_some_tokens_alone_has_no_dropout() -> None:
    noise = Noise(1, 2, torch.arange(10) // 5, torch.arange(10) % 5)
    with pytest.raises(AdapterError, match=r"sees 7 of 10 tokens.*adapter\.dropout=0"):
        noise.drop(torch.ones(7, 8), 3, 0.5)


# Targets.


def test_all_linear_leaves_the_head_alone() -> None:
    assert "lm_head" not in attach(llama(tie_word_embeddings=False), recipe.Lora(), 0).layers
    assert len(attach(llama(), recipe.Lora(), 0).layers) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_prj"]}, r"adapter\.targets: .*'q_prj'; did you mean 'q_proj'.*has down_proj, gate_proj"),
        ({"targets": ["query_key_value"]}, r"'query_key_value'; known names: down_proj, gate_proj"),
        ({"targets": ["lm_head"]}, "no linear layer is called 'lm_head'"),
        ({"targets": r".*\.attn\..*"}, r"no linear layer is called '\.\*.*known names"),
        ({"targets": "q_proj"}, r"'q_proj' is no whole dotted name.*write a list: \[q_proj\]"),
        ({"targets": "(q_proj"}, r"'\(q_proj' is not a regular expression"),
        ({"targets": []}, r"adapter\.targets: names no layer; write all-linear, or a list"),
        ({"targets": ""}, r"adapter\.targets: names no layer"),
        ({"ranks": {"c_attn": 3}}, r"adapter\.ranks: no linear layer is called 'c_attn'"),
        ({"targets": ["q_proj"], "alphas": {"up_proj": 3.0}}, r"adapter\.alphas: .*'up_proj'.*q_proj"),
        ({"ranks": {"q_proj)": 3}}, "is not a regular expression"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_named_with_what_the_model_has(options: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(llama(), recipe.Lora(**options), 0)


def test_names_in_the_file_mean_no_other_module() -> None:
    """A module of another kind may share the last part of a name; PEFT would adapt it too."""
    module = llama()
    module.model.extra = nn.ModuleDict({"q_proj": nn.Embedding(3, 3)})
    lora = attach(module, recipe.Lora(targets=["q_proj"]), 0)
    assert lora.targets == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    assert attach(llama(), recipe.Lora(targets=r".*\.q_proj"), 0).targets == ["q_proj"]


# Files.


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder, base = saved(tmp_path, recipe.Lora(rank=4, alpha=6.0, dropout=0.25))
    settings, _ = files.load(folder)
    assert isinstance(settings, recipe.Lora)
    assert (settings.rank, settings.alpha, settings.dropout) == (4, 6.0, 0.25)
    module = llama()
    restored(module, folder)
    assert torch.equal(logits(module), logits(base))
    assert files.load_extra(folder) == {"template": "plain"}
    config = json.loads((folder / files.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["lora_alpha"]) == ("some/base", "abc", 6)
    assert not list(folder.glob("*.part"))


def test_a_converted_file_holds_the_difference_in_twice_the_rank(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, recipe.Lora(rank=4, alpha=6.0, rslora=True, init="olora", ranks={"q_proj": 2}))
    config = json.loads((folder / files.CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["init_lora_weights"]) == (8, {"q_proj": 4}, True)
    assert config["lora_alpha"] == pytest.approx(6 * 2**0.5)


def test_the_file_says_where_a_weight_lies_on_its_side(tmp_path: Path) -> None:
    for make, on_its_side in ((gpt2, True), (llama, False)):
        folder, _ = saved(tmp_path, make=make)
        assert json.loads((folder / files.CONFIG).read_text())["fan_in_fan_out"] is on_its_side


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, r"no linear layer is called 'down_proj'; it was trained on some/base at abc, and this is other/base"),
        (lambda: llama(hidden_size=64), "has shape .* it was trained on some/base"),
        (
            lambda: llama(intermediate_size=64),
            r"on other/base: .*lora_[AB].* has shape \[.*\] where the model needs \[.*\]",
        ),
        (lambda: llama(num_hidden_layers=1), r"has a layer that .*layers\.1.*\(14 such\)"),
        (lambda: llama(num_hidden_layers=3), r"lacks .*layers\.2.*\(14 such\)"),
    ],
    ids=["architecture", "width", "middle", "fewer layers", "more layers"],
)
def test_an_adapter_of_another_base_is_refused_and_changes_nothing(tmp_path: Path, make: Any, message: str) -> None:
    folder, _ = saved(tmp_path)
    settings, tensors = files.load(folder)
    module, before = make(), logits(make())
    with pytest.raises(AdapterError, match=message), files.fitting(folder, "other/base", None):
        attach(module, settings, seed=0).load_state_dict(tensors)
    assert torch.equal(logits(module), before)


def test_a_base_of_another_name_or_revision_is_told_apart(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert files.other_base(folder, "some/base", None) == files.other_base(folder, "some/base", "abc") == ""
    assert "at abc, and this is some/base at def" in files.other_base(folder, "some/base", "def")
    assert "on some/base at abc, and this is mine" in files.other_base(folder, "mine", None)


@pytest.mark.parametrize("settings", [recipe.Lora(), recipe.Lora(dora=True)], ids=["lora", "dora"])
def test_a_partial_adapter_is_refused(tmp_path: Path, settings: recipe.Lora) -> None:
    folder, _ = saved(tmp_path, settings)
    _, tensors = files.load(folder)
    for name in list(tensors)[:3]:
        lora = attach(llama(), settings, seed=0)
        with pytest.raises(AdapterError, match=f"the adapter lacks {name}"):
            lora.load_state_dict({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(AdapterError, match="has a layer that this model"):
        lora.load_state_dict(tensors | {"base_model.model.x.lora_A.weight": torch.ones(4, 2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, value: float) -> None:
    lora = shaken(llama())
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
        ({"lora_dropout": 1.5}, "'dropout'.*less than 1"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_A.*not of rank 2"),
        ({"rank_pattern": [2]}, "'rank_pattern' should be a mapping"),
        ({"alpha_pattern": {"q_proj": -2}}, r"'alphas\.q_proj'"),
        ({"init_lora_weights": "corda"}, "needs a base that 'corda' has changed"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
    ids=str,
)
def test_what_luthier_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder, _ = saved(tmp_path)
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        files.load(folder)


def test_layers_chosen_by_number_are_those_of_the_file(tmp_path: Path) -> None:
    method = Method(theirs={"target_modules": ["q_proj"], "layers_to_transform": [1]})
    theirs, ours = method.peft(tmp_path), llama()
    assert list(restored(ours, tmp_path).layers) == ["model.layers.1.self_attn.q_proj"]
    assert_near(logits(ours), logits(theirs))


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
