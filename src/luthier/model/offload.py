"""Keeps weights in host memory that a GPU needs seldom: of some decoder blocks, which come as they are needed, and the
input embedding, of which a step reads a few rows.

While one block computes, the next one's weights are copied on a stream of their own: in the forward pass those of the
block after it, in the backward pass of the block before it. They go to one of two places in turn, which stay where they
are: a block's tensors are views of its place, whatever lies there just now. Weights are read only, so nothing is copied
back; what is trained, such as adapters, stays on the device, and so does all of a packed layer's block that is small.

Nothing may hold on to such a weight when its block is done. Our own decoder does not; a transformers module has to run
under activation checkpointing (`run.recompute`), or autograd would find another block's weights there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.kernels.fused import gather
from luthier.model.lane import Lane
from luthier.model.quantize import PackedLinear

_ALIGN = 512  # bytes: where a tensor may begin
PLACES = 2  # on the device, for blocks that come and go


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


def streamed_bytes(block: nn.Module) -> int:
    """What of a decoder block would stream."""
    return max((part.end for part in _parts(block)), default=0)


def can_wait(module: Any) -> bool:
    """Whether the input embedding may be in host memory: a step reads rows of it and no more, as it is not the head's
    weight, too; and they are what it gives, not scaled or normed as Gemma's are."""
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()
    return type(embed) is nn.Embedding and head is not None and head.weight is not embed.weight


def embedding_bytes(module: Any) -> int:
    """Of the input embedding; 0 where it cannot be in host memory."""
    weight: Tensor = module.get_input_embeddings().weight
    return weight.nbytes if can_wait(module) else 0


def embedding_to_host(module: Any, device: torch.device) -> None:
    """Leaves the input embedding in host memory, and makes it give the rows of its tokens on `device`. Where it can
    wait there."""
    assert can_wait(module), "the input embedding is wanted whole, or is more than rows"
    embed = module.get_input_embeddings()
    device = torch.empty(0, device=device).device  # with its number, as tensors say it
    weight = embed.weight.data.cpu()
    embed.weight.data = weight.pin_memory() if device.type == "cuda" else weight
    embed.device, embed.forward = device, partial(_rows, embed.weight)


def device_of(embed: Any) -> torch.device:
    """Where an embedding's rows are wanted."""
    found: torch.device = getattr(embed, "device", embed.weight.device)
    return found


def _rows(weight: Tensor, ids: Tensor) -> Tensor:
    # A GPU reads what is pinned by itself, so nothing has to wait for the host.
    return gather(weight, ids) if ids.is_cuda else F.embedding(ids, weight)


@dataclass(frozen=True)
class _Part:
    """A tensor of a block, and where in the block's bytes it lies."""

    tensor: Tensor
    start: int

    @property
    def end(self) -> int:
        return self.start + self.tensor.nbytes

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.end].view(self.tensor.dtype).view(self.tensor.shape)


class _Block:
    """What streams of one block, and its home: one stretch of host memory."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.parts = list(_parts(module))
        streams = {id(part.tensor) for part in self.parts}
        for tensor in chain(module.parameters(), module.buffers()):
            if id(tensor) not in streams:
                tensor.data = tensor.data.to(device)
        for layer in module.modules():
            layer.streamed = True  # type: ignore[assignment]
        size = max((part.end for part in self.parts), default=0)
        self.home = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for part in self.parts:
            part.view(self.home).copy_(part.tensor.data)

    def point_to(self, place: Tensor) -> None:
        for part in self.parts:
            part.tensor.data = part.view(place)


def _parts(module: nn.Module) -> Iterator[_Part]:
    """Of packed layers all that is packed, and its scales; of a block without any all that is frozen."""
    packed = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
    tensors: Iterable[Tensor] = chain(module.parameters(), module.buffers())
    if packed:
        tensors = (x for layer in packed for x in chain(layer.parameters(), layer.buffers()) if x is not layer.bias)
    start = 0
    for tensor in tensors:
        if not tensor.requires_grad:
            yield _Part(tensor, start)
            start += -(-tensor.nbytes // _ALIGN) * _ALIGN


class Streamed:
    """Blocks whose weights come and go. They run in their order, and their backward passes in the other.

    Attributes:
        fetches: how often one was copied to the device; only tests ask.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks = [_Block(module, device) for module in modules]
        self.lane = Lane(device)
        size = max(len(block.home) for block in self.blocks)
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self.holds: list[int | None] = [None] * PLACES  # the block whose weights are there, or on their way
        self.marks: list[Any] = [None] * PLACES
        self.fetches = 0
        self._backward: int | None = None  # the block whose backward pass is under way, by the module
        for index, (module, block) in enumerate(zip(modules, self.blocks, strict=True)):
            block.point_to(self.places[index % PLACES])
            module.register_forward_pre_hook(partial(self._enter, index))
            module.register_forward_hook(partial(self._leave, index))

    def enter(self, index: int, toward: int = 1) -> None:
        """To be called before block `index` computes. Begins to fetch the one that comes next: `toward` 1 forward, -1
        backward."""
        if index >= len(self.blocks):
            return
        self._fetch(index)
        self.lane.wait(self.marks[index % PLACES])
        if 0 <= index + toward < len(self.blocks):
            self._fetch(index + toward)

    def _fetch(self, index: int) -> None:
        place, home = index % PLACES, self.blocks[index].home
        if self.holds[place] == index:
            return
        with self.lane.copying():  # behind all that reads what lay there
            self.places[place][: len(home)].copy_(home, non_blocking=True)
        self.holds[place], self.marks[place] = index, self.lane.mark()
        self.fetches += 1

    # A transformers module tells by hooks what our decoder tells itself.

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if index != self._backward:  # else a recomputation; the weights are there
            self._backward = None
            self.enter(index)

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        hidden = _first_tensor(out if isinstance(out, tuple) else [out])
        if index != self._backward and hidden is not None and hidden.requires_grad:
            hidden.register_hook(partial(self._begin_backward, index))  # type: ignore[no-untyped-call]

    def _begin_backward(self, index: int, gradient: Tensor) -> None:
        """Called when the gradient of a block's output is known, so that the block after it is done."""
        self._backward = index
        self.enter(index, -1)


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    """A block's hidden states: the first tensor that it is given, or gives."""
    return next((value for value in values if isinstance(value, Tensor)), None)
