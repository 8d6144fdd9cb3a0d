"""Whether this machine, this torch and its kernels can compute at a place, and what is in the way if not."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING

from luthier.allocator import grow_segments
from luthier.errors import RecipeError
from luthier.machine import memory

if TYPE_CHECKING:
    import torch

_PICK = "pick the build for this machine at https://pytorch.org/get-started, or set run.place to cpu"


@dataclass(frozen=True)
class Build:
    """What an installed torch is made for, and what it finds.

    Attributes:
        version: torch's own.
        cuda: the CUDA (or ROCm) version it is built with, or None.
        archs: what its kernels are compiled for, such as `sm_80`, `compute_90` or `gfx90a`.
        capability: of the GPU, or None where torch can use none; meaningless under ROCm.
        why_no_gpu: what torch says when it is asked for one that it cannot use.
        mps: whether it can use Apple's GPU.
        rocm: whether its GPUs are AMD's.
    """

    version: str
    cuda: str | None = None
    archs: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    why_no_gpu: str = ""
    mps: bool = False
    rocm: bool = False


def check_place(place: str) -> None:
    """Raises RecipeError naming what is in the way if torch cannot compute at `place` (`cpu`, `cuda` or `mps`)."""
    if place != "cpu" and (found := problem(place, installed())) is not None:
        what, fix = found
        raise RecipeError(what, where=f"run.place: {place}", fix=fix)


def wake(place: str) -> None:
    """Has the GPU of `place` made ready by a thread of its own, which takes seconds, while this one goes on with what
    needs no GPU yet: imports, a plan. Whatever is in the way, `check_place` tells."""
    if place == "cuda":
        Thread(target=_use_gpu, name="wake", daemon=True).start()


def _use_gpu() -> None:
    grow_segments()  # before torch's allocator begins
    _make_context()
    import torch

    with suppress(RuntimeError, AssertionError):
        torch.cuda.synchronize()  # nothing is allocated, and no library begun
    with suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()  # the first kernel would wait until Triton has read all of itself; it remembers


def _make_context() -> None:
    """Has the driver make the context of the first GPU, which torch then uses. Asked through torch, it would keep other
    threads from running Python meanwhile, and would have to wait until torch is imported."""
    with suppress(OSError, AttributeError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def problem(place: str, build: Build) -> tuple[str, str] | None:
    """What is wrong and what to do about it, or None."""
    if place == "mps":
        fix = "set run.place to cpu; Apple's GPU needs macOS 14 and torch's build for it"
        return None if build.mps else (f"torch {build.version} cannot use Apple's GPU here", fix)
    if build.cuda is None:
        return f"torch {build.version} is built for the CPU, not for CUDA", _PICK
    if build.capability is None:
        fix = "update the GPU's driver, or take a torch for an older CUDA; `nvidia-smi` shows what the driver runs"
        return f"torch {build.version} for CUDA {build.cuda} cannot use a GPU here ({build.why_no_gpu})", fix
    if not build.rocm and not _runs(build.capability, build.archs):
        archs, found = " ".join(build.archs), "{}.{}".format(*build.capability)
        return f"the GPU's capability {found} is not among those of torch {build.version} ({archs})", _PICK
    return None


def _runs(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Compiled kernels run on later GPUs of their generation; `compute_` ones are compiled anew for any later one."""
    for arch in archs:
        kind, _, number = arch.rstrip("af").partition("_")
        major, minor = int(number[:-1]), int(number[-1])
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return True
    return False


def free_memory(device: torch.device, most: int | None = None) -> int:
    """Bytes that a process may still take: of a GPU, those that torch holds without using them among them. `most`: of a
    GPU's, that torch may take in all."""
    import torch

    if device.type != "cuda":
        return memory()[1]
    used = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    return free if most is None else max(0, min(free, most - used))


def installed() -> Build:
    """The torch at hand."""
    import torch

    rocm = torch.version.hip is not None
    usable, why = _gpu(torch.version.cuda is not None or rocm)
    return Build(
        version=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        archs=tuple(torch.cuda.get_arch_list()) if usable is not None else (),
        capability=usable,
        why_no_gpu=why,
        mps=torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0),
        rocm=rocm,
    )


def _gpu(built: bool) -> tuple[tuple[int, int] | None, str]:
    """The GPU's capability, or why there is none to be used."""
    import torch

    if not built:
        return None, ""
    try:
        return torch.cuda.get_device_capability(), ""
    except (RuntimeError, AssertionError) as error:
        return None, (str(error).strip().splitlines() or ["no reason given"])[0]
