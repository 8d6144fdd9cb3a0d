"""The least arithmetic that a step of LoRA can do, and how fast this GPU multiplies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers.models import config
from peers.workloads import Counts

RANK = 16


def flops_per_token(folder: Path, done: Counts) -> float:
    """Of a LoRA step on all linear layers, nothing recomputed: every product with a frozen weight once forward and once
    for the gradient of its input (4 per weight), the adapters' with their own gradient (6), causal attention (2 per
    squared token and feature forward, 2.5 times that backward), and the frozen head on supervised tokens alone."""
    size = sizes(folder)
    linear = 4 * size["blocks"] + 6 * size["adapter"]
    attention = 3.5 * 2 * size["attention"] * done.squares / done.tokens
    return float(linear + attention + 4 * size["head"] * done.targets / done.tokens)


def sizes(folder: Path) -> dict[str, int]:
    """Weights of the blocks' linear layers, of the adapters and of the head; features that attention multiplies, over
    all layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from luthier.model.quantize import packable_names

    tree = config(folder)
    tree.pop("quantization_config", None)
    made = AutoConfig.for_model(**tree)
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    shapes = [module.get_submodule(name).weight.shape for name in packable_names(module)]
    head = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    return {
        "blocks": sum(rows * columns for rows, columns in shapes),
        "adapter": sum(RANK * (rows + columns) for rows, columns in shapes),
        "head": made.vocab_size * made.hidden_size,
        "attention": made.num_hidden_layers * made.num_attention_heads * head,
    }


def matmul_rate(size: int = 8192, times: int = 400) -> float:
    """Sustained TFLOP/s of dense bfloat16 products, so many that the GPU is at the clock that its power allows."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b, out=out)
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds()
    return 2 * times * size**3 / seconds() / 1e12
