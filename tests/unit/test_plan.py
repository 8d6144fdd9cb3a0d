import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.errors import AdapterError, MemoryPlanError, ModelError, RecipeError, UsageError
from luthier.kernels.attention import attention_forward, causal_tiles
from luthier.machine import GIB, Machine, named_gpu, read_gpus
from luthier.model.causal import Kernels
from luthier.model.segments import Segments, reserved
from luthier.model.shape import kept_keys, padded_tokens, shape
from luthier.model.trace import _flash_backward
from luthier.plan import Plan, Setting, _empty_segments, parse_bytes, plan
from luthier.recipe import Lora, Recipe

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MACHINE = Machine(cores=2, busy=0, memory=24 * GIB, available=20 * GIB, flags=("avx512f",), compiler=None)


def planned(*overrides: str, processes: int = 1, dtype: str = "float32", longest: int | None = None) -> Plan:
    recipe = Recipe.parse("model: {base: b}\ndata: {train: [{path: a}]}\n", *overrides)
    return plan(recipe, SMOLLM2, Setting("cpu", dtype, "eager", processes), MACHINE, longest=longest)


def test_weights_and_adapter_are_counted_exactly() -> None:
    size = shape(SMOLLM2)
    assert size.weights == 134_515_008  # the published count of SmolLM2-135M
    assert size.adapter(Lora(rank=16)) == 4_884_480  # as PEFT counts it at rank 16
    assert size.adapter(Lora(rank=16, targets=["q_proj", "v_proj"])) == 30 * 16 * (576 + 576 + 576 + 192)


def test_the_parts_add_up_to_the_peak() -> None:
    result = planned(processes=2)
    assert sum(result.parts.values()) == result.peak_bytes
    assert result.fits


def test_a_micro_batch_holds_the_longest_row_and_keeps_to_the_memory() -> None:
    small = planned("run.memory=3GiB", "train.samples_per_step=64", longest=500)
    large = planned("run.memory=12GiB", "train.samples_per_step=64", longest=500)
    assert 500 <= small.micro_tokens < large.micro_tokens
    assert large.peak_bytes <= 12 * GIB


def keeping(plan: Plan) -> tuple[int, int]:
    """How many blocks recompute all, and gate|up alone."""
    return plan.recompute, plan.recompute_gate_up


def test_activations_are_recomputed_only_where_memory_is_short() -> None:
    assert keeping(planned("data.length=2048")) == (False, 0)
    some, more, most = (planned("data.length=2048", f"run.memory={n}GiB") for n in (2.5, 1.9, 1.43))
    assert keeping(some)[0] == 0 < keeping(some)[1] < 30  # gate|up costs the least for the memory it frees
    assert 0 < keeping(more)[0] < 30
    assert keeping(most)[0] > 25  # the last one, whose turn comes at once, keeps everything for nothing
    assert all(plan.fits for plan in (some, more, most))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["run.recompute=false"], (False, 0)),
        (["run.recompute=7"], (7, 0)),
        (["run.recompute=99"], (True, 0)),
        (["run.recompute_gate_up=30"], (False, 30)),
        (["run.recompute=7", "run.recompute_gate_up=99"], (7, 23)),
    ],
    ids=str,
)
def test_a_recipe_may_say_of_how_many_blocks_what_is_recomputed(changes: list[str], expected: tuple[int, int]) -> None:
    assert keeping(planned(*changes)) == expected


def test_a_plan_that_does_not_fit_says_what_to_change() -> None:
    result = planned("run.memory=1GiB")
    assert not result.fits
    assert any("data.length" in offer for offer in result.advice)


@pytest.mark.parametrize("length", [5, 128, 130, 512, 513, 930])
def test_probabilities_are_counted_as_attention_keeps_them(length: int) -> None:
    q, k = torch.zeros(1, length, 3, 4), torch.zeros(1, length, 4)
    _, kept = attention_forward(q, k, k, causal_tiles((0, length)))
    assert sum(p.numel() for p in kept if p is not None) == pytest.approx(3 * length * kept_keys(length))


def test_bfloat16_halves_the_weights() -> None:
    assert planned(dtype="bfloat16").parts["weights"] * 2 == planned().parts["weights"]


