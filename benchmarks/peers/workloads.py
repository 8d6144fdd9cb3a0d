"""What every peer trains on: the samples, and the steps they make. The same numbers for all, from fixed seeds.

Lengths are log-normal (sigma 0.7), cut to a range; token ids follow Zipf's law, so that there is something to learn and
a falling loss shows that gradients arrive. The last part of a sample is supervised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

SEED, ORDER_SEED = 1234, 3407
SIGMA = 0.7
SPECIAL = 300  # ids at the end of a vocabulary that no sample has: a tokenizer's special tokens are among them


class Sample(NamedTuple):
    ids: list[int]
    learned: int  # the last so many tokens are supervised

    @property
    def targets(self) -> int:
        """Terms of its loss: the first token has nothing before it to be told from."""
        return min(self.learned, len(self.ids) - 1)


Row = tuple[Sample, ...]  # what a peer's micro-batch counts: one sample, or several packed into one row
Step = tuple[Row, ...]


@dataclass(frozen=True)
class Mix:
    """Samples of a kind. `supervised`: the least and the largest share of a sample that is."""

    count: int
    mean: float  # tokens, before they are cut to what follows
    shortest: int
    longest: int
    supervised: tuple[float, float] = (1.0, 1.0)


CHAT = Mix(760, 300, 32, 1024, (0.15, 0.25))
CHATS = replace(CHAT, count=1520)  # twice as many, for steps that are soon over
FULL = Mix(64, 2048, 2048, 2048)
NOTEBOOK = Mix(240, 400, 32, 720)


@dataclass(frozen=True)
class Workload:
    """A model's shape and the steps it is trained by: `micro` rows at a time, `accumulate` times.

    Attributes:
        packed: a row is filled with samples, up to so many tokens; 0 makes each sample a row.
        warm: steps before those that are timed.
        known: those that are timed are run before that, too. Steps of few rows are of many shapes, and what a library
            compiles or records for one it does once a run.
    """

    shape: str
    mix: Mix
    micro: int
    accumulate: int = 1
    packed: int = 0
    nf4: bool = True
    warm: int = 3
    timed: int = 10
    profiled: int = 2
    known: bool = False

    @property
    def longest(self) -> int:
        return self.packed or self.mix.longest

    @property
    def first(self) -> int:
        """The number of the first step that is timed."""
        return self.warm + self.timed * self.known

    @property
    def total(self) -> int:
        return self.first + self.timed + self.profiled


WORKLOADS = {
    "W1": Workload("llama-3.1-8b", CHAT, 2, packed=4096, warm=6, timed=16),
    "W1-8": Workload("llama-3.1-8b", CHAT, 8, warm=12, timed=24),
    "start": Workload("llama-3.1-8b", CHAT, 8, warm=1, timed=1),  # W1-8's first step, and how long until it is done
    "W2": Workload("llama-3.1-8b", FULL, 4, timed=11),
    "W3": Workload("llama-3.1-8b", NOTEBOOK, 2, 4, timed=12, known=True),
    "S1": Workload("smollm2-135m", CHATS, 2, packed=4096, nf4=False, warm=16, timed=36, known=True),
    "S1-8": Workload("smollm2-135m", CHAT, 8, nf4=False, timed=40, known=True),
    "W3-phi-3": Workload("phi-3-mini", NOTEBOOK, 2, 4, timed=9, known=True),
    # transformers leaves Falcon's linear layers, which are of a class of their own, unquantised.
    "W3-falcon-7b": Workload("falcon-7b", NOTEBOOK, 2, 4, nf4=False, timed=9, known=True),
    "W3-glm-4": Workload("glm-4-9b", NOTEBOOK, 2, 4, timed=9, known=True),
}
MEMORY = {"W1": ("free", "8GiB", "24GiB")}  # caps a workload is run under; others: free memory alone


def dry(workload: Workload) -> Workload:
    """The same in a few short steps, for a CPU."""
    mix, shrink = workload.mix, 32
    small = replace(mix, mean=mix.mean / shrink, shortest=max(4, mix.shortest // shrink), longest=mix.longest // shrink)
    return replace(workload, mix=small, packed=workload.packed // shrink, warm=1, timed=2, profiled=1)


def steps(workload: Workload, vocabulary: int) -> list[Step]:
    """As many steps as are run, warm-up first. Raises ValueError where the samples do not suffice."""
    rows, size = _rows(workload, samples(workload.mix, vocabulary)), workload.micro * workload.accumulate
    wanted = workload.warm + workload.timed + workload.profiled
    if len(rows) < wanted * size:
        raise ValueError(f"{len(rows)} rows make {len(rows) // size} steps, and {wanted} are wanted")
    found = [tuple(rows[i * size : (i + 1) * size]) for i in range(wanted)]
    return found[: workload.first] + found[workload.warm :]


def _rows(workload: Workload, found: list[Sample]) -> list[Row]:
    if not workload.packed:
        return [(sample,) for sample in found]
    rows = best_fit([len(sample.ids) for sample in found], workload.packed)
    # Packing sorts by length; at random, a step has rows of all kinds.
    order = np.random.default_rng(ORDER_SEED).permutation(len(rows))
    return [tuple(found[i] for i in rows[place]) for place in order]


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`: best-fit decreasing, as TRL packs."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(room, row) for row, room in enumerate(free) if room >= lengths[index]]
        row = min(fitting)[1] if fitting else len(rows)
        if not fitting:
            rows.append([])
            free.append(capacity)
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def samples(mix: Mix, vocabulary: int) -> list[Sample]:
    """All samples of a mix, ids below `vocabulary` - SPECIAL."""
    rng, top = np.random.default_rng(SEED + 1), vocabulary - SPECIAL
    order = rng.permutation(top)
    shares = 1.0 / np.arange(1, top + 1)
    cumulated = np.cumsum(shares / shares.sum())
    made = []
    for length in _lengths(mix):
        ranks = np.minimum(np.searchsorted(cumulated, rng.random(length)), top - 1)
        share = rng.uniform(*mix.supervised)
        made.append(Sample(order[ranks].tolist(), max(1, round(length * share))))
    return made


def _lengths(mix: Mix) -> Any:
    drawn = np.random.default_rng(SEED).normal(np.log(mix.mean) - SIGMA**2 / 2, SIGMA, mix.count)
    return np.clip(np.rint(np.exp(drawn)), mix.shortest, mix.longest).astype(np.int64)


class Counts(NamedTuple):
    samples: int
    tokens: int
    targets: int
    squares: int  # the sum of the samples' squared lengths: what attention grows with


def counts(chosen: list[Step]) -> Counts:
    found = [sample for step in chosen for row in step for sample in row]
    lengths = [len(sample.ids) for sample in found]
    targets = sum(sample.targets for sample in found)
    return Counts(len(found), sum(lengths), targets, sum(n * n for n in lengths))
