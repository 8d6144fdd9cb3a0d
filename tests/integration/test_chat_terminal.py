"""The chat at a real terminal: Ctrl-C ends an answer and not the chat."""

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from safetensors.torch import load_file, save_file

import tiny
from luthier.cli import main
from luthier.runs import Run
from luthier.train.launch import train

# Takes the terminal as its own, so that Ctrl-C there is a signal.
CHAT = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("luthier.cli", run_name="__main__")
"""


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose model has learned nothing, and whose answers go on for thousands of tokens."""
    folder = tmp_path_factory.mktemp("talkative")
    run = tiny.run(folder, "train.max_steps=1", "evaluate.generate.max_new_tokens=20000")
    train(run)
    weights = run.adapter / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 50_000}))
    return run


class Terminal:
    """What is typed and shown at one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.shown = descriptor, ""

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def until(self, text: str, count: int) -> None:
        """Reads until that was shown so often."""
        while self.shown.count(text) < count:
            self.read()

    def glance(self) -> None:
        """Reads what is shown now, if anything: a key that is pressed may throw away what was on its way."""
        if select.select([self.descriptor], [], [], 0.5)[0]:
            self.read()

    def leave(self, process: subprocess.Popen[bytes]) -> int:
        """Types /quit until the process ends: a Ctrl-C that Python had only noted takes the next line with it."""
        while True:
            self.type("/quit\n")
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=20)

    def read(self) -> None:
        assert select.select([self.descriptor], [], [], 120)[0], self.shown
        self.shown += os.read(self.descriptor, 4096).decode(errors="replace")


@contextmanager
def chatting(run: Run) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    outer, inner = os.openpty()
    command = [sys.executable, "-c", CHAT, "chat", str(run.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    ends = {"stdin": inner, "stdout": inner, "stderr": inner}
    with subprocess.Popen(command, **ends, env=environment, start_new_session=True) as process:
        os.close(inner)
        try:
            yield Terminal(outer), process
        finally:
            process.kill()
            os.close(outer)


def test_ctrl_c_ends_the_answer_and_the_next_one_follows(talkative: Run) -> None:
    with chatting(talkative) as (terminal, process):
        for turn in (1, 2):
            terminal.until("> ", count=turn)
            terminal.type("what is one plus two\n")
            terminal.until("plus two", count=turn)
            asked = len(terminal.shown)
            while len(terminal.shown) < asked + 40:  # the answer is under way
                terminal.read()
            terminal.type("\x03")
            terminal.until("[stopped]", count=turn)
        terminal.until("> ", count=3)
        for _ in range(4):  # at the prompt it starts a new line, also where the last one's is not out yet
            terminal.type("\x03")
            terminal.glance()
        assert terminal.leave(process) == 0


@pytest.mark.parametrize("answering", [False, True])
def test_sigterm_ends_the_chat_with_a_line_at_the_prompt_and_in_an_answer(talkative: Run, answering: bool) -> None:
    with chatting(talkative) as (terminal, process):
        terminal.until("> ", count=1)
        if answering:
            terminal.type("what is one plus two\n")
            terminal.until("plus two", count=1)
            asked = len(terminal.shown)
            while len(terminal.shown) < asked + 40:
                terminal.read()
        process.terminate()
        terminal.type("\n")  # a signal that Python had only noted at the prompt takes the next line with it
        terminal.until("\nluthier: interrupted; the same command begins anew", count=1)
        assert process.wait() == 143


class Impatient(io.StringIO):
    """Where an answer is shown to somebody who presses keys twice before they have read any of it."""

    def __init__(self, *signals: signal.Signals) -> None:
        super().__init__()
        self.signals = list(signals)

    def flush(self) -> None:
        while self.signals and self.getvalue():
            signal.raise_signal(self.signals.pop(0))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_in_an_answer_ends_the_chat_at_once_and_says_that_the_command_begins_anew(
    talkative: Run, second: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Impatient(signal.SIGINT, second)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is one plus two\nwhat is two\n"))
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["chat", str(talkative.folder)]) == 128 + second
    told = f"luthier: stopped by {second.name}; a chat is not kept: the same command begins anew\n"
    assert capsys.readouterr().err.endswith(told)
    assert shown.getvalue().endswith("\n")
    assert shown.getvalue().count("\n") == 1
