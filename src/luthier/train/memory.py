"""What memory a process took, and how much it may take."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from luthier.allocator import give_back
from luthier.recipe import Run


@contextmanager
def at_most(reserved: int | None) -> Iterator[None]:
    """Inside, torch reserves at most so many bytes of the GPU: to ask for more is to run out of memory, however much is
    free there. None: as much as there is."""
    if reserved is None:
        yield
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(fraction(reserved, total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fraction(reserved: int, total: int) -> float:
    """The share of a GPU's `total` bytes that torch's allocator takes for so many: it rounds down what it makes of it
    (`setMemoryFraction` in `CUDACachingAllocator.cpp`). Never more than all."""
    return min(1.0, math.nextafter(reserved / total, 1.0))


def forget_peak() -> None:
    """Has `peak_bytes` begin anew, where it is that of a GPU: what loading took is no part of a step."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


def left_open(run: Run) -> set[str]:
    """The settings that may change where memory is short: those that the recipe leaves to the plan."""
    found = {name for name in ("unpacked", "recompute", "recompute_gate_up") if getattr(run, name) == "auto"}
    return found if run.recompute == "auto" else found - {"recompute_gate_up"}


def peak_bytes() -> int:
    """The most memory this process has held: of the GPU where one is used, else resident memory."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_reserved()
    return host_peak_bytes()


def host_peak_bytes() -> int:
    """The most resident memory this process has held, files it reads in place included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def settled(before: int) -> int:
    """The peak now. On a CPU, freed memory is given back where a step took more than any before it, `before` bytes."""
    peak = peak_bytes()
    if peak > before and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        give_back()
    return max(peak, before)
