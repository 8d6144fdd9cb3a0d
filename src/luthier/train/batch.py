"""The rows of a step: counted, shared among the processes and packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luthier.data.packing import micro_batches
from luthier.data.store import TokenStore
from luthier.data.stream import Micro, Sample, Stream, collate
from luthier.errors import MemoryPlanError, NotFiniteError
from luthier.model.pack import Coming, Shape
from luthier.recipe import Run
from luthier.train.engines import Engine
from luthier.train.step import Model

_LOOKED = 2048  # samples of a run, by which the sizes of its micro-batches are told


@dataclass(frozen=True)
class Batch:
    """What a step learns from."""

    samples: list[Sample]  # of all processes
    tokens: int  # in these
    targets: int  # supervised tokens in these, at least 1
    micros: list[Micro]  # this process's share, ready for the model
    largest: int  # tokens of the largest of them, or 0


def batch(stream: Stream, engine: Engine, model: Model, number: int, micro_tokens: int) -> Batch:
    """The rows of step `number`, counted from 0. They follow from these arguments alone, so they can be packed ahead of
    time."""
    return gathered(stream.store, engine, model, stream.step(number), number, micro_tokens)


def gathered(
    store: TokenStore, engine: Engine, model: Model, samples: list[Sample], number: int, micro_tokens: int
) -> Batch:
    """These rows of a store, packed and ready."""
    tokens = sum(int(store.lengths[sample.row]) for sample in samples)
    targets = max(1, sum(store.targets(sample.row) for sample in samples))
    micros = packed(store, engine, samples, number, micro_tokens)
    largest = max((len(micro.ids) for micro in micros), default=0)
    return Batch(samples, tokens, targets, [model.ready(micro) for micro in micros], largest)


def halved(store: TokenStore, engine: Engine, rows: Batch, fix: str) -> int:
    """Half of the largest micro-batch that any process tried, as a budget of tokens. Raises MemoryPlanError where that
    is one row; `fix` is what to do then."""
    largest = int(engine.highest(rows.largest))
    longest = max(rows.samples, key=lambda sample: store.lengths[sample.row])
    if largest <= store.lengths[longest.row]:
        raise MemoryPlanError(
            f"a row of {largest} tokens does not fit into memory by itself",
            where=origins(store, [longest]),
            fix=fix,
        )
    return largest // 2


def shorter(run: Run) -> str:
    """What to do about a row that does not fit while it is learned."""
    return "set data.length lower" if run.recompute is True else "set data.length lower, or run.recompute=true"


def not_finite(
    model: Model, store: TokenStore, samples: Sequence[Sample], number: int, loss: float, norm: float
) -> NotFiniteError:
    """The error of step `number`, counted from 0, that learned from these samples."""
    return NotFiniteError(
        f"step {number + 1} has loss {loss:.4g} and gradient norm {norm:.4g}; nothing was updated",
        where=guilty(model, store, samples, number),
        fix="look at these rows, or lower train.lr; the last checkpoint is sound",
    )


@torch.no_grad()
def judged(model: Model, micros: Sequence[Micro]) -> float:
    """The summed loss of micro-batches that nothing is learned from."""
    return sum(float(model.loss(micro)) for micro in micros)


def guilty(model: Model, store: TokenStore, samples: Sequence[Sample], step: int) -> str:
    """Where the rows are from whose loss alone is not finite; where none is (it is their gradient), all of them."""
    with torch.no_grad():
        losses = [float(model.loss(collate(store, [sample], step))) for sample in samples]
    found = [sample for sample, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)]
    return origins(store, found or samples)


def origins(store: TokenStore, samples: Sequence[Sample]) -> str:
    """The places in the data's files, the first twenty of them."""
    named = [str(store.origin(sample.row)) for sample in samples[:20]]
    return ", ".join([*named, f"and {len(samples) - 20:,} more"] if len(samples) > 20 else named)


def packed(store: TokenStore, engine: Engine, samples: Sequence[Sample], step: int, micro_tokens: int) -> list[Micro]:
    """This process's share of the samples, as micro-batches of at most `micro_tokens` tokens; a longer row is one by
    itself."""
    return [collate(store, pack, step) for pack in _packs(store, engine, samples, micro_tokens)]


def coming(stream: Stream, engine: Engine, micro_tokens: int) -> Coming:
    """What the run's micro-batches hold in this process, trimmed, by a look at its first steps. It depends on the run's
    data and `micro_tokens` alone, so a resumed run finds the same."""
    store, looked = stream.store, min(stream.steps, max(1, _LOOKED // stream.samples_per_step))
    packs = (pack for number in range(looked) for pack in _packs(store, engine, stream.step(number), micro_tokens))
    sizes = [_size(store, pack) for pack in packs]
    return Coming([size for size in sizes if size.rows], stream.steps / looked)


def _size(store: TokenStore, samples: Sequence[Sample]) -> Shape:
    learned = [np.flatnonzero(store.example(sample.row)[1][1:]) for sample in samples]
    ends = [int(places[-1]) + 1 for places in learned if len(places)]  # what follows is trimmed
    return Shape(sum(ends), sum(len(places) for places in learned), len(ends), max(ends, default=0))


def _packs(store: TokenStore, engine: Engine, samples: Sequence[Sample], micro_tokens: int) -> list[list[Sample]]:
    lengths = [int(store.lengths[sample.row]) for sample in samples]
    mine = engine.share(lengths)
    return [[samples[mine[i]] for i in pack] for pack in micro_batches([lengths[i] for i in mine], micro_tokens)]
