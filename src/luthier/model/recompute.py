"""Activations made again in the backward pass instead of being kept, a layer at a time, for transformers' modules.

transformers' own switch works in training mode only, in which its models drop values by generators of their own; our
models never leave evaluation mode, so the layers are wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from luthier.adapters.method import Noise
from luthier.model import attention
from luthier.model.shape import blocks_of


def recomputing(module: nn.Module, noise: Noise | None, recompute: bool | int = True) -> None:
    """Makes the first layers of `module`, as many as `recompute` says, keep their input alone for the backward pass."""
    layers = _layers(module)
    for layer in layers[: blocks_of(recompute, len(layers))]:
        layer.forward = partial(_forward, layer.forward, partial(_contexts, noise))


def _layers(module: nn.Module) -> list[nn.Module]:
    """Those that transformers can recompute, else the members of the longest list of modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    marked: list[nn.Module] = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return marked or max(lists, key=len, default=[])


def _forward(forward: Callable[..., Any], contexts: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing random is drawn: dropout is a function of `Noise`.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


def _contexts(noise: Noise | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, and for its repetition, when segments and noise may long be those of another one."""
    return nullcontext(), _as_it_was(attention.bounds(), noise, None if noise is None else replace(noise))


@contextmanager
def _as_it_was(bounds: tuple[int, ...] | None, noise: Noise | None, then: Noise | None) -> Iterator[None]:
    with attention.packed(bounds):
        if noise is None or then is None:
            yield
            return
        now = replace(noise)
        noise.step, noise.samples, noise.positions = then.step, then.samples, then.positions
        yield
        noise.step, noise.samples, noise.positions = now.step, now.samples, now.positions
