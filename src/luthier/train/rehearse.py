"""The worst step before the first one: memory that is enough for it is enough for the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.allocator import out_of_memory
from luthier.data.store import TokenStore
from luthier.data.stream import Micro
from luthier.errors import MemoryPlanError
from luthier.model.memory import release
from luthier.train.memory import forget_peak, left_open, peak_bytes

if TYPE_CHECKING:
    from luthier.train.loop import Trainer


def rehearse(trainer: Trainer) -> int:
    """Runs the largest micro-batch that can come, all of it supervised. An update would take no more: the optimizer has
    its moments from the start. Leaves torch's generators as they were, and a gradient of zero. Where memory runs out on
    any process, blocks of all keep less, as far as the recipe leaves that open; where they keep no more, all processes
    try half the tokens. So they train, too.

    Returns the peak bytes of all processes, without what loading took on a GPU. Raises MemoryPlanError if one row alone
    does not fit.
    """
    store = trainer.stream.store
    longest = int(store.lengths.max())
    release()  # what loading and packing took and gave back
    forget_peak()
    while True:
        tokens = min(trainer.progress.micro_tokens, longest * trainer.recipe.train.samples_per_step)
        if not trainer.engine.highest(_runs_out(trainer, worst(store, max(tokens, longest)))):
            return int(trainer.engine.total(peak_bytes())[0])
        release()
        if trainer.model.keep_less(left_open(trainer.recipe.run)):
            trainer.emit({"event": "note", "text": "out of memory in a rehearsal; less of the blocks is kept"})
            continue
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
    generators = torch.get_rng_state()
    try:
        trainer.model.accumulate(micro, 1.0)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return True
    finally:
        torch.set_rng_state(generators)
        trainer.gradient.zero_()
    return False