def test_a_model_of_another_family_is_named() -> None:
    with pytest.raises(ModelError, match="'mamba'"):
        shape({"model_type": "mamba"})


@pytest.mark.parametrize("key", ["ranks", "alphas"])
def test_layers_that_training_would_not_find_are_not_planned_either(key: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter.{key}: no linear layer is called 'q_prj'; did you mean 'q_proj'"):
        planned(f"adapter.{key}={{q_prj: 4}}")


TINY = {
    "model_type": "phi",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


def traced(*overrides: str, vram: int = 8 * GIB, config: dict[str, Any] = TINY, kernels: Kernels = "reference") -> Plan:
    gpu = named_gpu("RTX 4090")
    facts = Machine(**{**vars(MACHINE), "gpus": (type(gpu)(gpu.name, vram, vram, gpu.capability),)})
    recipe = Recipe.parse("model: {base: b}\ndata: {train: [{path: a}], length: 256}\n", *overrides)
    return plan(recipe, config, Setting("cuda", "bfloat16", kernels), facts)


def test_a_gpu_is_planned_by_part_for_a_family_that_no_formula_knows() -> None:
    result = traced()
    assert sum(result.parts.values()) == result.peak_bytes
    weights = 2 * 64 * 1000 + 1000 + 8 * (4 * 64 * 64 + 2 * 64 * 128 + 4 * 64 + 128 + 64 + 2 * 64) + 2 * 64
    assert weights * 2 <= result.parts["weights"] <= weights * 2 + 16384  # rotary tables besides
    assert {"adapter", "gradients", "optimizer", "activations", "workspace", "fragmentation", "context"} <= set(
        result.parts
    )
    assert result.measurable_bytes == result.peak_bytes - result.parts["context"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llamma"},
            r"transformers [\d.]+ has no architecture 'llamma'; did you mean 'llama'.*newer trans",
        ),
        ({"model_type": "unheard-of"}, "has no architecture 'unheard-of'; take a newer transformers, or a base"),
        ({"model_type": None}, "config.json: model_type: is missing, so the architecture is not known"),
        ({"model_type": "vit"}, "a 'vit' model is no causal language model; give a base that continues text"),
        ({"model_type": "t5"}, "a 't5' model is no causal language model"),
    ],
    ids=str,
)
def test_what_is_no_known_causal_model_is_said_plainly(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        traced(config=TINY | config)


def test_a_start_that_training_would_refuse_is_not_planned_either() -> None:
    assert traced("adapter={rank: 64, init: pissa}").fits
    with pytest.raises(AdapterError, match=r"adapter\.init: pissa: rank 65 is more than .* has, 64"):
        traced("adapter={rank: 65, init: pissa}")


def test_packed_weights_have_constants_and_take_a_quarter() -> None:
    plain, packed = traced(), traced("model.quantize={kind: nf4}")
    linear = 8 * (4 * 64 * 64 + 2 * 64 * 128)
    assert plain.parts["weights"] - packed.parts["weights"] == linear * 2 - linear // 2
    assert packed.parts["constants"] > 0


def test_moments_of_8_bits_take_a_quarter() -> None:
    wide = ["adapter.rank=64"]
    assert traced(*wide, "train.optimizer=adamw_8bit").parts["optimizer"] < 0.27 * traced(*wide).parts["optimizer"]


def test_recomputing_keeps_less() -> None:
    kept, made_again = traced("run.recompute=false"), traced("run.recompute=true")
    assert made_again.parts["activations"] < kept.parts["activations"] / 3
    assert made_again.seconds_per_step >= kept.seconds_per_step


LLAMA = TINY | {"model_type": "llama", "hidden_act": "silu"}
ON_THE_GPU = ("run.offload=0", "run.offload_embedding=false", "run.offload_activations=0")


def test_a_step_is_the_faster_the_more_memory_it_may_use_and_never_uses_more() -> None:
    def made(*more: str) -> Plan:
        return traced("run.micro_tokens=4096", "run.graphs=false", *more, config=LLAMA, kernels="compiled")

    roomy, least = made(), made("run.recompute=true")
    budgets = [roomy.peak_bytes - (roomy.peak_bytes - least.peak_bytes) * part // 8 for part in range(9)]
    plans = [made(f"run.memory='{budget}'") for budget in budgets]
    assert all(plan.fits and plan.peak_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert [plan.seconds_per_step for plan in plans] == sorted(plan.seconds_per_step for plan in plans)
    assert keeping(plans[0]) == (False, 0)
    assert len({keeping(plan) for plan in plans}) > 4


def test_a_step_is_cut_where_that_costs_less_than_to_recompute() -> None:
    """Two micro-batches hold half of the activations, and only unpack the weights once more."""
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}

    def made(memory: int, *more: str) -> Plan:
        changes = ["train.samples_per_step=64", "run.unpacked=0", "run.graphs=false", "model.quantize={kind: nf4}"]
        return traced(
            *changes, *ON_THE_GPU, *more, f"run.memory='{memory}'", config=wide, vram=99 * GIB, kernels="compiled"
        )

    whole = made(99 * GIB)
    assert (whole.micro_tokens, keeping(whole)) == (64 * 256, (False, 0))
    cut, again = (made(whole.peak_bytes * 2 // 3, *more) for more in ([], ["run.micro_tokens=16384"]))
    assert (cut.fits, keeping(cut)) == (True, (False, 0))
    assert 256 < cut.micro_tokens < 64 * 256
    assert again.micro_tokens == 64 * 256
    assert sum(keeping(again)) > 0
    assert whole.seconds_per_step < cut.seconds_per_step < again.seconds_per_step


WIDE = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}


def recording(*overrides: str, config: dict[str, Any] = LLAMA, mean: float | None = None, **known: Any) -> Plan:
    """As `traced`, of our block, where more is known of the data."""
    gpu = replace(named_gpu("RTX 4090"), total=99 * GIB, free=99 * GIB)
    recipe = Recipe.parse("model: {base: b}\ndata: {train: [{path: a}], length: 256}\n", *overrides)
    setting = Setting("cuda", "bfloat16", "compiled", **known)
    return plan(recipe, config, setting, replace(MACHINE, gpus=(gpu,)), mean_length=mean)


def test_launches_are_recorded_where_they_take_longer_than_the_work() -> None:
    small, off = (traced(*more, config=LLAMA, kernels="compiled") for more in ([], ["run.graphs=false"]))
    assert (small.graphs, off.graphs) == (True, False)
    assert "launches take the host" in small.why["graphs"]
    assert small.peak_bytes == off.peak_bytes + small.parts["graphs"]
    assert small.seconds_per_step < off.seconds_per_step / 2
    assert (small.graph_price > 0, off.graph_price) == (True, 0)
    large = ["train.samples_per_step=64", "run.recompute=false"]
    kept, asked = (recording(*large, *more, config=WIDE) for more in ([], ["run.graphs=true"]))
    assert (kept.graphs, kept.graph_price) == (False, 0)
    assert asked.graphs
    assert asked.seconds_per_step == pytest.approx(kept.seconds_per_step, rel=0.1)


def test_what_the_driver_takes_for_graphs_is_in_the_peak_and_not_in_what_torch_can_measure() -> None:
    small, off = (traced(*more, config=LLAMA, kernels="compiled") for more in ([], ["run.graphs=false"]))
    outside = [plan.peak_bytes - plan.measurable_bytes for plan in (small, off)]
    assert 0 < outside[0] - outside[1] < small.parts["graphs"]


def test_recorded_launches_take_what_padding_and_an_evaluation_take_and_no_second_pass() -> None:
    sizes = ["run.graphs=true", "train.samples_per_step=64", "run.recompute=false"]
    whole, more = (recording(*sizes, f"run.micro_tokens={tokens}", config=WIDE) for tokens in (4096, 4097))
    passing = sum(whole.parts[part] for part in ("activations", "logits", "backward"))
    driver = whole.peak_bytes - whole.measurable_bytes - whole.parts["context"]
    assert 0 < whole.parts["graphs"] - driver < passing / 4
    assert more.parts["graphs"] - whole.parts["graphs"] >= passing * (5120 / 4097 - 1)  # the next shape


@pytest.mark.parametrize(("heads", "size"), [(32, 128), (71, 64), (9, 64)])
def test_segments_without_tokens_take_what_flash_attention_takes_for_them(heads: int, size: int) -> None:
    config = {"num_attention_heads": heads, "hidden_size": heads * size}
    for tokens in (4096, 5760, 8192):
        q = torch.empty(padded_tokens(tokens), heads, size, device="meta")
        made = padded_tokens(tokens) // 128
        few, many = (_flash_backward(q, q, q, q, *range(2), range(count + 1)) for count in (8, 8 + made))
        assert many - few <= _empty_segments(config, (8, 9), tokens)
    assert _empty_segments(config, (9, 0), 8192) == 0


def test_it_is_the_typical_micro_batch_that_decides_whether_launches_are_recorded() -> None:
    typical = [recording("train.samples_per_step=16", config=WIDE, mean=mean).graphs for mean in (20.0, 256.0)]
    assert typical == [True, False]


def test_launches_of_a_run_are_recorded_where_it_is_long_enough_to_pay_for_it() -> None:
    assert [recording(steps=steps).graphs for steps in (1, 3, 100)] == [False, False, True]


def test_launches_are_not_recorded_where_the_memory_for_it_is_not_there() -> None:
    none = traced("run.graphs=false", config=LLAMA, kernels="compiled")
    sizes = ["run.recompute=false", f"run.micro_tokens={none.micro_tokens}"]
    tight = traced(f"run.memory='{none.peak_bytes}'", *sizes, config=LLAMA, kernels="compiled")
    assert tight.fits
    assert not tight.graphs
    assert "GiB for them are not there" in tight.why["graphs"]


def test_a_step_is_cut_where_only_smaller_micro_batches_can_be_recorded_and_are_faster() -> None:
    none = traced("run.graphs=false", config=LLAMA, kernels="compiled")
    assert none.micro_tokens > 256
    cut = traced(f"run.memory='{none.peak_bytes}'", *ON_THE_GPU, config=LLAMA, kernels="compiled")
    assert (cut.fits, cut.graphs) == (True, True)
    assert cut.micro_tokens < none.micro_tokens
    assert cut.seconds_per_step < 0.95 * none.seconds_per_step


def test_recorded_as_the_recipe_says_a_step_is_cut_until_graphs_fit_or_does_not_fit() -> None:
    sizes = ["train.samples_per_step=64", "run.recompute=false"]
    whole, auto = (recording(*sizes, *more, config=WIDE) for more in (["run.graphs=true"], []))
    assert auto.peak_bytes < whole.peak_bytes
    budget = f"run.memory='{(auto.peak_bytes + whole.peak_bytes) // 2}'"
    found = recording(*sizes, budget, "run.graphs=true", config=WIDE)
    assert recording(*sizes, budget, config=WIDE).micro_tokens == whole.micro_tokens == 64 * 256
    assert (found.fits, found.graphs) == (True, True)
    assert 256 < found.micro_tokens < whole.micro_tokens
    least = recording("run.micro_tokens=256", "run.recompute=true", "run.graphs=false", config=WIDE)
    none = recording(*sizes[:1], f"run.memory='{least.peak_bytes}'", "run.graphs=true", config=WIDE)
    assert (none.fits, none.graphs) == (False, True)
    assert any(said.startswith("run.graphs=auto") and "fits" in said for said in none.advice)


@pytest.mark.parametrize(
    ("changes", "kernels", "why"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "compiled", "'dynamic' pos"),
        ({"num_attention_heads": 16, "head_dim": 4}, "compiled", "heads of 4 features"),
        ({}, "reference", "our block's steps on a GPU alone"),
    ],
    ids=str,
)
def test_launches_that_depend_on_the_rows_are_not_recorded(changes: dict[str, Any], kernels: Kernels, why: str) -> None:
    made = traced(config=LLAMA | changes, kernels=kernels)
    assert (made.graphs, "graphs" in made.parts) == (False, False)
    assert why in made.why["graphs"]
    with pytest.raises(RecipeError, match=rf"run.graphs: true: .*cannot be recorded: .*{re.escape(why)}"):
        traced("run.graphs=true", config=LLAMA | changes, kernels=kernels)


def test_eager_launches_are_not_recorded_with_one_steps_dropout() -> None:
    assert traced(config=LLAMA, kernels="eager").graphs
    assert traced("adapter.dropout=0.1", config=LLAMA, kernels="compiled").graphs
    made = traced("adapter.dropout=0.1", config=LLAMA, kernels="eager")
    assert not made.graphs
    assert "repeat one step's dropout" in made.why["graphs"]


def test_what_comes_from_host_memory_is_not_recorded() -> None:
    for streamed in ("run.offload=2", "run.offload_activations=2"):
        with pytest.raises(RecipeError, match="what comes from host memory"):
            recording("run.graphs=true", "model.quantize={kind: nf4}", streamed)


def test_values_that_are_kept_save_the_time_to_unpack_them() -> None:
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
    changes = ["train.samples_per_step=16", "run.graphs=false", "model.quantize={kind: nf4}"]
    none, half, every = (
        traced(*changes, f"run.unpacked={n}", config=wide, vram=99 * GIB, kernels="compiled") for n in (0, 4, 8)
    )
    saved = none.seconds_per_step - every.seconds_per_step
    values = 8 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    # Each value is read as half a byte and written as two, forward and backward, at the rate of a GPU's memory.
    assert saved == pytest.approx(2 * 2.5 * values / (1008e9 * 0.7), rel=0.1)
    assert none.seconds_per_step - half.seconds_per_step == pytest.approx(saved / 2, rel=0.01)


@pytest.mark.parametrize("quantize", ["null", "{kind: nf4}"])
def test_our_block_keeps_less_than_the_module_on_a_gpu(quantize: str) -> None:
    changes = [f"model.quantize={quantize}", "run.recompute=false", "run.micro_tokens=4096"]
    sizes = LLAMA | {"hidden_size": 512, "intermediate_size": 1024}
    ours, module = (traced(*changes, config=sizes, kernels=kernels) for kernels in ("compiled", "reference"))
    shapes = ((1536, 512), (512, 512), (2048, 512), (512, 1024))
    around = 8 * sum(2 * 64 * (n + 64 + k) for n, k in shapes)  # where adapters are put: see `merged.py`
    assert ours.parts["weights"] == module.parts["weights"] + (around if quantize == "null" else 0)
    assert ours.parts["adapter"] == module.parts["adapter"]
    came = [sum(plan.parts[part] for part in ("activations", "logits", "backward")) for plan in (ours, module)]
    assert came[0] < 0.7 * came[1]
    assert ours.kernels == "compiled"


def test_values_of_packed_blocks_are_kept_where_half_of_the_room_holds_them() -> None:
    changes = ["model.quantize={kind: nf4}", "run.micro_tokens=512", "run.recompute=false", "run.graphs=false"]

    def made(*more: str, kernels: Kernels = "compiled") -> Plan:
        return traced(*changes, *ON_THE_GPU, *more, config=LLAMA, kernels=kernels)

    shapes = ((192, 64), (64, 64), (256, 64), (64, 128))  # with room for 64 ranks
    block, none = sum(2 * (n + 64) * (k + 64) for n, k in shapes), made("run.unpacked=0")
    assert none.unpacked == none.parts["unpacked"] == 0
    roomy = made()
    assert (roomy.unpacked, roomy.parts["unpacked"]) == (8, 8 * block)
    assert sum(roomy.parts.values()) == roomy.peak_bytes == none.peak_bytes + 8 * block
    assert roomy.measurable_bytes == none.measurable_bytes + 8 * block
    assert made(f"run.memory='{none.peak_bytes + 7 * block}'").unpacked == 3
    assert made(f"run.memory='{none.peak_bytes}'").unpacked == 0
    assert made(f"run.memory='{none.peak_bytes + block}'", "run.unpacked=1").fits
    assert not made(f"run.memory='{none.peak_bytes + block}'", "run.unpacked=2").fits
    assert made("run.unpacked=99").unpacked == 8
    assert made(kernels="reference").unpacked == 0
    assert traced(*changes[1:], config=LLAMA, kernels="compiled").parts.get("unpacked", 0) == 0


def test_our_block_is_planned_where_flash_attention_does_not_run() -> None:
    changes = ["run.micro_tokens=1024", "run.recompute=false"]
    assert traced(*changes, config=LLAMA | {"head_dim": 20}, kernels="compiled").parts["activations"] > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [{"model_type": "falcon", "multi_query": True}, {"model_type": "bloom"}], ids=str)
def test_a_family_with_attention_of_its_own_is_planned(family: dict[str, Any], recompute: bool) -> None:
    """What a recomputation saves has to be what the first forward pass saved, without data as with it."""
    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}
    result = traced(f"run.recompute={str(recompute).lower()}", config=family | sizes)
    assert result.recompute is recompute
    assert result.parts["activations"] > 0


