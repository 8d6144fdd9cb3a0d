"""A comparison in the terminal: the verdict in words, a table with intervals drawn, and one sample side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

from luthier.evaluate import tables
from luthier.evaluate.metrics import Metric
from luthier.evaluate.statistics.paired import Paired, figure, signed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from luthier.evaluate.comparison import Comparison

T = TypeVar("T")
Ends = tuple[float, float]
Scored = tuple[str, Metric, Paired]
HEAD = ("metric", "base", "tuned", "diff", "95 % interval")
GAP, MIN_BAR, MAX_BAR = 2, 9, 33
"""Cells between two columns, and the fewest and most that a drawn interval gets."""


@dataclass(frozen=True)
class Shown:
    """A comparison that rich can print, at the width it is given."""

    found: Comparison
    slices: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        found = self.found
        yield Padding(Text(found.sentence, style="bold"), (1, 0))
        yield _table(found, options.max_width)
        if len(found.sides) > 2:
            several = (tables.sides(found), tables.pairs(found), tables.others(found))
            yield from (Padding(table, (1, 0, 0, 0)) for table in several if table)
            yield from (Text(line, style="dim") for line in tables.spread(found))
        else:
            yield Text(_manner(found), style="dim")
        yield from (Text(line, style="dim") for line in (found.forgetting.lines if found.forgetting else ()))
        if sliced := tables.slices(found, every=self.slices):
            yield Padding(sliced, (1, 0, 0, 0))
        yield from (Text(f"note: {warning}", style="yellow") for warning in found.warnings)
        if sample := _sample(found):
            yield Padding(sample, (1, 0, 0, 0))


def render(found: Comparison, *, slices: bool = False) -> Shown:
    """What `luthier compare` prints: verdict, table, notes and one sample; readable from 40 columns up. `slices`: all
    of them, also where none stands out."""
    return Shown(found, slices)


def _table(found: Comparison, width: int) -> Table:
    """The scores in `width` cells. Where they are too few the drawing goes first; then each interval goes below its
    metric's name, which is always there."""
    from rich.table import Table

    rows, head = _rows(found), ("metric", "first", "second", *HEAD[3:]) if found.decision else HEAD
    cells: list[tuple[str, ...]] = [(title, *_figures(paired)) for title, _, paired in rows]
    widest = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    left = width - sum(widest) - GAP * len(widest)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(HEAD[0], overflow="fold")
    for name in head[1:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    if left < -GAP:
        cells = [(f"{title}\n  {bounds}", *figures) for title, *figures, bounds in cells]
    else:
        table.add_column(HEAD[-1], no_wrap=True)
    if left >= MIN_BAR:
        table.add_column("", no_wrap=True)
        cells = [(*line, bar) for line, bar in zip(cells, _bars(rows, min(left, MAX_BAR)), strict=True)]
    for place, line in enumerate(cells):
        table.add_row(*line, style="bold" if place == 0 else "dim" if line[0].startswith(" ") else "")
    return table


def _bars(rows: Sequence[Scored], width: int) -> list[str]:
    """The intervals drawn; those that share a unit share a scale."""
    shared = _ends(paired for _, metric, paired in rows if metric.unit)
    return [draw(paired, shared if metric.unit else _ends([paired]), width) for _, metric, paired in rows]


def _rows(found: Comparison) -> list[Scored]:
    """The metrics, and indented what stands beside them."""
    rows = [(found.known[name].title, found.known[name], p) for name, p in found.metrics.items()]
    rows += [(" same length", found.known[name], p) for name, p in found.matched.items()]
    rows += [(" mean of refs", found.known[name], p) for name, p in found.means.items() if name == found.first]
    return rows


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
    for name, side in zip(found.names, ("base", "tuned"), strict=True):
        table.add_row(shorten(name, 16), Text(shorten(row[side], 400)))
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

    def start(self, label: str, total: int, done: int = 0) -> None:
        """A line for `label`, or more to do on the one that it has."""
        if label in self._tasks:
            line = next(line for line in self._progress.tasks if line.id == self._tasks[label])
            self._progress.update(line.id, total=(line.total or 0) + total, advance=done)
        else:
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
    console = console or Console(quiet=True)
    # Into a file it would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        yield Bar(shown)
