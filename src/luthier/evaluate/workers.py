"""Tasks done by several processes: on a CPU, one process per core answers faster than one process with as many threads.

Workers only fill the memo. Whatever a lost one leaves undone, the parent does itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack

from luthier.evaluate.answers import Advance, Memo, Task, plan, sampling_of, work
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.subject import Subject
from luthier.evaluate.suite import suite
from luthier.machine import machine
from luthier.runs import Run

WORTH = 16
"""Tasks that one more process must have to be worth its start."""


def needed(run: Run) -> set[str]:
    """The parts of an answer that the recipe's metrics read. Raises RecipeError for an unknown metric."""
    return {METRICS.get(metric).needs for metric in run.recipe.evaluate.metrics}


def processes(run: Run, tasks: int) -> int:
    """As many as training ran in, which the plan found memory for, if they are worth it."""
    decisions = run.manifest.get("decisions", {})
    if decisions.get("place") != "cpu":
        return 1
    planned: int = decisions.get("processes", 1)
    return max(1, min(planned, machine().cores, tasks // WORTH))


def fill(run: Run, name: str, count: int, advance: Advance) -> None:
    """Does the tasks of comparison `name` in `count` processes, and returns when all have ended."""
    threads = {"OMP_NUM_THREADS": str(max(1, machine().cores // count)), "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **threads}
    with ExitStack() as stack:
        listeners = []
        for rank in range(count):
            worker = stack.enter_context(_start([str(run.folder), name, str(rank), str(count)], environment))
            stack.callback(worker.kill)  # runs before the worker is waited for
            listeners.append(threading.Thread(target=_listen, args=(worker, advance), daemon=True))
            listeners[-1].start()
        for listener in listeners:
            listener.join()  # a worker's output ends when it does


def share(tasks: Sequence[Task], rank: int, count: int) -> list[Task]:
    """One worker's tasks: those of every `count`-th question of a side, longest first. It depends on the tasks alone,
    not on what is done."""
    together: dict[tuple[str, int], list[Task]] = {}
    for task in {task.key: task for task in tasks}.values():
        together.setdefault((task.side, task.question), []).append(task)
    ordered = sorted(together, key=lambda place: (place[0], -max(task.length for task in together[place]), place[1]))
    return [task for place in ordered[rank::count] for task in together[place]]


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "luthier.evaluate.workers", *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _listen(worker: subprocess.Popen[str], advance: Advance) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        label, done = json.loads(line)
        advance(label, done)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(3)


def main(folder: str, name: str, rank: str, count: str) -> None:
    """One worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not get between the events

    def advance(label: str, done: int) -> None:
        events.write(json.dumps([label, done]) + "\n")
        events.flush()

    run = Run.open(folder)
    subject, sampling = Subject.open(run), sampling_of(run)
    tasks = plan(subject, suite(run).questions, sampling, needs=needed(run))
    memo = Memo(run.results / name / "answers.jsonl")
    work(subject, share(tasks, int(rank), int(count)), sampling, memo, advance)


if __name__ == "__main__":
    main(*sys.argv[1:])
