"""Where a run's figures go: always to metrics.jsonl, and to the trackers that the recipe names.

To add one: a class with `log(record)` and `close()`, made from (run folder, recipe as plain values), and a line in
TRACKERS. One that raises is dropped with a warning; it never stops a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import LuthierError, RecipeError
from luthier.registry import Registry
from luthier.runs import naming, write_atomic
from luthier.strict import dumps

Record = dict[str, Any]

TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": "luthier.train.trackers:TensorBoard",
        "wandb": "luthier.train.trackers:Wandb",
        "trackio": "luthier.train.trackers:Trackio",
        "mlflow": "luthier.train.trackers:Mlflow",
    },
)


class Tracker(Protocol):
    def log(self, record: Record) -> None:
        """One step (with `loss`) or one evaluation (with `eval_loss`); both have `step`."""

    def close(self) -> None: ...


class Journal:
    """metrics.jsonl: a line a step and a line an evaluation, flushed one by one, so a crash tears the last at most. A
    figure that is not finite is null, as JSON has no other word for it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, record: Record) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")

    def sync(self) -> None:
        """Returns once everything logged is on the disk."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int, evaluated: int) -> None:
        """Forgets steps after `step` and evaluations after `evaluated`, which will be done again, and a torn line."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = "".join(line for line in lines if _is_before(line, step, evaluated))
        write_atomic(self.path, kept)


class Trackers:
    """The trackers of a recipe as one, none of which can stop the run.

    Args:
        names: of TRACKERS, or `module:attribute`. Raises RecipeError for one that is unknown or not installed.
        folder: the run's folder.
        recipe: the recipe as plain values, which is all that a tracker learns of the run besides its figures.
        warn: told once of each tracker that fails.
    """

    def __init__(self, names: Sequence[str], folder: Path, recipe: Record, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._start(name, TRACKERS.get(name), folder, recipe)

    def log(self, record: Record) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(record))  # type: ignore[misc]

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)

    def _start(self, name: str, kind: Callable[[Path, Record], Tracker], folder: Path, recipe: Record) -> None:
        try:
            self._open[name] = kind(folder, recipe)
        except ImportError as error:
            fix = f"pip install {error.name or name}, or take it out of run.track"
            raise RecipeError(f"run.track: '{name}' is not installed", fix=fix) from error
        except LuthierError:
            raise
        except Exception as error:
            self._warn(f"tracker '{name}' could not start and is left out: {error!r}")

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            del self._open[name]
            self._warn(f"tracker '{name}' failed and is left out from here on: {error!r}")


class TensorBoard:
    def __init__(self, folder: Path, recipe: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: Record) -> None:
        for name, value in _figures(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, folder: Path, recipe: Record) -> None:
        import wandb

        self._run = wandb.init(dir=str(folder), name=folder.name, config=recipe, resume="allow", id=folder.name)

    def log(self, record: Record) -> None:
        self._run.log(_figures(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, folder: Path, recipe: Record) -> None:
        import trackio

        self._run = trackio.init(project="luthier", name=folder.name, config=recipe, resume="allow")

    def log(self, record: Record) -> None:
        self._run.log(_figures(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    def __init__(self, folder: Path, recipe: Record) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(recipe, "recipe.json")

    def log(self, record: Record) -> None:
        self._mlflow.log_metrics(_figures(record), step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()


def _figures(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


def _is_before(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
        return bool(record["step"] <= (evaluated if "eval_loss" in record else step)) and line.endswith("\n")
    except (ValueError, KeyError, TypeError):
        return False
