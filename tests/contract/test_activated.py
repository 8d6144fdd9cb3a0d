"""The activation's gradient and that of the A which reads it, without the activation, on a CPU through Triton's
interpreter."""

import re
from typing import get_args

import pytest
from hopper import compiled
from interpreted import errors_of

from luthier.kernels.pointwise import Activation

TOLERANCE = {"float32": 2e-6, "float16": 1e-3}  # the interpreter multiplies no matrices of bfloat16


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_gradients_of_one_pass_are_those_of_two(dtype: str) -> None:
    errors = errors_of("activated_script.py", dtype)
    assert len(errors) == 38
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors  # a NaN is below nothing


@pytest.mark.parametrize("act", get_args(Activation))
def test_its_kernels_read_ahead_16_bytes_at_a_time_on_hopper(act: Activation) -> None:
    pytest.importorskip("triton")
    from luthier.kernels import activated, adapted, jit

    blocks, kinds = activated.BLOCKS, {"parts": "*fp32"} | dict.fromkeys(("dh", "x", "dinner", "dA"), "*bf16")
    sizes = {"ROWS": activated.ROWS, "COLUMNS": blocks.columns, "RANKS": adapted.RANKS, "STAGES": blocks.stages}
    code = compiled(jit.activate_backward_dA, kinds, sizes | {"ACT": act, "GATED": True}, blocks.warps)
    assert "mma.sync" in code
    assert len(re.findall(r"cp\.async\.cg\S* .*, 0x10, ", code)) == 24  # two blocks of dh, gate and up, by four each
    assert not re.search(r"ld\.global\S*\.b16", code)  # single values, which nothing reads ahead
    compiled(jit.dA_sums, kinds, {"BLOCK": 512, "PARTS": 8}, 4)
