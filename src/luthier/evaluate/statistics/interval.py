"""95 % intervals of tuned - base over the same questions: a bootstrap for any metric, Tango's for right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from luthier.evaluate.metrics import Metric
from luthier.evaluate.statistics.student import quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVEL = 0.95
CHANCE = 0.05
"""A verdict needs a p below it."""
RESAMPLES = 10_000
BLOCK = 100_000
"""Numbers of one block of draws: what a core's cache holds, five times as fast as what it does not."""
KEPT = 60_000_000
"""Bytes of drawn counts that are kept for the next metric of the same comparison."""
HALVINGS = 60
"""Of an interval of length 2: what is left is less than a float64 tells apart."""


class Bootstrap(NamedTuple):
    """The percentile interval [`low`, `high`], the standard error `spread`, and the degrees of freedom behind it."""

    low: float
    high: float
    spread: float
    freedom: float


def bootstrap(metric: Metric, sides: Floats, seed: int) -> Bootstrap:
    """Of the statistics [2, n, k] of both sides, n at least 2. The same seed draws the same questions for every metric,
    so intervals of one comparison belong together.

    The percentiles are moved outwards (Hesterberg 2015, section 5.3): the plain ones are too narrow by sqrt((n-1)/n)
    and take normal for Student's t. How far depends on the degrees of freedom that the questions give the spread,
    which are fewer than n - 1 where few questions carry most of it.
    """
    import numpy as np

    n = sides.shape[1]
    base, tuned = left_out(metric, sides)
    differences, freedom = resampled(metric, sides, seed), degrees(tuned - base)
    widened = sqrt(n / (n - 1))
    tail = NormalDist().cdf(-quantile((1.0 + LEVEL) / 2.0, freedom) * widened)
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return Bootstrap(float(low), float(high), float(differences.std()) * widened, freedom)


def resampled(metric: Metric, sides: Floats, seed: int) -> Floats:
    """The difference tuned - base on each of RESAMPLES draws of n questions with replacement: statistics [2, n, k] ->
    [RESAMPLES]."""
    import numpy as np

    _, n, width = sides.shape
    both = np.concatenate(sides, axis=1)
    sums = np.concatenate([counts.astype(np.float64) @ both for counts in _draws(n, seed)])
    difference: Floats = metric.finish(sums[:, width:]) - metric.finish(sums[:, :width])
    return difference


def _draws(n: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """How often each of RESAMPLES draws has taken each question, in blocks [draws, n]."""
    block = max(1, BLOCK // n)
    if n * RESAMPLES > KEPT:
        yield from _counts(n, seed, block)
    else:
        yield from _kept(n, seed, block)


@lru_cache(maxsize=1)
def _kept(n: int, seed: int, block: int) -> list[NDArray[np.uint8]]:
    return list(_counts(n, seed, block))


def _counts(n: int, seed: int, block: int) -> Iterator[NDArray[np.uint8]]:
    import numpy as np

    draw = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, block):
        rows = draw.integers(0, n, (min(block, RESAMPLES - start), n))
        # A question is taken 255 times less often than once in 10^500 draws.
        yield np.stack([np.bincount(row, minlength=n).astype(np.uint8) for row in rows])


def left_out(metric: Metric, statistics: Floats) -> Floats:
    """How much each question moves a side's figure, times n: the jackknife's influences (Efron & Tibshirani 1993,
    chapter 11). Statistics [..., n, k] -> [..., n], each row with mean zero."""
    without = metric.finish(statistics.sum(axis=-2, keepdims=True) - statistics)
    influence: Floats = (statistics.shape[-2] - 1) * (without.mean(axis=-1, keepdims=True) - without)
    return influence


def degrees(influence: Floats) -> float:
    """The degrees of freedom of the variance that `influence` [n] estimates: 2n / (kurtosis - 1), at most n - 1, at
    least 1.

    A variance s² of n values with kurtosis κ itself varies by (κ - 1) s⁴ / n; a χ² with f degrees varies by 2 s⁴ / f
    (Satterthwaite 1946, O'Neill 2014). With normal values that is n; where five long answers carry a perplexity, or
    nineteen of twenty questions are tied, it is a few.
    """
    n = len(influence)
    variance = float((influence**2).mean())
    if not variance > 0.0:
        return n - 1.0
    excess = float((influence**4).mean()) / variance**2 - 1.0
    return max(1.0, n - 1.0 if excess * (n - 1) <= 2 * n else 2 * n / excess)


def tango(gains: int, losses: int, n: int) -> tuple[float, float]:
    """The score interval of a difference of two paired shares, (gains - losses) / n, each bound within [-1, 1] (Tango
    1998): the differences that a score test does not reject. It holds its level for rare successes, where few
    questions differ and a bootstrap of them is too sure; with no question that differs it still has a width."""
    z, estimate = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0), (gains - losses) / n
    low = _root(lambda delta: _score(gains, losses, n, delta) > z, -1.0, estimate)
    high = _root(lambda delta: _score(gains, losses, n, delta) > -z, estimate, 1.0)
    return low, high


def _score(gains: int, losses: int, n: int, delta: float) -> float:
    """Tango's z of the difference `delta`: how far the gains less the losses are from n delta, over their standard
    error at the likeliest share of losses under it."""
    linear = (2 * n - gains + losses) * delta - gains - losses
    free = losses * delta * (1.0 - delta)
    lost = (sqrt(linear**2 + 8 * n * free) - linear) / (4 * n)
    variance = n * (2.0 * lost + delta * (1.0 - delta))
    return (gains - losses - n * delta) / sqrt(max(variance, 1e-300))


def _root(beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where `beyond`, true at first, turns false between `low` and `high`."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if beyond(middle) else (low, middle)
    return (low + high) / 2.0
