"""A comparison in the terminal: the verdict in words, a table with intervals drawn, and one sample side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

from luthier.evaluate.paired import Paired, figure, signed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from luthier.evaluate.comparison import Comparison

T = TypeVar("T")
Ends = tuple[float, float]
FIXED, MIN_BAR, MAX_BAR = 51, 9, 33
"""Columns that the table needs beside the drawn intervals, and the fewest and most cells that these get."""


@dataclass(frozen=True)
class Shown:
    """A comparison that rich can print, at the width it is given."""

    found: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        found = self.found
        yield Padding(Text(found.sentence, style="bold"), (1, 0))
        yield _table(found, min(max(options.max_width - FIXED, MIN_BAR), MAX_BAR))
        yield Text(_manner(found), style="dim")
        yield from (Text(f"note: {warning}", style="yellow") for warning in found.warnings)
        if sample := _sample(found):
            yield Padding(sample, (1, 0, 0, 0))


def render(found: Comparison) -> Shown:
    """What `luthier compare` prints: verdict, table, notes and one sample; readable from 60 columns up."""
    return Shown(found)


def _table(found: Comparison, width: int) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("metric")
    for name in ("base", "tuned", "diff"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("", no_wrap=True)
    rows = [(found.known[name].title, found.known[name], p) for name, p in found.metrics.items()]
    rows += [(" same length", found.known[name], p) for name, p in found.matched.items()]
    rows += [(" mean of refs", found.known[name], p) for name, p in found.means.items() if name == found.first]
    shared = _ends(paired for _, metric, paired in rows if metric.unit)
    for place, (title, metric, paired) in enumerate(rows):
        drawn = draw(paired, shared if metric.unit else _ends([paired]), width)
        style = "bold" if place == 0 else "dim" if title.startswith(" ") else ""
        table.add_row(title, *_figures(paired), drawn, style=style)
    return table


def _figures(paired: Paired) -> tuple[str, str, str, str]:
    bounds = f"{signed(paired.low)} to {signed(paired.high)}"
    return figure(paired.base), figure(paired.tuned), signed(paired.difference), bounds


def draw(paired: Paired, ends: Ends, width: int) -> str:
    """The interval as text: `·` where it is not, `│` at zero, `━` where it is, `┿` where it holds zero, `●` at the
    estimate."""
    low, dot, high, zero = (_cell(value, ends, width) for value in (paired.low, paired.difference, paired.high, 0.0))
    cells = ["·"] * width
    cells[low : high + 1] = ["━"] * (high + 1 - low)
    cells[zero] = "┿" if low <= zero <= high else "│"
    cells[dot] = "●"
    return "".join(cells)


def _cell(value: float, ends: Ends, width: int) -> int:
    low, high = ends
    share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
    return round(share * (width - 1))


def _ends(scores: Iterable[Paired]) -> Ends:
    """From the least finite bound to the greatest, zero included, so that drawn intervals share one scale."""
    bounds = [v for p in scores for v in (p.low, p.high, p.difference, 0.0) if isfinite(v)]
    return min(bounds), max(bounds)


def _manner(found: Comparison) -> str:
    """How long the answers are and how they end, in one line."""
    lengths = ", ".join(f"{name} {figure(count)}" for name, count in found.lengths.items())
    stops = ", ".join(f"{name} {share:.0%}" for name, share in found.stopped.items())
    return f"words: {lengths}" + (f"; stops by itself: {stops}" if stops else "")


def _sample(found: Comparison) -> Table | None:
    """The median row by the deciding metric's gain: neither flattering nor harsh."""
    from rich.table import Table
    from rich.text import Text

    rows = [row for row in found.rows if row["tuned"] is not None and found.first in row["scores"]]
    if not rows:
        return None
    scores = {id(row): row["scores"][found.first] for row in rows}
    row = sorted(rows, key=lambda row: scores[id(row)]["tuned"] - scores[id(row)]["base"])[len(rows) // 2]
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", Text(shorten(" ".join(row["prompt"][-1]["content"].split()), 300)))
    for reference in row["references"][:1]:
        table.add_row("reference", Text(shorten(reference, 400)))
    for side in ("base", "tuned"):
        table.add_row(side, Text(shorten(row[side], 400)))
    return table


def printable(text: str) -> str:
    """The text without control characters: what a model says must not move the cursor or rename the window."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def shorten(text: str, limit: int) -> str:
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 2].rstrip() + " …"


class Bar:
    """Progress for people; silent without a console."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def start(self, label: str, total: int | None, done: int = 0) -> None:
        self._tasks[label] = self._progress.add_task(label, total=total, completed=done)

    def advance(self, label: str, done: int) -> None:
        """Moves a line that was started. May be called from any thread."""
        self._progress.advance(self._tasks[label], done)

    def wait(self, what: str, work: Callable[[], T]) -> T:
        """Does `work` under a line of unknown length."""
        task = self._progress.add_task(what, total=None)
        result = work()
        self._progress.update(task, total=1, completed=1)
        return result


@contextmanager
def progress(console: Console | None) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(quiet=True), transient=True) as shown:
        yield Bar(shown)
