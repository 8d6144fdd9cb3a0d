"""One order of sums on a GPU, without torch's compiler."""

import subprocess
import sys

CODE = """
import sys, torch
from luthier.train.reproducible import loosened, reproducible
with reproducible("cuda"):
    print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    print(loosened(RuntimeError("there is no deterministic implementation")))
    print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
print(torch.are_deterministic_algorithms_enabled(), "torch._inductor" in sys.modules)
"""


def test_the_order_is_fixed_and_let_loose_again_without_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True", "True", "True", "False", "False"]
