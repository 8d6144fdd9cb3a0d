"""Adapters on disk, exactly as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters.method import OTHER, READERS, Adapter
from luthier.errors import AdapterError
from luthier.strict import dumps

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "luthier.json"


def save(adapter: Adapter, folder: Path, *, base: str, revision: str | None, extra: dict[str, Any]) -> None:
    """Writes the adapter to `folder`; `extra` (JSON values: the template …) goes beside it in luthier.json.

    Each file is written aside and renamed, so a reader sees the old one or the new one.
    """
    from safetensors.torch import save as serialise

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    origin = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    _write(folder / WEIGHTS, serialise(tensors, metadata={"format": "pt"}))
    _write(folder / EXTRA, _json(extra))
    _write(folder / CONFIG, _json(origin | adapter.config()))


def load(folder: Path) -> tuple[recipe.Adapter, dict[str, Tensor]]:
    """The adapter in `folder`: what to attach, and the tensors to load into it, under the names of the file.

    Raises AdapterError for a missing or malformed file, an option that luthier does not compute, a tensor that is not
    finite, or one that does not go with the settings.
    """
    config = _read_json(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    kind = config.get("peft_type")
    read = READERS.get(kind if kind in READERS.names() else OTHER)
    settings: recipe.Adapter = read(config, tensors, folder / CONFIG)
    return settings, tensors


@contextmanager
def fitting(folder: Path, base: str, revision: str | None) -> Iterator[None]:
    """Inside, the adapter in `folder` is attached to `base`: an AdapterError then names both, and says so if it was
    trained on another. That alone is no error: a base may have moved."""
    try:
        yield
    except AdapterError as error:
        where = ": ".join(part for part in (f"{folder} on {base}", error.where) if part)
        fix = other_base(folder, base, revision) or error.fix
        raise AdapterError(error.what, where=where, fix=fix) from error


def other_base(folder: Path, base: str, revision: str | None) -> str:
    """A sentence if the adapter in `folder` says that it was trained on another base or revision, else empty."""
    config = _read_json(folder / CONFIG)
    was, at = config.get("base_model_name_or_path"), config.get("revision")
    other_revision = at and revision and at != revision
    if not was or (was == base and not other_revision):
        return ""
    return (
        f"it was trained on {was}{f' at {at}' if at else ''}, and this is {base}{f' at {revision}' if revision else ''}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises AdapterError if it is missing or malformed."""
    return _read_json(folder / CONFIG)


def load_extra(folder: Path) -> dict[str, Any]:
    """What `save` was given as `extra`; empty for an adapter that luthier did not write."""
    path = folder / EXTRA
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"cannot be read ({error.strerror})", where=str(path), fix="give an adapter's folder"
        ) from error
    except ValueError as error:
        raise AdapterError("is not valid JSON", where=str(path), fix="restore the file") from error
    if not isinstance(value, dict):
        raise AdapterError("should hold a JSON object", where=str(path), fix="restore the file")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except OSError as error:
        raise AdapterError(
            "cannot be read", where=str(path), fix="give a folder with adapter_model.safetensors"
        ) from error
    except SafetensorError as error:
        raise AdapterError(f"is damaged ({error})", where=str(path), fix="restore the file") from error
    if not tensors:
        raise AdapterError("holds no tensors", where=str(path), fix="restore the file")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fix = "use an earlier checkpoint"
            raise AdapterError("holds values that are not finite", where=f"{path}: {name}", fix=fix)
    return tensors


def _json(value: dict[str, Any]) -> bytes:
    return (dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
