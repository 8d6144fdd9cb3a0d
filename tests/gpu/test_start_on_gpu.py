"""A run's start on a real GPU: it is woken without being used, and its weights come whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from luthier.model import weights

pytestmark = pytest.mark.gpu
WAKE = """
import os, threading
from luthier.model.place import wake
wake("cuda")
[thread.join() for thread in threading.enumerate() if thread.name == "wake"]
import torch
print(torch.cuda.is_initialized(), torch.cuda.memory_reserved(), os.environ["PYTORCH_ALLOC_CONF"])
"""
OF_ITS_OWN = """
import ctypes
driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
assert driver.cuInit(0) == driver.cuCtxCreate_v2(ctypes.byref(context), 0, 0) == 0
assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
"""
CONTEXTS = """
import ctypes, torch
torch.cuda.synchronize()
driver, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_ulonglong()
used, primary, another = (ctypes.c_void_p() for _ in range(3))
assert driver.cuCtxGetCurrent(ctypes.byref(used)) == driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 0) == 0
assert driver.cuCtxCreate_v2(ctypes.byref(another), 0, 0) == driver.cuCtxGetId(another, ctypes.byref(number)) == 0
print(used.value == primary.value, number.value)
"""


def test_a_gpu_that_is_woken_has_its_context_and_nothing_in_it() -> None:
    assert said(WAKE) == ["True", "0", "expandable_segments:True"]


def test_waking_makes_the_context_that_torch_uses_and_no_other() -> None:
    """The driver numbers a process's contexts: the next one's number tells how many there were."""
    unwoken = said(CONTEXTS)
    assert unwoken[0] == "True", "torch uses another context than the device's primary one"
    assert said(WAKE + CONTEXTS)[3:] == unwoken
    assert said(OF_ITS_OWN + CONTEXTS) != unwoken, "the number tells nothing"


def said(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("ahead", [0, weights.AHEAD])
def test_weights_read_by_way_of_memory_that_is_lent_again_come_whole(ahead: int, tmp_path: Path) -> None:
    tensors = {f"{i:03}": torch.randint(0, 255, (5_000_000 + 77 * i,), dtype=torch.uint8) for i in range(60)}
    save_file(tensors, tmp_path / "a.safetensors")
    with weights.handles([tmp_path / "a.safetensors"], copied=True, pinned=True, ahead=ahead) as found:
        assert found["000"][...].is_pinned()
        for name, tensor in tensors.items():
            assert torch.equal(found[name][...].to("cuda"), tensor.to("cuda"))
