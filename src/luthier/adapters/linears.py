"""Linear layers, however a model keeps them: torch's nn.Linear, transformers' Conv1D (GPT-2: weight [in, out]), and
quantised ones, which have `in_features`, `out_features`, `bias`, `rounds_inputs`, `dequantize()` and
`requantize(weight)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def linear_names(module: nn.Module) -> list[str]:
    """Dotted names of the linear layers that can be adapted: all but the output head, those that are passed by, and
    those that choose which tokens attention reads: a choice has no gradient."""
    output = getattr(module, "get_output_embeddings", None)  # transformers' name for the head
    head = output() if callable(output) else None
    passed = _passed_by(getattr(getattr(module, "config", None), "model_type", ""))
    return [
        name
        for name, layer in module.named_modules()
        if is_linear(layer) and layer is not head and not name.endswith(passed) and ".indexer." not in name
    ]


def _passed_by(family: str) -> tuple[str, ...]:
    """Layers whose weight others' code reads, so that nothing beside them is run, or rightly: Mamba's step size, and
    what its fused kernels take (PEFT refuses those too); some routers; and what RWKV scales."""
    fused = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), (".out_proj",))
    special = fused | {"rwkv": (".attention.output", ".feed_forward.value")}
    return (".dt_proj", ".gate.wg", ".router.classifier", *special.get(family, ()))


def is_linear(layer: nn.Module) -> bool:
    if any(word in type(layer).__name__ for word in ("Router", "Grouped")):
        return False  # it chooses experts as well, or has a product for each group of its inputs
    return is_transposed(layer) or all(hasattr(layer, name) for name in ("in_features", "out_features", "weight"))


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a Conv1D, whose weight is [in, out]: `fan_in_fan_out` to PEFT."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nx")


def is_quantized(layer: nn.Module) -> bool:
    return hasattr(layer, "dequantize")


def multiplies(layer: Any) -> bool:
    """Whether its output is `dense_weight` times the input and the bias: not so for LLM.int8(), which rounds inputs."""
    # Falcon's own class is there to round before the bias is added, and computes the same.
    dense = type(layer) is nn.Linear or type(layer).__name__ == "FalconLinear"
    return dense or (is_quantized(layer) and not layer.rounds_inputs)


def features(layer: Any) -> tuple[int, int]:
    """(in, out)."""
    return (layer.nx, layer.nf) if is_transposed(layer) else (layer.in_features, layer.out_features)


def dense_weight(layer: Any) -> Tensor:
    """[out, in], in the layer's own dtype; a view where the layer keeps it dense."""
    if is_quantized(layer):
        weight: Tensor = layer.dequantize()
    else:
        weight = layer.weight.detach()
    return weight.t() if is_transposed(layer) else weight


def set_dense_weight(layer: Any, weight: Tensor) -> float:
    """Gives the layer `weight` [out, in], rounded or quantised as the layer keeps it. Returns what that lost: the norm
    of the difference as a share of the norm of `weight`."""
    with torch.no_grad():
        if is_quantized(layer):
            layer.requantize(weight)
        else:
            dense_weight(layer).copy_(weight)
        kept = dense_weight(layer).float()
        return float((kept - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))


def without_bias(layer: Any, y: Tensor) -> Tensor:
    """The layer's output less its bias: W x."""
    return y if layer.bias is None else y - layer.bias
