"""One worker of a study: takes cells that nobody has, trains each on a base that it reads once, and scores it.

`python -m luthier.evaluate.study.cells STUDY` is what `conduct.py` starts, one per core or GPU (see `train/group.py`).
There is no list of who does what: a cell belongs to the process that holds the lock of its folder, so that one that is
killed leaves its cell to whoever looks next.
"""

from __future__ import annotations

import fcntl
import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import recipe
from luthier.data.store import TokenStore
from luthier.errors import NotFiniteError, RunError
from luthier.evaluate.asking.answers import Memo, Task, Text, collect, likelihoods, located, plan, sampling_of, work
from luthier.evaluate.asking.seat import Seat
from luthier.evaluate.asking.subject import SIDES, Side, Subject
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.asking.workers import needed
from luthier.evaluate.comparison import score
from luthier.runs import Run, read_json, write_json
from luthier.train.decide import Decisions
from luthier.train.group import Event, Progress, report

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

Json = dict[str, Any]


def scores_of(run: Run) -> Path:
    """What a cell that is done leaves: statistics by question and by held-out row, or why training failed."""
    return run.results / "study.json"


def base_scores_of(folder: Path) -> Path:
    return folder / "base.json"


def main(folder: str) -> int:
    return report(lambda emit: _cells(Path(folder), emit))


def _cells(folder: Path, emit: Progress) -> Event:
    """Does what is left of the cells that study.json lists, in its order."""
    bench, runs = _Bench(), [Run.open(folder / "cells" / name) for name in read_json(folder / "study.json")["cells"]]
    for run in runs:
        with _held(run) as mine:
            if mine and not scores_of(run).exists():
                _cell(run, folder, bench, emit)
    trained = [run for run in runs if run.finished]
    if trained and not base_scores_of(folder).exists():
        _base(trained[0], folder, bench.trained(trained[0]), emit)
    return {}


@contextmanager
def _held(run: Run) -> Iterator[bool]:
    """Whether the run is ours for the time being; no other process takes it then."""
    with ExitStack() as stack:
        try:
            stack.enter_context(run.lock())
        except RunError:
            yield False
        else:
            yield True


def _cell(run: Run, folder: Path, bench: _Bench, emit: Progress) -> None:
    def told(event: Event) -> None:
        emit({**event, "cell": run.folder.name})

    told({"event": "cell"})
    try:
        model = bench.train(run, told)
    except NotFiniteError as error:
        write_json(_made(scores_of(run)), {"failed": str(error)})
    else:
        told({"event": "answering"})
        write_json(_made(scores_of(run)), _scores(run, folder, model, "tuned"))
        _base(run, folder, model, emit)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # they are three times the adapter, and it is done
    told({"event": "scored"})


def _base(run: Run, folder: Path, model: CausalModel, emit: Progress) -> None:
    """Scores the base by the model of any of the cells, unless somebody does or has done."""
    path = base_scores_of(folder)
    with (folder / ".base.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        if not path.exists():
            emit({"event": "base"})
            write_json(path, _scores(run, folder, model, "base"))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _scores(run: Run, folder: Path, model: CausalModel, side: Side) -> Json:
    """The statistics of the deciding metric by question, and the loss (nats, tokens) by held-out row, of one side.
    Answers go to the study's memo, those of all other metrics too, so that `compare` finds them there."""
    subject, sampling = replace(Subject.open(run), seat=_Taken(model)), sampling_of(run)
    questions, memo = suite(run).questions, Memo(folder / "answers.jsonl")
    # Where answers are drawn, those of the base depend on the seed: `compare` will want each cell's own.
    sides = [side] if sampling.temperature == 0 else SIDES
    tasks = plan(subject, questions, sampling, sides=sides, needs=needed(run))
    held = _heldout(subject, TokenStore.open(run.data / "heldout"), side)
    for some in (tasks, held):
        work(subject, some, sampling, memo, lambda label, count: None)
    first = run.recipe.evaluate.metrics[:1]
    found = next(iter(score(questions, [collect(tasks, memo, len(questions), side)], first).table.values()))
    losses = [[memo[task.key]["nll"], memo[task.key]["targets"]] for task in held]
    return {"rows": found.rows, "statistics": found.statistics(0), "heldout": losses}


def _heldout(subject: Subject, store: TokenStore, side: Side) -> list[Task]:
    """The likelihood of every held-out row, as training sees it."""
    rows = range(len(store))
    tasks = likelihoods(subject, side, {row: Text.of(store.as_example(row)) for row in rows})
    return located(tasks, [store.origin(row) for row in rows])


class _Taken(Seat):
    """A seat whose model is there already, with its adapter."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self._there = model

    def model(self, subject: Subject) -> CausalModel:
        return self._there


class _Bench:
    """Where the base lies between two cells. It is read once, where an adapter can be put on it without a trace."""

    def __init__(self) -> None:
        self._loaded: Any = None
        self._proven: list[Json] = []

    def train(self, run: Run, emit: Progress) -> CausalModel:
        """The model with the adapter of `run`, trained to its end if it is not."""
        from luthier.train.engines.local import Local
        from luthier.train.worker import work

        if run.finished and "result" in run.manifest:
            return self.trained(run)
        decisions, model = Decisions(**run.manifest["decisions"]), self._fresh(run)
        # The worst step is the same for all cells that decided the same: once is proof enough.
        proven = decisions.as_dict() in self._proven
        run.update_manifest(result=work(run, decisions, Local(), emit, model=model, proven=proven))
        self._proven.append(decisions.as_dict())
        return model

    def trained(self, run: Run) -> CausalModel:
        """The model with the adapter that `run` has left."""
        from luthier.adapters import files

        model = self._fresh(run)
        assert model.adapter is not None
        model.adapter.load_state_dict(files.load(run.adapter)[1])
        return model

    def _fresh(self, run: Run) -> CausalModel:
        """The base with a new adapter."""
        from luthier.model.load import model_folder
        from luthier.model.memory import release
        from luthier.train.worker import model_of

        gc.collect()  # the model before holds itself in cycles
        release()
        decisions, folder = Decisions(**run.manifest["decisions"]), model_folder(run.recipe.model)
        if not _leaves_the_base(run.recipe.adapter) or decisions.offload or decisions.offload_embedding:
            return model_of(run.recipe, decisions, folder)
        if self._loaded is None:
            self._loaded = _load(run.recipe, decisions, folder)
        return model_of(run.recipe, decisions, folder, self._loaded)


def _leaves_the_base(adapter: recipe.Adapter) -> bool:
    """Whether the base is the same once it has been trained: other methods are trained on one that is read anew."""
    if isinstance(adapter, recipe.Lora):
        return adapter.bias == "none" and not adapter.modules_to_save and not adapter.new_tokens
    return isinstance(adapter, recipe.Bottleneck)


def _load(chosen: recipe.Recipe, decisions: Decisions, folder: Path) -> Any:
    import torch

    from luthier.model.load import load_causal
    from luthier.model.place import check_place

    check_place(decisions.place)
    dtype = getattr(torch, decisions.dtype)
    return load_causal(folder, chosen.model, device=decisions.place, dtype=dtype, attention="packed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
