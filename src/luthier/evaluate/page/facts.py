"""What surrounds a comparison on the page: training, memory and speed, data, and where everything came from."""

from __future__ import annotations

import shlex
from math import isfinite
from typing import Any

from markupsafe import Markup

from luthier.evaluate.page.figures import Series, chart, histogram, smooth
from luthier.evaluate.statistics.paired import figure
from luthier.machine import GIB
from luthier.runs import Run, read_json

Json = dict[str, Any]
Pairs = list[tuple[str, str]]


# Training.


def training(run: Run) -> Json | None:
    """The loss curves and what the steps took, from metrics.jsonl; None before the first step."""
    records = run.steps()
    steps = [record for record in records if "loss" in record]
    heldout = [(float(r["step"]), float(r["eval_loss"])) for r in records if known(r.get("eval_loss"))]
    if not steps:
        return None
    losses = [(float(r["step"]), float(r["loss"])) for r in steps]
    lines = [Series("training, each step", losses, "raw"), Series("training, smoothed", smooth(losses), "smooth")]
    lines += [Series("held-out rows", heldout, "dots")] if heldout else []
    rates = [Series("learning rate", [(float(r["step"]), float(r["lr"])) for r in steps], "smooth")]
    peak, predicted = max(r["peak_bytes"] for r in steps), run.manifest.get("decisions", {}).get("predicted_peak_bytes")
    return {
        "loss": chart(lines, label=_spoken(losses, heldout), x_title="step"),
        "lr": chart(rates, label="Learning rate by step", x_title="step"),
        "facts": _learned(steps, heldout),
        "speed": _speed(steps),
        "memory": _memory(peak, predicted),
        "memory_said": _foreseen(peak, predicted),
    }


def known(figure: float | None) -> bool:
    """Whether it is finite: one that was not is null, in older files NaN."""
    return figure is not None and isfinite(figure)


def _spoken(losses: list[tuple[float, float]], heldout: list[tuple[float, float]]) -> str:
    """The chart in words, for who cannot see it."""
    said = f"Training loss from {figure(losses[0][1])} to {figure(losses[-1][1])}"
    return said + (f"; held-out loss from {figure(heldout[0][1])} to {figure(heldout[-1][1])}" if heldout else "")


def _learned(steps: list[Json], heldout: list[tuple[float, float]]) -> Pairs:
    facts = [
        ("steps", f"{steps[-1]['step']:,}"),
        ("epochs", f"{steps[-1]['epoch']:.2f}"),
        ("training loss, last step", f"{steps[-1]['loss']:.3f}"),
    ]
    if heldout:
        step, least = min(heldout, key=lambda point: point[1])
        facts.append(("held-out loss, least", f"{least:.3f} at step {step:,.0f}"))
    return facts


def _speed(steps: list[Json]) -> Pairs:
    seconds = sum(r["seconds"] for r in steps)
    tokens = sum(r["tokens"] for r in steps)
    return [
        ("time in steps", duration(seconds)),
        ("a step", duration(seconds / len(steps))),
        ("tokens", f"{tokens:,}"),
        ("of them supervised", f"{sum(r['targets'] for r in steps):,}"),
        ("tokens a second", f"{tokens / max(seconds, 1e-9):,.0f}"),
    ]


def _memory(peak: int, predicted: int | None) -> list[Json]:
    """Bars of the peak that was planned, where the run recorded it, and of the peak that was measured."""
    bars = [("planned", "base", predicted), ("measured", "tuned", peak)]
    most = max(peak, predicted or 0) or 1
    return [
        {"name": name, "style": style, "width": round(100 * size / most, 2), "text": f"{size / GIB:.2f} GiB"}
        for name, style, size in bars
        if size
    ]


def _foreseen(peak: int, predicted: int | None) -> str:
    if not predicted:
        return ""
    off = peak / predicted - 1
    return f"The peak was {abs(off):.0%} {'above' if off > 0 else 'below'} the plan."


