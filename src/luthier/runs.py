"""A run is a folder. Every verb reads and writes one.

recipe.yaml      the recipe as given, defaults and overrides included
manifest.json    versions, decisions made once from facts, hashes of what went in
metrics.jsonl    a line a step, and a line an evaluation
samples.jsonl    answers given during training
data/            report, dropped rows, tokens, test conversations, template
checkpoints/     step-00000050/ …, each verified by its own manifest
adapter/         the result, in PEFT's format
results/NAME/    comparisons and predictions
report.html      the page for people
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from luthier.errors import RunError
from luthier.recipe import Recipe
from luthier.strict import dumps

_PACKAGES = (
    *("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "rouge-score"),
    "nvidia-cudnn-frontend",  # computes attention where it is installed
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)

# What prepared data depends on: sources and their treatment, the columns that are kept, the tokenizer, and the seed of
# the split.
_PREPARED_BY = ("data.", "evaluate.slices", "model.base", "model.revision", "adapter.new_tokens", "train.seed")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replaces `path` by `content` in one step: written aside, fsynced, renamed, and the folder fsynced. An OSError
    names `path` and leaves nothing beside it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, as `write_atomic` has it: for what is too long to
    be held in one piece."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.filename in (None, str(aside)):  # not one of a file that the block reads
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            aside.unlink()
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file names `path`: a write that finds no room does not say where it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def refusal(error: OSError) -> RunError | None:
    """What to tell a person of an error of the disk; None where it is none."""
    fix = "the same command then goes on from what is whole"
    if error.errno in _FULL:
        what, fix = f"the disk takes no more ({error.strerror})", f"make room, or write elsewhere (run.dir=…); {fix}"
    elif error.errno in _REFUSED and error.filename:
        what, fix = f"cannot be read or written ({error.strerror})", f"give access to it, or write elsewhere; {fix}"
    else:
        return None
    return RunError(what, where=str(error.filename or ""), fix=fix)


def vacant(folder: Path) -> bool:
    """Whether nothing lies in it but what a killed `write_atomic` left."""
    return all(re.fullmatch(r"\..+\.\d+\.tmp", path.name) for path in folder.iterdir())


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises RunError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError("is missing", where=str(path), fix="is this the folder of a finished step?") from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error})", where=str(path)) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Run:
    """A run's folder and what lies in it. `Run.create` makes one, `Run.open` finds one."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.data = folder / "data"
        self.checkpoints = folder / "checkpoints"
        self.adapter = folder / "adapter"
        self.results = folder / "results"
        self.metrics = folder / "metrics.jsonl"
        self.samples = folder / "samples.jsonl"
        self.report = folder / "report.html"

    @classmethod
    def create(cls, recipe: Recipe, *, name: str = "run", root: Path | None = None) -> Run:
        """The run folder of `recipe`, made if new. `root` is what relative data paths count from. A run that has not
        begun to train, such as one whose start failed, takes another recipe.

        Raises RunError where one that has begun was of another recipe (in the half that says what is learned).
        """
        folder = Path(recipe.run.dir) if recipe.run.dir else Path("runs") / name
        run = cls(folder, recipe)
        if (folder / "recipe.yaml").exists():
            run._take_recipe(root)
            return run
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not vacant(folder):
                raise RunError("is not empty and is not a run", where=str(folder), fix="set run.dir to a new folder")
            write_atomic(folder / "recipe.yaml", recipe.dump())
        except OSError as error:
            raise RunError(
                f"cannot be written ({error.strerror})", where=str(folder), fix="set run.dir to another folder"
            ) from error
        run.write_first_manifest(root)
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in `folder`. Raises RunError where there is none."""
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            known = sorted(str(p.parent) for p in Path("runs").glob("*/recipe.yaml"))
            fix = f"runs here: {', '.join(known)}" if known else "train one first: luthier train RECIPE"
            raise RunError("is not a run folder", where=str(folder), fix=fix)
        return cls(folder, Recipe.load(folder / "recipe.yaml"))

    @property
    def manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        return dict(read_json(path)) if path.exists() else {}

    @property
    def root(self) -> Path:
        """The folder that relative data paths of the recipe count from."""
        return Path(self.manifest.get("root", "."))

    def update_manifest(self, **entries: Any) -> None:
        """Sets top-level entries of manifest.json and leaves the others."""
        write_json(self.folder / "manifest.json", self.manifest | entries)

    def steps(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line torn by a crash is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    @property
    def finished(self) -> bool:
        return (self.adapter / "adapter_config.json").exists()  # the last of its files to be written

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for one writer. Raises RunError naming the process that has it."""
        import fcntl

        path = self.folder / ".lock"
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise RunError(
                    f"is in use by {file.read().strip() or 'another process'}",
                    where=str(self.folder),
                    fix="wait for it, or set run.dir to another folder",
                ) from error
            with naming(path):
                file.seek(0)
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield

    @property
    def begun(self) -> bool:
        """Whether it holds anything that was learned: a step, a checkpoint or an adapter."""
        return bool(self.steps()) or self.finished or any(self.checkpoints.glob("step-*"))

    def _take_recipe(self, root: Path | None) -> None:
        there = Recipe.load(self.folder / "recipe.yaml")
        differs = there.diff(self.recipe)
        changed = {k: v for k, v in differs.items() if not k.startswith(("run.", "evaluate."))}
        if "evaluate.slices" in differs and not self.begun:  # later, a comparison reads them from the files
            changed["evaluate.slices"] = differs["evaluate.slices"]
        stale = (self.data / "report.json").exists() and any(key.startswith(_PREPARED_BY) for key in changed)
        is_lost = stale and any(source.path == "-" for source in there.data.train + there.data.test)
        if changed and (self.begun or is_lost):
            lines = "; ".join(f"{key}: {dumps(old)} there, {dumps(new)} now" for key, (old, new) in changed.items())
            raise RunError(
                f"holds a run of another recipe ({lines})",
                where=str(self.folder),
                fix="set run.dir to a new folder, or delete this one to train anew",
            )
        if changed:
            with self.lock():
                # The recipe last: until it is there, what stops midway is a change that is still to be made.
                if stale:
                    (self.data / "report.json").unlink()  # so that the data is prepared again
                self.write_first_manifest(root)
                write_atomic(self.folder / "recipe.yaml", self.recipe.dump())
        elif there != self.recipe:
            write_atomic(self.folder / "recipe.yaml", self.recipe.dump())
        if not self.manifest:  # a start that ended between the two
            self.write_first_manifest(root)

    def write_first_manifest(self, root: Path | None) -> None:
        """Begins manifest.json. `root` is what relative data paths count from."""
        manifest = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "root": str((root or Path()).resolve()),
            "command": sys.argv,
        }
        write_json(self.folder / "manifest.json", manifest)
