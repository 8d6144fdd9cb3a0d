"""What a study found: points, curves, verdict and a sentence, from the scores of its cells. Values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, nan
from typing import TYPE_CHECKING, Any

from luthier.evaluate.metrics import Metric
from luthier.evaluate.metrics.metric import ratio
from luthier.evaluate.statistics.paired import FEW, LEAST, figure, signed
from luthier.evaluate.study import curve
from luthier.evaluate.study.curve import Contrast, Curve, Fit, Interval
from luthier.registry import counted
from luthier.strict import finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Json = dict[str, Any]

_LOSSES = (0.0, inf)
_HUGE = 1e150  # a score from here on counts as infinite: chance is reckoned by squares, and its square is no number


@dataclass(frozen=True)
class Cell:
    """One training of a study: at a size of the data or with a value of a setting, under a seed. `scores` is what
    `cells.py` left of it; None where training failed."""

    at: Any
    seed: int
    folder: str
    scores: Json | None


@dataclass(frozen=True)
class Findings:
    """`as_dict()` is what `study --json` prints and findings.json holds. An interval that is not known has the bounds
    None there.

    Attributes:
        over: the setting that was varied; None: the size of the data.
        points: one for each size, the base first, or for each value.
        base: the score without training, where a setting was varied (of sizes it is a point).
        fit, loss_fit: of score and validation loss, over sizes.
        trend: gain in score per doubling of the data, over the sizes seen.
        chance: the score of guessing, in multiple choice.
    """

    metric: Metric
    over: str | None
    points: list[Json]
    verdict: str
    sentence: str
    base: Json | None = None
    fit: Json | None = None
    loss_fit: Json | None = None
    trend: Interval | None = None
    differences: list[Contrast] = field(default_factory=list)
    winner: Any = None
    chance: float | None = None
    warnings: list[str] = field(default_factory=list)
    cells: list[Json] = field(default_factory=list)
    settings: Json = field(default_factory=dict)

    def as_dict(self) -> Json:
        return {
            "over": self.over,
            "metric": self.metric.name,
            "metric_title": self.metric.title,
            "unit": self.metric.unit,
            "higher": self.metric.higher,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "points": self.points,
            "base": self.base,
            "fit": self.fit,
            "loss_fit": self.loss_fit,
            "trend": self.trend and finite(asdict(self.trend)),
            "differences": [finite(asdict(one)) for one in self.differences],
            "winner": self.winner,
            "chance": self.chance,
            "warnings": self.warnings,
            "cells": self.cells,
            "settings": self.settings,
        }


def find(
    metric: Metric,
    cells: Sequence[Cell],
    base: Json,
    *,
    over: str | None,
    chance: float | None,
    draws: int = curve.DRAWS,
) -> Findings:
    """Judges a study of some cells, in the order of their sizes or values. `base` are the scores without training,
    `draws` how often questions are resampled."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told in the findings
        table = _Table.of(metric, cells, base, draws)
        found = _over_sizes(table, chance) if over is None else _over_values(table, over, chance)
    found.cells.extend(_cell(cell, score) for cell, score in table.scored)
    found.warnings.extend(_warnings(table))
    return found


