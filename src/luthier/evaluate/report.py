"""report.html: a run on one page. One file that needs no network and no script; written from the run's files alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier import __version__
from luthier.evaluate.figures import Axis, Series, chart, histogram, interval, smooth
from luthier.evaluate.metrics import METRICS, Metric, normalise
from luthier.evaluate.paired import figure, signed
from luthier.machine import GIB
from luthier.runs import Run, read_json, write_atomic

Json = dict[str, Any]
SHOWN = 3
"""Samples of each kind: largest gains, largest losses, random."""
LONG = 400
"""Characters from which a prompt is folded away."""


def write_report(run: Run, name: str = "compare") -> Path:
    """Writes report.html of `run` from its files, with the comparison in results/`name` if there is one."""
    write_atomic(run.report, render(run, name))
    return run.report


def render(run: Run, name: str = "compare") -> str:
    """The page as text. All values are escaped by the template engine; data is never trusted to be harmless."""
    from jinja2 import Environment, StrictUndefined

    here = files("luthier.evaluate")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "report.html.jinja").read_text(encoding="utf-8"))
    style = Markup((here / "report.css").read_text(encoding="utf-8"))  # ours, and without user text
    return template.render(style=style, version=__version__, **_compared(run, name), **_about(run, name))


def _about(run: Run, name: str) -> Json:
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
        "training": _training(run),
        "data": _data(run),
        "commands": [f"luthier train {run.folder} run.dir={run.folder}-again", f"luthier compare {run.folder}-again"],
        "provenance": _provenance(run, manifest, name),
        "decisions": _flat(manifest.get("decisions", {})),
        "recipe": recipe.dump(),
    }


# The comparison.


def _compared(run: Run, name: str) -> Json:
    folder = run.results / name
    if not (folder / "comparison.json").exists():
        return {"verdict": None, "warnings": []}
    found = read_json(folder / "comparison.json")
    rows = read_rows(folder / "rows.jsonl")
    scores, asides = _scores(found)
    first, metric = found["metrics"][found["metric"]], METRICS.get(found["metric"])
    return {
        "verdict": {
            "headline": {"better": "Better", "worse": "Worse"}.get(found["verdict"], "No evidence"),
            "sentence": _sentence(found["sentence"]),
            "base": figure(first["base"]),
            "tuned": figure(first["tuned"]),
            "metric": metric.title,
            "lower": not metric.higher,
            "n": first["n"],
            "source": found["settings"].get("source", "test"),
        },
        "warnings": found["warnings"],
        "scores": scores,
        "asides": asides,
        "notes": _notes(found),
        "lengths": _lengths(found["lengths"]),
        "stopping": _stopping(found["stopped"]),
        "groups": _groups(rows, found["metric"], metric),
    }


def read_rows(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sentence(sentence: str) -> str:
    """The verdict's sentence below its headline: without the verdict, with a capital."""
    _, _, rest = sentence.partition(": ")
    return rest[:1].upper() + rest[1:] + "."


def _scores(found: Json) -> tuple[list[Json], list[Json]]:
    """The metrics, and what stands beside the verdict: the gain that is not length, the mean over several references.
    All figures in points share one scale; one with a unit of its own has its own."""
    beside = [(name, p, "both answers cut to the same length") for name, p in found["matched"].items()]
    beside += [(name, p, "mean over the references") for name, p in found["means"].items() if name == found["metric"]]
    named = [*found["metrics"].items(), *((name, p) for name, p, _ in beside)]
    shared = _axis(p for name, p in named if METRICS.get(name).unit)

    def line(name: str, paired: Json, note: str = "") -> Json:
        metric = METRICS.get(name)
        return _score(metric, paired, shared if metric.unit else _axis([paired]), note)

    return [line(name, p) for name, p in found["metrics"].items()], [line(*one) for one in beside]


