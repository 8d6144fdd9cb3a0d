"""Would more data help, and which setting is best? Points with bands, a learning curve and what it predicts,
differences between settings. Values in, values out: no model, no file.

Two things are chance in a study: which questions the test set holds, and the seed (rows drawn, order, start values).
Bands carry both. Questions are resampled, the same for every point. Seeds are too few for that: three drawn from three
show two thirds of their variance, so their part is drawn from Student's t with the standard deviation between seeds,
pooled over the points.

Questions that all score alike show no chance when they are resampled, though other questions would (see `_alike`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isclose, isfinite
from typing import TYPE_CHECKING, Literal

from luthier.evaluate.statistics.correction import holm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Finish = Callable[["Floats"], "Floats"]
"""Sums of statistics [..., k] to figures [...], as `Metric.finish`."""
Verdict = Literal["more helps", "helps", "no evidence", "worse"]

Bounds = tuple[float, float]

EVERYWHERE: Bounds = (-inf, inf)
LEVEL = 0.95
DRAWS = 10_000
LEAST = 3
"""Sizes that a curve needs."""
_EXPONENTS = [0.1 * step for step in range(-5, 21)]  # of the power law; at 0 its limit, the same gain each doubling
_STEPS = 40  # of a drawn curve
_TINY = 1e-9  # of the spread of scores: seeds that agree to the last question are no proof of no noise


@dataclass(frozen=True)
class Interval:
    """Of what chance leaves open; from -inf to inf where that is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Noise:
    """The standard deviation of a score from seed to seed, and the degrees of freedom it was estimated with; with none
    it is not known, and nothing carries it."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Prediction(Interval):
    """What a study of `size` rows would measure on the same questions with the same seeds: its mean over seeds."""

    size: int


@dataclass(frozen=True)
class Fit:
    """score = limit + amount · (size / smallest)^-exponent, by least squares, with the exponent that fits best; with
    exponent 0, limit + amount · log2(size / smallest). All else averages over the exponents (see `fit`): `path` is the
    curve, sizes and scores from the smallest size to twice the largest, which `next` is predicted for; `check` is what
    the smaller sizes predict for the largest, None where they are too few."""

    limit: float
    amount: float
    exponent: float
    smallest: int
    path: tuple[tuple[int, float], ...]
    next: Prediction
    check: Prediction | None


@dataclass(frozen=True)
class Contrast(Interval):
    """A difference of two settings, second - first. `p` is two-sided, adjusted by Holm's method."""

    first: str
    second: str
    p: float


class Curve:
    """The points of a study: settings in their order, each with the statistics of the same n questions by seed.

    Args:
        points: setting -> float64 [seeds, n, k]. Without seeds, because all of them failed, it has no score.
        finish: sums of statistics to figures.
        base: the statistics [n, k] of the model without training, which has no seeds.
        bounds: the least and the greatest score there is.
        draws: of the questions.

    `unknown` names the points whose questions all score alike at neither bound: how far chance reaches there is not
    known.
    """

    def __init__(
        self,
        points: Mapping[str, Floats],
        finish: Finish,
        base: Floats | None = None,
        bounds: Bounds = EVERYWHERE,
        draws: int = DRAWS,
    ) -> None:
        self.scores = {name: finish(there.sum(axis=1)) for name, there in points.items()}
        self.base = None if base is None else float(finish(base.sum(axis=0)))
        self.noise = _noise(list(self.scores.values()))
        sides = {**({"": base[None]} if base is not None else {}), **points}
        self.questions = max(there.shape[1] for there in sides.values())
        self.bounds = bounds
        self._places = {name: place for place, name in enumerate(points)}
        self._resampled, self.unknown = _resampled(sides, self.questions, finish, draws), list[str]()
        for name in [name for name, drawn in self._resampled.items() if _agree(drawn)]:
            self._widen(name)

    def _widen(self, name: str) -> None:
        """In place of draws without any chance, those of how other questions may score."""
        drawn = self._resampled[name]
        others = _alike(float(drawn[0]), self.bounds, self.questions, len(drawn), self._places.get(name, -1) + 1)
        if others is None:
            self.unknown.append(name)
        else:
            self._resampled[name] = others

    def band(self, name: str) -> Interval:
        """A setting's mean score over seeds, and where it would be for other questions and other seeds."""
        band = self.combined({name: 1.0})[0]
        if not isfinite(band.high):
            return band
        least, greatest = self.bounds
        return Interval(band.value, max(least, band.low), min(greatest, band.high))

    def base_band(self) -> Interval:
        return self.band("")

    def combined(self, weights: Mapping[str, float]) -> tuple[Interval, float]:
        """A weighted sum of mean scores, with its interval and the two-sided p-value of its being zero: 1 where the
        interval is not known. The name "" is the base."""
        import numpy as np

        means = {name: float(scores.mean()) for name, scores in self.scores.items() if len(scores)}
        value = sum(weight * (means[name] if name else self.base or 0.0) for name, weight in weights.items())
        if any(name in weights for name in self.unknown):
            return Interval(value, -inf, inf), 1.0
        draws = np.sum([weight * self._resampled[name] for name, weight in weights.items()], axis=0)
        for name in weights:
            if name and self.noise.freedom:
                spread = weights[name] * self.noise.deviation / np.sqrt(len(self.scores[name]))
                chance = np.random.default_rng([1, self._places[name]])  # each setting's own
                draws = draws + spread * chance.standard_t(self.noise.freedom, len(draws))
        # The same for each question, as between points of equal answers, or no numbers.
        if _agree(draws) or not np.isfinite(draws).all():
            return Interval(value, -inf, inf), 1.0
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value, min(float(low), value), max(float(high), value)), _p(draws)