@dataclass(frozen=True)
class _Table:
    """The cells by point: those that trained have statistics of the same questions and held-out rows. A training that
    left a model without a finite score failed as one that met no finite loss did; and of a question for which the base
    has no finite figure, nothing can be told: `left_out` counts those. If it has none for any, trainings are held
    against each other alone, on all questions. `scored` has every cell with its score over the questions that are left,
    None where it failed."""

    metric: Metric
    scored: list[tuple[Cell, float | None]]
    cells: dict[str, list[Cell]]
    failed: dict[str, list[Cell]]
    scores: Curve
    losses: Curve | None
    left_out: int

    @classmethod
    def of(cls, metric: Metric, cells: Sequence[Cell], base: Json, draws: int) -> _Table:
        known = _finite_rows(base) or set(base["rows"])
        shared = sorted(known.intersection(*(cell.scores["rows"] for cell in cells if cell.scores)))
        scored = [(cell, _score(metric, cell, shared)) for cell in cells]
        trained, failed = ({str(cell.at): list[Cell]() for cell in cells} for _ in range(2))
        for cell, score in scored:
            (failed if score is None else trained)[str(cell.at)].append(cell)
        zero, losses = _array(_of_rows(base, shared)), None
        points = {name: _stacked([_of_rows(c.scores, shared) for c in some], zero) for name, some in trained.items()}
        scores = Curve(points, metric.finish, zero, _bounds(metric), draws)
        if base["heldout"]:
            zero = _array(base["heldout"])
            held = {n: _stacked([c.scores["heldout"] for c in some if c.scores], zero) for n, some in trained.items()}
            losses = Curve(held, ratio, zero, _LOSSES, draws)
        return cls(metric, scored, trained, failed, scores, losses, len(base["rows"]) - len(known))

    def by_seed(self, found: Curve) -> dict[int, dict[int, float]]:
        """Scores by size and seed, as `fit` wants them."""
        return {
            int(name): {cell.seed: float(score) for cell, score in zip(some, found.scores[name], strict=True)}
            for name, some in self.cells.items()
            if some
        }

    @property
    def has_base(self) -> bool:
        """Whether there is a score without training, to hold others against."""
        assert self.scores.base is not None
        return abs(self.scores.base) < _HUGE

    def point(self, name: str) -> Json:
        point: Json = {"seeds": [cell.seed for cell in self.cells[name]]}
        if not self.cells[name]:
            point |= {"seed_scores": [], "score": None, "low": None, "high": None, "validation_loss": None}
        else:
            band = self.scores.band(name)
            point |= {"seed_scores": self.scores.scores[name].tolist(), **_named(band, "score")}
            point |= _losses(self.losses, name)
        if self.failed[name]:
            point["failed"] = [cell.seed for cell in self.failed[name]]
        return point

    def base_point(self) -> Json:
        band = self.scores.base_band() if self.has_base else Interval(nan, -inf, inf)
        return {"seeds": [], "seed_scores": finite([band.value]), **_named(band, "score"), **_losses(self.losses, "")}


def _bounds(metric: Metric) -> curve.Bounds:
    return (0.0, 100.0) if metric.unit == "points" else curve.EVERYWHERE


def _finite_rows(scores: Json) -> set[int]:
    known = zip(scores["rows"], scores["statistics"], strict=True)
    return {row for row, statistics in known if None not in finite(statistics)}


def _score(metric: Metric, cell: Cell, rows: Sequence[int]) -> float | None:
    if cell.scores is None:
        return None
    score = float(metric.finish(_array(_of_rows(cell.scores, rows)).sum(axis=0)))
    return score if abs(score) < _HUGE else None


def _of_rows(scores: Json | None, rows: Sequence[int]) -> list[list[float]]:
    assert scores is not None
    places = {row: place for place, row in enumerate(scores["rows"])}
    return [scores["statistics"][places[row]] for row in rows]


def _array(values: Sequence[Any]) -> Floats:
    import numpy as np

    return np.array(values, dtype=np.float64)


def _stacked(seeds: Sequence[Any], base: Floats) -> Floats:
    """[seeds, n, k], of the questions that `base` [n, k] has too; there may be no seeds."""
    return _array(seeds).reshape(len(seeds), *base.shape)


def _named(interval: Interval, name: str) -> Json:
    return {name: finite(interval.value), "low": finite(interval.low), "high": finite(interval.high)}


def _losses(losses: Curve | None, name: str) -> Json:
    if losses is None:
        return {"validation_loss": None}
    band = losses.band(name) if name else losses.base_band()
    seeds = losses.scores[name].tolist() if name else [band.value]
    bounds = {"validation_low": finite(band.low), "validation_high": finite(band.high)}
    return {"validation_loss": finite(band.value), **bounds, "seed_validation_losses": seeds}


def _cell(cell: Cell, score: float | None) -> Json:
    """Where training came to its end there is a report, of a model without a finite score too."""
    report = f"{cell.folder}/report.html" if cell.scores is not None else None
    about = {"folder": cell.folder, "at": cell.at, "seed": cell.seed, "report": report}
    return {**about, "failed": score is None, "score": score}


