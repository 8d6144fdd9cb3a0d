"""Keeps the frozen weights of some decoder blocks in host memory, and brings each to the device when it is needed.

While one block computes, the next one's weights are copied on a stream of their own: in the forward pass the block
after it, in the backward pass the block before it. At most two such blocks are on the device at a time. Weights are
read only, so nothing is copied back; what is trained, such as adapters, stays on the device.

The blocks have to run under activation checkpointing (`run.recompute`): what autograd saves inside a block would keep
its weights on the device otherwise. The recomputation of a block, in its backward pass, finds them there again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_ALIGN = 512  # bytes: where a tensor may begin


def blocks_name(module: nn.Module) -> str:
    """The dotted name of the list of a model's decoder blocks: the one with the most parameters in it."""
    lists: dict[str, nn.Module] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.ModuleList)
    }

    def size(name: str) -> tuple[int, int]:
        return sum(p.numel() for p in lists[name].parameters()), -len(name)

    return max(lists, key=size)


def stream(module: nn.Module, count: int, device: torch.device) -> Streamed:
    """Makes the first `count` decoder blocks of `module` run on `device` with their frozen weights in host memory.

    To be called when adapters are attached; `load_causal(…, offload=count)` has left the blocks there.
    """
    blocks: Any = module.get_submodule(blocks_name(module))
    return Streamed(list(blocks)[:count], device)


@dataclass(frozen=True)
class _Part:
    """A tensor of a block, and where in the block's bytes it lies."""

    tensor: Tensor
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, flat: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return flat[self.start : self.start + size].view(self.dtype).view(self.shape)


class _Block:
    """The frozen tensors of one block: their home, one stretch of host memory, and perhaps a copy on the device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)
        self.parts = list(_parts(module))
        size = max((p.start + p.tensor.nbytes for p in self.parts), default=0)
        self.home = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for part in self.parts:
            part.view(self.home).copy_(part.tensor.data)
        self.copy: Tensor | None = None
        self.ready: Any = None
        self.point_to(self.home)

    def point_to(self, flat: Tensor) -> None:
        for part in self.parts:
            part.tensor.data = part.view(flat)

    def fetch(self, side: Any) -> None:
        """Begins the copy to the device; `wait` has to come before its use."""
        with torch.cuda.stream(side) if side else nullcontext():
            self.copy = self.home.to(self.device, non_blocking=True, copy=True)
            self.ready = side.record_event() if side else None
        self.point_to(self.copy)

    def wait(self) -> None:
        if self.ready is not None and self.copy is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.ready)
            self.copy.record_stream(current)  # its memory is given to nobody before what is queued here has run

    def release(self) -> None:
        self.point_to(self.home)
        self.copy = self.ready = None


def _parts(module: nn.Module) -> Iterator[_Part]:
    start = 0
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.requires_grad:
            yield _Part(tensor, start, tensor.shape, tensor.dtype)
            start += -(-tensor.nbytes // _ALIGN) * _ALIGN


class Streamed:
    """Blocks whose weights come and go, in the order in which they run.

    Attributes:
        most: the most blocks that were on the device, or on their way, at a time.
        fetches: how often one was copied to the device.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks = [_Block(module, device) for module in modules]
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.most = self.fetches = 0
        self._backward: int | None = None  # the block whose backward pass is under way
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, index))

    @property
    def live(self) -> int:
        """How many blocks are on the device, or on their way."""
        return sum(block.copy is not None for block in self.blocks)

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == self._backward:  # a recomputation; the weights are there
            return
        self._backward = None
        self._keep(index, index + 1)
        self.blocks[index].wait()
        hidden = _first_tensor([*args, *kwargs.values()])
        if index == 0 and hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._keep())  # type: ignore[no-untyped-call]

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if index == self._backward:
            return
        hidden = _first_tensor(out if isinstance(out, tuple) else [out])
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(partial(self._begin_backward, index))  # type: ignore[no-untyped-call]
        # The backward pass begins with the last block, so it stays.
        stays = hidden is not None and hidden.requires_grad and index + 1 == len(self.blocks)
        self._keep(index if stays else index + 1)

    def _begin_backward(self, index: int, gradient: Tensor) -> None:
        """Called when the gradient of a block's output is known, so that the block after it is done."""
        self._backward = index
        self._keep(index, index - 1)
        self.blocks[index].wait()

    def _keep(self, *wanted: int) -> None:
        """Leaves the `wanted` blocks on the device, or on their way to it, and no others."""
        for index, block in enumerate(self.blocks):
            if block.copy is not None and index not in wanted:
                block.release()
        for index in wanted:
            if 0 <= index < len(self.blocks) and self.blocks[index].copy is None:
                self.blocks[index].fetch(self.side)
                self.fetches += 1
        self.most = max(self.most, self.live)


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    """A block's hidden states: the first tensor that it is given, or gives."""
    return next((value for value in values if isinstance(value, Tensor)), None)
