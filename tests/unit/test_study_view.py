"""What a person sees of a study while it works."""

import io

from rich.console import Console

from luthier.evaluate.study.view import watching

BEGUN = {"event": "cells", "steps": {"a": 10, "b": 10}, "done": [], "workers": 1}


def test_the_bar_over_all_cells_is_as_long_as_their_trainings_turn_out_to_be() -> None:
    """A file of weight 2 is seen twice an epoch, which nobody has counted before."""
    with watching(Console(file=io.StringIO(), force_terminal=True, width=100)) as view:
        view(BEGUN)
        view({"event": "cell", "cell": "a"})
        view({"event": "start", "cell": "a", "steps": 20, "resumed_from": 5})
        whole, cell = view.display.tasks  # type: ignore[attr-defined]
        assert (whole.completed, whole.total, cell.completed, cell.total) == (5, 30, 5, 20)
        view({"event": "step", "cell": "a", "step": 20, "loss": 1.0})
        view({"event": "scored", "cell": "a"})
        assert (whole.completed, whole.total) == (20, 30)
    assert BEGUN["steps"] == {"a": 10, "b": 10}


def test_without_a_terminal_there_is_a_line_for_each_cell() -> None:
    console = Console(file=io.StringIO(), width=40)
    with watching(console) as view:
        for event in (
            BEGUN,
            {"event": "start", "cell": "a", "steps": 10, "resumed_from": 0},
            {"event": "start", "cell": "b", "steps": 10, "resumed_from": 3},
            {"event": "note", "cell": "b", "text": "a [note] that is longer than the console is wide"},
            {"event": "scored", "cell": "a"},
        ):
            view(event)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "2 cells to train; 1 worker",
        "b: going on from step 3",
        "b: a [note] that is longer than the console is wide",
        "a: done (1 of 2)",
    ]
