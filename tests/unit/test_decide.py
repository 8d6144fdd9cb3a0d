"""Every `auto` becomes a decision from facts, with its reason."""

from dataclasses import replace
from typing import Any

import pytest

import tiny
from luthier.errors import MemoryPlanError, RecipeError
from luthier.machine import GIB, Machine
from luthier.train.decide import Decisions, Rows, decide, halved

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
    assert set(made.why.values()) == {"as the recipe says", "training on a GPU is not there yet"}


def test_several_processes_contradict_the_local_engine() -> None:
    with pytest.raises(RecipeError, match=r"run\.engine=ddp"):
        decided("run.engine=local", "run.processes=2")


def test_the_dtype_is_bfloat16_only_where_the_processor_multiplies_it() -> None:
    assert decided().dtype == "bfloat16"
    assert decided(facts=replace(IDLE, flags=("avx2",))).dtype == "float32"


def test_the_block_is_compiled_only_where_that_pays() -> None:
    long = replace(ROWS, steps=5000)
    assert decided(rows=long).kernels == "compiled"
    assert decided(rows=replace(ROWS, steps=3)).kernels == "eager"
    assert decided(rows=long, facts=replace(IDLE, compiler=None)).kernels == "eager"


def test_a_family_that_our_block_does_not_run_takes_the_reference_path() -> None:
    assert decided(config={**SMOL, "model_type": "gpt_neox"}).kernels == "reference"


def test_a_model_whose_sizes_are_unknown_trains_a_row_at_a_time_in_one_process() -> None:
    made = decided(config={"model_type": "other"})
    assert (made.engine, made.micro_tokens, made.kernels) == ("local", 256, "reference")


def test_halving_ends_at_the_longest_row() -> None:
    made = replace(decided(), micro_tokens=1000)
    smaller = halved(halved(made, longest=256), longest=256)
    assert smaller.micro_tokens == 256
    with pytest.raises(MemoryPlanError, match="a row of 256 tokens"):
        halved(smaller, longest=256)
