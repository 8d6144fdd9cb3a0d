"""Checkpoints that survive a crash at any instant, and are believed only after their content was checked.

A checkpoint is a folder `step-00000050`: `adapter.safetensors`, `optimizer.safetensors`, `progress.json`, and last of
all `manifest.json` with the size and SHA-256 of each. It is written aside on the same filesystem, every file and the
folder are fsynced, and one rename publishes it. Nothing else in the folder is ever read:

.partial-*   being written; left by a crash, swept away
.trash-*     on its way out; renamed first, so that a half-deleted folder never looks like a checkpoint
damaged-*    did not verify; kept for a person to look at
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from luthier.errors import CheckpointError
from luthier.runs import sync_folder
from luthier.strict import dumps

Tensors = dict[str, Tensor]
_MANIFEST = "manifest.json"
_FILES = ("adapter.safetensors", "optimizer.safetensors", "progress.json")
_LEAST_SCALE = 2.0**-12  # below it float16 loses more than it would have overflown


@dataclass
class Progress:
    """How far a run has come. With the recipe, its place in the data follows from `step` alone."""

    step: int  # updates made
    micro_tokens: int  # token budget, which only ever falls
    evaluated: int = 0  # step of the last evaluation
    stale: int = 0  # evaluations since the best one
    best_step: int | None = None
    best_loss: float | None = None
    scale: float = 1.0  # what summed losses are multiplied by in the backward pass; falls with float16 alone

    def judge(self, loss: float) -> None:
        """Takes note of the evaluation loss after `step`; one that is not finite is never the best."""
        self.evaluated = self.step
        self.stale += 1
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.stale = self.step, loss, 0

    def rescale(self) -> bool:
        """Takes a smaller scale, for a step whose gradient left float16's range (65,504); whether one was left."""
        self.scale /= 4
        return self.scale >= _LEAST_SCALE

    def limited(self, micro_tokens: int) -> Progress:
        return replace(self, micro_tokens=min(self.micro_tokens, micro_tokens))


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped: the adapter's tensors by name, the optimizer's and the
    random number generator's, and how far it has come."""

    adapter: Tensors
    optimizer: Tensors
    progress: Progress


# Every change to the disk goes through these three, so that a test can stop the process before and after each one.


def write_file(path: Path, content: bytes) -> None:
    """Creates `path` and returns once its content is on the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Within one folder: atomic, and durable on return."""
    os.rename(old, new)
    sync_folder(new.parent)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def publish(root: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` under `root`; it is there whole or not at all. Raises CheckpointError if the disk refuses."""
    step = checkpoint.progress.step
    final = folder_of(root, step)
    partial = root / f".partial-{final.name}"
    progress = dumps(asdict(checkpoint.progress), indent=2).encode()
    contents = dict(zip(_FILES, (save(checkpoint.adapter), save(checkpoint.optimizer), progress), strict=True))
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.mkdir()
        for name, content in contents.items():
            write_file(partial / name, content)
        write_file(partial / _MANIFEST, _manifest(step, contents))
        sync_folder(partial)
        if final.exists():
            discard(final)
        rename(partial, final)
    except OSError as error:
        remove(partial)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written ({error.strerror})",
            where=str(root),
            fix="free space or set run.dir to another disk; the same command then goes on from the last checkpoint",
        ) from error
    return final


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies. Those that do not are put aside as `damaged-*`, and `say` is told why."""
    sweep(root)
    for folder in reversed(published(root)):
        try:
            return read(folder)
        except CheckpointError as error:
            say(f"skipped a damaged checkpoint, kept as {_quarantine(folder).name}: {error}")
    return None


def read(folder: Path) -> Checkpoint:
    """Reads and verifies one checkpoint. Raises CheckpointError naming the file and what is wrong with it."""
    manifest = _read_manifest(folder)
    adapter, optimizer, progress = (_verified(folder / name, manifest["files"][name]) for name in _FILES)
    return Checkpoint(load(adapter), load(optimizer), Progress(**json.loads(progress)))


def read_adapter(folder: Path) -> Tensors:
    """The adapter's tensors of one checkpoint, verified, and nothing else. Raises CheckpointError."""
    return load(_verified(folder / _FILES[0], _read_manifest(folder)["files"][_FILES[0]]))


def adapter_digest(folder: Path) -> str:
    """SHA-256 of the adapter's tensors of one checkpoint, as its manifest says. Raises CheckpointError."""
    return str(_read_manifest(folder)["files"][_FILES[0]]["sha256"])


def hold(folder: Path, into: Path) -> Path:
    """A second name in `into` for what `read_adapter` needs of a checkpoint, which then stays readable if the run
    deletes its own. Raises CheckpointError if it is gone already."""
    held = into / folder.name
    try:
        held.mkdir(parents=True)
        for name in (_MANIFEST, _FILES[0]):
            _link(folder / name, held / name)
    except OSError as error:
        fix = "it may have been replaced by a newer one: see the folder's parent, and run.save.keep"
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(folder), fix=fix) from error
    return held


def _link(there: Path, here: Path) -> None:
    try:
        os.link(there, here)
    except OSError:
        shutil.copyfile(there, here)  # another filesystem, or one without links


def published(root: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first. Order comes from names, never from file times."""
    return sorted(root.glob("step-" + "[0-9]" * 8))


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def prune(root: Path, keep: int, best: int | None) -> None:
    """Leaves the `keep` newest checkpoints and the one of step `best`."""
    spared = {folder_of(root, best)} if best is not None else set()
    for folder in published(root)[:-keep]:
        if folder not in spared:
            discard(folder)


def discard(folder: Path) -> None:
    """Deletes a checkpoint: out of sight by one rename first."""
    trash = folder.with_name(f".trash-{folder.name}")
    remove(trash)
    rename(folder, trash)
    remove(trash)


def sweep(root: Path) -> None:
    """Removes what a crash left half-written or half-deleted."""
    for leftover in [*root.glob(".partial-*"), *root.glob(".trash-*")]:
        remove(leftover)


def _quarantine(folder: Path) -> Path:
    taken = len(list(folder.parent.glob(f"damaged-{folder.name}*")))
    aside = folder.with_name(f"damaged-{folder.name}" + (f"-{taken}" if taken else ""))
    rename(folder, aside)
    return aside


def _manifest(step: int, contents: dict[str, bytes]) -> bytes:
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    body = {"version": 1, "step": step, "files": files}
    return dumps(body | {"sha256": _digest(body)}, indent=2).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError("does not have the content it was written with", where=str(path))
    if folder.name != folder_of(folder.parent, manifest["step"]).name:
        raise CheckpointError(f"is the manifest of step {manifest['step']}", where=str(path))
    return manifest


def _verified(path: Path, facts: dict[str, Any]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if len(content) != facts["bytes"]:
        raise CheckpointError(f"has {len(content)} bytes of {facts['bytes']}", where=str(path))
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise CheckpointError("does not have the content it was written with", where=str(path))
    return content
