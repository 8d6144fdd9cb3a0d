"""Figures reach metrics.jsonl always, trackers where they can, and no tracker stops a run."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

import tiny
from luthier.errors import RecipeError
from luthier.train.trackers import TRACKERS, Journal, Record, Trackers
from luthier.train.worker import _recording

STEP = {"step": 3, "loss": 1.5, "lr": 0.1}


class Broken:
    """A tracker that fails from its second record on."""

    logged = 0

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        type(self).logged += 1
        if record["step"] > 1:
            raise OSError("no network")

    def close(self) -> None:
        raise OSError("no network")


class Listening:
    heard: ClassVar[list[Record]] = []

    def __init__(self, folder: Path, recipe: Record) -> None:
        pass

    def log(self, record: Record) -> None:
        self.heard.append(record)

    def close(self) -> None:
        pass


class Unstartable:
    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        raise OSError("no account")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_journal_appends_a_line_a_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        journal.log({"step": step, "loss": 0.1})
    journal.sync()
    assert lines(journal.path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}]


def test_the_journal_is_strict_json_where_a_figure_is_not_finite(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for loss in (math.nan, math.inf, 0.5):
        journal.log({"step": 1, "eval_loss": loss})
    journal.rewind(step=1, evaluated=1)
    read = [json.loads(line, parse_constant=pytest.fail) for line in journal.path.read_text().splitlines()]
    assert read == [{"step": 1, "eval_loss": loss} for loss in (None, None, 0.5)]


def test_whoever_is_told_of_a_figure_that_is_not_finite_is_told_none(tmp_path: Path) -> None:
    run, seen = tiny.run(tmp_path), list[Record]()
    trackers = Trackers([f"{__name__}:Listening"], tmp_path, {}, pytest.fail)
    _recording(run, trackers, seen.append)({"event": "evaluation", "step": 1, "eval_loss": math.nan})
    assert seen == [{"event": "evaluation", "step": 1, "eval_loss": None}]
    assert Listening.heard == [{"step": 1, "eval_loss": None}]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 2, "loss": 1.0}', "\ufffd\x00", "[]\n"])
def test_rewinding_forgets_what_will_be_done_again_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        journal.log({"step": step, "loss": 1.0})
    journal.log({"step": 2, "eval_loss": 1.0})
    journal.log({"step": 4, "eval_loss": 1.0})
    with open(journal.path, "a") as file:
        file.write(torn)
    journal.rewind(step=3, evaluated=2)
    left = [(record["step"], "eval_loss" in record) for record in lines(journal.path)]
    assert left == [(1, False), (2, False), (3, False), (2, True)]


def test_rewinding_without_a_file_does_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "metrics.jsonl").rewind(0, 0)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_raises_is_dropped_with_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    trackers = Trackers([f"{__name__}:Broken"], tmp_path, {}, warnings.append)
    for step in (1, 2, 3):
        trackers.log({"step": step})
    trackers.close()
    assert Broken.logged == 2
    assert len(warnings) == 1
    assert "no network" in warnings[0]


def test_a_tracker_that_cannot_start_is_left_out(tmp_path: Path) -> None:
    warnings: list[str] = []
    Trackers([f"{__name__}:Unstartable"], tmp_path, {}, warnings.append).log(STEP)
    assert len(warnings) == 1


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import system's own way to say that there is none
    with pytest.raises(RecipeError, match="'wandb' is not installed; pip install wandb"):
        Trackers(["wandb"], tmp_path, {}, print)


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tensorboard"):
        Trackers(["tensorbord"], tmp_path, {}, print)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, {}, print)
    trackers.log(STEP)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert events.Scalars("loss")[0].step == 3


class Service:
    """A double of a tracker's library: remembers what it was told."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.started: dict[str, Any] = {}
        self.finished = False

    def init(self, **options: Any) -> "Service":
        self.started = options
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((figures, step))

    def finish(self) -> None:
        self.finished = True

    start_run, log_metrics, end_run = init, log, finish

    def log_dict(self, value: dict[str, Any], name: str) -> None:
        self.started["config"] = value


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_service_gets_the_recipe_and_the_figures_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, module = Service(), ModuleType(name)
    for attribute in ("init", "start_run", "log_metrics", "end_run", "log_dict"):
        setattr(module, attribute, getattr(service, attribute))
    monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers([name], tmp_path, {"train": {"lr": 0.1}}, pytest.fail)
    trackers.log(STEP)
    trackers.close()
    assert service.logged == [({"loss": 1.5, "lr": 0.1}, 3)]
    assert service.started["config"] == {"train": {"lr": 0.1}}
    assert service.finished


def test_every_tracker_of_the_registry_can_be_found() -> None:
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        assert callable(TRACKERS.get(name))
