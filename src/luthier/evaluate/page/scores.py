"""The comparison's figures as the page shows them: comparison.json in, texts and drawings out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.evaluate.metrics import Metric, shown
from luthier.evaluate.page.figures import Axis, interval
from luthier.evaluate.statistics.paired import figure, signed

Json = dict[str, Any]
HEADLINES = {"better": "Better", "worse": "Worse"}
METHODS = {
    "bootstrap": "Intervals: paired bootstrap over questions, 10,000 draws, percentiles widened for small samples.",
    "score": "Intervals of right or wrong: Tango’s score interval for paired shares.",
    "seeds": "Intervals: Student’s, of the variances from seed to seed and from question to question together.",
}
MIRRORED = {"better": "worse", "worse": "better"}


def names(found: Json) -> list[str]:
    """The sides: first the two whose difference stands for the whole, then the others that were compared."""
    pair = found.get("pair", ["base", "tuned"])
    return [*pair, *(side["name"] for side in found.get("sides", []) if side["name"] not in pair)]


def judged(found: Json) -> list[str]:
    """The two whose difference stands for the whole; seeds that are judged together, by their recipe."""
    pair = names(found)[:2]
    if found["metrics"][found["metric"]].get("seeds") is None:
        return pair
    for recipe in found["seeds"]["recipes"]:
        members = [found["sides"][place]["name"] for place in recipe["sides"]]
        pair = [recipe["name"] if name in members else name for name in pair]
    return pair


def verdict(found: Json) -> Json:
    """What stands at the top: the headline, its sentence, and both sides' figures."""
    first, metric = found["metrics"][found["metric"]], _metric(found, found["metric"])
    return {
        "headline": _headline(found),
        "sentence": below_headline(found["sentence"]),
        "base": figure(first["base"]),
        "tuned": figure(first["tuned"]),
        "metric": metric.title,
        "lower": not metric.higher,
        "n": first["n"],
        "source": found["settings"].get("source", "test"),
        "detectable": _detectable(first, metric),
    }


def _headline(found: Json) -> str:
    if winner := found.get("winner"):
        return f"Best: {winner}"
    if found["sentence"].startswith("no winner"):
        return "No winner"
    return HEADLINES.get(found["verdict"], "No evidence")


def _metric(found: Json, name: str) -> Metric:
    return shown(name, found["metrics"][name])


def below_headline(sentence: str) -> str:
    """The verdict's sentence below its headline: without the verdict, with a capital."""
    _, _, rest = sentence.partition(": ")
    return rest[:1].upper() + rest[1:] + "."


def _detectable(found: Json, metric: Metric) -> str:
    """What a test set like this one can tell; empty without a verdict, where a warning says it."""
    least = found.get("detectable")
    if least is None or found["verdict"] == "no evidence":
        return ""
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{found['n']} questions like these find a true difference of {figure(least)}{unit} four times in five."


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
    lacking = "one question has no interval" if found["n"] == 1 else "not known"
    text = f"{signed(found['low'])} to {signed(found['high'])}" if known else lacking
    return {
        "title": metric.title,
        "note": note or ("" if metric.higher else "lower is better"),
        "n": found["n"],
        "base": figure(found["base"]),
        "tuned": figure(found["tuned"]),
        "difference": signed(found["difference"]),
        "drawing": interval(low, found["difference"], high, axis, f"95 % interval {text}"),
        "interval": ", ".join(filter(None, (text, _corrected(found)))),
        "verdict": found.get("verdict", ""),
    }


def _corrected(found: Json) -> str:
    """A comparison's p value; empty where there is none."""
    if found.get("adjusted") is not None:
        return f"{chance(found['adjusted'])} corrected for {found['family']}"
    return "" if found.get("p") is None else chance(found["p"])