def _warnings(table: _Table) -> list[str]:
    said = []
    n = table.scores.questions
    if n < FEW:
        said.append(f"only {n} questions: bands are wide; {FEW} or more say much more")
    if table.left_out:
        said.append(f"{counted(table.left_out, 'question')} left out, for which no figure without training is finite")
    if max(map(len, table.cells.values()), default=0) == 1:
        said.append("one seed: how much a seed does is not known well; --seeds 3 says")
    for name in table.scores.unknown:
        where = f"at {name}" if name else "without training"
        said.append(f"{where}, all {n} questions score alike: chance is not known")
    for name, cells in table.failed.items():
        if cells:
            said.append(f"at {name}, {len(cells)} of {len(cells) + len(table.cells[name])} trainings diverged")
    return said


# --- over sizes ---------------------------------------------------------------------------------------------------


def _over_sizes(table: _Table, chance: float | None) -> Findings:
    names = [name for name, cells in table.cells.items() if cells]
    for found in filter(None, (table.scores, table.losses)):
        if not found.noise.freedom:  # one seed each: what is left around the curve says how much a seed does
            found.noise = curve.residual_noise(table.by_seed(found))
    points = [{"size": 0, **table.base_point()}]
    points += [{"size": int(name), **table.point(name)} for name in table.cells]
    if not names:
        sentence = "no evidence: no training came to its end; lower train.lr"
        if not table.has_base:
            sentence = f"no evidence: {table.metric.title} is finite neither without training nor with it"
        return Findings(table.metric, None, points, "no evidence", sentence, chance=chance)
    trend, trend_p = _trend(table.scores, names)
    verdict = _verdict(table, names[-1], trend, trend_p)
    fit = _fitted(curve.fit(table.by_seed(table.scores), table.scores.bounds), points, "score")
    loss_fit = curve.fit(table.by_seed(table.losses), _LOSSES) if table.losses else None
    story = _Story(table.metric, points, verdict, trend, fit, chance)
    return Findings(
        table.metric,
        None,
        points,
        verdict,
        story.told(),
        fit=fit,
        loss_fit=_fitted(loss_fit, points, "validation_loss"),
        trend=trend,
        chance=chance,
    )


def _trend(scores: Curve, names: Sequence[str]) -> tuple[Interval | None, float]:
    """Gain per doubling of the size, and the p-value of there being none."""
    if len(names) < 2:
        return None, 1.0
    return scores.combined(dict(zip(names, curve.per_doubling([int(name) for name in names]), strict=True)))


def _verdict(table: _Table, largest: str, trend: Interval | None, trend_p: float) -> curve.Verdict:
    if table.scores.questions < LEAST or not table.has_base:
        return "no evidence"
    gain, gain_p = table.scores.combined({largest: 1.0, "": -1.0})
    return curve.verdict(gain.value, gain_p, trend.value if trend else None, trend_p, higher=table.metric.higher)


def _fitted(fit: Fit | None, points: Sequence[Json], key: str) -> Json | None:
    if fit is None:
        return None
    measured = {point["size"]: point[key] for point in points if point[key] is not None}
    largest = max(measured)
    following, check = fit.next, fit.check
    return {
        "model": "power law",
        **{name: getattr(fit, name) for name in ("limit", "amount", "exponent", "smallest", "path")},
        "next": {
            **_predicted(following),
            "gain": following.value - measured[largest],
            "within": (following.high - following.low) / 2,
        },
        "check": check
        and {
            **_predicted(check),
            "measured": measured[largest],
            "inside": check.low <= measured[largest] <= check.high,
        },
    }


def _predicted(prediction: curve.Prediction) -> Json:
    return {"size": prediction.size, **_named(prediction, "value")}


