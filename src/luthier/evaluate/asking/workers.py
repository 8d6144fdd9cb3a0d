"""Questions asked of some sides, in one process or several: on a CPU, one process per core answers faster than one
process with as many threads.

Workers only fill the memo. Whatever a lost one leaves undone, the parent does itself; but not where a run trains on
this machine: then all is done by workers, which have stepped back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from luthier.data.conversation import Conversation, from_json
from luthier.errors import RunError
from luthier.evaluate.asking.answers import Advance, Memo, Task, plan, sampling_of, work
from luthier.evaluate.asking.fit import usable
from luthier.evaluate.asking.neighbours import Training, room, step_back, taken, trainings
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.sides import Entry, Opened, by_base, open_sides
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.forgetting import general_tasks
from luthier.evaluate.metrics import resolved
from luthier.machine import cores, machine
from luthier.runs import Run
from luthier.train.group import begin

if TYPE_CHECKING:
    from luthier.evaluate.terminal import Bar
    from luthier.model.generate import Sampling

WORTH = 16
"""Tasks that one more process must have to be worth its start."""


@dataclass(frozen=True)
class Job:
    """The questions of the run `asker`, asked of some sides, in plain values: any process can do its share.

    Attributes:
        folder: where answers.jsonl lies.
        questions: a file of other questions to ask, conversations as JSON lines.
        needs: what has to be known of them; empty: what the run's metrics read.
        general: whether the general passages and questions are asked too.
        others: files with answers that need not be made again.
        start: the byte of answers.jsonl before which no answer is but such as `others` hold.
        in_flight: the most tokens that a process may hold keys and values of; None: what memory it finds free.
    """

    asker: str
    folder: str
    entries: tuple[Entry, ...]
    questions: str | None = None
    needs: tuple[str, ...] = ()
    general: bool = False
    others: tuple[str, ...] = ()
    start: int = 0
    in_flight: int | None = None

    @classmethod
    def parse(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "entries": tuple(Entry(**entry) for entry in values["entries"])})

    def memo(self, wanted: Sequence[Turn]) -> Memo:
        """What is known of what these turns have to do."""
        keys = {task.key for turn in wanted for task in turn.tasks}
        return Memo(Path(self.folder) / "answers.jsonl", map(Path, self.others), only=keys, start=self.start)


class Turn(NamedTuple):
    """A side, and what it has to do."""

    side: Opened
    tasks: list[Task]


def turns(
    sides: Sequence[Opened],
    questions: Sequence[Conversation],
    sampling: Sampling,
    needs: Collection[str],
    *,
    general: bool = False,
) -> list[Turn]:
    """The sides' tasks, those of one base together; with `general`, the general ones after those of the questions."""
    planned: dict[int, list[Task]] = {}  # by subject: the tokens of both its sides are the same, and are there once
    for subject in {id(side.subject): side.subject for side in sides}.values():
        both = [side.side for side in sides if side.subject is subject]
        planned[id(subject)] = plan(subject, questions, sampling, sides=both, needs=needs)

    def mine(side: Opened) -> list[Task]:
        asked = [task for task in planned[id(side.subject)] if task.side == side.side]
        return asked + (general_tasks(side.subject, side.side, len(questions)) if general else [])

    return [Turn(side, mine(side)) for side in by_base(sides)]


def needed(run: Run) -> set[str]:
    """The parts of an answer that the recipe's metrics read. Raises RecipeError for an unknown metric."""
    needs = {metric.needs for metric in resolved(run.recipe.evaluate.metrics).values()}
    return {"text" if need == "preferences" else need for need in needs}  # a judge reads the answers


def done(job: Job, asker: Run, wanted: Sequence[Turn], bar: Bar) -> Memo:
    """The memo with every task in it. Raises MemoryPlanError where there is no memory for it, and RunError where what
    trains on this machine has pushed it aside."""
    memo, sampling = job.memo(wanted), sampling_of(asker)
    _start_bar(wanted, memo, bar)
    missing = [turn for turn in wanted if any(task.key not in memo for task in turn.tasks)]
    if not missing:
        return memo
    near = trainings(turn.side.subject.run for turn in wanted)
    count = processes(asker, len({task.key for turn in missing for task in turn.tasks} - memo.keys()))
    count, in_flight = _room(missing, count, sampling, near)
    if count > 1 or near:
        fill(replace(job, in_flight=in_flight), count, bar.advance, beside=bool(near))
        memo = job.memo(wanted)
    if near and any(task.key not in memo for turn in missing for task in turn.tasks):
        fix = "the same command goes on where it was; it is surest when nothing trains here"
        raise RunError("the processes that answer were ended, most likely for want of memory", fix=fix)
    for turn in missing:
        _work(turn, turn.tasks, sampling, memo, bar.advance, in_flight=in_flight)
    return memo


