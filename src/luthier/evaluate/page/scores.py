"""The comparison's figures as the page shows them: comparison.json in, texts and drawings out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.evaluate.figures import Axis, interval
from luthier.evaluate.metrics import Metric, shown
from luthier.evaluate.paired import figure, signed

Json = dict[str, Any]
HEADLINES = {"better": "Better", "worse": "Worse"}
MIRRORED = {"better": "worse", "worse": "better"}


def verdict(found: Json) -> Json:
    """What stands at the top: the headline, its sentence, and both sides' figures."""
    first, metric = found["metrics"][found["metric"]], _metric(found, found["metric"])
    return {
        "headline": HEADLINES.get(found["verdict"], "No evidence"),
        "style": found["verdict"].replace(" ", "-"),
        "sentence": _sentence(found["sentence"]),
        "base": figure(first["base"]),
        "tuned": figure(first["tuned"]),
        "metric": metric.title,
        "lower": not metric.higher,
        "n": first["n"],
        "source": found["settings"].get("source", "test"),
        "detectable": _detectable(first, metric),
    }


def _metric(found: Json, name: str) -> Metric:
    return shown(name, found["metrics"][name])


def _sentence(sentence: str) -> str:
    """The verdict's sentence below its headline: without the verdict, with a capital."""
    _, _, rest = sentence.partition(": ")
    return rest[:1].upper() + rest[1:] + "."


def _detectable(found: Json, metric: Metric) -> str:
    """What a test set of this size can tell; empty where the comparison did not work it out."""
    least = found.get("detectable")
    if least is None:
        return ""
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{found['n']} questions can tell differences of about {figure(least)}{unit} or more."


def scores(found: Json) -> tuple[list[Json], list[Json]]:
    """The metrics, and what stands beside the verdict: the gain that is not length, the mean over several references.
    All figures in points share one scale; one with a unit of its own has its own."""
    beside = [(name, p, "both answers cut to the same length") for name, p in found["matched"].items()]
    beside += [(name, p, "mean over the references") for name, p in found["means"].items() if name == found["metric"]]
    named = [*found["metrics"].items(), *((name, p) for name, p, _ in beside)]
    shared = _axis(p for name, p in named if _metric(found, name).unit)

    def line(name: str, paired: Json, note: str = "") -> Json:
        metric = _metric(found, name)
        return _score(metric, paired, shared if metric.unit else _axis([paired]), note)

    return [line(name, p) for name, p in found["metrics"].items()], [line(*one) for one in beside]


def _axis(found: Iterable[Json]) -> Axis:
    """One scale for all scores that share a unit, zero included."""
    ends = [v for p in found for v in (p["low"], p["high"], p["difference"], 0.0) if v is not None]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = 0.05 * (high - low) or 1.0
    return Axis(low - margin, high + margin)


def _score(metric: Metric, found: Json, axis: Axis, note: str = "") -> Json:
    low, high = (axis_end if v is None else v for v, axis_end in ((found["low"], axis.low), (found["high"], axis.high)))
    known = found["low"] is not None
    text = f"{signed(found['low'])} to {signed(found['high'])}" if known else "one question has no interval"
    return {
        "title": metric.title,
        "note": note or ("" if metric.higher else "lower is better"),
        "n": found["n"],
        "base": figure(found["base"]),
        "tuned": figure(found["tuned"]),
        "difference": signed(found["difference"]),
        "drawing": interval(low, found["difference"], high, axis, f"95 % interval {text}"),
        "interval": text + (f", {chance(found['p'])}" if found.get("p") is not None else ""),
        "verdict": found.get("verdict", ""),
    }


def chance(p: float) -> str:
    """A p value for people: p = 0.03, p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def notes(found: Json) -> list[str]:
    several = "; of several references the best one counts" if found["means"] else ""
    said = [f"Scores are points of 100{several}. ROUGE is rouge-score’s F-measure with the Porter stemmer."]
    if "perplexity" in found["metrics"]:
        said.append("Perplexity is exp of the mean loss per token of the first reference, over all questions together.")
    said.append("Intervals: paired bootstrap over questions, 10,000 draws, percentiles widened for small samples.")
    return said


def lengths(means: dict[str, float]) -> list[Json]:
    most = max(means.values(), default=1.0) or 1.0
    return [
        {"name": name, "style": name, "width": round(100 * count / most, 2), "text": f"{count:.1f} words"}
        for name, count in means.items()
    ]


def stopping(stopped: dict[str, float]) -> str:
    sides = " and ".join(f"{share:.0%} of the {name} answers" for name, share in stopped.items())
    return f"{sides} ended by themselves; the others were cut at the most tokens allowed." if sides else ""


def slices(found: Json) -> list[Json]:
    """A table for each way to slice the questions (`slices: {name: {value: {metric: paired}}}`): the deciding metric,
    and the others beside it. All rows of a metric share one scale."""
    return [
        {
            "title": name.replace("_", " "),
            "rows": _slice_rows(found, values, [found["metric"]]),
            "others": _slice_rows(found, values, rest),
        }
        for name, values in found.get("slices", {}).items()
        for rest in [[metric for metric in found["metrics"] if metric != found["metric"]]]
    ]


def _slice_rows(found: Json, values: Json, names: list[str]) -> list[Json]:
    rows = []
    for name in names:
        metric, scored = _metric(found, name), [(value, by[name]) for value, by in values.items() if name in by]
        axis = _axis(paired for _, paired in scored)
        rows += [{**_score(metric, paired, axis), "value": value} for value, paired in scored]
    return rows


def matrix(found: Json) -> Json | None:
    """Every side against every other (`sides`, `pairs`), or None where two sides were compared."""
    names = found.get("sides", [])
    if len(names) < 3:
        return None
    cells = {(pair["tuned"], pair["base"]): _cell(pair) for pair in found["pairs"]}
    cells |= {(pair["base"], pair["tuned"]): _cell(_mirror(pair)) for pair in found["pairs"]}
    return {"names": names, "rows": [(mine, [cells.get((mine, other)) for other in names]) for mine in names]}


def _cell(pair: Json) -> Json:
    return {
        "verdict": pair["verdict"],
        "style": pair["verdict"].replace(" ", "-"),
        "difference": signed(pair["difference"]),
        "chance": chance(pair["p_adjusted"]),
    }


def _mirror(pair: Json) -> Json:
    return pair | {"difference": -pair["difference"], "verdict": MIRRORED.get(pair["verdict"], pair["verdict"])}
