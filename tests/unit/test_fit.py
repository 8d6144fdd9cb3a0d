"""What of a base is in host memory while it answers on a GPU: decided from what the GPU may be used for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from luthier.evaluate.asking.fit import ROWS, Fit, fit, usable
from luthier.machine import GIB, Machine, named_gpu, unnamed_gpu
from luthier.recipe import Recipe

MACHINE = Machine(cores=2, busy=0, memory=64 * GIB, available=64 * GIB, flags=(), compiler=None)
LLAMA: dict[str, Any] = {  # of 8B
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
EMBEDDING = 2 * 128256 * 4096
WEIGHTS = 7_000_000_000 // 2  # of the blocks in 4 bits, without their scales: at the least


def asked(*changes: str) -> Recipe:
    rows = "data: {train: [{path: a}], length: 512}\nevaluate: {generate: {max_new_tokens: 64}}\n"
    return Recipe.parse(f"model: {{base: b, quantize: {{kind: nf4}}}}\n{rows}adapter: {{rank: 16}}\n", *changes)


def fitted(
    gib: float, *changes: str, kernels: Any = "compiled", config: dict[str, Any] = LLAMA, owed: int = 0, **facts: Any
) -> Fit:
    """The 8B model in 4 bits on a GPU with so much free memory."""
    machine, recipe = replace(MACHINE, gpus=(unnamed_gpu(int(gib * GIB)),), **facts), asked(*changes)
    return fit(recipe, config, usable(recipe, machine), dtype="bfloat16", kernels=kernels, owed=owed)


def kept(found: Fit) -> tuple[int, bool]:
    return found.offload, found.offload_embedding


def test_what_trained_in_6_gib_by_streaming_answers_in_6_gib() -> None:
    found = fitted(6)
    assert found.offload == 32
    assert found.fixed + ROWS * (512 + 64) * found.token <= 6 * GIB
    assert found.token == 2 * 32 * 8 * 128 * 2
    assert found.memory is None


def test_weights_stay_where_there_is_room_for_them_and_the_embedding_goes_first() -> None:
    assert [kept(fitted(gib)) for gib in (24, 8, 6, 4)] == [(0, False), (0, True), (32, False), (32, True)]
    whole, without, streamed = fitted(24).fixed, fitted(8).fixed, fitted(6).fixed
    assert whole - without == EMBEDDING
    assert whole - streamed > WEIGHTS * 30 // 32


def test_a_large_gpu_of_which_the_recipe_allows_6_gib_is_a_gpu_of_6_gib() -> None:
    recipe, machine = asked("run.memory=6GiB"), replace(MACHINE, gpus=(named_gpu("H200"),))
    found = fit(recipe, LLAMA, usable(recipe, machine), dtype="bfloat16", kernels="compiled")
    assert found.offload == 32
    assert found.memory is not None
    assert 5 * GIB < found.memory < 6 * GIB  # without the driver's context
    assert kept(fit(asked(), LLAMA, usable(asked(), machine), dtype="bfloat16", kernels="compiled")) == (0, False)


def test_no_recipe_makes_more_of_a_gpu_free_than_is() -> None:
    gpu = replace(unnamed_gpu(24 * GIB), free=6 * GIB)
    recipe = asked("run.memory=20GiB")
    assert usable(recipe, replace(MACHINE, gpus=(gpu,))).gpus[0].free == 6 * GIB


def test_what_a_training_run_is_owed_is_not_there() -> None:
    assert kept(fitted(24, owed=18 * GIB)) == kept(fitted(6))


def test_what_the_recipe_says_is_done() -> None:
    assert kept(fitted(24, "run.offload=5", "run.offload_embedding=true")) == (5, True)
    assert kept(fitted(6, "run.offload=0", "run.offload_embedding=false")) == (0, False)
    assert kept(fitted(24, "run.offload=99")) == (32, False)


@pytest.mark.parametrize("gib", [4, 8])
def test_the_embedding_stays_where_no_kernel_reads_it_elsewhere_and_where_it_is_the_head_too(gib: float) -> None:
    assert kept(fitted(gib, kernels="reference")) == (32, False)
    assert kept(fitted(gib, config=LLAMA | {"tie_word_embeddings": True})) == ((0 if gib == 8 else 32), False)


def test_what_the_host_has_no_memory_for_stays() -> None:
    assert kept(fitted(6, available=GIB)) == (0, False)
    assert kept(fitted(6, available=4 * GIB)) == (0, True)


def test_dense_weights_stream_too() -> None:
    assert kept(fitted(8, "model.quantize=null")) == (32, False)
    assert fitted(8, "model.quantize=null").fixed < 8 * GIB
