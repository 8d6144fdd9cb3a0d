"""The least difference that a test set of this size tells from none, four times in five (Cohen 1988)."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from luthier.evaluate.statistics.interval import LEVEL
from luthier.evaluate.statistics.student import quantile

POWER = 0.8


def detectable(spread: float, freedom: float) -> float:
    """In the unit of `spread`, the standard error of tuned - base as estimated with so many degrees of freedom: the
    difference whose interval leaves out zero with probability POWER.

    The bound is t errors below the estimate; the estimate and the error itself vary (the normal approximation to the
    noncentral t, Johnson & Welch 1940), and an error estimated with few degrees is too small on average.
    """
    t, z = quantile((1.0 + LEVEL) / 2.0, freedom), NormalDist().inv_cdf(POWER)
    return spread * (t + z * sqrt(1.0 + t**2 / (2.0 * freedom)) / (1.0 - 1.0 / (4.0 * freedom)))


def detectable_share(differing: int, n: int) -> float:
    """The same for right or wrong, as a share of n questions of which `differing` are right on one side only.

    What is gained differs too, so the spread grows with the difference d: z² (differing/n + d - d²) = n d² (Connor 1987
    with the gain on top of the noise), z the sum of the normal quantiles of the level and the power. Where no question
    differs it still takes 7.8 gains.
    """
    z = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0) + NormalDist().inv_cdf(POWER)
    return (z**2 + sqrt(z**4 + 4 * (n + z**2) * z**2 * differing / n)) / (2 * (n + z**2))