def chance(p: float) -> str:
    """A p value for people: p = 0.03, p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def general(found: Json) -> list[Json]:
    """What became of general abilities (`forgetting: {metric: paired}`), each on a scale of its own."""
    return [
        _score(shown(name, {"unit": "", **paired}), paired, _axis([paired]))
        for name, paired in found.get("forgetting", {}).items()
    ]


def notes(found: Json) -> list[str]:
    several = "; of several references the best one counts" if found["means"] else ""
    said = [f"Scores are points of 100{several}. ROUGE is rouge-score’s F-measure with the Porter stemmer."]
    if "perplexity" in found["metrics"]:
        said.append("Perplexity is exp of the mean loss per token of the first reference, over all questions together.")
    said += [METHODS[method] for method in METHODS if method in {p.get("method") for p in found["metrics"].values()}]
    return said


def lengths(found: Json) -> list[Json]:
    """Mean words of an answer on each side and of a reference, as bars."""
    means, called = found["lengths"], _called(found)
    most = max(means.values(), default=1.0) or 1.0
    return [
        {"name": called[name], "style": name, "width": round(100 * count / most, 2), "text": f"{count:.1f} words"}
        for name, count in means.items()
    ]


def stopping(found: Json) -> str:
    called = _called(found)
    sides = " and ".join(f"{share:.0%} of the {called[name]} answers" for name, share in found["stopped"].items())
    return f"{sides} ended by themselves; the others were cut at the most tokens allowed." if sides else ""


def _called(found: Json) -> dict[str, str]:
    """What a comparison of two calls its sides, and what people do."""
    return dict(zip(("base", "tuned"), names(found), strict=False)) | {"reference": "reference"}


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


def several(found: Json) -> Json | None:
    """Each side with its score (`sides`), and each against each other (`pairs`, or those of `seeds`, where seeds of one
    recipe stand together); None where two were compared."""
    metric = found["metric"]
    if len(found.get("sides", [])) < 3:
        return None
    pairs = found.get("seeds", {}).get("pairs") or found["pairs"]
    judged = [(pair["first"], pair["second"], pair["metrics"][metric]) for pair in pairs]
    known = list(dict.fromkeys(name for first, second, _ in judged for name in (first, second)))
    cells = {(second, first): _cell(paired) for first, second, paired in judged}
    cells |= {(first, second): _cell(_mirrored(paired)) for first, second, paired in judged}
    return {
        "names": known,
        "scores": _alone(found["sides"], metric),
        "others": [_by_side(found, name) for name in _others(found)],
        "seeds": [_spread(found, recipe) for recipe in found.get("seeds", {}).get("recipes", [])],
        "rows": [(mine, [cells.get((mine, other)) for other in known]) for mine in known],
    }


def _others(found: Json) -> list[str]:
    """Metrics that do not decide and that every side has."""
    shared = set.intersection(*(set(side["metrics"]) for side in found["sides"]))
    return [name for name in found["metrics"] if name in shared and name != found["metric"]]


def _by_side(found: Json, name: str) -> Json:
    """Each side's score by a metric that does not decide."""
    scores = [figure(side["metrics"][name]["score"]) for side in found["sides"]]
    return {"title": _metric(found, name).title, "scores": scores}


def _spread(found: Json, recipe: Json) -> Json:
    """What seeds of one recipe do to the deciding metric."""
    of, names = recipe["metrics"][found["metric"]], [found["sides"][place]["name"] for place in recipe["sides"]]
    return {
        "name": recipe["name"],
        "scores": ", ".join(f"{name} {figure(score)}" for name, score in zip(names, of["scores"], strict=True)),
        "mean": figure(of["mean"]),
        "spread": figure(of["spread"]),
    }


def _alone(sides: list[Json], metric: str) -> list[Json]:
    """Each side's score with its own interval, all on one scale."""
    scored = [(side, side["metrics"][metric]) for side in sides]
    ends = [v for _, one in scored for v in (one["score"], one["low"], one["high"]) if v is not None]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    return [_side(side, one, Axis(min(ends) - margin, max(ends) + margin)) for side, one in scored]


def _side(side: Json, found: Json, axis: Axis) -> Json:
    low, high = (found["score"] if end is None else end for end in (found["low"], found["high"]))
    text = f"{figure(low)} to {figure(high)}"
    return {
        "name": side["name"],
        "about": side.get("adapter") or "untouched",
        "score": figure(found["score"]),
        "drawing": interval(low, found["score"], high, axis, f"95 % interval {text}", zero=None),
        "interval": text,
        "words": f"{side['words']['mean']:.1f}" if side.get("words") else "–",
    }


def _cell(paired: Json) -> Json:
    return {
        "verdict": paired["verdict"],
        "style": paired["verdict"].replace(" ", "-"),
        "difference": signed(paired["difference"]),
        "chance": chance(paired["p_adjusted"]),
    }


def _mirrored(paired: Json) -> Json:
    turned = MIRRORED.get(paired["verdict"], paired["verdict"])
    return paired | {"difference": -paired["difference"], "verdict": turned}
