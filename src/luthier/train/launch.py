"""From a run to a trained run: data, decisions, and the processes that do the work, watched until they end.

The processes of a group are started and watched here, without torch. One that the kernel kills (memory) stops the
group, which starts again from the last checkpoint with half the tokens in a micro-batch.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import errors
from luthier.data.prepare import Prepared, prepare
from luthier.errors import LuthierError, RunError
from luthier.machine import Machine, machine
from luthier.model.load import load_tokenizer, model_config, model_folder
from luthier.plan import Plan
from luthier.recipe import Recipe
from luthier.runs import Run, read_json
from luthier.train.decide import Decisions, Rows, decide, halved, planned
from luthier.train.interrupt import Interrupt, stopped

if TYPE_CHECKING:
    from rich.console import Console

Event = dict[str, Any]
Progress = Callable[[Event], None]

_RESTARTS = 4  # halvings of the token budget after the kernel killed a process
_GRACE = 10.0  # seconds that the other processes have to end when one has failed


def train(run: Run, *, console: Console | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Trains `run` to its end, or goes on from its last checkpoint; a finished run is left as it is.

    Args:
        console: where progress is shown to people.
        progress: told of every event instead (see `view.py`).

    Returns what `train --json` prints. Raises LuthierError; Stopped after SIGTERM or SIGINT.
    """
    from luthier.train.view import show

    with show(console, progress) as emit, run.lock(), Interrupt(at_once=True):
        if run.finished and "result" in run.manifest:
            emit({"event": "note", "text": f"{run.folder} is trained already"})
            result: dict[str, Any] = run.manifest["result"]
            return result | {"resumed_from": result["steps"]}
        prepared = prepare_data(run, say=lambda text: emit({"event": "note", "text": text}))
        decisions = decisions_of(run, prepared)
        emit({"event": "decisions", **decisions.as_dict()})
        if decisions.engine == "local":
            result = _here(run, decisions, emit)
        else:
            result = _in_processes(run, decisions, int(prepared.train.lengths.max()), emit)
        run.update_manifest(result=result)
        return result


def prepare_data(run: Run, say: Callable[[str], None] | None = None) -> Prepared:
    """The run's data as tokens: made once, then reused. A run that has not begun takes a changed file as it is now; one
    that has begun stays with the rows it began with. `say` is told so, and if the model has to be fetched first."""
    tokenizer = load_tokenizer(model_folder(run.recipe.model, say), run.recipe.adapter)
    say = say or (lambda text: None)
    if (run.data / "report.json").exists():
        prepared = Prepared.open(run.data, tokenizer)
        changed = ", ".join(prepared.changed(run.root))
        if changed and run.steps():
            say(f"{changed} changed since this run began: it goes on with the rows it began with")
        if not changed or run.steps():
            return prepared
        say(f"{changed} changed since the data was prepared: preparing it again")
        run.update_manifest(asked=None)  # other rows, other decisions
    return prepare(run.recipe.data, tokenizer, seed=run.recipe.train.seed, folder=run.data, root=run.root)


def decisions_of(run: Run, prepared: Prepared) -> Decisions:
    """The decisions recorded in the manifest, if the recipe asks for the same; else new ones, then recorded. A run that
    has begun keeps its dtype: that decides what is learned."""
    manifest = run.manifest
    asked = run.recipe.run.model_dump(mode="json", exclude={"dir", "log_every", "save", "track"})
    if manifest.get("asked") == asked:
        return Decisions(**manifest["decisions"])
    facts = machine()
    rows = _rows(run.recipe, prepared)
    dtype = manifest["decisions"]["dtype"] if "decisions" in manifest and run.steps() else None
    decisions = decide(run.recipe, _config(run.recipe), facts, rows, dtype=dtype)
    run.update_manifest(asked=asked, decisions=decisions.as_dict(), machine=facts.as_dict())
    return decisions


def decide_for(recipe: Recipe, facts: Machine, place: str | None = None) -> Plan:
    """The plan of `recipe` on a machine before its data is known, where the recipe says or in another `place`."""
    return planned(recipe, model_config(recipe.model), facts, place)


