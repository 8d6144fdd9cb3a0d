"""report.html: a run on one page. One file that needs no network, written from the run's files alone.

Its one script (report.js) is ours and allowed by its hash; it searches and sorts the rows, and without it the page
still shows all but that.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.evaluate.metrics import shown
from luthier.evaluate.page import facts, rows, scores
from luthier.evaluate.page.template import ours, template
from luthier.runs import Run, read_json, replacing

Json = dict[str, Any]


def write_report(run: Run, name: str = "compare", path: Path | None = None) -> Path:
    """Writes report.html of `run`, or `path`, from its files, with the comparison in results/`name` if there is one."""
    with replacing(path or run.report) as file:
        file.writelines(piece.encode() for piece in _pieces(run, name))
    return path or run.report


def render(run: Run, name: str = "compare") -> str:
    """The page as text."""
    return "".join(_pieces(run, name))


def _pieces(run: Run, name: str) -> Iterator[str]:
    """The page in pieces, since it may hold many rows. All values are escaped by the template engine; data is never
    trusted to be harmless."""
    path = run.results / name / "comparison.json"
    found = read_json(path) if path.exists() else {}
    return template("report.html.jinja").generate(
        style=ours("report.css"),
        script=ours("report.js"),
        script_hash=_hash(ours("report.js")),
        version=__version__,
        warnings=found.get("warnings", []),
        compared=_compared(found, rows.read(path.with_name("rows.jsonl"), scores.names(found))) if found else None,
        **_about(run, found.get("settings", {}), found.get("sides", [])),
    )


def _hash(script: str) -> str:
    """The script's name in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _commands(run: Run, sides: list[Json]) -> list[str]:
    """What does it again, as a shell takes it: of one run all, of several sides the comparison."""
    named = [side["folder"] for side in sides if side.get("folder")]
    if len(named) > 1 or any(side.get("kind") in ("checkpoint", "adapter") for side in sides):
        return [shlex.join(["luthier", "compare", *named])]
    again = f"{run.folder}-again"
    return [
        shlex.join(["luthier", "train", str(run.folder), f"run.dir={again}"]),
        shlex.join(["luthier", "compare", again]),
    ]


def _about(run: Run, settings: Json, sides: list[Json]) -> Json:
    recipe, manifest = run.recipe, run.manifest
    return {
        "title": f"{run.folder.name} · luthier",
        "run": {
            "name": run.folder.name,
            "folder": str(run.folder),
            "base": recipe.model.base,
            "method": recipe.adapter.title,
            "date": str(manifest.get("created", ""))[:10],
        },
        "training": facts.training(run),
        "data": facts.data(run),
        "commands": _commands(run, sides),
        "provenance": facts.provenance(run, settings),
        "decisions": facts.flat(manifest.get("decisions", {})),
        "recipe": recipe.dump(),
    }


def _compared(found: Json, asked: list[Json]) -> Json:
    figures, asides = scores.scores(found)
    metrics = {name: shown(name, described) for name, described in found["metrics"].items()}
    names, kept = scores.names(found), rows.fitting(asked)
    return {
        "names": names,
        "judged": scores.judged(found),
        "verdict": scores.verdict(found),
        "scores": figures,
        "asides": asides,
        "general": scores.general(found),
        "notes": scores.notes(found),
        "several": scores.several(found),
        "slices": scores.slices(found),
        "lengths": scores.lengths(found),
        "stopping": scores.stopping(found),
        "groups": rows.groups(asked, found["metric"], metrics[found["metric"]], names),
        "rows": rows.payload(kept, found["metrics"], names),
        "left_out": _left_out(len(kept), len(asked)),
        "metrics": list(metrics.values()),
        "filters": rows.slice_values(kept),
    }


def _left_out(kept: int, count: int) -> str:
    if kept == count:
        return ""
    return f"A random draw of {kept:,} of {count:,} rows, for which one page has room; all are in results/ of the run."