def _noise(scores: Sequence[Floats]) -> Noise:
    """Pooled over points: with three seeds each says little, all of them together say enough."""
    freedom = sum(max(0, len(some) - 1) for some in scores)
    squares = sum(float(((some - some.mean()) ** 2).sum()) for some in scores if len(some))
    return Noise((squares / freedom) ** 0.5 if freedom else 0.0, freedom)


def _resampled(points: Mapping[str, Floats], n: int, finish: Finish, count: int) -> dict[str, Floats]:
    """The mean score over seeds of each point, on `count` draws of n questions with replacement, the same for all
    points: float64 [count]. Drawn deviations are sqrt(n / (n-1)) too small, which is made good."""
    import numpy as np

    draw, found = np.random.default_rng(0), {name: np.zeros(0) for name in points}
    block = max(1, 2_000_000 // n)
    for start in range(0, count, block):
        rows = draw.integers(0, n, (min(block, count - start), n))
        places = rows + n * np.arange(len(rows))[:, None]
        counts = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64)
        for name, seeds in points.items():
            if len(seeds):
                mean = np.mean([finish(counts @ statistics) for statistics in seeds], axis=0)
                found[name] = np.concatenate([found[name], mean])
    wider = np.sqrt(n / (n - 1)) if n > 1 else 1.0
    return {name: draws.mean() + wider * (draws - draws.mean()) for name, draws in found.items() if len(draws)}


def _agree(draws: Floats) -> bool:
    """Whether resampling the questions changes nothing, but for rounding."""
    import numpy as np

    return bool(np.ptp(draws) <= _TINY * max(1.0, float(np.abs(draws).max())))


def _alike(value: float, bounds: Bounds, n: int, count: int, place: int) -> Floats | None:
    """Where the score of a point may be whose n questions all score `value`: float64 [count].

    At a bound, the share of other questions that do not is drawn from Beta(1, n), and each of them may be at the other
    bound. Its 97.5th percentile, 1 - 0.025^(1/n), is the exact limit for none of n (Clopper & Pearson 1934). None away
    from the bounds and where there are none: n equal figures do not say how far others may be.
    """
    import numpy as np

    least, greatest = bounds
    reaches = [(least, greatest - least), (greatest, least - greatest)]
    reach = next((reach for bound, reach in reaches if isclose(value, bound, rel_tol=_TINY, abs_tol=_TINY)), inf)
    if not np.isfinite(reach):
        return None
    levels = (np.arange(count) + 0.5) / count
    shares = 1.0 - np.random.default_rng([3, place]).permutation(1.0 - levels) ** (1.0 / n)
    draws: Floats = value + reach * shares
    return draws


def _p(draws: Floats) -> float:
    """Two-sided, by the share of draws on the far side of zero."""
    import numpy as np

    far = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return float(min(1.0, 2 * (far + 1) / (len(draws) + 1)))


