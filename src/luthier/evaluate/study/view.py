"""A study in the terminal: progress over its cells, then a table, a drawn curve with bands, and the sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.evaluate.statistics.paired import figure
from luthier.evaluate.study.findings import Findings
from luthier.registry import counted
from luthier.train.view import displayed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.progress import Progress, TaskID
    from rich.table import Table

Json = dict[str, Any]
Event = dict[str, Any]

HEIGHT = 10
"""Lines of the drawn curve."""


@contextmanager
def watching(console: Console | None) -> Iterator[Callable[[Event], None]]:
    """Gives the function that events go to: a bar where there is a terminal, else a line for each cell."""
    with displayed(console, _Bar, _Lines) as emit:
        yield emit


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console, self.done, self.cells = console, 0, 0

    def __call__(self, event: Event) -> None:
        match event["event"]:
            case "cells":
                self.done, self.cells = len(event["done"]), len(event["steps"])
                self._say(_begins(event))
            case "scored":
                self.done += 1
                self._say(f"{event['cell']}: done ({self.done} of {self.cells})")
            case "start" if event["resumed_from"]:
                self._say(f"{event['cell']}: going on from step {event['resumed_from']}")
            case "note":
                self._say(_note(event))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """One bar over all steps of all cells, and a line for each cell in work; remarks scroll above them."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[figures]}"))
        self.display: Progress = Display(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.whole: TaskID = self.display.add_task("cells", total=None, figures="")
        self.tasks: dict[str, TaskID] = {}
        self.steps: dict[str, int] = {}
        self.done: set[str] = set()

    def __enter__(self) -> _Bar:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def __call__(self, event: Event) -> None:
        cell = event.get("cell", "")
        match event["event"]:
            case "cells":
                self._begin(event)
            case "cell":
                self.tasks[cell] = self.display.add_task(cell, total=self.steps[cell], figures="")
            case "start" if cell in self.tasks:
                self.steps[cell] = event["steps"]  # in files of other weights there are more or fewer than were counted
                self.display.update(self.tasks[cell], total=event["steps"], completed=event["resumed_from"])
            case "step" if cell in self.tasks:
                self.display.update(self.tasks[cell], completed=event["step"], figures=f"loss {event['loss']:.3f}")
            case "answering" if cell in self.tasks:
                self.display.update(self.tasks[cell], completed=self.steps[cell], figures="answering")
            case "scored":
                self.done.add(cell)
                self._drop(cell)
            case "report":
                self.display.update(self.whole, description=f"report {event['number']} of {event['of']}")
            case "note":
                self.display.console.print(_note(event), markup=False, highlight=False)
        self._count()

    def _begin(self, event: Event) -> None:
        for cell in list(self.tasks):
            self._drop(cell)
        self.steps, self.done = dict(event["steps"]), set(event["done"])
        self.display.console.print(_begins(event), markup=False, highlight=False)

    def _drop(self, cell: str) -> None:
        if cell in self.tasks:
            self.display.remove_task(self.tasks.pop(cell))

    def _count(self) -> None:
        """Where the whole is: the steps of finished cells, and those made in the others."""
        made = sum(self.steps.get(cell, 0) for cell in self.done)
        made += sum(int(task.completed) for task in self.display.tasks if task.id in self.tasks.values())
        total, figures = sum(self.steps.values()), f"{len(self.done)}/{len(self.steps)}"
        self.display.update(self.whole, total=total or None, completed=made, figures=figures)


def _begins(event: Event) -> str:
    left = counted(len(event["steps"]) - len(event["done"]), "cell")
    done = f", {len(event['done'])} done" if event["done"] else ""
    return f"{left} to train{done}; {counted(event['workers'], 'worker')}"


def _note(event: Event) -> str:
    return f"{event['cell']}: {event['text']}" if "cell" in event else str(event["text"])


# --- what came out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """Findings that rich can print, at the width it is given; readable from 60 columns up."""

    found: Json

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        found = self.found
        yield Padding(Text(found["sentence"], style="bold"), (1, 0))
        yield _table(found)
        if drawing := draw(found, min(options.max_width, 78), HEIGHT):
            yield Padding(Text(drawing, no_wrap=True), (1, 0, 0, 0))
        yield from (Text(f"note: {warning}", style="yellow") for warning in found["warnings"])


def render(found: Findings) -> Shown:
    """What `luthier study` prints: the sentence, a table and the curve."""
    return Shown(found.as_dict())


def _table(found: Json) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("rows" if found["over"] is None else found["over"], justify="right", no_wrap=True)
    for name in ("score", "95 % band", "seeds", "validation loss"):
        table.add_column(name, justify="right", no_wrap=name != "validation loss")
    for label, point in labelled(found):
        band = banded(point) if point["score"] is not None else ""
        loss = f"{point['validation_loss']:.3f}" if point["validation_loss"] is not None else ""
        table.add_row(label, scored(point), band, str(len(point["seeds"]) or ""), loss, style=_style(found, point))
    return table


def _style(found: Json, point: Json) -> str:
    if found["winner"] is not None and point.get("value") == found["winner"]:
        return "bold"
    return "dim" if not point["seeds"] else ""


def labelled(found: Json) -> list[tuple[str, Json]]:
    """The points by what people call them, the base first."""
    base = [("base", found["base"])] if found["base"] else []
    return base + [(f"{p['size']:,}" if "size" in p else str(p["value"]), p) for p in found["points"]]


def scored(point: Json) -> str:
    """The score of a point, in words: all its trainings may have diverged, and the base's need not be finite."""
    return "diverged" if point["score"] is None and "failed" in point else figure(point["score"])


def banded(point: Json) -> str:
    """The band of a point with a score, in words."""
    return "not known" if point["low"] is None else f"{figure(point['low'])} to {figure(point['high'])}"


def ends(point: Json) -> tuple[float, float]:
    """Of a point's band, to draw it; of one that is not known only the score."""
    return (point["score"], point["score"]) if point["low"] is None else (point["low"], point["high"])


class _Mark(NamedTuple):
    """What is drawn of a point: its band, and a sign at its score."""

    label: str
    score: float
    low: float
    high: float
    sign: str


def draw(found: Json, width: int, height: int) -> str:
    """The points with their bands as text: `●` at the score, `│` over the band, `┄` at chance. Sizes are to scale, and
    where the next doubling is expected stands `○`; values of a setting stand side by side."""
    marks = _marks(found)
    if len(marks) < 2:
        return ""
    top, bottom = max(mark.high for mark in marks), min(mark.low for mark in marks)
    scale, names = [figure(top), figure(bottom)], [mark.label for mark in marks]
    margin = max(map(len, scale)) + 1
    columns = _columns(found, names, width - margin - 4)

    def line(score: float) -> int:
        return round((height - 1) * (top - score) / ((top - bottom) or 1.0))

    cells = [[" "] * (width - margin) for _ in range(height)]
    if found["chance"] is not None and bottom <= found["chance"] <= top:
        cells[line(found["chance"])] = ["┄"] * (width - margin)
    for column, mark in zip(columns, marks, strict=True):
        for row in range(line(mark.high), line(mark.low) + 1):
            cells[row][column] = "│"
        cells[line(mark.score)][column] = mark.sign
    sides = [scale[0], *[""] * (height - 2), scale[1]]
    lines = [f"{side:>{margin - 1}} {''.join(row).rstrip()}" for side, row in zip(sides, cells, strict=True)]
    return "\n".join([*lines, " " * margin + _under(columns, names, width - margin)])


def _marks(found: Json) -> list[_Mark]:
    points = [(label, point) for label, point in labelled(found) if point["score"] is not None]
    marks = [_Mark(label, point["score"], *ends(point), "●") for label, point in points]
    if found["fit"]:
        following = found["fit"]["next"]
        marks.append(_Mark(f"{following['size']:,}", following["value"], following["low"], following["high"], "○"))
    return marks


def _columns(found: Json, names: Sequence[str], width: int) -> list[int]:
    """Where each mark stands: sizes to scale, values evenly."""
    if found["over"] is None:
        sizes = [int(name.replace(",", "")) for name in names]
        return [2 + round((width - 1) * size / max(sizes)) for size in sizes]
    return [2 + round((width - 1) * place / max(1, len(names) - 1)) for place in range(len(names))]


def _under(columns: Sequence[int], names: Sequence[str], width: int) -> str:
    """The names below their columns; one that would touch its neighbour is left out."""
    line = ""
    for column, name in zip(columns, names, strict=True):
        start = min(max(0, column - len(name) // 2), width - len(name))
        if start >= len(line) + bool(line):
            line = line.ljust(start) + name
    return line
