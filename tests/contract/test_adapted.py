"""What a product's gradient means to its adapters, of one reading of it, on a CPU through Triton's interpreter."""

import re

import pytest
from hopper import compiled
from interpreted import errors_of


def test_what_is_computed_of_one_reading_is_what_two_products_are() -> None:
    errors = errors_of("adapted_script.py")
    assert len(errors) == 112
    assert all(error < 2e-6 for error in errors.values()), errors  # a NaN is below nothing


def test_its_kernels_read_ahead_16_bytes_at_a_time_on_hopper() -> None:
    pytest.importorskip("triton")
    from luthier.kernels import adapted, jit

    kinds = {"inner_parts": "*fp32", "B_parts": "*fp32", "blocks": "*i32", "sums": "*i32"}
    kinds |= dict.fromkeys(("dy", "B", "inner", "dinner", "dB"), "*bf16")
    blocks = adapted.BLOCKS
    sizes = {"ROWS": adapted.ROWS, "COLUMNS": blocks.columns, "RANKS": adapted.RANKS, "STAGES": blocks.stages}
    code = compiled(jit.adapted, kinds, sizes, blocks.warps)
    assert "wgmma.mma_async" in code
    assert "cp.async.cg" in code
    assert not re.search(r"ld\.global\S*\.b16", code)  # single values, which nothing reads ahead
    compiled(jit.adapted_sums, kinds, {"RANKS": adapted.RANKS, "BLOCK": 512, "PARTS": 8}, 4)
