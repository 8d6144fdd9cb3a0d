"""What a product's gradient means to its adapters, of one reading of it, on a CPU through Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("adapted_script.py")


def test_what_is_computed_of_one_reading_is_what_two_products_are() -> None:
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernels, is not installed")
    # Triton asks whether to interpret when it is imported, so that the whole process has to.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = {name: float(error) for name, error in (line.split() for line in done.stdout.splitlines())}
    assert len(errors) == 108
    assert all(error < 2e-6 for error in errors.values()), errors  # a NaN is below nothing


def test_its_kernels_compile_for_hopper_and_read_ahead_16_bytes_at_a_time() -> None:
    """Which the interpreter says nothing of; and no GPU is needed for it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from luthier.kernels import adapted, jit

    pointers = {"inner_parts": "*fp32", "B_parts": "*fp32", "blocks": "*i32", "sums": "*i32"}
    pointers |= dict.fromkeys(("dy", "B", "inner", "dinner", "dB"), "*bf16")

    def compiled(kernel: Any, warps: int, **fixed: int) -> str:
        kinds = {p.name: "constexpr" if p.is_constexpr else pointers.get(p.name, "i32") for p in kernel.params}
        known = [p for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        even = {(p.num,): [["tt.divisibility", 16]] for p in known}
        places = {(p.num,): fixed[p.name] for p in kernel.params if p.is_constexpr}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=places, attrs=even)
        options = {"num_warps": warps}
        return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])

    blocks = adapted.BLOCKS
    sizes = {"ROWS": adapted.ROWS, "COLUMNS": blocks.columns, "RANKS": adapted.RANKS, "STAGES": blocks.stages}
    code = compiled(jit.adapted, blocks.warps, **sizes)
    assert "wgmma.mma_async" in code
    assert "cp.async.cg" in code
    assert not re.search(r"ld\.global\S*\.b16", code)  # single values, which nothing reads ahead
    compiled(jit.adapted_sums, 4, RANKS=adapted.RANKS, BLOCK=512, PARTS=8)