@dataclass(frozen=True)
class _Story:
    """A study over sizes in words."""

    metric: Metric
    points: list[Json]
    verdict: curve.Verdict
    trend: Interval | None
    fit: Json | None
    chance: float | None

    def told(self) -> str:
        return "; ".join(part for part in (self._finding(), self._slope(), self._next()) if part)

    def _finding(self) -> str:
        base, last = self.points[0], self._trained[-1]
        if base["score"] is None:
            told = f"no evidence: {self.metric.title} is not finite without training, so that no gain is known"
            return f"{told}; with {_rows(last)} it is {figure(last['score'])}"
        move = (
            f"{self.metric.title} {figure(base['score'])} without training, {figure(last['score'])} with {_rows(last)}"
        )
        match self.verdict:
            case "more helps":
                return f"more data helps: {move}"
            case "helps":
                return f"training helps, but more data is not seen to: {move}"
            case "worse":
                return f"worse: {move}"
        sizes = f"{self._trained[0]['size']:,} to {_rows(last)}" if len(self._trained) > 1 else _rows(last)
        told = f"no evidence: with {sizes} {self.metric.title} stays where it is without training, within chance"
        told += f" ({figure(base['score'])} and {figure(last['score'])}{self._guessing()})"
        return f"{told}; more data of this kind does not show help with this model"

    @property
    def _trained(self) -> list[Json]:
        return [point for point in self.points[1:] if point["score"] is not None]

    def _guessing(self) -> str:
        return "" if self.chance is None else f"; guessing gives {figure(self.chance)}"

    def _slope(self) -> str:
        if self.trend is None:
            return ""
        gave = f"a doubling gave {signed(self.trend.value)}{_unit(self.metric)}"
        if not isfinite(self.trend.low):
            return f"{gave} (chance is not known)"
        return f"{gave} (95 % interval {signed(self.trend.low)} to {signed(self.trend.high)})"

    def _next(self) -> str:
        if self.fit is None:
            return ""
        told = f"the next doubling, to {self.fit['next']['size']:,} rows, gives {expectation(self.fit)}"
        check = self.fit["check"]
        if check is None:
            return told
        return f"{told} (the smaller sizes {'foresaw' if check['inside'] else 'did not foresee'} the largest)"


def expectation(fit: Json) -> str:
    """What the next doubling gives, in short: `+1.9 ± 3.0`."""
    return f"{signed(fit['next']['gain'])} ± {figure(fit['next']['within'])}"


def _unit(metric: Metric) -> str:
    return f" {metric.unit}" if metric.unit else ""


def _rows(point: Json) -> str:
    return counted(point["size"], "row")


# --- over a setting -----------------------------------------------------------------------------------------------


def _over_values(table: _Table, over: str, chance: float | None) -> Findings:
    values = {name: _value(table, name) for name in table.cells}
    points = [{"value": values[name], **table.point(name)} for name in table.cells]
    found = curve.contrasts(table.scores)
    best = curve.winner(table.scores, found, higher=table.metric.higher)
    if table.scores.questions < LEAST:
        best = None
    return Findings(
        table.metric,
        over,
        points,
        "winner" if best is not None else "no winner",
        _of_values(table, over, points, found, best),
        base=table.base_point(),
        differences=found,
        winner=None if best is None else values[best],
        chance=chance,
        warnings=[] if table.has_base else [f"without training {table.metric.title} is not finite"],
    )


def _value(table: _Table, name: str) -> Any:
    return next(cell.at for cell in (*table.cells[name], *table.failed[name]))


def _of_values(table: _Table, over: str, points: list[Json], found: list[Contrast], best: str | None) -> str:
    title, scored = table.metric.title, [point for point in points if point["score"] is not None]
    if not scored:
        return "no winner: no training came to its end"
    ordered = sorted(scored, key=lambda point: point["score"], reverse=table.metric.higher)
    if best is not None and len(ordered) > 1:
        (first, score), (second, lower) = ((point["value"], figure(point["score"])) for point in ordered[:2])
        than = f"better than with every other value, beyond chance (the next is {second} with {lower})"
        return f"winner: with {over}={first} {title} is {score}, {than}"
    scores = ", ".join(f"{point['value']}: {figure(point['score'])}" for point in scored)
    why = "" if table.scores.noise.freedom else "; with one seed a setting cannot be told from its seed"
    reach = _reach(table.metric, found)
    return f"no winner: no value of {over} is better than every other beyond chance ({title} {scores}){why}{reach}"


def _reach(metric: Metric, found: Sequence[Contrast]) -> str:
    """How far chance reaches, where there is a difference at all."""
    if not found:
        return ""
    widest = max(max(abs(one.low), abs(one.high)) for one in found)
    if not isfinite(widest):
        return "; chance is not known"
    return f"; differences up to {figure(widest)}{_unit(metric)} are within reach of chance"
