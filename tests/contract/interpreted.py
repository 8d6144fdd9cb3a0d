"""Kernels on a CPU, through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def errors_of(script: str, *arguments: str) -> dict[str, float]:
    """What a script of this folder prints: a name and how far a kernel is from its twin, on a line each. Triton asks
    whether to interpret when it is imported, so that a whole process has to."""
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernels, is not installed")
    command, environment = (
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        {"TRITON_INTERPRET": "1"},
    )
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: float(error) for name, error in (line.split() for line in done.stdout.splitlines())}
