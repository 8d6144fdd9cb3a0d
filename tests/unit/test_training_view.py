"""What a person sees of training, and what stays short."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from luthier.train.view import Event, show

STEP = {"event": "step", "loss": 2.5, "tokens_per_second": 1234.5, "peak_bytes": 3 * 1024**3}
EVENTS: list[Event] = [
    {"event": "start", "steps": 100, "resumed_from": 40},
    {"event": "note", "text": "out of memory; from here on 512 tokens [at a time]"},
    *({**STEP, "step": n} for n in range(41, 101)),
    {"event": "checkpoint", "step": 100},
    {"event": "evaluation", "step": 100, "eval_loss": 2.25},
    {"event": "sample", "step": 100, "prompt": "what\nis it", "reference": "x", "answer": "a [b] c"},
]


def shown(events: list[Event] = EVENTS, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with show(console) as emit:
        for event in events:
            emit(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_figures_and_remarks_are_shown(terminal: bool) -> None:
    text = shown(terminal=terminal)
    for part in ("going on from step 40", "512 tokens [at a time]", "loss 2.500", "1,234 tokens/s", "3.0 GiB", "2.250"):
        assert part in text
    assert "asked: what is it" in text
    assert "said:  a [b] c" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_held_out_loss_that_is_not_finite_is_said_to_be_so(terminal: bool) -> None:
    unknown: Event = {"event": "evaluation", "step": 100, "eval_loss": None}
    said = "held-out not finite" if terminal else "held-out loss not finite"
    assert said in shown([*EVENTS, unknown], terminal=terminal)


def test_without_a_terminal_there_are_about_twenty_plain_lines() -> None:
    lines = shown(terminal=False).splitlines()
    assert 12 <= sum("tokens/s" in line for line in lines) <= 25
    assert "step 100/100  loss 2.500  1,234 tokens/s  3.0 GiB" in lines
    assert "\x1b" not in "".join(lines)


def test_events_go_to_a_function_if_one_is_given() -> None:
    seen: list[dict[str, object]] = []
    with show(Console(file=io.StringIO()), seen.append) as emit:
        emit(EVENTS[0])
    assert seen == EVENTS[:1]


def test_the_loop_stays_short() -> None:
    import luthier.train

    loop = Path(luthier.train.__file__).with_name("loop.py")
    assert len(loop.read_text().splitlines()) <= 250
