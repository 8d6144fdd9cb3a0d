"""Kernels on a CPU, through Triton's interpreter."""

import builtins
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


def allow_ends_of_one_value() -> None:
    """For scripts: the interpreter of Triton 3.6 reads the ends of a kernel's ranges, arrays of one value, as numbers,
    which numpy 2.4 no longer allows."""
    from triton.runtime import interpreter

    interpreter.range = lambda *ends: builtins.range(
        *(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in ends)
    )
