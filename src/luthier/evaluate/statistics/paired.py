"""Is the difference between two sides real? An interval and a test over paired questions, and a verdict in plain words.

Both sides answer the same questions, so questions are drawn, not answers: what makes a question hard for both sides
cancels out (Efron & Tibshirani 1993, chapter 16; for language Koehn 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, isnan
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from luthier.evaluate.metrics import Metric, Statistics
from luthier.evaluate.metrics.metric import ratio
from luthier.evaluate.statistics.interval import CHANCE, LEVEL, RESAMPLES, bootstrap, tango
from luthier.evaluate.statistics.permutation import mcnemar, sign_flip
from luthier.evaluate.statistics.power import detectable, detectable_share

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = [
    "CHANCE",
    "FEW",
    "LEAST",
    "LEVEL",
    "RESAMPLES",
    "Paired",
    "Verdict",
    "explain",
    "figure",
    "limits",
    "paired",
    "signed",
]

Verdict = Literal["better", "no evidence", "worse"]
Method = Literal["bootstrap", "score", "seeds"]

FEW = 30
"""Below this many questions the reader is warned that the interval is wide."""
LEAST = 6
"""With n pairs that all agree, chance does as well once in 2^(n-1) times: below six that is more than 5 %."""


@dataclass(frozen=True, slots=True)
class Paired:
    """One metric on both sides. `difference` is always tuned - base, in the metric's own unit, and [`low`, `high`] its
    95 % interval; whether up is good is `higher`, and `verdict` has taken it into account. `n` counts questions.

    Attributes:
        p: of the two-sided sign-flip test; the interval leaves out zero exactly where it is below 0.05.
        detectable: the least true difference that a test set like this one finds four times in five, in the metric's
            unit; None where no question's score differs.
        differing: questions whose scores differ.
        method: where the interval comes from: a bootstrap over questions, Tango's score interval for right or wrong, or
            variances of seeds and questions.
        seeds: how often each side was trained, where several seeds are judged together.
        adjusted: p after Holm's correction for `family` comparisons; None where this one stands alone. The verdict is
            by it, the interval is this pair's own.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    n: int
    higher: bool
    verdict: Verdict
    p: float
    detectable: float | None
    differing: int
    method: Method
    seeds: tuple[int, int] | None = None
    adjusted: float | None = None
    family: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a bound that is not finite (one question has no interval) is None, as JSON has no infinity."""
        return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(self).items()}


def paired(metric: Metric, base: Sequence[Statistics], tuned: Sequence[Statistics], *, seed: int = 0) -> Paired:
    """Compares the statistics [n] of one metric on the same n questions. Raises ValueError where n is 0 or lengths
    differ. The same seed draws the same questions for every metric, so intervals of one comparison belong together.
    """
    import numpy as np

    if len(base) != len(tuned) or not len(base):
        raise ValueError("a paired comparison needs the same questions on both sides, and at least one")
    sides = np.array([base, tuned], dtype=np.float64)
    scored, known = right_or_wrong(metric, sides), bool(np.isfinite(sides).all())
    found = _of_shares(sides) if scored else _of_sums(metric, sides, seed) if known else UNKNOWN
    judged = agreed(found, len(base))
    there, differing = metric.finish(sides.sum(axis=1)), int((sides[0] != sides[1]).any(axis=1).sum())
    return Paired(
        base=float(there[0]),
        tuned=float(there[1]),
        difference=float(there[1] - there[0]),
        low=judged.low,
        high=judged.high,
        n=len(base),
        higher=metric.higher,
        verdict=verdict_of(judged.low, judged.high, higher=metric.higher),
        p=judged.p,
        detectable=judged.detectable,
        differing=differing,
        method="score" if scored else "bootstrap",
    )


class Judged(NamedTuple):
    """An interval, a p and the least difference that would be found."""

    low: float
    high: float
    p: float
    detectable: float | None


UNKNOWN = Judged(-inf, inf, 1.0, None)
"""Of one question, and of questions of which one has no finite figure."""


def right_or_wrong(metric: Metric, sides: Floats) -> bool:
    """Whether every question counts once and scores 0 or 100 on both sides [2, n, k]: then shares are compared."""
    if metric.finish is not ratio:
        return False
    points, weights = sides[..., 0], sides[..., 1]
    return bool((weights == 1.0).all() and ((points == 0.0) | (points == 100.0)).all())


def _of_shares(sides: Floats) -> Judged:
    n, moved = sides.shape[1], sides[1, :, 0] - sides[0, :, 0]
    gains, losses = int((moved > 0).sum()), int((moved < 0).sum())
    low, high = tango(gains, losses, n)
    return Judged(100.0 * low, 100.0 * high, mcnemar(gains, losses), 100.0 * detectable_share(gains + losses, n))


def _of_sums(metric: Metric, sides: Floats, seed: int) -> Judged:
    if sides.shape[1] < 2:
        return UNKNOWN
    found = bootstrap(metric, sides, seed)
    least = detectable(found.spread, found.freedom) if found.spread > 0.0 else None
    return Judged(found.low, found.high, sign_flip(metric, sides, seed), least)


def agreed(judged: Judged, n: int) -> Judged:
    """A difference is called real where interval and test both say so. Where one does and the other does not, the
    interval is stretched to zero and p raised to 0.05, so that what is read says the same thing twice."""
    low, high, p, least = judged
    if n >= LEAST and p < CHANCE and not low <= 0.0 <= high:
        return judged
    return Judged(min(low, 0.0), max(high, 0.0), max(p, CHANCE), least)


def verdict_of(low: float, high: float, *, higher: bool) -> Verdict:
    """`better` or `worse` only where the whole interval of tuned - base lies on that side of zero; NaN does not."""
    if not (low > 0.0 or high < 0.0):
        return "no evidence"
    return "better" if (low > 0.0) == higher else "worse"


def figure(value: float | None) -> str:
    """A figure for people: 13.4, 9.8, 0.4, 0.012, 2.1e+08. None is what was not finite."""
    if value is None or isnan(value):
        return "not finite"
    if not isfinite(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.1f}" if 1.0 <= abs(value) < 1e7 else f"{value:.2g}"


def explain(metric: Metric, found: Paired) -> str:
    """The verdict as a sentence: `better: ROUGE-L rises by 9.8 points (95 % interval 7.9 to 11.7, 120 rows)`."""
    unit, about = f" {metric.unit}" if metric.unit else "", _about(found)
    if found.verdict == "no evidence":
        interval = f"95 % interval {signed(found.low)} to {signed(found.high)}, {about}"
        return f"no evidence of a difference: {metric.title} {signed(found.difference)}{unit} ({interval})"
    moves = "rises" if found.difference > 0 else "falls"
    ends = sorted((abs(found.low), abs(found.high)))
    interval = f"95 % interval {figure(ends[0])} to {figure(ends[1])}, {about}"
    return f"{found.verdict}: {metric.title} {moves} by {figure(abs(found.difference))}{unit} ({interval})"


def _about(found: Paired) -> str:
    """What the interval rests on: rows, seeds where there are several, and the other pairs it was judged with."""
    about = f"{found.n} rows"
    if found.seeds:
        about += f", {found.seeds[0]} and {found.seeds[1]} seeds"
    if found.adjusted is not None:
        about += f"; p = {found.adjusted:.2g} among {found.family} comparisons, the interval is for this one alone"
    return about


def limits(metric: Metric, found: Paired) -> str | None:
    """What `no evidence` does not say: `200 rows cannot tell differences under 6.1 points`. None with a verdict."""
    if found.verdict != "no evidence" or found.detectable is None or found.n < LEAST:
        return None
    least = f"{figure(found.detectable)} {metric.unit or f'in {metric.title}'}"
    return f"{found.n} rows cannot tell differences under {least}"


def signed(value: float | None) -> str:
    """A figure with its sign: +9.8, −0.4."""
    if value is None:
        return figure(value)
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return sign + figure(abs(value))
