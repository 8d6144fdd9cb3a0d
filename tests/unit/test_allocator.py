"""Memory that a training step frees stays with the process: the next step need not have its pages cleared anew."""

import json
import subprocess
import sys

import pytest

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
    assert sorted(faults[3:])[2] < 1000, "without the setting it is about 20,000"
