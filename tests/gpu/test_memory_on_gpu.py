"""What the recipe says that a run may take of a GPU is what it takes, however much more is free there."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import tiny
from luthier.model.memory import release
from luthier.model.place import free_memory
from luthier.train.launch import decisions_of, prepare_data, train
from luthier.train.memory import at_most

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def test_torch_takes_no_more_than_it_may_and_all_there_is_afterwards() -> None:
    release()
    limit = torch.cuda.memory_reserved() + 256 * MIB
    with at_most(limit):
        some = torch.empty(192 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() <= limit
        del some
        more = torch.empty(224 * MIB, dtype=torch.uint8, device="cuda")  # what is kept for later makes room
    assert len(torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")) > len(more)
    assert torch.cuda.get_per_process_memory_fraction() == 1


def test_without_an_amount_torch_takes_what_it_wants() -> None:
    with at_most(None):
        assert torch.cuda.get_per_process_memory_fraction() == 1
        assert len(torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")) == 512 * MIB


def trained(folder: Path) -> tuple[int, list[int], float]:
    """What a run may take, what it said and what torch says that it took, and torch's share afterwards."""
    run = tiny.run(folder, "run.place=cuda", "run.memory=2GiB", "evaluate.samples=2")
    decisions = decisions_of(run, prepare_data(run))
    assert decisions.memory_bytes is not None
    found = train(run)
    assert found["steps"] > 0
    taken = [found["peak_bytes"], torch.cuda.max_memory_reserved()]
    return decisions.memory_bytes, taken, torch.cuda.get_per_process_memory_fraction()


def test_a_run_keeps_to_the_amount_that_its_recipe_says(tmp_path: Path) -> None:
    """Its passes, and the answers that it samples, which take a part of what is free. It has a process of its own, as
    runs do: what other tests left reserved is no part of it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        limit, taken, share = pool.submit(trained, tmp_path).result(timeout=120)
    assert limit < 2048 * MIB
    assert 0 < max(taken) <= limit
    assert share == 1


def test_what_is_free_is_no_more_than_a_process_may_take() -> None:
    release()
    used = torch.cuda.memory_allocated()
    assert free_memory(torch.device("cuda"), used + 64 * MIB) == 64 * MIB
    assert free_memory(torch.device("cuda")) > 64 * MIB
