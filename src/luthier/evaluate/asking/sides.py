"""What can be compared: runs, checkpoints of runs, adapters that were made elsewhere, and the bases of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from luthier import recipe
from luthier.errors import AdapterError, RunError, UsageError
from luthier.evaluate.asking.seat import Seat, Stored
from luthier.evaluate.asking.subject import Side, Subject
from luthier.runs import Run

Kind = Literal["base", "run", "checkpoint", "adapter"]


@dataclass(frozen=True)
class Entry:
    """A side in plain values, from which any process can open it.

    Attributes:
        name: what people call it; no two sides of a comparison have the same.
        run: folder of the run whose base, template and decisions it takes.
        folder: of the trained tensors; for a base, of those that are switched off.
        model: the recipe's `model` section, where the adapter is of another base than the run.
        given: the folder that was named, where `folder` is another name of it.
    """

    name: str
    kind: Kind
    run: str
    folder: str
    model: dict[str, Any] | None = None
    given: str | None = None


@dataclass(frozen=True)
class Opened:
    """A side that can answer: `subject`, with its adapter on (`tuned`) or off (`base`)."""

    entry: Entry
    subject: Subject

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def side(self) -> Side:
        return "base" if self.entry.kind == "base" else "tuned"

    @property
    def about(self) -> dict[str, Any]:
        """What it is, JSON values."""
        facts, base = self.subject.facts, self.entry.kind == "base"
        return {
            "name": self.name,
            "kind": self.entry.kind,
            "base": facts["base"],
            "revision": facts["revision"],
            "dtype": facts["dtype"],
            "quantize": facts["quantize"],
            "adapter": None if base else self.subject.adapter.title,
            "sha256": None if base else facts["adapter"],
            "folder": None if base else self.entry.given or self.entry.folder,
        }


def pair_of(run: Run) -> list[Entry]:
    """A run against its base."""
    if not run.finished:
        Subject.open(run)  # raises, and says what to do
    own = Entry("tuned", "run", str(run.folder), str(run.adapter))
    return [replace(own, name="base", kind="base"), own]


def entries(folders: Sequence[Path], asker: Run | None, base: bool | None = None) -> list[Entry]:
    """The sides that `folders` mean, in their order. `asker` is the run that foreign adapters take their template from,
    where no run is among the folders; `base` is whether untouched bases come to them (see `with_bases`).

    Raises UsageError for a folder that is nothing of the kind or is given twice, and for one alone without its base;
    RunError for a run that has no adapter yet, AdapterError for an adapter that does not name its base.
    """
    host = next((run for folder in folders if (run := _run_of(folder)) is not None), asker)
    found = [_entry(folder, host) for folder in folders]
    places = Counter(str(Path(entry.folder).resolve()) for entry in found)
    if twice := [folder for folder in places if places[folder] > 1]:
        raise UsageError("is given twice", where=twice[0], fix="name each side once")
    if len(found) < 2 and base is False:
        fix = "name another, or leave --no-base out"
        raise UsageError("is one side, and there is nothing to compare it with", where=str(folders[0]), fix=fix)
    names = Counter(entry.name for entry in found)
    return [
        entry if names[entry.name] == 1 and entry.name != "base" else replace(entry, name=str(folder))
        for entry, folder in zip(found, folders, strict=True)
    ]


def asker_of(folders: Sequence[Path]) -> Run:
    """The first run among `folders`, whose questions, metrics and decoding are taken. Raises UsageError without one."""
    for folder in folders:
        if (run := _run_of(folder)) is not None:
            return run
        _entry_kind(folder)  # a folder that is nothing at all is told first
    fix = "put a run first, or name one: --questions RUN"
    raise UsageError("no run is among them, and questions, template and decoding come from one", fix=fix)


def open_sides(wanted: Iterable[Entry], seat: Seat, *known: Run) -> list[Opened]:
    """Opens the sides, without reading weights; those of one seat never hold two models. `known` are runs that need not
    be opened again."""
    runs = {str(run.folder): run for run in known}
    subjects: dict[tuple[str, str], Subject] = {}
    opened = []
    for entry in wanted:
        key = (entry.run, entry.folder)
        if key not in subjects:
            subjects[key] = _subject(entry, runs.get(entry.run) or Run.open(entry.run), seat)
        opened.append(Opened(entry, subjects[key]))
    return opened


def with_bases(sides: Sequence[Opened], wanted: bool | None) -> list[Opened]:
    """The sides, the untouched bases first if they are `wanted`; None: where all sides share one."""
    kinds: list[Opened] = []
    for side in sides:
        if all(side.subject.base != other.subject.base for other in kinds):
            kinds.append(side)
    if wanted is False or (wanted is None and len(kinds) > 1):
        return list(sides)
    named = [kinds[0].name] if len(kinds) == 1 else [f"base of {side.name}" for side in kinds]
    names = ["base"] if len(kinds) == 1 else named
    bases = [replace(s, entry=replace(s.entry, name=name, kind="base")) for s, name in zip(kinds, names, strict=True)]
    return [*bases, *sides]


def by_base(sides: Sequence[Opened]) -> list[Opened]:
    """The sides with those of one base together, so that each base is loaded once."""
    order: list[dict[str, Any]] = []
    for side in sides:
        if side.subject.base not in order:
            order.append(side.subject.base)
    return sorted(sides, key=lambda side: order.index(side.subject.base))


def _entry(folder: Path, host: Run | None) -> Entry:
    kind = _entry_kind(folder)
    if kind == "adapter":
        return _foreign(folder, host or asker_of([folder]))
    run = _run_of(folder)
    assert run is not None
    if kind == "checkpoint":
        step = int(folder.name.removeprefix("step-"))
        return Entry(f"{run.folder.resolve().name}@{step}", "checkpoint", str(run.folder), str(folder))
    return replace(pair_of(run)[1], name=run.folder.resolve().name)


def _entry_kind(folder: Path) -> Kind:
    if _run_of(folder) is not None:
        return "checkpoint" if folder.parent.name == "checkpoints" else "run"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if not folder.is_dir():
        Run.open(folder)  # raises, and says which runs there are
    fix = "give a run folder, a checkpoint in one (RUN/checkpoints/step-00000050), or a PEFT adapter's folder"
    if inside := sorted(str(recipe.parent) for recipe in folder.glob("*/recipe.yaml")):
        fix = f"name one or several of the runs in it: {', '.join(inside)}"
    raise UsageError("is no run, checkpoint or adapter", where=str(folder), fix=fix)


def _run_of(folder: Path) -> Run | None:
    """The run that `folder` is, or holds as a checkpoint or as its adapter; None for other folders."""
    if (folder / "recipe.yaml").is_file():
        return Run.open(folder)
    if folder.name == "adapter" and (folder.parent / "recipe.yaml").is_file():
        return Run.open(folder.parent)
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "recipe.yaml").is_file():
        if not _is_checkpoint(folder):
            raise RunError("is no checkpoint (any more)", where=str(folder), fix=_others(folder.parent))
        return Run.open(folder.parent.parent)
    return None


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("step-") and (folder / "manifest.json").is_file()


def _others(checkpoints: Path) -> str:
    names = sorted(path.name for path in checkpoints.glob("step-" + "[0-9]" * 8))
    return f"there are {', '.join(names)}; run.save.keep says how many stay" if names else "there is none yet"


def _foreign(folder: Path, host: Run) -> Entry:
    """An adapter that no run here made: on the base that it names, under the decisions of `host`."""
    from luthier.adapters.files import read_config
    from luthier.model.load import model_folder

    config = read_config(folder)
    base, own = config.get("base_model_name_or_path"), host.recipe.model
    entry = Entry(folder.resolve().name, "adapter", str(host.folder), str(folder))
    if not base:
        fix = f'write its base into adapter_config.json: "base_model_name_or_path": "{own.base}"'
        raise AdapterError("does not name its base model", where=str(folder), fix=fix)
    named = own.model_copy(update={"base": base, "revision": config.get("revision"), "trust_remote_code": False})
    if base == own.base or model_folder(named).resolve() == model_folder(own).resolve():
        return entry
    return replace(entry, model=named.model_dump(mode="json"))


def _subject(entry: Entry, run: Run, seat: Seat) -> Subject:
    stored = Stored(run, Path(entry.folder), checkpoint=_is_checkpoint(Path(entry.folder)))
    if entry.model is not None:
        changes = {"model": recipe.Model.model_validate(entry.model)}
        run = Run(run.folder, run.recipe.model_copy(update=changes))
    adapter = stored.load().settings if entry.kind == "adapter" else run.recipe.adapter
    return Subject.of(run, stored, adapter, seat)
