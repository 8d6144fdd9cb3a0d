"""The same bits from the same step: what a GPU's libraries need to be told for a resumed run to be the same run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Workspaces of a fixed size, so that a stream takes the same one again. cuBLAS reads this when it is first used, and a
# model that is being built uses it already: so it is said as soon as training is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def reproducible(place: str) -> Iterator[None]:
    """Inside, operations on a GPU add up in an order that is always the same, some of them a little slower. A CPU's do
    so anyway."""
    if place != "cuda":
        yield
        return
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    # Not with warn_only: flash attention takes that for leave to add up in any order.
    _fix_order(True)
    deterministic.fill_uninitialized_memory = False  # ours is always written before it is read
    try:
        yield
    finally:
        _fix_order(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def loosened(error: RuntimeError) -> bool:
    """Whether `error` says that an operation has no fixed order. It is then let pass from here on."""
    if "deterministic" not in str(error) or not torch.are_deterministic_algorithms_enabled():
        return False
    _fix_order(True, warn_only=True)
    return True


def _fix_order(wanted: bool, *, warn_only: bool = False) -> None:
    """torch.use_deterministic_algorithms, which imports torch's compiler to tell it, too: seconds of a start, and
    nothing of ours is compiled by it."""
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)
    else:
        torch._C._set_deterministic_algorithms(wanted, warn_only=warn_only)
