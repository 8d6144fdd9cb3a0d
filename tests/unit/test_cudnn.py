"""Who computes attention on a GPU: decided by the machine and the lengths, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels import cudnn
from luthier.kernels.cudnn import Machine, way

HOPPER = Machine(9, 91900, True)


@pytest.mark.parametrize(
    ("at", "size", "wanted"),
    [
        (HOPPER, 128, "packed"),
        (HOPPER, 256, "packed"),
        (HOPPER, 264, None),
        (HOPPER, 100, None),
        (Machine(10, 91900, True), 128, "packed"),
        (Machine(10, 91900, True), 256, None),
        (Machine(12, 91900, True), 64, None),
        (Machine(8, 91900, True), 64, None),
        (Machine(9, 91002, True), 64, None),
        (Machine(9, 0, True), 64, None),
        (Machine(9, 91900, False), 64, None),
    ],
    ids=str,
)
def test_packed_rows_are_cudnns_where_it_has_kernels_for_them_and_the_frontend_is_installed(
    at: Machine, size: int, wanted: str | None
) -> None:
    assert way(at, size, tokens=8192, segments=27, longest=669) == wanted


@pytest.mark.parametrize("frontend", [False, True])
def test_rows_that_are_all_as_long_are_a_batch_that_needs_no_frontend(frontend: bool) -> None:
    at = HOPPER._replace(frontend=frontend)
    assert way(at, 128, tokens=8192, segments=4, longest=2048) == "batch"
    assert way(at, 128, tokens=8188, segments=4, longest=2047) == "batch"
    assert way(at, 128, tokens=8191, segments=4, longest=2048) != "batch"
    assert way(at, 128, tokens=8200, segments=4, longest=2050) != "batch"  # a length that never comes again
    assert way(at._replace(major=8), 128, tokens=8192, segments=4, longest=2048) is None


def test_numbers_and_lengths_of_segments_share_few_plans() -> None:
    assert [cudnn.capacity(n) for n in (1, 2, 3, 27, 32, 33, 2048, 2049)] == [1, 2, 4, 32, 32, 64, 2048, 4096]
    assert len({cudnn.capacity(n) for n in range(1, 8193)}) == 14


def test_elsewhere_than_on_a_gpu_nothing_is_computed() -> None:
    q = torch.empty(8, 2, 64, dtype=torch.bfloat16, device="meta")
    assert cudnn.forward(q, q, q, torch.tensor([0, 8], dtype=torch.int32), 8, 0.1) is None
