"""The optimizer, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.recipe import Train


def optimizer(parameters: Iterable[tuple[str, Parameter]], train: Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019): decay is decoupled from the gradient and falls on the given parameters alone,
    which are the adapter's, by name. State is fp32, as the parameters are; one fused kernel updates each tensor.

    The rate of B is `train.lora_plus` times A's (Hayou et al. 2024, section 4): each group's `times` says so.
    """
    groups: dict[float, list[Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault(train.lora_plus if name.endswith("lora_B.weight") else 1.0, []).append(parameter)
    parts = [{"params": group, "times": times, "lr": train.lr * times} for times, group in groups.items()]
    return torch.optim.AdamW(parts, betas=train.betas, weight_decay=train.weight_decay, fused=True)


def flat_gradient(parameters: list[Parameter]) -> Tensor:
    """One fp32 buffer that holds all gradients: each parameter's `.grad` is a view of it, which backward passes add to.
    So processes sum one tensor, and the norm and the clipping are one operation each."""
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `PARAMETER.NAME`, with parameters counted in their order."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes what `moments` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rate(train: Train, step: int, steps: int) -> float:
    """The learning rate of update `step`, counted from 0, of `steps`: linear warm-up, then the schedule.

    Never 0: the first update of a warm-up of w is lr/w, and the last of a decay is one step's worth above 0.
    """
    warmup = train.warmup if isinstance(train.warmup, int) else math.ceil(train.warmup * steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    return train.lr * _SHAPES[train.schedule](step - warmup, max(1, steps - warmup), train)


def _constant(step: int, steps: int, train: Train) -> float:
    return 1.0


def _linear(step: int, steps: int, train: Train) -> float:
    return (steps - step) / steps


def _cosine(step: int, steps: int, train: Train) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _wsd(step: int, steps: int, train: Train) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): flat, then linear over the last `train.decay` of the steps."""
    return min(1.0, (steps - step) / max(1, math.ceil(train.decay * steps)))


_SHAPES: dict[str, Callable[[int, int, Train], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
