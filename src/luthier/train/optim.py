"""The optimizer, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

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


def flat_gradient(parameters: Iterable[tuple[str, Parameter]]) -> Tensor:
    """One fp32 buffer that holds all gradients: each parameter's `.grad` is a view of it, which backward passes add to.
    So processes sum one tensor, and the norm and the clipping are one operation each. Those of every LoRA's B lie last,
    as in the optimizer's groups: so our decoder's backward pass can add to all with one operation, too."""
    ordered = [p for _, p in _as_they_lie(parameters)]
    flat = torch.zeros(_size(ordered), dtype=torch.float32, device=ordered[0].device)
    for parameter, part in zip(ordered, _cut(flat, ordered), strict=True):
        parameter.grad = part
    return flat


def optimizer(
    parameters: Iterable[tuple[str, Parameter]],
    gradient: Tensor,
    train: Train,
    say: Callable[[str], None] = lambda text: None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): decay is decoupled from the gradient and falls on the given parameters alone,
    which are the adapter's, by name. State is fp32, as the parameters are. One kernel updates a group: its values
    become one buffer, as their gradients are in `gradient`, which `flat_gradient` made. `adamw_8bit` keeps its moments
    in blocks of 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861), a parameter at a time.

    The rate of B is `train.lora_plus` times A's (Hayou et al. 2024, section 4): each group's `times` says so. `say` is
    told where `adamw` takes the place of an optimizer that cannot run here.
    """
    named = list(parameters)
    groups: dict[float, list[Parameter]] = {}
    for name, parameter in _as_they_lie(named):
        groups.setdefault(train.lora_plus if _is_B(name) else 1.0, []).append(parameter)
    # A checkpoint counts parameters in the adapter's order, or where there are several groups in theirs.
    counted = [p for _, p in named] if len(groups) == 1 else [p for group in groups.values() for p in group]
    numbers = {parameter: number for number, parameter in enumerate(counted)}
    make = _from_bitsandbytes(train.optimizer, gradient.is_cuda, say) if train.optimizer != "adamw" else None
    updated = groups.values() if make else _joined(list(groups.values()), gradient)
    parts = [
        {"params": params, "parts": {numbers[p]: p for p in group}, "times": times, "lr": train.lr * times}
        for params, (times, group) in zip(updated, groups.items(), strict=True)
    ]
    made = (make or partial(torch.optim.AdamW, fused=True))(parts, betas=train.betas, weight_decay=train.weight_decay)
    _begin(made)
    return made


def _is_B(name: str) -> bool:
    return name.endswith("lora_B.weight")


def _as_they_lie(parameters: Iterable[tuple[str, Parameter]]) -> list[tuple[str, Parameter]]:
    """In the order of the flat buffers."""
    return sorted(parameters, key=lambda named: _is_B(named[0]))


def _size(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _cut(flat: Tensor, parameters: Sequence[Parameter]) -> list[Tensor]:
    """Consecutive parts of `flat`, in the shapes of the parameters."""
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def _joined(groups: list[list[Parameter]], gradient: Tensor) -> Iterator[list[Parameter]]:
    """For each group one parameter, of which those of the group become parts; its gradient is their part of `gradient`,
    where the groups lie one after the other."""
    for group, part in zip(groups, torch.split(gradient, [_size(group) for group in groups]), strict=True):
        whole = Parameter(torch.cat([parameter.detach().flatten() for parameter in group]))
        whole.grad = part
        for parameter, values in zip(group, _cut(whole.detach(), group), strict=True):
            parameter.data = values
        yield [whole]


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state before a step takes the memory, among whose tensors it would lie otherwise."""
    theirs = getattr(optimizer, "init_state", None)  # bitsandbytes': some of it is memory that only they can allocate
    for place, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if theirs is not None:
                theirs(group, p, place, index)
            else:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": p.new_zeros(()), **moments}


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


def finish(
    optimizer: torch.optim.Optimizer, gradient: Tensor, loss: Tensor, *, lr: float, max_norm: float | None
) -> Callable[[], list[float]]:
    """Clips `gradient` to `max_norm` and updates at the learning rate `lr`; where the `loss` (fp64 scalar) or the norm
    is not finite, no bit of weights and state changes. That is decided where the gradient is, so that nobody waits.

    Returns a function that does: it gives the loss and the gradient's norm, before clipping.
    """
    norm = precise(torch.linalg.vector_norm(gradient))
    figures = torch.stack([loss, norm])
    told = _told(figures)
    if max_norm is not None:
        gradient.mul_(torch.full_like(norm, max_norm).div_(norm).clamp_(max=1).float())
    skip = (figures - figures).isnan().any().float()  # x - x is 0, unless x is not finite
    update(optimizer, lr, skip)
    return told


def precise(x: Tensor) -> Tensor:
    """`x` in fp64; on the host, if Apple's GPU has it, which has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _told(figures: Tensor) -> Callable[[], list[float]]:
    """Begins to copy `figures` to the host. What is returned waits for that, and for nothing launched later."""
    if not figures.is_cuda:
        return figures.tolist
    host = torch.empty_like(figures, device="cpu", pin_memory=True).copy_(figures, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def update(optimizer: torch.optim.Optimizer, lr: float, skip: Tensor) -> None:
    """One update at the learning rate `lr`, of which each group takes its multiple; nothing where `skip`, an fp32
    scalar, is 1. Torch's fused kernel reads that where it lies beside the parameters; else the host waits for it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]
    beside = skip.device == optimizer.param_groups[0]["params"][0].device
    if isinstance(optimizer, torch.optim.AdamW) and beside:
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch's GradScaler tells it
        optimizer.step()
    elif not skip:
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `PARAMETER.NAME`, with parameters counted in their order. bitsandbytes'
    tables of the levels of 8 bits (`qmap1` …), one for all parameters and always the same, are left out."""
    return {
        f"{number}.{name}": torch.as_tensor(value).clone() if name == "step" else value
        for number, state in _states(optimizer).items()
        for name, value in state.items()
        if not name.startswith("qmap")
    }


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes what `moments` gave."""
    states = _states(optimizer)
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state = states[int(number)]
        if isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:  # bitsandbytes counts steps in a number
            state[name] = value.item()


def _states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The state of each parameter, by its number."""
    found: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        states = [optimizer.state[parameter] for parameter in group["params"]]
        if isinstance(optimizer, torch.optim.AdamW):
            states = _split(states[0], list(group["parts"].values()))
        found |= zip(group["parts"], states, strict=True)
    return found


def _split(state: dict[str, Tensor], parts: Sequence[Parameter]) -> list[dict[str, Any]]:
    """The state of several parameters that are updated as one: views, and the count of steps that they share."""
    moments = {name: _cut(value, parts) for name, value in state.items() if name != "step"}
    return [{name: values[i] for name, values in moments.items()} | {"step": state["step"]} for i in range(len(parts))]


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