def _here(run: Run, decisions: Decisions, emit: Progress) -> dict[str, Any]:
    os.environ |= {name: value for name, value in _quiet_threads().items() if name not in os.environ}
    from luthier.train.engines.local import Local
    from luthier.train.worker import work

    return work(run, decisions, Local(), emit)


def _in_processes(run: Run, decisions: Decisions, longest: int, emit: Progress) -> dict[str, Any]:
    """Starts the group, and again with half the token budget each time that the kernel kills one of it."""
    for _ in range(_RESTARTS):
        with _group(run, decisions) as group:
            result = group.watch(emit)
        if result is not None:
            return result
        decisions = halved(decisions, longest)
        run.update_manifest(decisions=decisions.as_dict())
        text = f"the kernel killed a process; going on with {decisions.micro_tokens} tokens at a time"
        emit({"event": "note", "text": text})
    raise RunError(
        f"a process was killed {_RESTARTS} times",
        where=str(run.folder),
        fix="leave more memory free, or set run.memory",
    )


class _Group:
    """The processes of one attempt."""

    def __init__(self, run: Run, decisions: Decisions, meeting: Path) -> None:
        self.run, self.meeting = run, meeting
        self.events: queue.Queue[Event] = queue.Queue()
        self.processes = [self._start(rank, decisions) for rank in range(decisions.processes)]
        self.readers = [threading.Thread(target=self._read, args=(p,), daemon=True) for p in self.processes]
        for reader in self.readers:
            reader.start()

    def _start(self, rank: int, decisions: Decisions) -> subprocess.Popen[bytes]:
        environment = (
            os.environ
            | _quiet_threads()
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(decisions.processes),
                "LUTHIER_RENDEZVOUS": str(self.meeting / "rendezvous"),
                "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
                "OMP_NUM_THREADS": str(decisions.threads),
            }
        )
        with open(self._log(rank), "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "luthier.train.worker", str(self.run.folder)],
                env=environment,
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
        """Passes events on until all processes have ended. Returns the result, or None if the kernel killed one.
        Raises the error that a process met, or Stopped."""
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
            raise _rebuilt(error)
        if result is None and -signal.SIGKILL not in self.first_codes:
            raise self._crashed()
        return result

    def _events(self, interrupt: Interrupt) -> Iterator[Event]:
        """Events as they come. Passes a signal on once, and ends the other processes when one has failed. One that ends
        as the signal asks has not failed: rank 0 may still be writing the checkpoint."""
        told, deadline = False, None
        self.first_codes: list[int] = []
        while any(p.poll() is None for p in self.processes) or any(r.is_alive() for r in self.readers):
            if interrupt.signal and not told:
                told = True
                self._signal(interrupt.signal)
            codes = [p.returncode for p in self.processes if p.poll() not in (None, 0, 128 + interrupt.signal)]
            if codes and deadline is None:
                self.first_codes, deadline = codes, time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            try:
                yield self.events.get(timeout=0.1)
            except queue.Empty:
                continue
        while not self.events.empty():
            yield self.events.get()

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
        return self.run.folder / f"worker-{rank}.log"


@contextmanager
def _group(run: Run, decisions: Decisions) -> Iterator[_Group]:
    with tempfile.TemporaryDirectory(prefix="luthier-") as meeting:
        group = _Group(run, decisions, Path(meeting))
        try:
            yield group
        finally:
            group.stop()


def _rebuilt(event: Event) -> LuthierError:
    """The error that a worker met, as its own kind."""
    kind = getattr(errors, event["kind"], LuthierError)
    error: LuthierError = kind(event["what"], where=event["where"], fix=event["fix"])
    error.exit_code = event["exit_code"]
    return error


def _quiet_threads() -> dict[str, str]:
    """Idle OpenMP threads that spin take the cores from those that work (libgomp's default)."""
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def _rows(recipe: Recipe, prepared: Prepared) -> Rows:
    lengths, train = prepared.train.lengths, recipe.train
    steps = train.max_steps or max(1, round(train.epochs * len(lengths) / train.samples_per_step))
    return Rows(longest=int(lengths.max(initial=1)), mean=float(lengths.mean()) if len(lengths) else 1.0, steps=steps)


def _config(recipe: Recipe) -> dict[str, Any]:
    return dict(read_json(model_folder(recipe.model) / "config.json"))