def test_blocks_that_do_not_fit_stay_in_host_memory_and_no_more_of_them() -> None:
    wide = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    whole = traced("run.recompute=true", "run.micro_tokens=256", config=wide)
    block = 2 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    assert whole.offload == 0
    short = traced("run.micro_tokens=256", config=wide, vram=int((whole.peak_bytes - 5 * block) / 0.96))
    assert 5 + 2 <= short.offload <= 5 + 4  # two of them are on the GPU at a time
    assert short.fits
    assert short.recompute
    assert sum(short.parts.values()) == short.peak_bytes <= short.budget_bytes
    asked = traced("run.offload=24", "run.micro_tokens=256", config=wide)
    assert asked.offload == 24
    assert whole.peak_bytes - asked.peak_bytes == pytest.approx(22 * block, rel=0.02)


def test_blocks_that_cannot_stream_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"run.offload: 9: the model has 8 blocks; write at most 8, or auto"):
        traced("run.offload=9")
    with pytest.raises(
        RecipeError, match=r"run.offload: 1: blocks stream .* CUDA GPU, and this run is on cpu; leave it"
    ):
        planned("run.offload=1")
    assert planned("run.offload=0").offload == 0


def test_a_recipe_makes_no_gpu_larger_than_it_is() -> None:
    assert traced("run.memory=64GiB", vram=GIB).budget_bytes == GIB
    assert traced("run.memory=1GiB").budget_bytes == GIB


