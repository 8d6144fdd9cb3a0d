"""A recipe's amount of memory is what torch may take of a GPU, less what torch does not know of."""

from typing import Any

import pytest

import tiny
from luthier.machine import GIB, Machine, named_gpu
from luthier.plan import context_bytes
from luthier.train.decide import Decisions, Rows, decide
from luthier.train.memory import fraction

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("total", [8 * GIB, 24564 << 20, 150_754_820_096, 85_520_809_984 + 511])
@pytest.mark.parametrize("reserved", [1, 770 << 20, 5 * GIB, 6 * GIB - 350 * 2**20 - 1, 8 * GIB - 1])
def test_the_fraction_is_of_exactly_so_many_bytes(reserved: int, total: int) -> None:
    assert int(fraction(reserved, total) * total) == reserved


def test_the_fraction_is_never_more_than_all() -> None:
    assert fraction(25 * GIB, 24 * GIB) == fraction(24 * GIB, 24 * GIB) == 1


def decided(*overrides: str, gpu: str = "RTX 4090") -> Decisions:
    facts = Machine(4, 0, 32 * GIB, 30 * GIB, (), None, gpus=(named_gpu(gpu),))
    chosen = tiny.recipe("run.place=cuda", "run.kernels=compiled", "run.graphs=false", *overrides)
    return decide(chosen, LLAMA, facts, Rows(longest=256, mean=150.0, steps=60))


@pytest.mark.parametrize("gpu", ["RTX 4090", "H200"])
def test_an_amount_is_kept_to_with_the_context_and_auto_leaves_the_rest_to_others(gpu: str) -> None:
    assert decided(gpu=gpu).memory_bytes is None
    told = decided("run.memory=6GiB", gpu=gpu)
    assert told.memory_bytes == 6 * GIB - context_bytes(named_gpu(gpu))
    assert told.predicted_peak_bytes <= told.memory_bytes
    all_of_it = decided("run.memory=999GiB", gpu=gpu).memory_bytes
    assert all_of_it == named_gpu(gpu).total - context_bytes(named_gpu(gpu))


def test_what_the_driver_keeps_for_graphs_is_left_to_it_as_well() -> None:
    plain, recorded = (decided("run.memory=6GiB", f"run.graphs={said}") for said in ("false", "true"))
    assert recorded.graphs
    assert plain.memory_bytes is not None
    assert recorded.memory_bytes is not None
    assert 0 < plain.memory_bytes - recorded.memory_bytes < GIB // 4


def test_a_cpu_is_given_no_such_limit_and_older_runs_have_none() -> None:
    on_a_cpu = decided("run.memory=6GiB", "run.place=cpu")
    assert on_a_cpu.memory_bytes is None
    stored = {key: value for key, value in decided().as_dict().items() if key != "memory_bytes"}
    assert Decisions(**stored).memory_bytes is None
