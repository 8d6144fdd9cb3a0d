"""Memory that a training step frees stays with the process: the next step need not have its pages cleared anew."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import tiny
from luthier import recipe
from luthier.model.causal import Kernels, build
from luthier.model.memory import release

STEPS = """
import json, resource, threading
import torch
from luthier.allocator import keep_freed_memory

keep_freed_memory()
torch.set_num_threads(1)

def backward(kept):  # in a thread of its own, as torch runs it
    while kept:
        gradient = torch.empty(3 << 20).fill_(1.0)
        kept.pop()
        torch.empty(2 << 20).fill_(1.0)

def step():
    kept = [torch.empty((2 + i % 3) << 20).fill_(1.0) for i in range(12)]
    thread = threading.Thread(target=backward, args=(kept,))
    thread.start()
    thread.join()

faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")
def test_a_later_step_asks_the_system_for_no_memory() -> None:
    run = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True)
    faults = json.loads(run.stdout)
    assert faults[0] > 30_000  # 126 MiB in pages of 4 KiB: the measure itself works
    assert sorted(faults[3:])[2] < 5000, "without the setting it is about 20,000"


HOLES = """
import json
import torch
from luthier.allocator import give_back, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

keep_freed_memory()
before = resident()
tensors = [torch.empty(1 << 20).fill_(1.0) for _ in range(50)]
last = torch.empty(1 << 10).fill_(1.0)  # above them all
del tensors
kept = resident()
give_back()
print(json.dumps([kept - before, resident() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")
def test_what_is_kept_can_be_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    kept, left = json.loads(run.stdout)
    assert kept > 190
    assert left < 20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is mapped")
@pytest.mark.parametrize(("kernels", "mapped"), [("eager", False), ("reference", True)])
def test_our_block_merges_the_weights_and_lets_go_of_their_file(kernels: Kernels, mapped: bool, tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base")
    settings = recipe.Model(base=str(folder))
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    model = build(settings, None, folder=folder, kernels=kernels, recompute=False, seed=0, **place)
    assert (model.decoder is None) is mapped
    assert (str(folder / "model.safetensors") in Path("/proc/self/maps").read_text(encoding="utf-8")) is mapped


def test_memory_that_an_error_s_frames_refer_to_in_a_circle_is_released() -> None:
    def fails() -> tuple[weakref.ref[torch.Tensor], Exception]:
        held = torch.zeros(8)
        try:
            raise MemoryError
        except MemoryError as error:
            kept = error  # the frame holds the error, and the error's traceback the frame
            return weakref.ref(held), kept

    gc.disable()
    try:
        seen = fails()[0]
        assert seen() is not None
        release()
        assert seen() is None
    finally:
        gc.enable()