# --- over sizes ---------------------------------------------------------------------------------------------------


def per_doubling(sizes: Sequence[int]) -> list[float]:
    """The weights of the points in the least-squares gain per doubling of the size."""
    import numpy as np

    doublings = np.log2(np.array(sizes, dtype=np.float64))
    centred = doublings - doublings.mean()
    return [float(weight) for weight in centred / (centred**2).sum()]


def verdict(gain: float, gain_p: float, trend: float | None, trend_p: float, *, higher: bool) -> Verdict:
    """What a study over sizes says, from the largest size against the base and from the gain per doubling; two chances
    to be wrong, so both p-values are adjusted.

    `more helps`: the score gets better with the size. `helps`: training does, but more rows are not seen to. `worse`:
    the largest size is worse than no training, or worse than less of it.
    """
    sign = 1.0 if higher else -1.0
    adjusted = holm([gain_p, trend_p]) if trend is not None else [gain_p, 1.0]
    trained = sign * gain if adjusted[0] < 1 - LEVEL else 0.0
    rises = sign * (trend or 0.0) if adjusted[1] < 1 - LEVEL else 0.0
    if trained < 0 or rises < 0:
        return "worse"
    return "more helps" if rises > 0 else "helps" if trained > 0 else "no evidence"


def fit(scores: Mapping[int, Mapping[int, float]], bounds: Bounds = EVERYWHERE) -> Fit | None:
    """The learning curve through scores by size and seed; None for fewer than LEAST sizes, where one is not finite, and
    where all are equal, which shows neither a curve nor its noise.

    For each exponent of a grid, limit and amount follow by least squares, beside a constant for each seed (its subsets
    are nested, so that its scores share what it drew). A prediction draws the exponent by how well it fits (its
    marginal likelihood under flat priors on limit, amount and the logarithm of the noise) and then from Student's t,
    the predictive distribution of that regression. So an exponent that the data do not settle makes the interval wide.
    Predictions are kept within `bounds`.
    """
    sizes, seen = sorted(scores), {score for some in scores.values() for score in some.values()}
    if len(sizes) < LEAST or len(seen) < 2 or not all(map(isfinite, seen)):
        return None
    regressions = [_regress(scores, exponent) for exponent in _EXPONENTS]
    if regressions[0].freedom < 1:
        return None
    best = max(regressions, key=lambda one: one.weight)
    seeds, largest = len(scores[sizes[-1]]), sizes[-1]
    rest = {size: scores[size] for size in sizes[:-1]}
    check = _predicted(rest, largest, seeds, bounds) if len(rest) >= LEAST else None
    limit, amount = (float(value) for value in best.coefficients[:2])
    following = _predicted(scores, 2 * largest, seeds, bounds)
    assert following is not None
    path = _path(regressions, best.smallest, 2 * largest, bounds)
    return Fit(limit, amount, best.exponent, best.smallest, path, following, check)


def _path(regressions: Sequence[_Regression], first: int, last: int, bounds: Bounds) -> tuple[tuple[int, float], ...]:
    """The mean over exponents by how well they fit, from size `first` to `last`, denser where curves bend."""
    import numpy as np

    sizes = np.unique(np.geomspace(first, last, _STEPS).round().astype(int))
    weights = _shares(regressions)
    means = [float(weights @ [one.predict(int(size))[0] for one in regressions]) for size in sizes]
    return tuple((int(size), min(max(mean, bounds[0]), bounds[1])) for size, mean in zip(sizes, means, strict=True))


def _shares(regressions: Sequence[_Regression]) -> Floats:
    """Of each exponent in the average, with the sum 1."""
    import numpy as np

    logarithms = np.array([one.weight for one in regressions])
    weights = np.exp(logarithms - logarithms.max())
    shares: Floats = weights / weights.sum()
    return shares


@dataclass(frozen=True)
class _Regression:
    exponent: float
    smallest: int
    coefficients: Floats
    inverse: Floats  # (X'X)^-1
    variance: float  # of the residuals
    freedom: int
    weight: float  # logarithm of the marginal likelihood, but for a constant

    def predict(self, size: int) -> tuple[float, float]:
        """The mean over seeds at `size`, and the variance factor of its estimate."""
        import numpy as np

        row = np.zeros(len(self.coefficients))
        row[:2] = 1.0, _shape(size / self.smallest, self.exponent)
        return float(row @ self.coefficients), float(row @ self.inverse @ row)