def duration(seconds: float) -> str:
    """0.43 s, 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# Data.


def data(run: Run) -> Json | None:
    """The data report in short, from data/report.json; None before the data was read."""
    path = run.data / "report.json"
    if not path.exists():
        return None
    report = read_json(path)
    rows = report["rows"]
    return {
        "facts": _counts(report),
        "dropped": [(k.replace("_", " "), n) for k, n in sorted(rows["dropped"].items(), key=lambda item: -item[1])],
        "doubts": _doubts(report),
        "files": [_file(file) for file in report.get("files", []) if "path" in file],
        "lengths": _token_lengths(report.get("lengths", {}), run.recipe.data.length),
    }


def _counts(report: Json) -> Pairs:
    rows, tokens = report["rows"], report["tokens"]
    parts = ((part, report.get(part, {}).get("rows")) for part in ("train", "heldout", "test"))
    titles = {"train": "rows to train on", "heldout": "held-out rows", "test": "test rows"}
    return [
        ("rows read", f"{rows['read']:,}"),
        ("rows kept", f"{rows['kept']:,}"),
        *((titles[part], f"{count:,}") for part, count in parts if count is not None),
        ("tokens", f"{tokens['total']:,}"),
        ("supervised", f"{tokens['supervised']:,} ({tokens['supervised'] / max(tokens['total'], 1):.0%})"),
        ("tokens cut", f"{tokens['cut']:,}"),
    ]


def _doubts(report: Json) -> list[str]:
    """What makes a good score less believable: rows seen twice, test rows seen in training."""
    kinds = {"leaks": "of the test rows also among the training rows", "duplicates": "among the training rows"}
    return [
        f"{count:,} {kind} duplicate{'' if count == 1 else 's'} {where}"
        for key, where in kinds.items()
        for kind, count in report.get(key, {}).items()
        if isinstance(count, int) and count
    ]


def _file(file: Json) -> tuple[str, str, str, str]:
    return file["path"], file.get("part", ""), file.get("format", ""), f"{file.get('rows', 0):,}"


def _token_lengths(lengths: Json, limit: int) -> Markup:
    spread = lengths.get("histogram")
    if not spread:
        return Markup("")
    mark = limit if lengths["max"] > 0.5 * limit else None
    title = f"tokens (dashed: data.length, {limit})" if mark else "tokens"
    label = f"Rows by tokens, from {lengths['min']:,} to {lengths['max']:,}"
    return histogram(spread["edges"], spread["counts"], label=label, x_title=title, mark=mark)


# Provenance.


def provenance(run: Run, settings: Json) -> list[tuple[str, Pairs]]:
    """Groups of names and values that say what was run, on what; a value that nobody recorded is left out."""
    manifest = run.manifest
    path = run.data / "report.json"
    files = read_json(path).get("files", []) if path.exists() else []
    machine = manifest.get("machine", {})
    known: dict[str, Json] = {
        "Model and adapter": {
            "base model": run.recipe.model.base,
            "revision": settings.get("revision") or manifest.get("revision"),
            "weights": settings.get("weights"),
            "adapter, SHA-256": settings.get("adapter"),
            "template, SHA-256": settings.get("template"),
            "number format": settings.get("dtype"),
        },
        "Questions and answers": {
            "questions, SHA-256": settings.get("questions"),
            "decoding": ", ".join(f"{k} {v}" for k, v in settings.get("decoding", {}).items()),
            "resamples": settings.get("resamples"),
            "time of comparison": duration(settings["seconds"]) if "seconds" in settings else None,
        },
        "Data files, SHA-256": {file["path"]: file.get("sha256") for file in files if "path" in file},
        "Run": {
            "command": shlex.join(manifest.get("command", [])),
            "created": manifest.get("created"),
            "seed": run.recipe.train.seed,
            "cores": machine.get("cores"),
            "memory": f"{machine['memory'] / GIB:.1f} GiB" if machine.get("memory") else None,
            "GPUs": ", ".join(str(gpu.get("name", "")) for gpu in machine.get("gpus", [])),
        },
        "Versions": {**manifest.get("versions", {}), **settings.get("versions", {})},
    }
    return [(title, shown) for title, values in known.items() if (shown := _known(values))]


def _known(values: Json) -> Pairs:
    return [(name, str(value)) for name, value in values.items() if value not in (None, "")]


def flat(tree: Json, prefix: str = "") -> Pairs:
    """A tree as names with dots and their values."""
    pairs: Pairs = []
    for key, value in tree.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return pairs