def _start_bar(wanted: Sequence[Turn], memo: Memo, bar: Bar) -> None:
    for turn in wanted:
        kinds: dict[str, set[str]] = {}
        for task in turn.tasks:
            kinds.setdefault(_label(turn, task.label), set()).add(task.key)
        for label, keys in kinds.items():
            bar.start(label, len(keys), len(keys & memo.keys()))


def _label(turn: Turn, label: str) -> str:
    """`base answers`, by the name that people know the side by."""
    return f"{turn.side.name} {label.partition(' ')[2]}"


def _work(
    turn: Turn,
    tasks: Sequence[Task],
    sampling: Sampling,
    memo: Memo,
    advance: Advance,
    *,
    in_flight: int | None,
    processes: int = 1,
) -> None:
    def named(label: str, count: int) -> None:
        advance(_label(turn, label), count)

    work(turn.side.subject, tasks, sampling, memo, named, in_flight=in_flight, processes=processes)


def _room(missing: Sequence[Turn], count: int, sampling: Sampling, near: list[Training]) -> tuple[int, int | None]:
    """In how many processes, and with how many tokens in flight, there is memory for the largest of the sides. Who sits
    in this process already has what it needs."""
    facts = machine()
    found = [(count, 0)]
    for turn in missing if near else [turn for turn in missing if not turn.side.subject.sits]:
        longest = max(task.length for task in turn.tasks) + sampling.max_new_tokens
        subject, mine = turn.side.subject, usable(turn.side.subject.run.recipe, facts)
        found.append(room(taken(subject), longest, count, subject.place, mine, near))
    return min(processes for processes, _ in found), min(tokens for _, tokens in found[1:]) if near else None


def processes(run: Run, tasks: int) -> int:
    """As many as training ran in, which the plan found memory for, if they are worth it."""
    decisions = run.manifest.get("decisions", {})
    if decisions.get("place") != "cpu":
        return 1
    planned: int = decisions.get("processes", 1)
    return max(1, min(planned, cores(), tasks // WORTH))


def fill(job: Job, count: int, advance: Advance, *, beside: bool = False) -> None:
    """Does the job in `count` processes, and returns when all have ended. `beside` a run that trains they step back."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // count)), "OMP_WAIT_POLICY": "passive"}
    environment, text = {**os.environ, **threads}, json.dumps(asdict(job))
    with ExitStack() as stack:
        listeners = []
        for rank in range(count):
            worker = stack.enter_context(_start([text, str(rank), str(count), str(int(beside))], environment))
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
    command = [sys.executable, "-P", "-m", "luthier.evaluate.asking.workers", *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _listen(worker: subprocess.Popen[str], advance: Advance) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        label, done = json.loads(line)
        advance(label, done)


def main(text: str, rank: str, count: str, beside: str) -> None:
    """One worker."""
    if beside == "1":
        step_back()
    tell = begin()

    def advance(label: str, done: int) -> None:
        tell([label, done])

    job = Job.parse(text)
    asker = Run.open(job.asker)
    sampling, needs, sides = sampling_of(asker), job.needs or needed(asker), open_sides(job.entries, Seat())
    wanted = turns(sides, _questions(job, asker), sampling, needs, general=job.general)
    memo = job.memo(wanted)
    for turn in wanted:
        mine = share(turn.tasks, int(rank), int(count))
        _work(turn, mine, sampling, memo, advance, in_flight=job.in_flight, processes=int(count))


def _questions(job: Job, asker: Run) -> list[Conversation]:
    if job.questions is None:
        return suite(asker).questions
    with Path(job.questions).open(encoding="utf-8") as lines:
        return [from_json(json.loads(line)) for line in lines]


if __name__ == "__main__":
    main(*sys.argv[1:])
