import pytest

from luthier.errors import MemoryPlanError, ModelError
from luthier.machine import GIB, Machine
from luthier.plan import Plan, parse_bytes, plan, shape
from luthier.recipe import Recipe

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
    return plan(recipe, SMOLLM2, dtype=dtype, processes=processes, threads=1, facts=MACHINE, longest=longest)


def test_weights_and_adapter_are_counted_exactly() -> None:
    size = shape(SMOLLM2)
    assert size.weights == 134_515_008  # the published count of SmolLM2-135M
    assert size.adapter(16, "all-linear") == 4_884_480  # as PEFT counts it at rank 16
    assert size.adapter(16, ["q_proj", "v_proj"]) == 30 * 16 * (576 + 576 + 576 + 192)


def test_the_parts_add_up_to_the_peak() -> None:
    result = planned(processes=2)
    assert sum(result.parts.values()) == result.peak_bytes
    assert result.fits


def test_a_micro_batch_holds_the_longest_row_and_keeps_to_the_memory() -> None:
    small = planned("run.memory=3GiB", "train.samples_per_step=64", longest=500)
    large = planned("run.memory=12GiB", "train.samples_per_step=64", longest=500)
    assert 500 <= small.micro_tokens < large.micro_tokens
    assert large.peak_bytes <= 12 * GIB


def test_activations_are_recomputed_only_where_memory_is_short() -> None:
    assert not planned("data.length=2048").recompute
    assert planned("data.length=2048", "run.memory=2.5GiB").recompute


def test_a_plan_that_does_not_fit_says_what_to_change() -> None:
    result = planned("run.memory=1GiB")
    assert not result.fits
    assert any("data.length" in offer for offer in result.advice)


def test_bfloat16_halves_the_weights() -> None:
    assert planned(dtype="bfloat16").parts["weights"] * 2 == planned().parts["weights"]


def test_a_model_of_another_family_is_named() -> None:
    with pytest.raises(ModelError, match="'mamba'"):
        shape({"model_type": "mamba"})


@pytest.mark.parametrize(("text", "value"), [("6GiB", 6 * GIB), ("1.5 GB", 1_500_000_000), ("512MiB", 512 * 1024**2)])
def test_amounts_of_memory_are_read(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "6 gallons", "GiB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(MemoryPlanError, match="6GiB"):
        parse_bytes(text)
