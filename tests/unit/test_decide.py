"""Every `auto` becomes a decision from facts, with its reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from luthier.errors import MemoryPlanError, ModelError, RecipeError
from luthier.machine import GIB, Machine, named_gpu
from luthier.train.decide import Decisions, Rows, decide, halved, planned

IDLE = Machine(
    cores=4, busy=0, memory=16 * GIB, available=12 * GIB, flags=("avx2", "amx_bf16"), compiler="/usr/bin/g++"
)
SMOL = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ROWS = Rows(longest=256, mean=150.0, steps=60)


def decided(*overrides: str, facts: Machine = IDLE, config: dict[str, Any] = SMOL, rows: Rows = ROWS) -> Decisions:
    return decide(tiny.recipe(*overrides), config, facts, rows)


def test_the_same_facts_give_the_same_decisions() -> None:
    assert decided() == decided()


def test_free_cores_become_processes_of_one_thread() -> None:
    made = decided()
    assert (made.engine, made.processes, made.threads) == ("ddp", 4, 1)
    assert "4 of 4 cores are free" in made.why["engine"]


def test_cores_that_others_use_are_left_to_them() -> None:
    assert decided(facts=replace(IDLE, busy=2)).processes == 2
    alone = decided(facts=replace(IDLE, busy=4))
    assert (alone.engine, alone.processes, alone.threads) == ("local", 1, 1)


def test_there_are_no_more_processes_than_rows_in_a_step() -> None:
    made = decided("train.samples_per_step=2")
    assert (made.processes, made.threads) == (2, 2)


def test_copies_that_memory_does_not_hold_are_not_made() -> None:
    made = decided(facts=replace(IDLE, available=int(2.6 * GIB)))
    assert made.processes < 4
    assert made.predicted_peak_bytes <= 2.6 * GIB


def test_memory_for_not_even_one_row_is_an_error_that_offers_ways_out() -> None:
    with pytest.raises(MemoryPlanError, match=r"data\.length="):
        decided(facts=replace(IDLE, available=GIB // 2))


def test_what_the_recipe_says_is_done() -> None:
    wanted = ["run.engine=ddp", "run.processes=2", "run.threads=3", "run.micro_tokens=300", "run.kernels=reference"]
    made = decided(*wanted, "run.recompute=true", "model.compute=float32")
    assert (made.engine, made.processes, made.threads, made.micro_tokens) == ("ddp", 2, 3, 300)
    assert (made.kernels, made.recompute, made.dtype) == ("reference", True, "float32")
    assert set(made.why.values()) == {"as the recipe says", "no GPU is seen"}


def test_several_processes_contradict_the_local_engine() -> None:
    with pytest.raises(RecipeError, match=r"run\.engine=ddp"):
        decided("run.engine=local", "run.processes=2")


def test_the_dtype_is_bfloat16_only_where_the_processor_multiplies_it() -> None:
    assert decided().dtype == "bfloat16"
    assert decided(facts=replace(IDLE, flags=("avx2",))).dtype == "float32"


def test_float16_that_the_processor_would_crawl_through_is_computed_in_float32() -> None:
    made = decided("model.compute=float16")
    assert (made.dtype, "float16" in made.why["dtype"]) == ("float32", True)
    assert decided("model.compute=float16", facts=replace(IDLE, flags=("avx512_fp16",))).dtype == "float16"
    assert planned(tiny.recipe("model.compute=float16"), SMOL, IDLE, "cpu").why["dtype"] == made.why["dtype"]


def test_a_run_that_has_begun_keeps_its_dtype() -> None:
    made = decide(tiny.recipe("model.compute=float16"), SMOL, IDLE, ROWS, dtype="bfloat16")
    assert (made.dtype, made.why["dtype"]) == ("bfloat16", "as this run began")


def test_the_block_is_compiled_only_where_that_pays() -> None:
    long = replace(ROWS, steps=5000)
    assert decided(rows=long).kernels == "compiled"
    assert decided(rows=replace(ROWS, steps=3)).kernels == "eager"
    assert decided(rows=long, facts=replace(IDLE, compiler=None)).kernels == "eager"


def test_a_family_that_our_block_does_not_run_takes_the_reference_path() -> None:
    assert decided(config={**SMOL, "model_type": "olmo2"}).kernels == "reference"


@pytest.mark.parametrize(
    "override",
    [
        "adapter.dora=true",
        "adapter.init=pissa",
        "adapter.new_tokens=[<x>]",
        "adapter={kind: none}",
        "model.quantize={kind: int8}",
    ],
)
def test_what_our_block_does_not_compute_takes_the_reference_path(override: str) -> None:
    assert decided(override).kernels == "reference"


def test_rows_that_leave_the_attention_window_take_the_reference_path() -> None:
    mistral = SMOL | {"model_type": "mistral", "sliding_window": 256}
    assert decided(config=mistral).kernels != "reference"
    longer = decided(config=mistral, rows=replace(ROWS, longest=257))
    assert (longer.kernels, "window" in longer.why["kernels"]) == ("reference", True)


def test_a_plan_before_the_data_is_known_takes_rows_for_as_long_as_allowed() -> None:
    mistral = SMOL | {"model_type": "mistral", "sliding_window": 256}
    for length, kernels in ((256, "eager"), (257, "reference")):
        assert planned(tiny.recipe(f"data.length={length}"), mistral, IDLE).kernels == kernels


def test_a_window_that_only_transformers_default_tells_counts() -> None:
    mistral = {key: value for key, value in SMOL.items() if key != "sliding_window"} | {"model_type": "mistral"}
    assert decided(config=mistral, rows=replace(ROWS, longest=4097)).kernels == "reference"


def test_a_config_without_a_type_is_said_to_lack_it() -> None:
    with pytest.raises(ModelError, match="is missing"):
        decided(config={key: value for key, value in SMOL.items() if key != "model_type"})


def test_norms_that_are_finer_than_the_products_are_our_blocks_too() -> None:
    assert decided("model.norms=float32", "model.compute=bfloat16").kernels != "reference"


GPU = Machine(**{**vars(IDLE), "gpus": (named_gpu("RTX 4090"),)})
PHI = {"model_type": "phi", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}


NARROW = SMOL | {"num_hidden_layers": 3, "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_a_gpu_runs_one_process_in_bfloat16() -> None:
    made = decided("run.place=cuda", facts=GPU, config=PHI)
    assert (made.place, made.engine, made.processes) == ("cuda", "local", 1)
    assert (made.dtype, made.why["dtype"]) == ("bfloat16", "the GPU multiplies bfloat16")


def test_a_gpu_runs_our_block_where_it_knows_the_family_and_says_why_where_not() -> None:
    olmo = NARROW | {"model_type": "olmo2"}
    phi, ours, other = (decided("run.place=cuda", facts=GPU, config=config) for config in (PHI, NARROW, olmo))
    for made in (phi, ours):
        assert (made.kernels, made.why["kernels"]) == (
            "compiled",
            "our block runs this family, in less memory and time",
        )
    assert (other.kernels, other.why["kernels"]) == ("reference", "our block does not run this family")
    assert planned(tiny.recipe(), NARROW, GPU, "cuda").kernels == "compiled"


def test_on_a_gpu_the_path_that_runs_is_the_one_that_is_planned() -> None:
    changes = ["run.place=cuda", "run.micro_tokens=2048", "run.recompute=false", "run.graphs=false"]
    ours, module = (
        decided(*changes, f"run.kernels={kernels}", facts=GPU, config=NARROW) for kernels in ("auto", "reference")
    )
    assert ours.predicted_peak_bytes < module.predicted_peak_bytes


def test_blocks_that_stream_are_the_modules_own() -> None:
    wide = NARROW | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    small = replace(GPU, gpus=(replace(GPU.gpus[0], free=9 * GIB // 10, total=GIB),))
    made = decided("run.place=cuda", "run.recompute=true", "run.micro_tokens=256", facts=small, config=wide)
    assert made.offload > 0
    assert (made.kernels, "stream" in made.why["kernels"]) == ("reference", True)


def test_a_gpu_that_torch_does_not_reach_is_left_alone() -> None:
    made = decided(facts=GPU)
    assert made.place == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "RTX 4090" in made.why["place"]


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(MemoryPlanError, match="no GPU"):
        decided("run.place=cuda", config=PHI)


def test_several_processes_on_a_gpu_are_refused() -> None:
    with pytest.raises(RecipeError, match="one process"):
        decided("run.place=cuda", "run.processes=2", facts=GPU, config=PHI)


@pytest.mark.parametrize("change", ["model.quantize={kind: nf4}", "adapter.dora=true", "adapter.new_tokens=[<x>]"])
def test_what_the_block_formula_does_not_know_is_traced(change: str) -> None:
    small = {**SMOL, "num_hidden_layers": 2, "vocab_size": 1000}
    plain, changed = decided(config=small), decided(change, config=small)
    assert plain.predicted_peak_bytes != changed.predicted_peak_bytes > 0


def test_halving_ends_at_the_longest_row() -> None:
    made = replace(decided(), micro_tokens=1000)
    smaller = halved(halved(made, longest=256), longest=256)
    assert smaller.micro_tokens == 256
    with pytest.raises(MemoryPlanError, match="a row of 256 tokens"):
        halved(smaller, longest=256)


def test_a_micro_batch_is_planned_for_no_more_tokens_than_a_step_can_have() -> None:
    short = replace(ROWS, step_tokens=900)
    alone = ["run.engine=local", "train.samples_per_step=16"]
    assert decided(*alone).micro_tokens == 16 * 256
    made = decided(*alone, rows=short)
    assert made.micro_tokens == 900
    assert made.predicted_peak_bytes < decided(*alone).predicted_peak_bytes
    asked = decided(*alone, "run.micro_tokens=100000", rows=short)
    assert (asked.micro_tokens, asked.predicted_peak_bytes) == (900, made.predicted_peak_bytes)


def test_products_in_16_bits_keep_code_that_grows_with_the_run_to_an_end() -> None:
    bfloat = replace(IDLE, flags=("avx512_bf16",))
    alone = ["run.engine=local", "run.micro_tokens=512"]
    peaks = [
        decided(*alone, facts=bfloat, rows=replace(ROWS, steps=steps)).predicted_peak_bytes for steps in (1, 4, 60, 900)
    ]
    assert peaks[0] < peaks[1] < peaks[2] == peaks[3]
    plain = ["model.compute=float32", *alone]
    assert decided(*plain).predicted_peak_bytes == decided(*plain, rows=replace(ROWS, steps=1)).predicted_peak_bytes
