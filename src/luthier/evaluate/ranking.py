"""Several sides on the same questions: each with its score, every pair with its difference, and whether one is best.
Values in, values out: no model, no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from statistics import NormalDist, fmean, quantiles, stdev
from typing import Any

from luthier.evaluate.comparison import Scored, Scores
from luthier.evaluate.metrics import Answer, Metric, words
from luthier.evaluate.statistics.correction import together
from luthier.evaluate.statistics.interval import LEVEL, bootstrap
from luthier.evaluate.statistics.paired import Paired, Verdict, explain, figure, right_or_wrong
from luthier.evaluate.statistics.seeds import seeded


@dataclass(frozen=True)
class Pair:
    """Two sides by name. In `metrics` the first is `base`, the second `tuned`, and p is adjusted for the pairs of its
    family: those that hold an untouched base, and those that do not."""

    first: str
    second: str
    metrics: dict[str, Paired]

    def as_dict(self, metric: str) -> dict[str, Any]:
        """`metric` is the one that decides."""
        metrics = {name: {**p.as_dict(), "p_adjusted": _adjusted(p)} for name, p in self.metrics.items()}
        return {
            "first": self.first,
            "second": self.second,
            "metrics": metrics,
            "verdict": self.metrics[metric].verdict,
        }


@dataclass(frozen=True)
class Decision:
    """What to say of all sides at once.

    Attributes:
        pair: the two sides that stand for the whole: the two that were asked about, or the best and the next.
        verdict: of the second of them; of several sides, `better` only if it is better than every other.
        winner: None where two sides were compared, or none of several is better than all others.
    """

    pair: tuple[Unit, Unit]
    verdict: Verdict
    sentence: str
    winner: str | None


@dataclass(frozen=True)
class Unit:
    """What is compared: one side, or several that are seeds of one recipe, by their places among the sides."""

    name: str
    sides: tuple[int, ...]


def pairs(scored: Scored, units: Sequence[Unit], bases: Sequence[str] = ()) -> list[Pair]:
    """Every pair in the order of `units`, by every metric; two untouched `bases` are no pair."""
    every = [pair for pair in combinations(units, 2) if not all(unit.name in bases for unit in pair)]
    families = [[pair for pair in every if (pair[0].name in bases) == held] for held in (False, True)]
    found: dict[tuple[Unit, Unit], dict[str, Paired]] = {pair: {} for pair in every}
    for name, scores in scored.table.items():
        for family in families:
            judged = [_paired(scores, *pair, fixed=pair[0].name in bases) for pair in family]
            judged = together(judged) if len(judged) > 1 else judged
            for pair, one in zip(family, judged, strict=True):
                found[pair][name] = one
    return [Pair(first.name, second.name, metrics) for (first, second), metrics in found.items()]


def _paired(scores: Scores, first: Unit, second: Unit, *, fixed: bool) -> Paired:
    if len(first.sides) == len(second.sides) == 1:
        return scores.best(first.sides[0], second.sides[0])
    import numpy as np

    base, tuned = (np.array([scores.statistics(side) for side in unit.sides]) for unit in (first, second))
    return seeded(scores.metric, base, tuned, fixed=fixed)


def decide(scored: Scored, units: Sequence[Unit], found: Sequence[Pair], bases: Sequence[str] = ()) -> Decision:
    """The untouched `bases`, first of the units, are never asked about where two others are."""
    metric, asked = scored.table[scored.first].metric, [unit for unit in units if unit.name not in bases]
    if len(asked) < 3:
        first, second = (units[0], *asked)[-2:]
        paired = _between(found, first.name, second.name).metrics[scored.first]
        head, _, rest = explain(metric, paired).partition(": ")
        return Decision((first, second), paired.verdict, f"{head}: from {first.name} to {second.name}, {rest}", None)
    return _best(scored.table[scored.first], asked, found)


def _best(scores: Scores, asked: Sequence[Unit], found: Sequence[Pair]) -> Decision:
    metric, figures = scores.metric, {unit: _figure(scores, unit) for unit in asked}
    best, *others = sorted(asked, key=lambda unit: -figures[unit] if metric.higher else figures[unit])
    left = [unit for unit in others if not _beats(best, unit, metric.name, found)]
    nearest = (left or others)[0]
    pair = _between(found, nearest.name, best.name)
    told = explain(metric, pair.metrics[metric.name]).partition(": ")[2]
    told = f"from {pair.first} to {pair.second}, {told}"
    lead = f"{best.name} has the {'highest' if metric.higher else 'lowest'} {metric.title}, {figure(figures[best])}"
    if left:
        names = ", ".join(unit.name for unit in left)
        return Decision(
            (nearest, best), "no evidence", f"no winner: {lead}, but is not told from {names}; {told}", None
        )
    beats = f"and is better than each of the {len(others)} others"
    return Decision((nearest, best), "better", f"better: {lead}, {beats}; {told}", best.name)


def _between(found: Sequence[Pair], one: str, other: str) -> Pair:
    return next(pair for pair in found if {pair.first, pair.second} == {one, other})


def _beats(best: Unit, other: Unit, metric: str, found: Sequence[Pair]) -> bool:
    pair = _between(found, best.name, other.name)
    return pair.metrics[metric].verdict == ("better" if pair.second == best.name else "worse")


def _figure(scores: Scores, unit: Unit) -> float:
    return fmean(_score(scores, side) for side in unit.sides)


def _score(scores: Scores, side: int) -> float:
    return scores.metric.figure(tuple(sum(column) for column in zip(*scores.statistics(side), strict=True)))


def noise(scored: Scored, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """What seeds do, of each unit of several: the mean and the standard deviation of its scores from seed to seed, in
    the order of its sides (by their places)."""
    found = []
    for unit in units:
        if len(unit.sides) > 1:
            of = {name: [_score(scores, side) for side in unit.sides] for name, scores in scored.table.items()}
            metrics = {name: {"scores": s, "mean": fmean(s), "spread": stdev(s)} for name, s in of.items()}
            found.append({"name": unit.name, "sides": list(unit.sides), "metrics": metrics})
    return found


def _adjusted(paired: Paired) -> float:
    return paired.p if paired.adjusted is None else paired.adjusted


def described(scored: Scored, side: int) -> dict[str, Any]:
    """A side's scores by metric, and how long its answers are and how they end."""
    metrics = {name: alone(scores.metric, scores.statistics(side)) for name, scores in scored.table.items()}
    return {"metrics": metrics, **manner(scored.answers[side])}


