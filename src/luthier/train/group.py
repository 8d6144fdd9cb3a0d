"""Processes that work as one, started and watched without torch.

A worker tells what happens as JSON lines on stdout, and ends when its stdin closes: so when its parent does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from luthier import errors
from luthier.errors import LuthierError, RunError
from luthier.machine import memory_kills
from luthier.runs import refusal
from luthier.strict import dumps
from luthier.train.interrupt import Interrupt, stopped

Event = dict[str, Any]
Progress = Callable[[Event], None]

RESTARTS = 4
"""How often what was killed is begun again where nothing else helps."""
_GRACE = 10.0  # seconds that the other processes have to end when one has failed


class Killed(NamedTuple):
    """What is known of a SIGKILL: the kernel sends it for want of memory, and others for reasons of their own."""

    what: str
    fix: str
    wants_memory: bool

    def error(self, folder: Path) -> RunError:
        """What the work in `folder` ends with when it was killed after all its restarts too."""
        return RunError(f"{self.what}, {RESTARTS + 1} times now", where=str(folder), fix=self.fix)


_FIX = "leave more memory free, or set run.memory"
_BY_KERNEL = Killed("the kernel killed a process for want of memory", _FIX, wants_memory=True)
_PERHAPS = Killed("a process was killed (SIGKILL), maybe for want of memory", _FIX, wants_memory=True)
_BY_ANOTHER = Killed(
    "a process was killed (SIGKILL), but not by the kernel for want of memory",
    "see who kills it: a person, a job's limits, a guard of memory such as earlyoom; the same command then goes on",
    wants_memory=False,
)


@contextmanager
def group(module: str, folder: Path, environments: Sequence[dict[str, str]]) -> Iterator[Group]:
    """Runs `python -m MODULE FOLDER` once for each environment; none is left when the block ends."""
    started = Group(module, folder, environments)
    try:
        yield started
    finally:
        started.stop()


class Group:
    """The processes of one attempt. What they print besides events is in `worker-RANK.log` of the folder."""

    def __init__(self, module: str, folder: Path, environments: Sequence[dict[str, str]]) -> None:
        self.module, self.folder = module, folder
        self.events: queue.Queue[Event] = queue.Queue()
        self._kills = memory_kills()
        self.processes = [self._start(rank, own) for rank, own in enumerate(environments)]
        self.readers = [threading.Thread(target=self._read, args=(p,), daemon=True) for p in self.processes]
        for reader in self.readers:
            reader.start()

    def _start(self, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self._log(rank), "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(self.folder)],
                env=os.environ | quiet_threads() | environment,
                stdin=subprocess.PIPE,  # held open: a worker ends when it closes, so when we die
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we pass it on once
            )

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.events.put(json.loads(line))

    def watch(self, emit: Progress) -> dict[str, Any] | None:
        """Passes events on until all processes have ended. Returns the result, or None if one was killed (see
        `killed`). Raises the error that a process met, or Stopped."""
        result, error = None, None
        with Interrupt() as interrupt:
            for event in self._events(interrupt):
                if event["event"] == "result":
                    result = {key: value for key, value in event.items() if key != "event"}
                elif event["event"] == "error":
                    error = error or event
                else:
                    emit(event)
        if interrupt.signal and result is None:
            raise stopped(interrupt.signal)
        if error:
            raise rebuilt(error)
        if result is None and not self.was_killed:
            raise self._crashed()
        return result

    @property
    def was_killed(self) -> bool:
        """Whether one of the processes was, once all have ended."""
        return -signal.SIGKILL in self.first_codes

    @property
    def killed(self) -> Killed:
        """What is known of the kill, once one was."""
        before, now = self._kills, memory_kills()
        if before is None or now is None:
            return _PERHAPS
        return _BY_KERNEL if now > before else _BY_ANOTHER

    def _events(self, interrupt: Interrupt) -> Iterator[Event]:
        """Events as they come. Passes a signal on once, and ends the other processes when one has failed. One that ends
        as the signal asks has not failed: rank 0 may still be writing the checkpoint."""
        told, deadline = False, None
        self.first_codes: list[int] = []
        while any(p.poll() is None for p in self.processes) or any(r.is_alive() for r in self.readers):
            if interrupt.signal and not told:
                told = True
                self._signal(interrupt.signal)
            if deadline is None and (codes := self._failed(interrupt)):
                self.first_codes, deadline = codes, time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            try:
                yield self.events.get(timeout=0.1)
            except queue.Empty:
                continue
        self.first_codes = self.first_codes or self._failed(interrupt)
        while not self.events.empty():
            yield self.events.get()

    def _failed(self, interrupt: Interrupt) -> list[int]:
        """The exit codes of processes that did not end well, nor as a signal asked."""
        return [p.returncode for p in self.processes if p.poll() not in (None, 0, 128 + interrupt.signal)]

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for log in map(self._log, range(len(self.processes))):
            if log.stat().st_size == 0:
                log.unlink()

    def _crashed(self) -> RunError:
        logs = [self._log(rank) for rank, process in enumerate(self.processes) if process.returncode]
        tail = (logs[0].read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        return RunError(
            f"a process ended with exit code {self.first_codes[0]} ({tail})",
            where=str(logs[0]),
            fix="the same command goes on from the last checkpoint",
        )

    def _log(self, rank: int) -> Path:
        return self.folder / f"worker-{rank}.log"


def report(work: Callable[[Progress], Event | None]) -> int:
    """The other end, in a worker: does `work`, whose events and result travel to the parent, and so do errors that a
    person can act on. Returns the exit code."""
    emit = begin()
    try:
        result = work(emit)
    except (LuthierError, OSError) as error:
        told = refusal(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        described = {"what": told.what, "where": told.where, "fix": told.fix, "exit_code": told.exit_code}
        emit({"event": "error", "kind": type(told).__name__, **described})
        return told.exit_code
    except KeyboardInterrupt:  # passed on by the parent, where nothing is under way that has to be finished
        return 130
    if result is not None:
        emit({"event": "result", **result})
    return 0


def begin() -> Callable[[Any], None]:
    """Begins a worker, which ends when its parent does. Returns what tells the parent a value, as a line of JSON."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not get between the events

    def emit(value: Any) -> None:
        events.write(dumps(value) + "\n")
        events.flush()

    return emit


def _end_with_parent() -> None:
    """The parent holds the other end of stdin. When it is gone nobody watches this worker, and its locks are free for
    another process: stop at once, which checkpoints survive."""
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(3)


def rebuilt(event: Event) -> LuthierError:
    """The error that a worker met, as its own kind."""
    kind = getattr(errors, event["kind"], LuthierError)
    error: LuthierError = kind(event["what"], where=event["where"], fix=event["fix"])
    error.exit_code = event["exit_code"]
    return error


def quiet_threads() -> dict[str, str]:
    """Idle OpenMP threads that spin take the cores from those that work (libgomp's default). oneDNN keeps the code of
    each size of product in 16 bits, some 0.7 MiB; a step of 4,096 tokens has at most about 500 sizes."""
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}
