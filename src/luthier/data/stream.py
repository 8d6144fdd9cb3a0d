"""Which rows a step learns from, and those rows as tensors.

The order is a pure function of (seed, epoch, index), so a run's place in the data is one integer and resuming needs
no iterator state. Epochs follow each other without a gap: a step may hold the end of one epoch and the start of the
next, so every step but the run's last has the same number of rows and no row weighs more for coming last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.store import TokenStore
from luthier.errors import DataError

Ints = NDArray[np.int64]

_SUBSET = 2**64 - 1  # stands where an order has its epoch: no run has so many


@dataclass(frozen=True, slots=True)
class Sample:
    """One row at one place of the endless sequence of epochs. `index` is that place: unique, and so the sample's
    identity for dropout, however the step is cut."""

    index: int
    row: int
    epoch: int


@dataclass(frozen=True)
class Micro:
    """One packed forward and backward pass: T tokens of n rows, S of whose next tokens are learned."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each segment
    bounds: tuple[int, ...]  # n + 1 segment boundaries, from 0 to T
    rows: Tensor  # int64 [S]: tokens whose next token, of the same segment, is supervised
    targets: Tensor  # int64 [S]: that next token
    samples: Tensor  # int64 [n]: the identity of each segment's sample
    step: int
    trimmed: bool = field(default=False, kw_only=True)  # whether tokens that no supervised one sees are left out


class Stream:
    """The rows of every step.

    Args:
        store: the rows.
        weights: float [len(store)], how often a row is seen in an epoch, or None for once each.
        seed: of the order.
        samples_per_step: rows of a step, over all processes.
        epochs: passes over the data; a run ends after `epochs` of them, in a shorter last step if need be.
        rows: learn from so many rows alone, the first of an order that depends on `seed` (see `subset`).
        max_steps: number of (whole) steps instead, whatever `epochs` says.

    Raises DataError if an epoch holds no row, or `store` fewer than `rows`.
    """

    def __init__(
        self,
        store: TokenStore,
        weights: NDArray[np.float64] | None,
        seed: int,
        samples_per_step: int,
        *,
        epochs: float = 1.0,
        max_steps: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.store, self.seed, self.samples_per_step = store, seed, samples_per_step
        self._weights = np.ones(len(store)) if weights is None else np.asarray(weights, dtype=np.float64)
        if rows is not None:
            self._weights = self._weights * subset(len(store), seed, rows)
        self.epoch_samples = sum(math.floor(w) * len(rows) + part for w, rows, part in self._groups())
        if not self.epoch_samples:
            raise DataError(
                "no rows are left to train on", fix="see the data report, or raise the weights in data.train"
            )
        self.samples = max_steps * samples_per_step if max_steps else max(1, round(epochs * self.epoch_samples))
        self._order = lru_cache(maxsize=2)(self._epoch)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.samples / self.samples_per_step)

    @property
    def steps_per_epoch(self) -> float:
        return self.epoch_samples / self.samples_per_step

    def step(self, number: int) -> list[Sample]:
        """The samples of step `number`, counted from 0."""
        start = number * self.samples_per_step
        return [self._sample(i) for i in range(start, min(start + self.samples_per_step, self.samples))]

    def _sample(self, index: int) -> Sample:
        epoch, place = divmod(index, self.epoch_samples)
        return Sample(index, int(self._order(epoch)[place]), epoch)

    def _epoch(self, epoch: int) -> Ints:
        """Row numbers of `epoch` in the order they are seen."""
        rows = np.concatenate([self._repeated(w, rows, part, epoch) for w, rows, part in self._groups()])
        return rows[_shuffle(self.seed, epoch + 1, len(rows))]

    def _groups(self) -> list[tuple[float, Ints, int]]:
        """Rows of one weight w: (w, rows, how many of them are seen once more than floor(w) times an epoch)."""
        return [
            (float(w), rows := np.flatnonzero(self._weights == w), round((w - math.floor(w)) * len(rows)))
            for w in np.unique(self._weights)
        ]

    def _repeated(self, weight: float, rows: Ints, part: int, epoch: int) -> Ints:
        """The fractional part walks through a seeded order of the rows, so that epochs cover all rows evenly."""
        walk = (epoch * part + np.arange(part)) % len(rows)
        return np.concatenate([np.tile(rows, math.floor(weight)), rows[_shuffle(self.seed, 0, len(rows))[walk]]])


def subset(size: int, seed: int, rows: int) -> NDArray[np.bool_]:
    """bool [size]: the first `rows` rows of the seed's order, so that a smaller number's are among a larger one's.

    Raises DataError where there are fewer.
    """
    if rows > size:
        fix = "ask for fewer (data.rows), or give more in data.train"
        raise DataError(f"{rows:,} rows are asked for and {size:,} are left to learn from", fix=fix)
    chosen = np.zeros(size, np.bool_)
    chosen[_shuffle(seed, _SUBSET, size)[:rows]] = True
    return chosen


def collate(store: TokenStore, chosen: Sequence[Sample], step: int) -> Micro:
    """Packs the rows of `chosen` one after another, without padding."""
    examples = [store.example(sample.row) for sample in chosen]
    bounds = np.cumsum([0, *(len(ids) for ids, _ in examples)])
    ids = np.concatenate([ids for ids, _ in examples]).astype(np.int64)
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in examples])
    learned = np.flatnonzero(np.concatenate([supervised for _, supervised in examples]))
    learned = learned[positions[learned] > 0]  # a segment's first token has nothing before it to be told from
    return Micro(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        bounds=tuple(bounds.tolist()),
        rows=torch.from_numpy(learned - 1),
        targets=torch.from_numpy(ids[learned]),
        samples=torch.tensor([sample.index for sample in chosen]),
        step=step,
    )


def _shuffle(seed: int, epoch: int, size: int) -> Ints:
    """A permutation of range(size) from a hash of (seed, epoch, index): the same under every version of numpy."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64)) + np.uint64(epoch))
        return np.argsort(_mix(key + np.arange(size, dtype=np.uint64)), kind="stable")


def _mix(x: Any) -> NDArray[np.uint64]:
    """splitmix64's output function (Steele, Lea, Flood 2014), a bijection that mixes all bits."""
    x = np.asarray(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
