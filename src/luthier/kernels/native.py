"""The pointwise parts in C++, built for this processor on first use (about three seconds) and kept in the user's cache.

Nothing here is needed: the eager parts (`run.kernels=eager`) do the same without a compiler. The sources use no torch
header; tensors are passed as pointers, so every wrapper says what layout it needs and asserts it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import ModelError
from luthier.kernels.pointwise import Activation, Pointwise, activate_backward_dA
from luthier.kernels.spare import empty
from luthier.machine import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
LIBRARIES = ["-lstdc++"]  # what a driver for C, such as CXX=gcc, leaves out
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, else g++ or clang++; None if there is none."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def parts() -> Pointwise:
    """The native parts. Raises ModelError if they cannot be built."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelError(f"the C++ parts cannot be built ({error})", fix="set run.kernels=eager") from error
    return PARTS


def rms_norm(x: Tensor, weight: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    y, scale = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 1, dtype=torch.float32)
    _call("rms_norm", x, None, weight.float(), None, *_rows(y), scale, *x.shape, ctypes.c_float(eps))
    return y, scale


def add_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    y, scale = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 1, dtype=torch.float32)
    _call("rms_norm", x, update, weight.float(), update, *_rows(y), scale, *x.shape, ctypes.c_float(eps))
    return update, y, scale


def rms_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None, spare: int = 0
) -> tuple[Tensor, Tensor]:
    dx, y = empty(x, len(x), x.shape[1], spare), torch.empty_like(x)
    _call("rms_norm_backward", dy, x, scale, weight.float(), *_rows(residual), *_rows(dx), y, *x.shape)
    return dx, y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    y, moments = empty(x, len(x), x.shape[1], spare), x.new_empty(len(x), 2, dtype=torch.float32)
    _call("layer_norm", x, weight.float(), bias.float(), *_rows(y), moments, *x.shape, ctypes.c_float(eps))
    return y, moments


def layer_norm_backward(
    dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, spare: int = 0
) -> tuple[Tensor, Tensor]:
    dx, y = empty(x, len(x), x.shape[1], spare), torch.empty_like(x)
    factors = weight.float(), bias.float()
    _call("layer_norm_backward", dy, x, moments, *factors, *_rows(residual), *_rows(dx), y, *x.shape)
    return dx, y


def rotate(x_TGRD: Tensor, cos: Tensor, sin: Tensor, scale: float, neighbours: bool) -> Tensor:
    tokens, groups, repeats, size = x_TGRD.shape
    out = x_TGRD.new_empty(groups, tokens, repeats, size)
    _turn(x_TGRD, cos, sin, out.transpose(0, 1), scale, neighbours, 1.0)
    return out


def unrotate(dy_GTRD: Tensor, cos: Tensor, sin: Tensor, out_TGRD: Tensor, scale: float, neighbours: bool) -> None:
    _turn(dy_GTRD.transpose(0, 1), cos, sin, out_TGRD, scale, neighbours, -1.0)


def _turn(
    x_TGRD: Tensor, cos: Tensor, sin: Tensor, out_TGRD: Tensor, scale: float, neighbours: bool, sign: float
) -> None:
    assert x_TGRD.stride(-1) == out_TGRD.stride(-1) == 1
    strides = [(ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (x_TGRD, out_TGRD)]
    pointers = [t.data_ptr() for t in (x_TGRD, out_TGRD)]  # these two alone may be views
    turned = cos.shape[1]
    shape = (*x_TGRD.shape, turned, *((2, 1) if neighbours else (1, turned)))
    factors = ctypes.c_float(scale), ctypes.c_float(sign)
    _call("rotate", pointers[0], strides[0], cos, sin, pointers[1], strides[1], *shape, *factors)


def activate(x: Tensor, act: Activation, gated: bool, spare: int = 0) -> Tensor:
    h = empty(x, len(x), x.shape[1] // 2 if gated else x.shape[1], spare)
    _call(f"activate_{act}", *_rows(x), *_rows(h), *h.shape, int(gated), like=x)
    return h


def activate_backward(dh: Tensor, x: Tensor, act: Activation, gated: bool) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(dh)
    _call(f"activate_backward_{act}", dh, *_rows(x), h, *h.shape, int(gated))
    return x, h


def softmax(scores_GQRK: Tensor, seen: Tensor) -> Tensor:
    _call("softmax", scores_GQRK, seen, *scores_GQRK.shape)
    return scores_GQRK


def softmax_backward(dp_GQK: Tensor, p_GQK: Tensor, delta_GQ: Tensor) -> Tensor:
    groups, queries, keys = dp_GQK.shape
    _call("softmax_backward", dp_GQK, p_GQK, delta_GQ, groups * queries, keys)
    return dp_GQK


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest, mass = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    _call("exponentials", logits, largest, mass, *logits.shape)
    return logits, largest, mass


PARTS = Pointwise(
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rms_norm_backward=rms_norm_backward,
    layer_norm=layer_norm,
    layer_norm_backward=layer_norm_backward,
    rotate=rotate,
    unrotate=unrotate,
    activate=activate,
    activate_backward=activate_backward,
    activate_backward_dA=partial(activate_backward_dA, backward=activate_backward),
    softmax=softmax,
    softmax_backward=softmax_backward,
    exponentials=exponentials,
)


def _rows(x: Tensor | None) -> tuple[int, int]:
    """x [T, H], whose rows may lie apart, as native.cpp takes it: where it begins, and how far they do."""
    if x is None:
        return 0, 0
    assert x.stride(1) == 1, x.stride()
    assert x.device.type in ("cpu", "meta"), x.device
    return x.data_ptr(), x.stride(0)


def _call(name: str, *arguments: Any, like: Tensor | None = None) -> None:
    """Calls a function of native.cpp for the dtype of `like`, or of the first tensor among the arguments. Without data
    nothing is computed."""
    first = next(a for a in arguments if isinstance(a, Tensor)) if like is None else like
    if first.is_meta:
        return
    function = getattr(_library(), f"{name}_{_SUFFIXES[first.dtype]}")
    function(*(_pass(a) for a in arguments), torch.get_num_threads())


def _pass(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous(), argument.stride()
        assert argument.device.type == "cpu", argument.device
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    found = compiler()
    if found is None:
        raise OSError("no C++ compiler is installed")
    processor = _processor()
    # Compilers keep to half of a 512-bit register unless told; bf16 needs the whole (1.5 times as fast).
    command = [found, *FLAGS, *(["-mprefer-vector-width=512"] if "avx512f" in processor else [])]
    key = hashlib.sha256(repr((SOURCE.read_bytes(), command, LIBRARIES, processor)).encode()).hexdigest()[:16]
    path = cache_folder() / f"native-{key}.so"
    if not path.exists():
        _build(command, path)
    return ctypes.CDLL(str(path))


def _build(command: list[str], path: Path) -> None:
    """Builds aside and renames: another process or thread may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        subprocess.run(
            [*command, str(SOURCE), *LIBRARIES, "-o", str(aside)], check=True, capture_output=True, timeout=300
        )
        aside.replace(path)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
