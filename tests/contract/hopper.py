"""What Triton makes of a kernel for Hopper: no GPU is needed for it, and the interpreter says nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compiled(kernel: Any, kinds: Mapping[str, str], fixed: Mapping[str, int | str], warps: int, stages: int = 3) -> str:
    """Its PTX. `kinds`: of the arguments that are not int32; `fixed`: what is compiled into it. Pointers, and
    int32 that do not change from launch to launch, are taken to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    told = [p for p in kernel.params if not p.is_constexpr]
    signature = {p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in kernel.params}
    even = [p for p in told if not p.do_not_specialize and signature[p.name] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(p.num,): fixed[p.name] for p in kernel.params if p.is_constexpr},
        attrs={(p.num,): [["tt.divisibility", 16]] for p in even},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