def alone(metric: Metric, statistics: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """One side's score with its 95 % interval over questions. Bounds are None for a single question."""
    import numpy as np

    found = np.array(statistics, dtype=np.float64)  # [n, k]
    n, score = len(found), float(metric.finish(found.sum(axis=0)))
    if n < 2:
        return {"score": score, "low": None, "high": None, "n": n}
    if right_or_wrong(metric, found[None]):
        low, high = wilson(score / 100.0, n)
        return {"score": score, "low": 100.0 * low, "high": 100.0 * high, "n": n}
    # Every question of the other side is the mean one: whatever is drawn, its score is this side's over all questions.
    spread = bootstrap(metric, np.stack([np.broadcast_to(found.mean(axis=0), found.shape), found]), seed=0)
    low, high = (round(score + end, 9) + 0.0 for end in (spread.low, spread.high))
    return {"score": score, "low": low, "high": high, "n": n}


def wilson(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of n (Wilson 1927)."""
    z = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0)
    middle, half = share + z * z / (2 * n), z * sqrt(share * (1.0 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def manner(answers: Sequence[Answer]) -> dict[str, Any]:
    """Words of an answer, and the share of answers that ended by themselves, 0..1; None where none were asked for."""
    said = [answer for answer in answers if answer.text is not None]
    if not said:
        return {"words": None, "stopped": None}
    counts = sorted(words(answer.text or "") for answer in said)
    cuts = quantiles(counts, n=20, method="inclusive") if len(counts) > 1 else [counts[0]] * 19
    spread = {"mean": fmean(counts), "median": cuts[9], "p95": cuts[18], "most": counts[-1]}
    return {"words": spread, "stopped": fmean(answer.stopped for answer in said)}
