"""The rows of a step: counted, shared among the processes and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.data.packing import micro_batches
from luthier.data.store import TokenStore
from luthier.data.stream import Micro, Sample, Stream, collate
from luthier.train.engines import Engine
from luthier.train.step import Model


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
    store, samples = stream.store, stream.step(number)
    tokens = sum(int(store.lengths[sample.row]) for sample in samples)
    targets = max(1, sum(store.targets(sample.row) for sample in samples))
    micros = packed(store, engine, samples, number, micro_tokens)
    largest = max((len(micro.ids) for micro in micros), default=0)
    return Batch(samples, tokens, targets, [model.ready(micro) for micro in micros], largest)


def packed(store: TokenStore, engine: Engine, samples: Sequence[Sample], step: int, micro_tokens: int) -> list[Micro]:
    """This process's share of the samples, as micro-batches of at most `micro_tokens` tokens; a longer row is one by
    itself."""
    lengths = [int(store.lengths[sample.row]) for sample in samples]
    mine = engine.share(lengths)
    packs = micro_batches([lengths[i] for i in mine], micro_tokens)
    return [collate(store, [samples[mine[i]] for i in pack], step) for pack in packs]
