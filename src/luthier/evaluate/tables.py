"""What a comparison of several sides, or of slices, adds to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.evaluate.slices import apart
from luthier.evaluate.statistics.paired import figure, signed

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.evaluate.comparison import Comparison


def sides(found: Comparison) -> Table:
    """Each side's score by the deciding metric, and how it answers."""
    table = _table(found.known[found.first].title, "score", "95 % interval", "words", "stops")
    for side in found.sides:
        score, words, stopped = side["metrics"][found.first], side["words"], side["stopped"]
        length = figure(words["mean"]) if words else ""
        ended = f"{stopped:.0%}" if stopped is not None else ""
        table.add_row(side["name"], figure(score["score"]), _bounds(score, figure), length, ended)
    return table


def pairs(found: Comparison) -> Table:
    """Every pair by the deciding metric, seeds of one recipe together; p is corrected for the number of pairs."""
    table = _table("from → to", "diff", "95 % interval", "p (Holm)", "verdict")
    for pair in found.seeds.get("pairs") or found.pairs:
        one = pair["metrics"][found.first]
        names = f"{pair['first']} → {pair['second']}"
        table.add_row(names, signed(one["difference"]), _bounds(one, signed), _p(one["p_adjusted"]), pair["verdict"])
    return table


def others(found: Comparison) -> Table | None:
    """Each side's score by the metrics that do not decide; None where there are none."""
    names = [name for name in found.metrics if name != found.first]
    table = _table("score by")
    for side in found.sides:
        table.add_column(side["name"], justify="right", overflow="fold", min_width=6)
    for name in names:
        table.add_row(found.known[name].title, *(figure(side["metrics"][name]["score"]) for side in found.sides))
    return table if names else None


def spread(found: Comparison) -> list[str]:
    """A line for each recipe of which there are several seeds: how far chance alone takes the deciding metric."""
    lines = []
    for recipe in found.seeds.get("recipes", []):
        of = recipe["metrics"][found.first]
        scores = ", ".join(map(figure, of["scores"]))
        lines.append(
            f"{recipe['name']}: {found.known[found.first].title} {scores}; "
            f"mean {figure(of['mean'])}, standard deviation {figure(of['spread'])} from seed to seed"
        )
    return lines


def slices(found: Comparison, *, every: bool) -> Table | None:
    """The slices by the deciding metric: all, or those that stand out and the whole beside them; None where none do."""
    outstanding = apart(found.slices, found.metrics[found.first], found.first)
    shown = [(s, v) for s, of in found.slices.items() for v in of if every or (s, v) in outstanding]
    if not shown:
        return None
    table = _table("slice (a hint, no verdict)", "rows", "diff", "95 % interval", "p (Holm)")
    whole = found.metrics[found.first]
    table.add_row("all questions", str(whole.n), signed(whole.difference), _range(whole.low, whole.high), _p(whole.p))
    for slicing, value in shown:
        if one := found.slices[slicing][value].get(found.first):
            p = one.p if one.adjusted is None else one.adjusted
            bounds = _range(one.low, one.high)
            table.add_row(f"{slicing}: {value}", str(one.n), signed(one.difference), bounds, _p(p))
    return table


def _table(first: str, *figures: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bounds(of: dict[str, Any], show: Any) -> str:
    return "" if of["low"] is None or of["high"] is None else f"{show(of['low'])} to {show(of['high'])}"


def _range(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