def _axis(scores: Iterable[Json]) -> Axis:
    """One scale for all scores that share a unit, zero included."""
    ends = [v for p in scores for v in (p["low"], p["high"], p["difference"], 0.0) if v is not None]
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
        "base": figure(found["base"]),
        "tuned": figure(found["tuned"]),
        "difference": signed(found["difference"]),
        "drawing": interval(low, found["difference"], high, axis, f"95 % interval {text}"),
        "interval": text,
        "verdict": found["verdict"],
    }


def _notes(found: Json) -> list[str]:
    several = "; of several references the best one counts" if found["means"] else ""
    notes = [f"Scores are points of 100{several}. ROUGE is rouge-score’s F-measure with the Porter stemmer."]
    if "perplexity" in found["metrics"]:
        notes.append(
            "Perplexity is exp of the mean loss per token of the first reference, over all questions together."
        )
    notes.append("Intervals: paired bootstrap over questions, 10,000 draws, percentiles widened for small samples.")
    return notes


def _lengths(lengths: dict[str, float]) -> list[Json]:
    most = max(lengths.values(), default=1.0) or 1.0
    return [
        {"name": name, "style": name, "width": round(100 * count / most, 2), "text": f"{count:.1f} words"}
        for name, count in lengths.items()
    ]


def _stopping(stopped: dict[str, float]) -> str:
    sides = " and ".join(f"{share:.0%} of the {name} answers" for name, share in stopped.items())
    return f"{sides} ended by themselves; the others were cut at the most tokens allowed." if sides else ""


# Samples.


def _groups(rows: list[Json], name: str, metric: Metric) -> list[Json]:
    """The largest gains, the largest losses and a random draw, no row twice."""
    spoken = [row for row in rows if row["tuned"] is not None and name in row["scores"]]
    ordered = sorted(spoken, key=lambda row: _gain(row, name, metric), reverse=True)
    best = [row for row in ordered[:SHOWN] if _gain(row, name, metric) > 0]
    worst = [row for row in reversed(ordered[-SHOWN:]) if _gain(row, name, metric) < 0]
    rest = [row for row in spoken if row not in best and row not in worst]
    drawn = random.Random(0).sample(rest, min(SHOWN, len(rest)))
    kinds = (("Largest gains", best), ("Largest losses", worst), ("At random", drawn))
    return [
        {"title": title, "samples": [_sample(r, name, metric) for r in chosen]} for title, chosen in kinds if chosen
    ]


def _gain(row: Json, name: str, metric: Metric) -> float:
    score = row["scores"][name]
    return float(score["tuned"] - score["base"]) * (1 if metric.higher else -1)


def _sample(row: Json, name: str, metric: Metric) -> Json:
    score = row["scores"][name]
    prompt = _prompt(row["prompt"])
    return {
        "origin": row["origin"],
        "change": f"{metric.title} {figure(score['base'])} → {figure(score['tuned'])}",
        "prompt": prompt,
        "long": len(prompt) > LONG,
        "start": " ".join(prompt[:160].split()) + " …",
        "references": row["references"],
        "sides": [_side(row, side) for side in ("base", "tuned")],
    }


