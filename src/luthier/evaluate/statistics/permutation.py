"""Could the sides be swapped, question by question, without anyone noticing? Sign-flip tests for paired answers.

If both sides are as good, which of a question's two answers is whose is a coin's toss. The share of tosses that give a
difference as large as the one found is p (Fisher 1935; Noreen 1989, for language Yeh 2000).
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

from luthier.evaluate.metrics import Metric
from luthier.evaluate.statistics.interval import BLOCK, RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

EXACT = 14
"""Up to so many questions whose scores differ, all 2^14 swaps are made; beyond, RESAMPLES random ones."""


def sign_flip(metric: Metric, sides: Floats, seed: int) -> float:
    """The two-sided p of tuned - base, of the statistics [2, n, k] of both sides.

    Exact where at most EXACT questions differ; else of seeded random swaps, the found ones counted among them so that
    p is never 0 (Phipson & Smyth 2010).
    """
    import numpy as np

    differ = (sides[0] != sides[1]).any(axis=1)
    there, moves = sides.sum(axis=1), (sides[1] - sides[0])[differ]
    found = abs(float(np.diff(metric.finish(there))[0]))
    exact = len(moves) <= EXACT
    swaps = _all(len(moves)) if exact else _random(len(moves), seed)
    beyond = 0
    for swap in swaps:
        moved = swap.astype(np.float64) @ moves
        differences = metric.finish(there[1] - moved) - metric.finish(there[0] + moved)
        beyond += int((np.abs(differences) >= found * (1.0 - 1e-9)).sum())  # sums in another order differ in last bits
    return beyond / 2 ** len(moves) if exact else (beyond + 1) / (RESAMPLES + 1)


def _all(count: int) -> Iterator[NDArray[np.uint8]]:
    import numpy as np

    yield (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.uint8)


def _random(count: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    import numpy as np

    draw, block = np.random.default_rng(seed), max(1, BLOCK // count)
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        bits = draw.integers(0, 256, (rows, (count + 7) // 8), dtype=np.uint8)
        yield np.unpackbits(bits, axis=1, count=count)


def mcnemar(gains: int, losses: int) -> float:
    """The two-sided mid-p of the same test where each question is right or wrong: the swaps are tosses of a coin, one
    for each question that only one side has right. The exact p is too strict for few of them; counting half of the
    probability of what was found keeps the level (Fagerland, Lydersen & Laake 2013)."""
    tosses, fewer = gains + losses, min(gains, losses)
    below = sum(comb(tosses, k) for k in range(fewer))
    return (2 * below + comb(tosses, fewer)) / 2**tosses if gains != losses else 1.0
