"""Packed attention that a GPU computes, and its gradient, on a CPU through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
