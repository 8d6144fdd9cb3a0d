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
print(torch.cuda.mem_get_info()[0])
"""
USE = "import torch; torch.cuda.synchronize(); print(torch.cuda.mem_get_info()[0])"


def test_a_gpu_that_is_woken_has_its_context_and_nothing_in_it() -> None:
    assert said(WAKE)[:3] == ["True", "0", "expandable_segments:True"]


def test_waking_makes_the_context_that_torch_uses_and_no_other() -> None:
    assert abs(int(said(WAKE)[3]) - int(said(USE)[0])) < 256 << 20  # bytes left; a context takes some 500 MiB


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
