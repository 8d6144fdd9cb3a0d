"""Memory that runs out where a test wants it to, on a CPU, which otherwise never says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUMBERS = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default}
"""Operations that make no tensor."""


class Scarce(TorchDispatchMode):
    """Memory that runs out at operation `at`, counted from 0, and is there again `times` operations later."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times, self.count = at, times, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in NUMBERS
        if func not in NUMBERS and self.at < self.count <= self.at + self.times:
            raise torch.OutOfMemoryError("as a test")
        return func(*args, **(kwargs or {}))


class Small(TorchDispatchMode):
    """Memory that holds no new tensor of more than `most` numbers. `times`: how often one was wanted."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.times = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        had = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in had]
        if any(x.numel() > self.most for x in made):
            self.times += 1
            raise torch.OutOfMemoryError("as a test")
        return found