def _prompt(messages: list[Json]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _side(row: Json, side: str) -> Json:
    count, ended = row["words"][side], row["stopped"][side]
    plural = "" if count == 1 else "s"
    facts = f"{count} word{plural}" + ("" if ended else ", cut off")
    return {"name": side, "facts": facts, "words": marked(row[side], row["references"])}


def marked(text: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The text in stretches of words, each with whether the nearest reference has it in the same order."""
    said = text.split()
    matches = [SequenceMatcher(None, _keys(said), _keys(r.split()), autojunk=False) for r in references]
    if not matches:
        return [(text, True)]
    shared = [False] * len(said)
    for block in max(matches, key=lambda match: match.ratio()).get_matching_blocks():
        shared[block.a : block.a + block.size] = [True] * block.size
    stretches: list[tuple[str, bool]] = []
    for word, is_shared in zip(said, shared, strict=True):
        if stretches and stretches[-1][1] == is_shared:
            stretches[-1] = (f"{stretches[-1][0]} {word}", is_shared)
        else:
            stretches.append((word, is_shared))
    return stretches


def _keys(said: list[str]) -> list[str]:
    """Words without case and outer punctuation; a word that is all punctuation stays as it is."""
    return [re.sub(r"^\W+|\W+$", "", normalise(word)) or word for word in said]


# Training and data.


def _training(run: Run) -> Json | None:
    steps = [record for record in run.steps() if "loss" in record]
    evaluations = [record for record in run.steps() if "eval_loss" in record]
    if not steps:
        return None
    losses = [(float(r["step"]), float(r["loss"])) for r in steps]
    lines = [Series("each step", losses, "raw"), Series("smoothed", smooth(losses), "smooth")]
    if evaluations:
        points = [(float(r["step"]), float(r["eval_loss"])) for r in evaluations]
        lines.append(Series("held-out rows", points, "dots"))
    rates = [Series("learning rate", [(float(r["step"]), float(r["lr"])) for r in steps], "smooth")]
    return {
        "facts": _speed(steps),
        "loss": chart(lines, label=f"Loss from {figure(losses[0][1])} to {figure(losses[-1][1])}", x_title="step"),
        "lr": chart(rates, label="Learning rate by step", x_title="step"),
    }


def _speed(steps: list[Json]) -> list[tuple[str, str]]:
    seconds = sum(r["seconds"] for r in steps)
    tokens = sum(r["tokens"] for r in steps)
    return [
        ("steps", f"{steps[-1]['step']:,}"),
        ("epochs", f"{steps[-1]['epoch']:.2f}"),
        ("time in steps", duration(seconds)),
        ("tokens", f"{tokens:,}"),
        ("of them supervised", f"{sum(r['targets'] for r in steps):,}"),
        ("tokens a second", f"{tokens / max(seconds, 1e-9):,.0f}"),
        ("peak memory", f"{max(r['peak_bytes'] for r in steps) / GIB:.2f} GiB"),
    ]


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _data(run: Run) -> Json | None:
    path = run.data / "report.json"
    if not path.exists():
        return None
    report = read_json(path)
    rows, tokens = report["rows"], report["tokens"]
    return {
        "facts": [
            ("rows read", f"{rows['read']:,}"),
            ("rows kept", f"{rows['kept']:,}"),
            ("tokens", f"{tokens['total']:,}"),
            ("supervised", f"{tokens['supervised']:,} ({tokens['supervised'] / max(tokens['total'], 1):.0%})"),
            ("tokens cut", f"{tokens['cut']:,}"),
        ],
        "dropped": [(k.replace("_", " "), n) for k, n in sorted(rows["dropped"].items(), key=lambda item: -item[1])],
        "lengths": _token_lengths(report.get("lengths", {}), run.recipe.data.length),
    }


def _token_lengths(lengths: Json, limit: int) -> Markup:
    spread = lengths.get("histogram")
    if not spread:
        return Markup("")
    mark = limit if lengths["max"] > 0.5 * limit else None
    title = f"tokens (dashed: data.length, {limit})" if mark else "tokens"
    return histogram(spread["edges"], spread["counts"], label="Rows by tokens", x_title=title, mark=mark)


# Provenance.


def _provenance(run: Run, manifest: Json, comparison: str) -> list[tuple[str, str]]:
    path, data = run.results / comparison / "comparison.json", run.data / "report.json"
    settings = read_json(path)["settings"] if path.exists() else {}
    files = read_json(data).get("files", []) if data.exists() else []
    known = {
        "base model": run.recipe.model.base,
        "revision": settings.get("revision") or manifest.get("revision"),
        "adapter, SHA-256": settings.get("adapter"),
        "questions, SHA-256": settings.get("questions"),
        "template, SHA-256": settings.get("template"),
        **{f"{file['path']}, SHA-256": file["sha256"] for file in files if "path" in file},
        "number format": settings.get("dtype"),
        "decoding": ", ".join(f"{k} {v}" for k, v in settings.get("decoding", {}).items()),
        "seed": run.recipe.train.seed,
        "time of comparison": duration(settings["seconds"]) if "seconds" in settings else None,
        **manifest.get("versions", {}),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _flat(tree: Json, prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, str(value))]
    return pairs
