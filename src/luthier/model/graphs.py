"""Small steps on a GPU, recorded as CUDA graphs.

A micro-batch is some 2,000 launches, whatever its size, and each costs the host 10 to 40 µs: a small model's step waits
for them. A graph is one launch. It computes on tensors that stay where they are, of a fixed shape: so micro-batches are
padded to one of few shapes (`pack.padded`), which changes neither their loss nor their gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from luthier.data.stream import Micro
from luthier.model.pack import Placed, Shape, numbers, padded, placed, shape

LIMIT = 24  # graphs of a run: each keeps some MiB of the driver's memory

Step = Callable[[], Tensor]


class Recorder(Protocol):
    """Runs steps, and makes replays of them."""

    def run(self, step: Step) -> Tensor: ...

    def record(self, step: Step) -> Step: ...


class CudaRecorder:
    """Graphs that share one pool of memory: they never run at the same time, and nobody reads what one left there after
    another one ran."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step: Step) -> Tensor:
        """Now, in the stream that recordings are made in, so that autograd finds nothing of another one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the GPU meanwhile. The outer stream is that of now: a recording
        # that fails would leave its own behind.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class _Recorded(NamedTuple):
    numbers: Tensor  # that the graph reads
    replay: Step


class Graphs:
    """Adds gradients of micro-batches to the parameters' `.grad`, by graphs where their shape came before.

    Args:
        loss: of a micro-batch, with the autograd graph. It must not wait for the GPU, and what it reads must stay where
            it is.
        device: where the model is.
        recorder: of that device.
    """

    def __init__(self, loss: Callable[[Placed], Tensor], device: torch.device, recorder: Recorder) -> None:
        self.loss, self.device, self.recorder = loss, device, recorder
        self.recorded: dict[Shape, _Recorded] = {}
        self.on, self._longest = True, 1
        self._made_for: tuple[float, ...] = ()

    def accumulate(self, micro: Micro, key: int, scale: float, places: Iterable[Tensor]) -> Tensor:
        """Adds the gradient of the loss times `scale`, and returns the loss.

        Args:
            micro: on the host, trimmed.
            key: dropout's, of seed and step.
            places: a parameter and its `.grad`, by which a graph knows that it reads and adds at the right places.
        """
        chosen = shape(micro, self._longest)
        micro, self._longest = padded(micro, chosen), chosen.longest
        self._check((scale, chosen.longest, *(tensor.data_ptr() for tensor in places)))
        told = numbers(micro, key)
        told = told.pin_memory() if self.device.type == "cuda" else told  # so that copying it waits for nothing
        recorded = self.recorded.get(chosen)
        if recorded is not None:
            recorded.numbers.copy_(told, non_blocking=True)
            return recorded.replay().clone()  # the next replay writes there
        loss = self._now(told, micro, scale)  # which also compiles and chooses what a recording cannot
        if self.on and len(self.recorded) < LIMIT:
            self._record(chosen, micro, scale)
        return loss

    def _now(self, told: Tensor, micro: Micro, scale: float) -> Tensor:
        try:
            return self.recorder.run(lambda: self._step(told.to(self.device, non_blocking=True), micro, scale))
        except torch.OutOfMemoryError as error:
            self._give_up(error)  # the memory of the graphs is there for the next try
            raise

    def forget(self) -> None:
        """Lets all graphs go, and their memory."""
        self.recorded.clear()

    def _check(self, made_for: tuple[float, ...]) -> None:
        """A graph holds the scale as a number, and where parameters and gradients are. Of a longer segment than any
        before it others are of no use any more."""
        if made_for != self._made_for:
            self.forget()
            self._made_for = made_for

    def _record(self, chosen: Shape, micro: Micro, scale: float) -> None:
        """What is recorded does not run."""
        try:
            static = numbers(micro, 0).to(self.device)
            replay = self.recorder.record(lambda: self._step(static, micro, scale))
        except RuntimeError as error:  # of which running out of memory is one
            self._give_up(error)
        else:
            self.recorded[chosen] = _Recorded(static, replay)

    def _step(self, numbers: Tensor, micro: Micro, scale: float) -> Tensor:
        return backward(self.loss(placed(numbers, micro, self._longest)), scale)

    def _give_up(self, error: RuntimeError) -> None:
        self.on = False
        self.forget()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"steps are launched one by one from here on, which only takes longer: {reason}", stacklevel=2)


def backward(loss: Tensor, scale: float) -> Tensor:
    """Adds the gradient of the loss times `scale` to each parameter's `.grad`. Returns the loss, without the graph."""
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
