"""Packed attention that a GPU computes, and its gradient, on a CPU through Triton's interpreter."""

import re

import pytest
from hopper import compiled
from interpreted import errors_of

from luthier.kernels import varlen_backward


def test_packed_attention_and_its_gradient_are_those_of_torch() -> None:
    errors = errors_of("varlen_script.py")
    assert len(errors) == 32
    assert all(error < 2e-6 for error in errors.values()), errors  # a NaN is below nothing


@pytest.mark.parametrize("size", [64, 128])
def test_on_hopper_no_thread_reads_sums_that_another_one_has_read(size: int) -> None:
    """They are the only values of 4 bytes that are read ahead: before the loop, and in it."""
    pytest.importorskip("triton")
    from luthier.kernels import varlen_jit

    how = varlen_backward.how(8192, 32, 8, size)
    kinds = dict.fromkeys(("do", "q", "k", "v", "cos", "sin", "dk", "dv"), "*bf16")
    kinds |= {"sums": "*fp32", "inner": "*fp32", "blocks": "*i32", "scale": "fp32"}
    rows, keys, warps, stages = how.keys
    sizes = {"HALF": size // 2, "GROUP": 4, "HEADS": 4, "SIZE": size, "WIDE": size, "ROWS": rows, "KEYS": keys}
    code = compiled(varlen_jit.keys_and_values, kinds, sizes, warps, stages)
    assert len(re.findall(r"cp\.async\.ca\.shared\.global .*0x4, ", code)) == stages


@pytest.mark.parametrize(
    ("tokens", "stages", "apart"), [(1199, 2, True), (1200, 3, False), (2799, 3, False), (2800, 2, False)]
)
def test_how_blocks_of_large_heads_are_made_follows_from_how_many_programs_there_are(
    tokens: int, stages: int, apart: bool
) -> None:
    how = varlen_backward.how(tokens, 32, 8, 128)
    assert (how.keys.stages, how.apart) == (stages, apart)
