"""The optimizer, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.recipe import Train

# The recipe's names that bitsandbytes computes, as its classes are called.
_BITSANDBYTES = {
    "adamw_32bit": "AdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def optimizer(
    parameters: Iterable[tuple[str, Parameter]], train: Train, say: Callable[[str], None] = lambda text: None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): decay is decoupled from the gradient and falls on the given parameters alone,
    which are the adapter's, by name. State is fp32, as the parameters are; one fused kernel updates each tensor.
    `adamw_8bit` keeps its moments in blocks of 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861).

    The rate of B is `train.lora_plus` times A's (Hayou et al. 2024, section 4): each group's `times` says so. `say` is
    told where `adamw` takes the place of an optimizer that cannot run here.
    """
    groups: dict[float, list[Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault(train.lora_plus if name.endswith("lora_B.weight") else 1.0, []).append(parameter)
    parts = [{"params": group, "times": times, "lr": train.lr * times} for times, group in groups.items()]
    on_gpu = any(parameter.is_cuda for group in groups.values() for parameter in group)
    made = _from_bitsandbytes(train.optimizer, on_gpu, say) if train.optimizer != "adamw" else None
    if made is not None:
        return made(parts, betas=train.betas, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parts, betas=train.betas, weight_decay=train.weight_decay, fused=True)


def _from_bitsandbytes(
    name: str, on_gpu: bool, say: Callable[[str], None]
) -> Callable[..., torch.optim.Optimizer] | None:
    try:
        # Importing it without a GPU warns of what it cannot do there; its AdamW runs all the same.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = import_module("bitsandbytes.optim")
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be loaded"])[0]
        say(f"train.optimizer={name} needs bitsandbytes ({reason}): adamw with 32-bit moments takes its place")
        return None
    if name.startswith("paged_") and not on_gpu:
        say(f"train.optimizer={name}: only a GPU's memory is paged; here its moments stay where they are")
        name = name.removeprefix("paged_")
    made: Callable[..., torch.optim.Optimizer] = getattr(module, _BITSANDBYTES[name])
    return made


def update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One update at the learning rate `lr`, of which each group takes its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]
    optimizer.step()


def flat_gradient(parameters: Iterable[tuple[str, Parameter]]) -> Tensor:
    """One fp32 buffer that holds all gradients: each parameter's `.grad` is a view of it, which backward passes add to.
    So processes sum one tensor, and the norm and the clipping are one operation each. Those of every LoRA's B come last,
    as in the optimizer's groups: so our decoder's backward pass can add to all with one operation, too."""
    ordered = [p for _, p in sorted(parameters, key=lambda named: named[0].endswith("lora_B.weight"))]
    sizes = [parameter.numel() for parameter in ordered]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=ordered[0].device)
    for parameter, part in zip(ordered, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `PARAMETER.NAME`, with parameters counted in their order. bitsandbytes'
    tables of the levels of 8 bits (`qmap1` …), one for all parameters and always the same, are left out."""
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
        if not name.startswith("qmap")
    }


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes what `moments` gave."""
    parameters = _parameters(optimizer)
    # bitsandbytes counts steps in a number, and its paged moments are a kind of memory that only it can allocate.
    prepare = getattr(optimizer, "init_state", None)
    if prepare is not None:
        for index in sorted({int(key.partition(".")[0]) for key in tensors}):
            prepare(optimizer.param_groups[0], parameters[index], 0, index)
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        parameter = parameters[int(place)]
        state = optimizer.state[parameter]
        if prepare is None:
            state[name] = value.to(parameter.device)
        elif isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = value.item()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
