"""Is one recipe better than another, whatever the seed? Both were trained under some seeds, and seeds differ too.

One training under one seed says how good *that model* is; the next seed gives another. A difference between recipes is
judged with both kinds of chance: which questions were asked and which seeds were drawn.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import TYPE_CHECKING, NamedTuple

from luthier.evaluate.metrics import Metric
from luthier.evaluate.statistics.interval import LEVEL, degrees, left_out
from luthier.evaluate.statistics.paired import Judged, Paired, agreed, verdict_of
from luthier.evaluate.statistics.power import detectable
from luthier.evaluate.statistics.student import quantile, tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


class Spread(NamedTuple):
    """A variance of tuned - base and the degrees of freedom it was estimated with."""

    variance: float
    freedom: float


def seeded(metric: Metric, base: Floats, tuned: Floats, *, fixed: bool = False) -> Paired:
    """Compares two recipes on the same n questions: statistics [seeds, n, k] of each side, whose numbers of seeds may
    differ. Figures are means over seeds.

    A side with one seed borrows the other's variance from seed to seed; with `fixed` the base is one model that no seed
    has made, such as the untrained one, and has none. Raises ValueError where no side has two seeds, where questions
    differ in number, or with fewer than two.

    The interval is Student's, of the variances of seeds and of questions together, with Satterthwaite's (1946) degrees
    of freedom: three seeds give two each, so that it is up to 4.3 standard errors to each side, and not 1.96. A
    bootstrap over seeds cannot know that: of three seeds it shows two thirds of their variance.
    """
    import numpy as np

    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    n = _questions(base, tuned, fixed=fixed)
    scores = [metric.finish(side.sum(axis=1)) for side in (base, tuned)]
    moves = [left_out(metric, side) for side in (base, tuned)]
    total = _total(scores, moves, fixed=fixed)
    difference = float(scores[1].mean() - scores[0].mean())
    judged = agreed(_judged(difference, total), n)
    return Paired(
        base=float(scores[0].mean()),
        tuned=float(scores[1].mean()),
        difference=difference,
        low=judged.low,
        high=judged.high,
        n=n,
        higher=metric.higher,
        verdict=verdict_of(judged.low, judged.high, higher=metric.higher),
        p=judged.p,
        detectable=judged.detectable,
        differing=int((base.mean(axis=0) != tuned.mean(axis=0)).any(axis=1).sum()),
        method="seeds",
        seeds=(len(base), len(tuned)),
    )


def _questions(base: Floats, tuned: Floats, *, fixed: bool) -> int:
    if base.shape[1:] != tuned.shape[1:] or base.shape[1] < 2:
        raise ValueError("recipes are compared on the same questions, and at least two")
    if len(tuned) < 2 and (fixed or len(base) < 2):
        raise ValueError("the noise of seeds is not known from one seed: compare the two models with `paired`")
    return int(base.shape[1])


def _judged(difference: float, total: Spread) -> Judged:
    error = sqrt(total.variance)
    if not error > 0.0:
        return Judged(difference, difference, 0.0 if difference else 1.0, None)
    half = quantile((1.0 + LEVEL) / 2.0, total.freedom) * error
    p = tail(difference / error, total.freedom)
    return Judged(difference - half, difference + half, p, detectable(error, total.freedom))


def _total(scores: list[Floats], moves: list[Floats], *, fixed: bool) -> Spread:
    """The variance of the difference of two means over seeds. The part that is both a seed's and a question's stands in
    the seeds' variance and in the questions', so it is taken off once; what is left is never less than either."""
    seeds = _of_seeds(*scores, fixed=fixed)
    questions = _of_questions(moves[1].mean(axis=0) - moves[0].mean(axis=0))
    trained = sum(part.variance for part in seeds)
    variance = trained + questions.variance - sum(_of_both(side) for side in moves)
    variance = max(variance, trained, questions.variance)
    parts = sum(part.variance**2 / part.freedom for part in (*seeds, questions))
    return Spread(variance, max(1.0, variance**2 / parts) if parts > 0.0 else inf)


def _of_seeds(base: Floats, tuned: Floats, *, fixed: bool) -> list[Spread]:
    """Of the two means over scores [seeds], in parts that were estimated apart from each other."""
    if fixed or len(base) < 2:
        return [_of_mean(tuned, 1.0 / len(tuned) + (0.0 if fixed else 1.0))]
    if len(tuned) < 2:
        return [_of_mean(base, 1.0 / len(base) + 1.0)]
    return [_of_mean(side, 1.0 / len(side)) for side in (base, tuned)]


def _of_mean(scores: Floats, share: float) -> Spread:
    return Spread(float(scores.var(ddof=1)) * share, len(scores) - 1.0)


def _of_questions(moves: Floats) -> Spread:
    """Of a mean over questions that each move it by `moves` [n]."""
    return Spread(float((moves**2).sum()) / (len(moves) * (len(moves) - 1)), degrees(moves))


def _of_both(moves: Floats) -> float:
    """Of one side's mean over seeds, what its questions [seeds, n] do differently from seed to seed."""
    seeds, n = moves.shape
    if seeds < 2:
        return 0.0
    apart = moves - moves.mean(axis=0)
    variance: float = float((apart**2).sum()) / ((seeds - 1) * (n - 1) * n * seeds)
    return variance
