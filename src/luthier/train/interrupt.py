"""The first SIGTERM or SIGINT asks a run to stop after its step; the second stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from luthier.errors import Stopped

GOES_ON = "the same command goes on from the last checkpoint"


def heeded() -> list[signal.Signals]:
    """SIGTERM and SIGINT, without those that are ignored: a Ctrl-C is not meant for a script's background job."""
    return [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]


class Interrupt:
    """As a context manager: `signal` is the number of the signal received, or 0. `fix`: what Stopped says to do.

    A second one, or the first where nothing runs yet that could be finished (`at_once`), ends the block by Stopped,
    which is safe at any instant: checkpoints are published by one rename. Inside it is a KeyboardInterrupt, which
    nothing takes for an error of what it was about. A signal that the parent has told this process to ignore stays
    ignored. Outside the main thread, where Python takes no signal handlers, it does nothing.
    """

    def __init__(self, *, at_once: bool = False, fix: str = GOES_ON) -> None:
        self.signal, self._at_once, self._fix = 0, at_once, fix
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in heeded()}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if at_once := _cause(error):
            raise stopped(at_once.number, fix=self._fix) from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal or self._at_once:
            raise _AtOnce(number)
        self.signal = number


class _AtOnce(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _cause(error: BaseException | None) -> _AtOnce | None:
    """The stop that `error` is, or during whose clean-up it arose: a full disk then is not what ended the run."""
    while error is not None and not isinstance(error, _AtOnce | Stopped):
        error = error.__context__
    return error if isinstance(error, _AtOnce) else None


def stopped(number: int, when: str = "", *, fix: str = GOES_ON) -> Stopped:
    """What a signal ends a run with."""
    return Stopped(f"stopped by {signal.Signals(number).name}{when}", fix=fix, exit_code=128 + number)