def test_advice_comes_with_the_peak_it_leads_to() -> None:
    result = traced(vram=GIB // 2)
    assert not result.fits
    assert any(offer.startswith("data.length=128 (") and "GiB" in offer for offer in result.advice)


def test_a_few_blocks_tell_what_all_take(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from luthier.model import trace

    model = trace.outline(TINY, Recipe.parse("model: {base: b}\ndata: {train: [{path: a}]}").model, Lora(),
                          dtype=torch.float32, recompute=False)  # fmt: skip
    few = trace.trace(model, [40, 30])
    monkeypatch.setattr(trace, "_FEW", 8)
    every = trace.trace(model, [40, 30])
    assert few.peak == every.peak
    assert few.work == every.work


@pytest.mark.parametrize("counts", [(3, 0), (0, 5), (2, 3), (7, 1), (1, 0)])
def test_traces_of_blocks_that_keep_alike_make_that_of_blocks_that_do_not(counts: tuple[int, int]) -> None:
    import torch

    from luthier.model import trace

    model = trace.outline(LLAMA, Recipe.parse("model: {base: b}\ndata: {train: [{path: a}]}").model, Lora(),
                          dtype=torch.float32, recompute=False, kernels="eager")  # fmt: skip
    assert model.decoder is not None
    alike = []
    for whole, gate_up in ((8, 0), (0, 8), (0, 0)):
        model.decoder.recompute(whole, gate_up)
        alike.append(trace.trace(model, [40, 30]))
    model.decoder.recompute(*counts)
    mixed = trace.mixed(list(zip(alike, (*counts, 8 - sum(counts)), strict=True)))
    assert mixed.peak == pytest.approx(_every_block(model).peak)


def _every_block(model: Any) -> Any:
    """The trace of a run of all blocks, of which each keeps what it does."""
    from luthier.model import trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_FEW", 8)
        return trace.trace(model, [40, 30])


def test_the_allocator_grows_by_pages_and_fills_its_holes() -> None:
    followed = Segments()
    followed.take(1, 30 << 20)
    followed.take(2, 5 << 20)
    followed.take(3, 100)
    assert reserved(followed.tops) == (40 << 20) + (2 << 20)
    followed.give(1)
    followed.take(4, 20 << 20)
    followed.take(5, 10 << 20)
    assert reserved(followed.tops) == (40 << 20) + (2 << 20)
    followed.give(5)
    followed.take(6, 11 << 20)  # the hole is too small
    assert reserved(followed.tops) == (60 << 20) + (2 << 20)
    assert followed.used == (20 << 20) + (5 << 20) + 512 + (11 << 20)


def test_what_is_free_at_the_segments_end_is_taken_last() -> None:
    """As torch has it: a block that can grow counts as the largest, so that a larger hole is filled before it."""
    followed = Segments()
    for key, size in enumerate((40, 2, 20)):
        followed.take(key, size << 20)
    followed.give(0)
    followed.give(2)
    followed.take(3, 15 << 20)  # into the hole of 40, not into the 20 at the end
    followed.take(4, 22 << 20)
    assert followed.tops[False] == (40 + 2 + 20) << 20
    followed.take(5, 30 << 20)
    assert followed.tops[False] == (40 + 2 + 30) << 20


@pytest.mark.parametrize(("kernels", "share"), [("reference", 0.01), ("compiled", 0.025)])
def test_a_gpu_is_given_room_for_what_no_trace_follows(kernels: Kernels, share: float) -> None:
    parts = traced("run.recompute=false", config=LLAMA, kernels=kernels).parts
    followed = sum(parts.values()) - parts["context"]
    assert parts["fragmentation"] >= share / (1 + share) * followed


def test_gpus_are_read_from_the_drivers_table() -> None:
    told = "GPU-a, NVIDIA H200, 143771, 143000, 9.0\nGPU-b, Tesla T4, 15360, 15000, 7.5\nGPU-c, X, [N/A], [N/A], 9.0\n"
    first, second = read_gpus(told, None)
    assert (first.free, first.capability, first.known.tflops) == (143000 << 20, (9, 0), 989.4)
    assert (second.bfloat16, second.known.tflops) == (False, 65.0)
    assert [gpu.name for gpu in read_gpus(told, "1,0")] == ["Tesla T4", "NVIDIA H200"]
    assert [gpu.name for gpu in read_gpus(told, "GPU-b")] == ["Tesla T4"]
    assert read_gpus(told, "") == read_gpus("no devices were found", None) == ()


@pytest.mark.parametrize(
    ("name", "memory"), [("NVIDIA A100-SXM4-80GB", 81920), ("NVIDIA A100 80GB PCIe", 81920), ("NVIDIA L40S", 46068)]
)
def test_a_gpus_kind_is_found_in_its_name(name: str, memory: int) -> None:
    gpu = named_gpu("t4")
    assert type(gpu)(name, 0, 0, (8, 0)).known.memory == memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 4091", "did you mean 'RTX 4090'"),
        ("A100", r"did you mean 'A100 40GB' or 'A100 80GB'\?; or give --vram$"),
        ("rtx 40", "did you mean 'RTX 4060 Ti' or 'RTX 4070' or 'RTX 4080' or 'RTX 4090'"),
        ("L40", "did you mean 'L40S'"),
        ("MI300X", "known names: A10, "),
        ("", "--gpu is given no name; write one, such as 'RTX 4090'"),
        (" ", "--gpu is given no name"),
    ],
)
def test_a_gpu_that_nobody_knows_is_answered_with_those_that_are_meant(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        named_gpu(name)


@pytest.mark.parametrize("name", ["A100-80", "a100 80GB", "A100-80GB", "NVIDIA A100 80 GB"])
def test_a_gpu_is_known_however_its_name_is_written(name: str) -> None:
    assert named_gpu(name).total == 81920 << 20


@pytest.mark.parametrize(("text", "value"), [("6GiB", 6 * GIB), ("1.5 GB", 1_500_000_000), ("512MiB", 512 * 1024**2)])
def test_amounts_of_memory_are_read(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "6 gallons", "GiB", "infGiB", "1e400GiB", "-1GiB", "24"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(MemoryPlanError, match="6GiB"):
        parse_bytes(text)
