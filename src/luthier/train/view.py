"""What a person sees of training: a bar where there is a terminal, plain lines where there is none.

Events, as dicts with the key `event`: decisions, start, rehearsal, step, evaluation, sample, checkpoint, note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from luthier.machine import GIB
from luthier.registry import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Event = dict[str, Any]
Emit = Callable[[Event], None]


@contextmanager
def show(console: Console | None, progress: Emit | None = None) -> Iterator[Emit]:
    """Gives the function that events go to: `progress` if given, else a display on `console`, if any."""
    if progress is not None:
        yield progress
        return
    with displayed(console, _Bar, _Lines) as emit:
        yield emit


@contextmanager
def displayed(
    console: Console | None,
    bar: Callable[[Console], AbstractContextManager[Emit]],
    lines: Callable[[Console], Emit],
) -> Iterator[Emit]:
    """What events go to: a bar where there is a terminal, else lines, or nothing."""
    if console is None:
        yield lambda event: None
    elif console.is_terminal:
        with bar(console) as emit:
            yield emit
    else:
        yield lines(console)


class _Lines:
    """A line now and then: about twenty of a run's steps, and all that is rarer."""

    def __init__(self, console: Console) -> None:
        self.console, self.steps = console, 1

    def __call__(self, event: Event) -> None:
        if event["event"] == "start":
            self.steps = event["steps"]
        if text := self._text(event):
            self.console.print(text, markup=False, highlight=False)

    def _text(self, event: Event) -> str | None:
        match event["event"]:
            case "step" if self._shown(event["step"]):
                return f"step {event['step']}/{self.steps}  {_figures(event)}"
            case "evaluation":
                return f"step {event['step']}/{self.steps}  held-out loss {_loss(event['eval_loss'])}"
        return _remark(event)

    def _shown(self, step: int) -> bool:
        return step in (1, self.steps) or step % max(1, self.steps // 20) == 0


class _Bar:
    """One bar with the figures of the last step; remarks scroll above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        self.display: Progress = Display(*columns, console=console)
        self.task: TaskID | None = None
        self.figures = self.held = ""

    def __enter__(self) -> _Bar:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def __call__(self, event: Event) -> None:
        if event["event"] == "start":
            self._restart(event)
        elif event["event"] == "step" and self.task is not None:
            self.figures = _figures(event)
            self.display.update(self.task, completed=event["step"], figures=self.figures + self.held)
        elif event["event"] == "evaluation" and self.task is not None:
            self.held = f"  held-out {_loss(event['eval_loss'])}"
            self.display.update(self.task, figures=self.figures + self.held)
        elif text := _remark(event):
            self.display.console.print(text, markup=False, highlight=False)

    def _restart(self, event: Event) -> None:
        """A group that is started again after a kill begins anew from its checkpoint."""
        if self.task is not None:
            self.display.remove_task(self.task)
        self.task = self.display.add_task("", total=event["steps"], completed=event["resumed_from"], figures="")
        if text := _remark(event):
            self.display.console.print(text, markup=False, highlight=False)


def _figures(step: Event) -> str:
    return f"loss {step['loss']:.3f}  {step['tokens_per_second']:,.0f} tokens/s  {step['peak_bytes'] / GIB:.1f} GiB"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _remark(event: Event) -> str | None:
    match event["event"]:
        case "start" if event["resumed_from"]:
            return f"going on from step {event['resumed_from']}"
        case "decisions":
            processes = counted(event["processes"], "process", "processes")
            who = f"{processes} of {counted(event['threads'], 'thread')} on {event['place']}"
            why = event["why"]
            how = f"{event['dtype']} ({why['dtype']}), {event['kernels']} kernels ({why['kernels']})"
            graphs = f"; recorded as CUDA graphs ({why['graphs']})" if event.get("graphs") else ""
            return f"{who} ({why['engine']}); {how}{graphs}"
        case "rehearsal":
            took, planned = event["peak_bytes"] / GIB, event["predicted_peak_bytes"] / GIB
            return f"the worst step takes {took:.2f} GiB; {planned:.2f} were planned"
        case "sample":
            return f"  asked: {_short(event['prompt'])}\n  said:  {_short(event['answer'])}"
        case "note":
            return str(event["text"])
    return None


def _short(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[1 - width :]