def _shape(ratio: float, exponent: float) -> float:
    import math

    return math.log2(ratio) if abs(exponent) < _TINY else ratio**-exponent


def _regress(scores: Mapping[int, Mapping[int, float]], exponent: float) -> _Regression:
    import numpy as np

    sizes, smallest = sorted(scores), min(scores)
    seeds = sorted({seed for some in scores.values() for seed in some})
    cells = [(size, seed) for size in sizes for seed in scores[size]]
    shapes = np.array([_shape(size / smallest, exponent) for size, _ in cells])
    apart = np.array(
        [[(seed == one) - (seed == seeds[-1]) for one in seeds[:-1]] for _, seed in cells], dtype=np.float64
    )
    design = np.column_stack([np.ones(len(cells)), shapes, apart.reshape(len(cells), -1)])
    seen = np.array([scores[size][seed] for size, seed in cells])
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ seen
    squares = float(((seen - design @ coefficients) ** 2).sum()) + _TINY * (float(np.ptp(seen)) ** 2 + 1.0)
    freedom = len(cells) - int(np.linalg.matrix_rank(design))
    # The amount in units of the whole range of sizes seen, so that its flat prior means the same for every exponent.
    reach = abs(shapes[-1] - shapes[0])
    determinant = np.linalg.slogdet(design.T @ design)[1] - 2 * np.log(reach)
    weight = -0.5 * determinant - 0.5 * freedom * np.log(squares)
    return _Regression(exponent, smallest, coefficients, inverse, squares / max(1, freedom), freedom, float(weight))


def _predicted(scores: Mapping[int, Mapping[int, float]], size: int, seeds: int, bounds: Bounds) -> Prediction | None:
    import numpy as np

    regressions = [_regress(scores, exponent) for exponent in _EXPONENTS]
    freedom = regressions[0].freedom
    if freedom < 1:
        return None
    draw = np.random.default_rng(2)
    chosen = draw.choice(len(regressions), DRAWS, p=_shares(regressions))
    means, factors = np.array([one.predict(size) for one in regressions]).T
    spread = np.sqrt([one.variance for one in regressions] * (factors + 1 / seeds))
    draws = means[chosen] + spread[chosen] * draw.standard_t(freedom, DRAWS)
    draws = draws.clip(*bounds)
    low, middle, high = (float(value) for value in np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]))
    return Prediction(middle, low, high, size)


def residual_noise(scores: Mapping[int, Mapping[int, float]]) -> Noise:
    """The noise of single scores around the curve: what is left to know it by where each size has one seed."""
    regressions = [_regress(scores, exponent) for exponent in _EXPONENTS] if len(scores) >= LEAST else []
    best = max(regressions, key=lambda one: one.weight, default=None)
    return Noise(best.variance**0.5, best.freedom) if best and best.freedom else Noise(0.0, 0)


# --- over a setting -----------------------------------------------------------------------------------------------


def contrasts(curve: Curve) -> list[Contrast]:
    """Every pair of settings that have scores, second - first, adjusted together."""
    named = [name for name, scores in curve.scores.items() if len(scores)]
    pairs = list(combinations(named, 2))
    found = [curve.combined({first: -1.0, second: 1.0}) for first, second in pairs]
    adjusted = holm([p for _, p in found])
    return [
        Contrast(interval.value, interval.low, interval.high, first, second, p)
        for (first, second), (interval, _), p in zip(pairs, found, adjusted, strict=True)
    ]


def winner(curve: Curve, found: Sequence[Contrast], *, higher: bool) -> str | None:
    """The setting that is better than every other beyond chance; None where the noise leaves it open, or is unknown."""
    named = [name for name, scores in curve.scores.items() if len(scores)]
    if not curve.noise.freedom or len(named) < 2:
        return None
    return next((name for name in named if all(_beats(name, one, higher) for one in found if name in _of(one))), None)


def _of(contrast: Contrast) -> tuple[str, str]:
    return contrast.first, contrast.second


def _beats(name: str, contrast: Contrast, higher: bool) -> bool:
    rises = (contrast.value > 0) == higher
    return contrast.p < 1 - LEVEL and (name == contrast.second) == rises
