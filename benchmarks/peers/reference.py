"""What the first loss must be: transformers' own module in fp32, one sample at a time, without adapters, which start as
nothing."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peers.workloads import Step, Workload

from luthier.model.load import load_causal
from luthier.recipe import Model


@torch.no_grad()
def first_loss(folder: Path, workload: Workload, step: Step) -> float:
    """The mean over the supervised tokens of a step."""
    module, found, targets = _module(folder, workload.nf4), 0.0, 0
    for sample in (sample for row in step for sample in row):
        ids = torch.tensor([sample.ids], device=module.device)
        logits = module(input_ids=ids, use_cache=False).logits[0, -sample.targets - 1 : -1]
        found += float(torch.nn.functional.cross_entropy(logits, ids[0, -sample.targets :], reduction="sum"))
        targets += sample.targets
    return found / targets


@lru_cache(maxsize=1)
def _module(folder: Path, nf4: bool) -> Any:
    """Loaded once for all workloads of a model."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Model.model_validate({"base": str(folder), "quantize": {"kind": "nf4"} if nf4 else None})
    return load_causal(folder, settings, device=place, dtype=torch.float32, attention="sdpa")
