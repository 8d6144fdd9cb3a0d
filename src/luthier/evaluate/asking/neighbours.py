"""Answering beside a run that trains: who trains here, what memory that run may still take, and what is left.

A run that trains always comes first. Who answers meanwhile is a process of its own, of the lowest priority and the
first that the kernel ends when memory runs short; and it does not start where its memory is not free.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from luthier.errors import MemoryPlanError, RunError
from luthier.evaluate.asking.fit import LOGIT_ROWS
from luthier.machine import Machine
from luthier.runs import Run, read_json

if TYPE_CHECKING:
    from luthier.evaluate.asking.subject import Subject

PROCESS = 480 << 20
"""Bytes of a process with torch and transformers imported: as the plan of training has it."""
PACKED = 1.1
"""Bytes of a packed weight and its scales, in 8 bits; in 4 bits it is about half of that."""


@dataclass(frozen=True)
class Training:
    """A run that another process trains on this machine. `owed` are bytes that its plan says it may take yet."""

    folder: Path
    process: int
    owed: int
    place: str


def trainings(runs: Iterable[Run]) -> list[Training]:
    """The runs that are being trained beside or among `runs`, and under runs/ here."""
    roots = {run.folder.resolve().parent for run in runs} | {Path("runs").resolve()}
    locks = sorted(lock for root in roots for lock in root.glob("*/.lock"))
    return [training for lock in locks if (training := _training(lock)) is not None]


def _training(lock: Path) -> Training | None:
    """The holder of a run's lock, found without touching the lock: a try would make a run that starts just now fail."""
    try:
        found = re.fullmatch(r"process (\d+) on (.+)", lock.read_text(encoding="utf-8").strip())
        decisions = read_json(lock.parent / "manifest.json").get("decisions", {})
    except (OSError, RunError):
        return None
    if not found or found[2] != socket.gethostname():
        return None
    process = int(found[1])
    if process == os.getpid() or not _holds(process, lock):
        return None
    owed = max(0, decisions.get("predicted_peak_bytes", 0) - _resident(process))
    return Training(lock.parent, process, owed, decisions.get("place", "cpu"))


def _holds(process: int, lock: Path) -> bool:
    """Whether `process` is there and has the file open; where the system does not tell, that it is there."""
    descriptors = Path(f"/proc/{process}/fd")
    if not Path("/proc/self/fd").is_dir():
        return is_there(process)
    try:
        return any(link.resolve() == lock.resolve() for link in descriptors.iterdir())
    except PermissionError:
        return is_there(process)
    except OSError:
        return False


def is_there(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _resident(process: int) -> int:
    """Resident bytes of a process and of those it started; 0 where the system does not tell."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
        parents.setdefault(parent, []).append(int(stat.parent.name))
    family, pages = [process], 0
    for member in family:
        family += parents.get(member, [])
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text(encoding="utf-8").split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


class Taken(NamedTuple):
    """Bytes of a process that answers: those it cannot do without, and those of a token's keys and values."""

    fixed: int
    token: int


def taken(subject: Subject) -> Taken:
    """What answering takes. On a CPU as the headers of the base's files tell: its weights in the dtype of the products
    or packed, and the logits of a few hundred rows."""
    if subject.place == "cuda":
        return Taken(subject.fit.fixed, subject.fit.token)
    from luthier.model.folder import shards
    from luthier.model.load import model_folder

    model = subject.run.recipe.model
    folder, size = model_folder(model), 4 if subject.facts["dtype"] == "float32" else 2
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    shapes = [shape for path in shards(folder) for shape in _shapes(path)]
    weights = sum(prod(shape) * (PACKED if model.quantize and len(shape) == 2 else size) for shape in shapes)
    logits = LOGIT_ROWS * config.get("vocab_size", 0) * (4 + size)
    token = 2 * config.get("num_hidden_layers", 0) * config.get("hidden_size", 0) * size
    return Taken(int(PROCESS + weights + logits), token)


def room(
    of: Taken, longest: int, count: int, place: str, facts: Machine, beside: Sequence[Training]
) -> tuple[int, int]:
    """In how many processes, at most `count`, answers of `longest` tokens can be made, and how many tokens each of them
    may then hold.

    Raises MemoryPlanError where not one fits into what the machine, or its GPU, has free and no training run is owed.
    """
    gpu = facts.gpus[0] if place == "cuda" and facts.gpus else None
    there = facts.available if gpu is None else gpu.free
    owed = sum(training.owed for training in beside if (training.place == "cuda") == (gpu is not None))
    free, least = max(0, there - owed), of.fixed + longest * of.token
    if fitting := min(count, free // least):
        return fitting, (free // fitting - of.fixed) // max(of.token, 1)
    what = f"answering needs about {least >> 20:,} MiB and may take {there >> 20:,} MiB"
    if beside:
        names = ", ".join(f"{training.folder} (process {training.process})" for training in beside)
        what += f", of which {owed >> 20:,} MiB belong to what trains here: {names}"
    fix = "wait until it has ended" if beside else "close other programs"
    raise MemoryPlanError(what, fix=f"{fix}, or compare on another machine; answers that were made stay")


def _shapes(path: Path) -> list[list[int]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)


def step_back() -> None:
    """Makes this process the last that gets a core and the first that the kernel ends when memory runs short."""
    os.nice(19)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    except OSError:
        return  # another system, or not allowed: the priority still holds
