"""Packed attention that a GPU computes, and its gradient, on a CPU through Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hopper import compiled

SCRIPT = Path(__file__).with_name("varlen_script.py")


def test_packed_attention_and_its_gradient_are_those_of_torch() -> None:
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernels, is not installed")
    # Triton asks whether to interpret when it is imported, so that the whole process has to.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = {name: float(error) for name, error in (line.split() for line in done.stdout.splitlines())}
    assert len(errors) == 32
    assert all(error < 2e-6 for error in errors.values()), errors  # a NaN is below nothing


@pytest.mark.parametrize("size", [64, 128])
def test_on_hopper_no_thread_reads_sums_that_another_one_has_read(size: int) -> None:
    """They are the only values of 4 bytes that are read ahead: before the loop, and in it."""
    pytest.importorskip("triton")
    from luthier.kernels import varlen_backward, varlen_jit

    how = varlen_backward.how(8192, 32, 8, size)
    kinds = dict.fromkeys(("do", "q", "k", "v", "cos", "sin", "dk", "dv"), "*bf16")
    kinds |= {"sums": "*fp32", "inner": "*fp32", "blocks": "*i32", "scale": "fp32"}
    rows, keys, warps, stages = how.keys
    sizes = {"HALF": size // 2, "GROUP": 4, "HEADS": 4, "SIZE": size, "WIDE": size, "ROWS": rows, "KEYS": keys}
    code = compiled(varlen_jit.keys_and_values, kinds, sizes, warps, stages)
    assert len(re.findall(r"cp\.async\.ca\.shared\.global .*0x4, ", code)) == stages
