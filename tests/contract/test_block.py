"""The contract of a family's fast path: the logits and the adapter's gradients of the transformers module."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.data.stream import Micro
from luthier.errors import ModelError
from luthier.kernels import native
from luthier.kernels.place import noticing, planned_for
from luthier.model import attention, families
from luthier.model.causal import CausalModel, Kernels, shell
from luthier.model.pack import share_prefix, trim
from luthier.model.quantize import quantize_module
from luthier.model.trace import outline
from luthier.train.optim import flat_gradient

VOCAB = 97
ALL = recipe.Lora(rank=4, alpha=8)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": 100,
}
GEMMA_3 = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    },
}
SPECIAL: dict[str, dict[str, Any]] = {
    "falcon": {"bias": True, "alibi": False},
    "glm": {"head_dim": 16, "attention_bias": True, "pad_token_id": 0},
    "glm4": {"head_dim": 16, "attention_bias": True, "pad_token_id": 0},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 9, "attn_logit_softcapping": None, "sliding_window": 400},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 100, "sliding_window": 400, **GEMMA_3},
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
}


def config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": True,
        **SPECIAL.get(family, {}),
    }
    return AutoConfig.for_model(family, **(sizes | changes))


def module(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model whose norms and biases are not at their start values, where a fault in them would not show."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    how = "sdpa" if family == "falcon" else attention.NAME  # Falcon calls torch's attention, which is taken over
    made = AutoModelForCausalLM.from_config(config(family, **changes), attn_implementation=how)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.data.uniform_(0.5, 1.5)
        if "bias" in name:
            parameter.data.normal_(0, 0.2)
    return made.to(dtype).eval()


def model(family: str, kernels: Kernels, adapter: recipe.Lora = ALL, **options: Any) -> CausalModel:
    kept = {key: options.pop(key) for key in ("recompute", "recompute_gate_up", "unpacked") if key in options}
    packed, dtype = options.pop("packed", False), options.pop("dtype", torch.float32)
    base = module(family, dtype, **options)
    if packed:
        quantize_module(base, recipe.FourBit(kind="nf4"), dtype)
    lora = attach(base, adapter, seed=3)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.layers.values():
        layer.B.data.normal_(0, 0.05, generator=generator)
    return CausalModel(base, lora, kernels=kernels, **kept)


def micro(lengths: tuple[int, ...] = (7, 2, 150, 12), supervised: tuple[int, ...] | None = None) -> Micro:
    """Random rows, of which the tokens at `supervised` (places in the pack) are learned; by default half of them."""
    tokens, bounds = sum(lengths), (0, *torch.tensor(lengths).cumsum(0).tolist())
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])
    learned = torch.tensor(supervised) if supervised else ((positions > 0) & (ids % 2 == 0)).nonzero()[:, 0]
    return Micro(ids, positions, bounds, learned - 1, ids[learned], torch.arange(len(lengths)) + 40, step=2)


def gradients(model: CausalModel, batch: Micro) -> tuple[Tensor, Tensor]:
    assert model.adapter is not None
    for parameter in model.adapter.parameters():
        parameter.grad = None
    loss = model.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.adapter.parameters()]
    return loss.detach(), torch.cat([g.flatten() for g in flat])


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())


def alike(one: CausalModel, other: CausalModel, batch: Micro, tolerance: float = 1e-5) -> None:
    (loss, gradient), (wanted_loss, wanted) = gradients(one, batch), gradients(other, batch)
    assert abs(loss - wanted_loss) <= tolerance * wanted_loss
    assert error(gradient, wanted) <= tolerance


@pytest.fixture(params=["eager", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "compiled" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    return request.param  # type: ignore[no-any-return]


def test_the_reference_path_gives_the_logits_of_the_untouched_module() -> None:
    batch, made = micro(), model("llama", "reference")
    untouched = copy.deepcopy(made.module)
    untouched.set_attn_implementation("eager")
    rows = torch.cat([untouched(batch.ids[None, a:b]).logits[0] for a, b in pairwise(batch.bounds)])
    assert error(made.head.logits(made.hidden(batch)), rows[batch.rows]) <= 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_has_the_logits_and_gradients_of_the_module(family: str, kernels: Kernels) -> None:
    fast, reference, batch = model(family, kernels), model(family, "reference"), micro()
    assert error(fast.hidden(batch), reference.hidden(batch)) <= 1e-5
    alike(fast, reference, batch)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("budget", [{}, {"recompute": True}, {"recompute_gate_up": 3}], ids=str)
def test_a_family_drops_recomputes_and_leaves_rows_out(family: str, budget: dict[str, Any], kernels: Kernels) -> None:
    adapter, batch = recipe.Lora(rank=4, dropout=0.3), micro(supervised=(8, 9, 158))
    alike(model(family, kernels, adapter, **budget), model(family, "reference", adapter), batch)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_shares_a_prefix(family: str, kernels: Kernels) -> None:
    alike(model(family, kernels), model(family, "reference"), sharing(25))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi", {"num_key_value_heads": 6, "hidden_act": "gelu"}),
        ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
        ("falcon", {"bias": False}),
        ("falcon", {"bias": False, "num_attention_heads": 3, "activation": "gelu_pytorch_tanh"}),
        ("glm", {"attention_bias": False, "num_hidden_layers": 1}),
        ("phi3", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        ("qwen3", {"attention_bias": True, "num_hidden_layers": 1}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("smollm3", {"no_rope_layers": [0, 0, 0]}),
        ("gpt_neox", {"hidden_act": "gelu_fast", "attention_bias": False, "num_hidden_layers": 1}),
        ("stablelm", {"use_qkv_bias": True}),
        ("phi3", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 512}),
    ],
    ids=str,
)
def test_variants_of_families_agree(family: str, changes: dict[str, Any], kernels: Kernels) -> None:
    alike(model(family, kernels, **changes), model(family, "reference", **changes), micro())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi", {"qk_layernorm": True}),
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"multi_query": False}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("stablelm", {"qk_layernorm": True}),
        ("stablelm", {"use_parallel_residual": True}),
        ("llama", {"hidden_act": "relu"}),
    ],
    ids=str,
)
def test_variants_that_the_block_does_not_compute_are_refused(family: str, changes: dict[str, Any]) -> None:
    assert families.find(config(family)) is not None
    assert families.find(config(family, **changes)) is None


@pytest.mark.parametrize(
    "targets",
    [
        ["fc2"],
        ["dense"],
        ["model.layers.1.mlp.fc1"],
        ["model.layers.1.self_attn.v_proj"],
        ["model.layers.1.mlp.fc1", "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.fc2"],
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_any_targets_of_a_parallel_block_agree(targets: list[str], recompute: bool, kernels: Kernels) -> None:
    adapter = recipe.Lora(rank=3, alpha=5, targets=targets)
    alike(model("phi", kernels, adapter, recompute=recompute), model("phi", "reference", adapter), micro())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_shapes_biases_and_scaled_rotations_agree(changes: dict[str, Any], kernels: Kernels) -> None:
    alike(model("llama", kernels, **changes), model("llama", "reference", **changes), micro())


@pytest.mark.parametrize(
    "targets",
    [
        ["v_proj", "down_proj"],
        ["o_proj"],
        ["gate_proj"],
        ["model.layers.1.self_attn.q_proj"],
        ["model.layers.2.mlp.up_proj"],
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_any_targets_agree(targets: list[str], recompute: bool, kernels: Kernels) -> None:
    adapter = recipe.Lora(rank=3, alpha=5, targets=targets)
    alike(model("qwen2", kernels, adapter, recompute=recompute), model("qwen2", "reference", adapter), micro())


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_masks_are_those_of_the_reference_path(recompute: bool, kernels: Kernels) -> None:
    adapter = recipe.Lora(rank=4, dropout=0.3)
    fast, reference = model("llama", kernels, adapter, recompute=recompute), model("llama", "reference", adapter)
    alike(fast, reference, micro())
    undropped = model("llama", "reference", ALL)
    assert error(gradients(fast, micro())[1], gradients(undropped, micro())[1]) > 0.1


def test_evaluation_drops_nothing(kernels: Kernels) -> None:
    dropping = model("llama", kernels, recipe.Lora(rank=4, alpha=8, dropout=0.3))
    with torch.no_grad():
        assert torch.equal(dropping.loss(micro()), model("llama", kernels).loss(micro()))


@pytest.mark.parametrize("paths", ["reference", "eager", "compiled"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_promise_1_recomputing_none_some_or_all_changes_no_bit(paths: Kernels, dropout: float) -> None:
    if paths == "compiled" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    adapter, budgets = recipe.Lora(rank=4, dropout=dropout), [{"recompute": 2}, {"recompute": True}]
    if paths != "reference":
        budgets += [{"recompute_gate_up": 3}, {"recompute": 1, "recompute_gate_up": 1}]
    kept = gradients(model("llama", paths, adapter), micro())
    for budget in budgets:
        remade = gradients(model("llama", paths, adapter, **budget), micro())
        assert all(torch.equal(*pair) for pair in zip(kept, remade, strict=True))


def test_blocks_keep_less_and_less_until_all_recompute() -> None:
    made = model("llama", "eager", num_hidden_layers=9)
    assert made.decoder is not None
    kept = [[block.recompute for block in made.decoder.blocks] for _ in range(11) if made.keep_less()]
    assert kept[0] == ["gate_up"] * 2 + ["nothing"] * 7
    assert kept[5] == ["all"] * 2 + ["gate_up"] * 7
    assert kept[-1] == ["all"] * 9
    assert len(kept) == 10
    assert not model("llama", "reference").keep_less()


def test_the_first_blocks_recompute_and_the_last_ones_keep(kernels: Kernels) -> None:
    made = model("llama", kernels, recompute=1, recompute_gate_up=1).decoder
    assert made is not None
    assert [block.recompute for block in made.blocks] == ["all", "gate_up", "nothing"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_promise_1_packed_and_row_by_row_give_the_same_loss_and_gradients(kernels: Kernels, dropout: float) -> None:
    made, batch = model("llama", kernels, recipe.Lora(rank=4, dropout=dropout)), micro()
    whole, gradient = gradients(made, batch)
    alone = [gradients(made, row) for row in rows(batch)]
    assert abs(sum(loss for loss, _ in alone) - whole) <= 1e-6 * whole
    assert error(sum((g for _, g in alone), torch.zeros(())), gradient) <= 1e-6


def rows(batch: Micro) -> list[Micro]:
    """The segments of a micro-batch, each as its own."""
    made = []
    for number, (a, b) in enumerate(pairwise(batch.bounds)):
        mine = (batch.rows >= a) & (batch.rows < b)
        part = replace(batch, ids=batch.ids[a:b], positions=batch.positions[a:b], bounds=(0, b - a))
        made.append(
            replace(part, rows=batch.rows[mine] - a, targets=batch.targets[mine], samples=batch.samples[[number]])
        )
    return [part for part in made if len(part.rows)]


@pytest.mark.parametrize(
    "supervised",
    [(3,), (1, 2, 3, 4, 5, 6), (170,), (8, 9, 158), tuple(range(10, 159))],
    ids=lambda s: f"{s[0]}-{s[-1]}",
)
def test_what_is_left_out_for_unsupervised_rows_changes_nothing(supervised: tuple[int, ...], kernels: Kernels) -> None:
    alike(model("llama", kernels), model("llama", "reference"), micro(supervised=supervised))


@pytest.mark.parametrize("recompute", [False, True])
def test_values_that_are_kept_beside_packed_weights_change_no_bit(recompute: bool, kernels: Kernels) -> None:
    found = [
        gradients(model("llama", kernels, packed=True, unpacked=count, recompute=recompute), micro())
        for count in (0, 1, 3)
    ]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, found[0], strict=True))


def test_values_are_kept_of_as_many_blocks_as_was_said() -> None:
    made = model("llama", "eager", packed=True, unpacked=2).decoder
    assert made is not None
    assert [all(linear.dense is not None for linear in block.linears) for block in made.blocks] == [True, True, False]


def test_tokens_after_the_last_supervised_one_are_left_out() -> None:
    short = trim(micro(lengths=(5, 4, 6), supervised=(2, 3, 12)))
    assert short.bounds == (0, 3, 6)
    assert short.samples.tolist() == [40, 42]
    assert short.rows.tolist() == [1, 2, 5]
    assert short.positions.tolist() == [0, 1, 2, 0, 1, 2]


def sharing(prefix: int, lengths: tuple[int, ...] = (50, 90, 60, 200)) -> Micro:
    """Rows that begin with the same `prefix` tokens, of which none is learned."""
    batch = micro(lengths)
    ids = batch.ids.clone()
    for start in batch.bounds[:-1]:
        ids[start : start + prefix] = torch.arange(prefix) % VOCAB
    kept = batch.positions[batch.rows] >= prefix
    return replace(batch, ids=ids, rows=batch.rows[kept], targets=ids[batch.rows[kept] + 1])


@pytest.mark.parametrize("prefix", [12, 25, 33])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(prefix: int, recompute: bool, kernels: Kernels) -> None:
    batch = sharing(prefix)
    shorter, found = share_prefix(trim(batch))
    assert found == prefix
    assert len(trim(batch).ids) - len(shorter.ids) == 3 * prefix
    alike(model("llama", kernels, recompute=recompute), model("llama", "reference"), batch)


def test_a_prefix_ends_before_what_is_learned_and_where_rows_differ() -> None:
    batch = sharing(25)
    early = replace(
        batch, rows=torch.cat([torch.tensor([10]), batch.rows]), targets=torch.cat([batch.ids[[11]], batch.targets])
    )
    assert share_prefix(early)[1] == 10
    differing = replace(batch, ids=batch.ids.clone())
    differing.ids[batch.bounds[2] + 17] += 1
    assert share_prefix(differing)[1] == 17


def test_a_single_row_and_rows_that_share_little_are_left_alone() -> None:
    for batch in (sharing(25, lengths=(200,)), sharing(4)):
        assert share_prefix(batch) == (batch, 0)


def test_rows_with_dropout_share_no_prefix(kernels: Kernels) -> None:
    adapter = recipe.Lora(rank=4, dropout=0.3)
    alike(model("llama", kernels, adapter), model("llama", "reference", adapter), sharing(25))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bfloat16_is_as_near_to_fp32_as_the_module_in_bfloat16(family: str, kernels: Kernels) -> None:
    batch = micro()
    _, truth = gradients(model(family, "reference"), batch)
    fast = gradients(model(family, kernels, dtype=torch.bfloat16), batch)[1]
    theirs = gradients(model(family, "reference", dtype=torch.bfloat16), batch)[1]
    assert error(fast, truth) <= 1.2 * error(theirs, truth)


def test_the_module_still_runs_by_itself_on_the_merged_weights(kernels: Kernels) -> None:
    fast, reference, ids = model("qwen2", kernels), model("qwen2", "reference"), micro().ids[None]
    assert error(fast.module(ids).logits, reference.module(ids).logits) <= 1e-6


def test_a_second_model_of_the_same_base_shares_its_weights_and_none_that_were_moved_since(kernels: Kernels) -> None:
    base = module("qwen2")
    first, second = (CausalModel(shell(base), None, kernels=kernels) for _ in range(2))
    weights = [{x.place.data_ptr() for b in m.decoder.blocks for x in b.linears} for m in (first, second)]  # type: ignore[union-attr]
    assert weights[0] == weights[1]
    with torch.no_grad():
        before = first.loss(micro())
        assert torch.equal(second.loss(micro()), before)
        for parameter in base.parameters():
            parameter.data = parameter.detach() * 1.5
        third = CausalModel(shell(base), None, kernels=kernels)
        assert error(third.loss(micro()), CausalModel(shell(base), None).loss(micro())) < 1e-6
        assert not torch.equal(third.loss(micro()), before)


def test_a_disabled_adapter_is_the_base_model(kernels: Kernels) -> None:
    fast = model("llama", kernels)
    base = CausalModel(module("llama"), None, kernels=kernels)
    assert fast.adapter is not None
    with torch.no_grad():
        tuned = fast.loss(micro())
        assert not torch.equal(tuned, base.loss(micro()))
        with fast.adapter.disabled():
            assert torch.equal(fast.loss(micro()), base.loss(micro()))
        assert torch.equal(fast.loss(micro()), tuned)


def test_nothing_flows_below_the_first_adapted_layer(kernels: Kernels) -> None:
    adapter = recipe.Lora(rank=4, targets=["model.layers.2.mlp.down_proj"])
    loss = model("llama", kernels, adapter).loss(micro())
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    assert [type(node).__name__ for node in seen].count("_LayerBackward") == 1


def test_a_row_longer_than_the_window_is_refused_by_the_block_and_right_on_the_reference_path(kernels: Kernels) -> None:
    sliding, short = {"sliding_window": 100}, micro(lengths=(90, 60))
    with pytest.raises(ModelError, match="100 tokens"):
        model("mistral", kernels, **sliding).loss(micro())
    model("mistral", kernels, **sliding).loss(short)
    made, batch = model("mistral", "reference", **sliding), micro()
    untouched = copy.deepcopy(made.module)
    untouched.set_attn_implementation("eager")
    rows = torch.cat([untouched(batch.ids[None, a:b]).logits[0] for a, b in pairwise(batch.bounds)])
    assert error(made.head.logits(made.hidden(batch)), rows[batch.rows]) <= 1e-5
    unbounded = model("mistral", "reference", sliding_window=None)
    assert error(unbounded.hidden(batch), made.hidden(batch)) > 1e-3


def test_a_row_longer_than_the_window_is_evaluated_as_the_module_does(kernels: Kernels) -> None:
    """Held-out rows may be longer than those that are learned, by which the path was chosen."""
    sliding, batch = {"sliding_window": 100}, micro()
    with torch.no_grad():
        found, wanted = (model("mistral", path, **sliding).hidden(batch) for path in (kernels, "reference"))
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_one_key_head_that_goes_through_a_norm_has_the_right_gradient(family: str, kernels: Kernels) -> None:
    one, other = (model(family, path, num_key_value_heads=1) for path in (kernels, "reference"))
    alike(one, other, micro(), 2e-5)


@pytest.mark.parametrize(
    ("family", "kernels"),
    [("llama", "compiled"), ("qwen3", "compiled"), ("llama", "reference"), ("falcon", "reference")],
)
def test_on_a_gpu_a_model_answers_in_inference_mode_and_trains_after_it(family: str, kernels: Kernels) -> None:
    """Without data: the operations are those of a GPU, and so is what they save."""
    options: dict[str, Any] = {"kernels": kernels, "recompute": False, "capability": (9, 0)}
    made = outline(config(family).to_dict(), recipe.Model(base="b"), ALL, dtype=torch.bfloat16, **options)
    tokens = torch.zeros(70, dtype=torch.int64, device="meta")
    batch = Micro(tokens, tokens, (0, 30, 70), tokens, tokens, tokens[:2], step=0)

    def hidden() -> Tensor:
        return made._packed(batch) if made.decoder is None else made.decoder.hidden(batch, None)

    with planned_for((9, 0)):
        with torch.inference_mode():
            assert not hidden().requires_grad
        hidden().sum().backward()  # type: ignore[no-untyped-call]


class Launches(TorchDispatchMode):
    """Counts the operations that compute, our own kernels among them, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def launches(layers: int) -> tuple[Counter[str], Counter[str]]:
    """Of a Llama with so many layers on a GPU, forward and backward."""
    sizes, options = config("llama", num_hidden_layers=layers, head_dim=16).to_dict(), {"capability": (9, 0)}
    more: dict[str, Any] = {"kernels": "compiled", "recompute": False, **options}
    made = outline(sizes, recipe.Model(base="b"), recipe.Lora(rank=8, alpha=16), dtype=torch.bfloat16, **more)
    tokens = torch.zeros(70, dtype=torch.int64, device="meta")
    assert made.adapter is not None
    assert made.decoder is not None
    flat_gradient(made.adapter.named_parameters())
    with Launches() as seen, planned_for((9, 0)), noticing(lambda kernel, tensors: seen.found.update([kernel])):
        hidden = made.decoder.hidden(Micro(tokens, tokens, (0, 30, 70), tokens, tokens, tokens[:2], step=0), None)
        forward = Counter(seen.found)
        hidden.sum().backward()  # type: ignore[no-untyped-call]
    return forward, seen.found - forward


