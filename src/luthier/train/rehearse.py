"""The worst step before the first one: memory that is enough for it is enough for the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.data.store import TokenStore
from luthier.data.stream import Micro
from luthier.errors import MemoryPlanError
from luthier.train import optim
from luthier.train.memory import out_of_memory, peak_bytes, release

if TYPE_CHECKING:
    from luthier.train.loop import Trainer


def rehearse(trainer: Trainer) -> int:
    """Runs the largest micro-batch that can come, all of it supervised, and an update, and leaves weights, optimizer
    and generators as they were, to the bit, and a gradient of zero. Where memory runs out on any process, all try half
    the tokens, and train with these.

    Returns the peak bytes of all processes. Raises MemoryPlanError if one row alone does not fit.
    """
    store = trainer.stream.store
    longest = int(store.lengths.max())
    release()  # what loading and packing took and gave back
    while True:
        tokens = min(trainer.progress.micro_tokens, longest * trainer.recipe.train.samples_per_step)
        if not trainer.engine.highest(_runs_out(trainer, worst(store, max(tokens, longest)))):
            return int(trainer.engine.total(peak_bytes())[0])
        release()
        if tokens <= longest:
            raise MemoryPlanError(
                f"a row of {longest} tokens does not fit into memory by itself",
                where=str(store.origin(int(store.lengths.argmax()))),
                fix="set data.length lower, or run.recompute=true",
            )
        trainer.progress.micro_tokens = max(longest, tokens // 2)
        text = f"out of memory in a rehearsal; training with {trainer.progress.micro_tokens} tokens at a time"
        trainer.emit({"event": "note", "text": text})


def worst(store: TokenStore, tokens: int) -> Micro:
    """A micro-batch of so many tokens in rows as long as the longest, and a shorter one. Each row is the longest one,
    begun at another place, so that no two begin alike and share work."""
    row = torch.from_numpy(store.example(int(store.lengths.argmax()))[0].copy()).long()
    lengths = [min(len(row), tokens - start) for start in range(0, tokens, len(row))]
    ids = torch.cat([row.roll(-i)[:length] for i, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = (positions[1:] > 0).nonzero()[:, 0]  # all that have a next token in their row
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return Micro(ids, positions, tuple(bounds), rows, ids[rows + 1], torch.arange(len(lengths)), step=0)


def _runs_out(trainer: Trainer, micro: Micro) -> bool:
    try:
        with _unchanged(trainer.optimizer):
            trainer.model.loss(micro).backward()  # type: ignore[no-untyped-call]
            trainer.gradient.zero_()
            optim.update(trainer.optimizer, lr=0.0)  # without gradient, decay or step: it only takes its memory
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return True
    finally:
        trainer.gradient.zero_()
    return False


@contextmanager
def _unchanged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives the optimizer's state, learning rates and torch's generators back. What state there is, after a resume,
    waits in host memory; a parameter that had none has none again."""
    before = {p: {name: _kept(value) for name, value in state.items()} for p, state in optimizer.state.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    generators = torch.get_rng_state()
    try:
        yield
    finally:
        for parameter in list(optimizer.state):
            if parameter not in before:
                del optimizer.state[parameter]
        for parameter, state in before.items():
            _give_back(optimizer.state[parameter], state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        torch.set_rng_state(generators)


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _give_back(state: dict[str, Any], kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if isinstance(value, Tensor):
            state[name].copy_(value)
        else:
            state[name] = value
