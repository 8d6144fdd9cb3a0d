"""study.html: a study on one page, written from findings.json alone. One file, no network, no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier import __version__
from luthier.evaluate.page.figures import Axis, Series, chart, interval
from luthier.evaluate.page.scores import below_headline
from luthier.evaluate.page.template import ours, template
from luthier.evaluate.statistics.paired import figure, signed
from luthier.evaluate.study.findings import expectation
from luthier.evaluate.study.view import banded, ends, labelled, scored
from luthier.runs import read_json, write_atomic

Json = dict[str, Any]

_HEADLINES = {
    "more helps": "More data helps",
    "helps": "Training helps",
    "no evidence": "No evidence",
    "worse": "Worse",
    "winner": "A winner",
    "no winner": "No winner",
}


def write_page(folder: Path) -> Path:
    """Writes study.html of the study in `folder` from its findings."""
    page = folder / "study.html"
    write_atomic(page, render(read_json(folder / "findings.json")))
    return page


def render(found: Json) -> str:
    """The page as text. All values are escaped by the template engine."""
    return template("study/page.html.jinja").render(
        style=ours("report.css"),
        version=__version__,
        found=found,
        headline=_HEADLINES[found["verdict"]],
        sentence=below_headline(found["sentence"]),
        title=found["metric_title"][:1].upper() + found["metric_title"][1:],
        what="rows" if found["over"] is None else found["over"],
        score=_score(found),
        loss=_loss(found),
        base_loss=_figure_of_loss(labelled(found)[0][1]),
        rows=_rows(found),
        differences=_differences(found),
        next=_next(found),
        cells=_cells(found),
    )


def _score(found: Json) -> Markup:
    if found["over"] is not None:
        return Markup("")
    lines = _bands(found["points"], "score", "low", "high") + _fitted(found["fit"])
    if found["chance"] is not None and (following := found["points"][-1]["size"]):
        lines.append(Series("guessing", [(0.0, found["chance"]), (float(following), found["chance"])], "raw"))
    return chart(lines, label=f"{found['metric_title']} by number of rows", x_title="rows learned from")


def _loss(found: Json) -> Markup:
    """Of the trained points: the first rows lower it so much that nothing else could be seen beside the base."""
    if found["over"] is not None or found["points"][0]["validation_loss"] is None:
        return Markup("")
    trained = found["points"][1:]
    lines = _bands(trained, "validation_loss", "validation_low", "validation_high") + _fitted(found["loss_fit"])
    return chart(lines, label="Validation loss by number of rows", x_title="rows learned from")


def _bands(points: list[Json], middle: str, low: str, high: str) -> list[Series]:
    known = [point for point in points if point[middle] is not None]
    within = [point for point in known if point[low] is not None]
    return [
        Series("95 % band", [(float(p["size"]), float(p[high])) for p in within], "raw"),
        Series("", [(float(p["size"]), float(p[low])) for p in within], "raw"),
        Series("measured", [(float(p["size"]), float(p[middle])) for p in known], "dots"),
    ]


def _fitted(fit: Json | None) -> list[Series]:
    """The curve from the smallest trained size to the next doubling, where its interval stands."""
    if fit is None:
        return []
    expected, path = fit["next"], [(float(size), float(score)) for size, score in fit["path"]]
    ends = [(float(expected["size"]), float(expected[end])) for end in ("low", "high")]
    return [Series("fitted curve", path, "smooth"), Series("", ends, "smooth")]


def _rows(found: Json) -> list[Json]:
    """A line of the table for each point, all bands on one scale."""
    bounds = [end for _, point in labelled(found) if point["score"] is not None for end in ends(point)]
    low, high = min(bounds, default=0.0), max(bounds, default=0.0)
    margin = 0.05 * (high - low) or 1.0
    axis = Axis(low - margin, high + margin)
    return [_row(label, point, axis) for label, point in labelled(found)]


def _row(label: str, point: Json, axis: Axis) -> Json:
    row = {
        "label": "without training" if label in ("0", "base") else label,
        "seeds": len(point["seeds"]) or "",
        "score": scored(point),
        "loss": _figure_of_loss(point),
    }
    if point["score"] is None:
        return row | {"band": "", "drawing": ""}
    (low, high), band = ends(point), banded(point)
    return row | {"band": band, "drawing": interval(low, point["score"], high, axis, f"95 % band {band}")}


def _figure_of_loss(point: Json) -> str:
    return "" if point["validation_loss"] is None else f"{point['validation_loss']:.3f}"


def _differences(found: Json) -> list[Json]:
    return [
        {
            "pair": f"{one['second']} − {one['first']}",
            "difference": signed(one["value"]),
            "interval": "not known" if one["low"] is None else f"{signed(one['low'])} to {signed(one['high'])}",
            "p": f"{one['p']:.2g}",
        }
        for one in found["differences"]
    ]


def _next(found: Json) -> Json | None:
    fit = found["fit"]
    if fit is None:
        return None
    told = {"size": f"{fit['next']['size']:,}", "gain": expectation(fit), "check": ""}
    if check := fit["check"]:
        where = "inside" if check["inside"] else "outside"
        told["check"] = (
            f"Without the largest size, the curve foresees {figure(check['low'])} to {figure(check['high'])} for it; "
            f"it measured {figure(check['measured'])}, {where} that interval."
        )
    return told


def _cells(found: Json) -> list[Json]:
    return [
        {
            "name": cell["folder"].rpartition("/")[2],
            "report": cell["report"],
            "score": "diverged" if cell["failed"] else figure(cell["score"]),
        }
        for cell in found["cells"]
    ]