def test_a_block_launches_as_few_products_and_sums_on_a_gpu_as_with_adapters_there_have_to_be() -> None:
    forward, backward = (more - less for more, less in zip(launches(4), launches(3), strict=True))
    inner, large, gradients = 4, 4, 3  # those of the inner values, and of A
    assert forward["mm"] == inner + large
    assert backward["mm"] == large + gradients
    assert backward["adapted"] == backward["adapted_sums"] == 4  # gradients of inner values and of B
    assert backward["activate_backward_dA"] == backward["dA_sums"] == 1  # of the A of `down`
    assert forward["clone"] == 3  # inner values behind what is not kept
    assert (forward["rms_norm"], backward["rms_norm_backward"]) == (2, 2)
    assert not {"add_", "add", "addmm_", "zeros_like", "zero_", "cat"} & {*forward, *backward}


def test_a_loss_whose_adapters_were_switched_before_it_went_backward_is_refused(kernels: Kernels) -> None:
    made = model("llama", kernels)
    assert made.adapter is not None
    loss = made.loss(micro())
    with torch.no_grad(), made.adapter.disabled():
        made.loss(micro())
    with pytest.raises(ModelError, match="other adapters"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_family_that_the_block_does_not_run_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="olmo2"):
        CausalModel(module("olmo2"), None, kernels="eager")
