"""Without a GPU these tests say that they were left out. `make test` does not select their mark."""

import pytest


@pytest.fixture(autouse=True)
def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
