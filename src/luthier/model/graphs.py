"""Small steps on a GPU, recorded as CUDA graphs.

A micro-batch is some 2,000 launches, whatever its size, and each costs the host 10 to 40 µs: a small model's step waits
for them. A graph is one launch. It computes on tensors that stay where they are, of a fixed shape: so micro-batches are
padded to one of few shapes (`pack.padded`), which changes neither their loss nor their gradients.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import finalize

import torch
from torch import Tensor

from luthier.allocator import out_of_memory
from luthier.data.stream import Micro
from luthier.model.pack import Coming, Placed, Shape, choose, fits, numbers, padded, placed, shape

LIMIT = 24  # graphs at a time: each keeps some MiB of the driver's memory
UNFORESEEN = 4  # of them are left to shapes that nobody foresaw
LACKS = 3  # so often memory may run out while a step is recorded, until none is any more

Step = Callable[[], Tensor]


class Recorder(Protocol):
    """Runs steps, and makes replays of them."""

    def run(self, step: Step) -> Tensor: ...

    def record(self, step: Step) -> Step: ...

    def forget(self) -> None:
        """Told when all replays are gone, and after a recording failed."""


class CudaRecorder:
    """Graphs that share one pool of memory: they never run at the same time, and nobody reads what one left there after
    another one ran.

    Passes that are launched have no part in it: what they make the first time and keep, as attention's plans do, would
    lie where replays write. Their memory is given back before each recording.
    """

    _idle: ClassVar[list[torch.cuda.Stream]] = []
    """Streams of recorders that are gone, to be used again: for each that it ever ran in, cuBLAS keeps workspaces, 64
    MiB on Hopper. Never by two at a time: from 2.12 on torch frees a stream's workspaces with any of its graphs."""

    def __init__(self) -> None:
        try:
            self.stream = self._idle.pop()
        except IndexError:
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        finalize(self, self._idle.append, self.stream).atexit = False
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
        try:
            with (
                _uncollected(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                out = step()
        except BaseException:
            _end_recording(self.pool)
            raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def forget(self) -> None:
        """Gives the memory back. The next ones get another pool: torch refuses one whose graphs are gone while anything
        lies in it, or in which a recording failed."""
        torch.cuda.synchronize()  # torch would wait for the stream of recordings, and replays may run in any
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is freed meanwhile that lies in a cycle: CUDA lets no recording be destroyed, of a model that is gone,
    while another one is made."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _end_recording(pool: Any) -> None:
    """Ends what a recording leaves open whose end failed: torch's allocator would go on as if one were under way, and
    give no memory back; its generator would refuse to draw."""
    device = torch.cuda.current_device()
    # Raised where the end did not fail, or by a torch that has other names for these.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)  # type: ignore[attr-defined, unused-ignore]
        torch._C._cuda_releasePool(device, pool)  # type: ignore[attr-defined, unused-ignore]
        generator: Any = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


class _Recorded(NamedTuple):
    numbers: Tensor  # that the graph reads
    replay: Step
    kept: Any  # what else it reads, and nobody else may keep


class Graphs:
    """Adds gradients of micro-batches to the parameters' `.grad`, by graphs where their shape came before.

    Args:
        loss: of a micro-batch, with the autograd graph. It must not wait for the GPU, and what it reads must stay where
            it is.
        reads: what, of that, is kept by what this returns after a pass, and perhaps by nothing else.
        programs: what of the kernels that a pass launches depends on its number of tokens.
        device: where the model is.
        recorder: of that device; None once recording failed for good, and nothing is recorded any more.
        price: what it costs to record a shape, in tokens of a micro-batch; 0: shapes follow a rule, whatever comes.
    """

    def __init__(
        self,
        loss: Callable[[Placed], Tensor],
        device: torch.device,
        recorder: Recorder,
        *,
        reads: Callable[[], Any],
        programs: Callable[[int], object],
        price: float = 0.0,
    ) -> None:
        self.loss, self.device, self.reads, self.programs, self.price = loss, device, reads, programs, price
        self.recorder: Recorder | None = recorder
        self.recorded: dict[Shape, _Recorded] = {}
        self.shapes: list[Shape] = []  # chosen ahead of time, the smallest first
        self._came: set[Shape] = set()
        self._at_once = True  # whether expected shapes like one that was launched are recorded without
        self._lacks = 0
        self._longest = 1
        self._made_for: tuple[float, ...] = ()

    def expect(self, coming: Coming, row: float) -> None:
        """Chooses the shapes of what is to come. `row`: what a supervised row costs, in tokens."""
        self.shapes = choose(coming.sizes, self.price / coming.times, row, LIMIT - UNFORESEEN)
        self.forget()

    def accumulate(self, micro: Micro, key: int, scale: float, places: Iterable[Tensor]) -> Tensor:
        """Adds the gradient of the loss times `scale`, and returns the loss.

        Args:
            micro: on the host, trimmed.
            key: dropout's, of seed and step.
            places: a parameter and its `.grad`, by which a graph knows that it reads and adds at the right places.
        """
        chosen = self._shape(micro)
        micro = padded(micro, chosen)
        self._check((scale, *(tensor.data_ptr() for tensor in places)))
        told = numbers(micro, key)
        told = told.pin_memory() if self.device.type == "cuda" else told  # so that copying it waits for nothing
        lacks = self._lacks
        if chosen not in self.recorded and self._was_launched(chosen):
            self._record(chosen, micro, scale)
        recorded = self.recorded.get(chosen)
        if recorded is not None:
            recorded.numbers.copy_(told, non_blocking=True)
            return recorded.replay().clone()  # the next replay writes there
        if self.recorded:
            self._let_go()  # and recorded again at once: their memory beside a launched pass is more than is planned
        loss = self._now(told, micro, scale, chosen.longest)  # compiles and chooses what a recording cannot
        if self._comes_again(chosen) and lacks == self._lacks:  # else not now: memory has just lacked
            self._record(chosen, micro, scale)
        return loss

    def _shape(self, micro: Micro) -> Shape:
        found = next((shape for shape in self.shapes if fits(micro, shape)), None)
        if found is None:
            found = shape(micro, self._longest)
            self._longest = found.longest
        return found

    def _was_launched(self, chosen: Shape) -> bool:
        """Whether a pass of the shape was launched before or, of an expected shape, one that differs in tokens and rows
        alone, both in tiles, and not in its programs: then nothing is left to be compiled or loaded, which no recording
        bears."""
        if not self._at_once or chosen not in self.shapes:
            return chosen in self._came
        launched = (self.programs(shape.tokens) for shape in self._came if shape in self.shapes)
        return self.programs(chosen.tokens) in launched

    def _comes_again(self, chosen: Shape) -> bool:
        """Whether to record a shape: it was chosen ahead of time, or has come before."""
        again = chosen in self.shapes or chosen in self._came
        self._came.add(chosen)
        return again

    def _now(self, told: Tensor, micro: Micro, scale: float, longest: int) -> Tensor:
        def step() -> Tensor:
            return self._step(told.to(self.device, non_blocking=True), micro, scale, longest)

        return step() if self.recorder is None else self.recorder.run(step)

    def forget(self) -> None:
        """Lets all graphs go. Each shape is launched before it is recorded again, which finds what changed."""
        self._came.clear()
        self._let_go()

    def give_way(self) -> bool:
        """Lets all graphs go for want of memory beside them; returns whether there were any. Often enough, and nothing
        is recorded any more."""
        if not self.recorded:
            return False
        self.forget()
        self._lacked("there was no memory beside what is recorded")
        return True

    def _let_go(self) -> None:
        self.recorded.clear()
        if self.recorder is not None:
            self.recorder.forget()

    def _check(self, made_for: tuple[float, ...]) -> None:
        """A graph holds the scale as a number, and where parameters and gradients are."""
        if made_for != self._made_for:
            self.forget()
            self._made_for = made_for

    def _record(self, chosen: Shape, micro: Micro, scale: float) -> None:
        """What is recorded does not run."""
        if self.recorder is None or chosen in self.recorded or len(self.recorded) >= LIMIT:
            return
        try:
            static = numbers(micro, 0).to(self.device)
            replay = self.recorder.record(lambda: self._step(static, micro, scale, chosen.longest))
        except RuntimeError as error:
            self._go_on(error, launched=chosen in self._came)
        else:
            self.recorded[chosen] = _Recorded(static, replay, self.reads())

    def _step(self, numbers: Tensor, micro: Micro, scale: float, longest: int) -> Tensor:
        return backward(self.loss(placed(numbers, micro, longest)), scale)

    def _go_on(self, error: RuntimeError, *, launched: bool) -> None:
        """After a recording failed: what was not launched yet is launched first."""
        self.forget()
        found = lack(error)
        if found is not None:
            self._lacked(said(found))
        elif launched:
            self._tell(said(error), for_good=True)
        else:
            self._at_once = False

    def _lacked(self, reason: str) -> None:
        """Memory that lacked may be there later: steps are recorded again, but not for ever."""
        self._lacks += 1
        self._tell(reason, for_good=self._lacks >= LACKS)

    def _tell(self, reason: str, *, for_good: bool) -> None:
        self.recorder = None if for_good else self.recorder
        tell_launched(reason, "from here on" if for_good else "until they are recorded again")


def tell_launched(reason: str, until: str = "from here on") -> None:
    """Warns that steps are not recorded."""
    warnings.warn(f"steps are launched one by one {until}, which only takes longer: {reason}", stacklevel=3)


def said(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lack(error: BaseException | None) -> BaseException | None:
    """The lack of memory that an error is or came of: torch may say of a recording that it spoilt that it cannot be
    ended."""
    return error if error is None or out_of_memory(error) else lack(error.__context__)


def backward(loss: Tensor, scale: float) -> Tensor:
    """Adds the gradient of the loss times `scale` to each parameter's `.grad`. Returns the loss, without the graph."""
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
