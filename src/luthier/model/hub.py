"""Gets a model from a hub into its cache: the files that are needed and no others, of one commit, if they fit the disk.

The hub is `HF_ENDPOINT` (https://huggingface.co unless set, so a mirror works too), the token what `hf auth login` or
`HF_TOKEN` left, the cache `HF_HOME`: all as `huggingface_hub` has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import recipe
from luthier.errors import ModelError
from luthier.model import embedded

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

Say = Callable[[str], None]

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "LICENSE*"]
UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # the same weights a second time
_AT_ONCE = 4


class UnreachableError(ModelError):
    """There is no network, or none that leads to the hub, and no copy in its cache."""


def snapshot(model: recipe.Model, progress: Say | None = None) -> Path:
    """The folder of `model.base` in the hub's cache, at the commit that `model.revision` means now.

    Args:
        progress: is told in one line each what is looked for, what is fetched, and how far that is.

    Raises:
        ModelError: the hub cannot be reached and has left no copy, wants a login, has no such model or revision, or
            has it as pickle files only; or the disk is too small.
    """
    say = progress or (lambda line: None)
    say(f"looking for {model.base} in the hub's cache, else fetching it")
    with _explaining(model.base):
        return _snapshot(model, say)


def config_file(model: recipe.Model) -> Path:
    """`config.json` of `model.base` in the hub's cache, fetched by itself if need be. Raises ModelError, also where
    the hub has the weights as pickle files only."""
    from huggingface_hub.errors import DryRunError

    with _explaining(model.base), suppress(DryRunError):  # no network: a copy in the cache still does
        _check_pickles(model, _listed(model))
    return _part(model, ["config.json"]) / "config.json"


def tokenizer_folder(model: recipe.Model) -> Path:
    """The folder in the hub's cache that has the tokenizer of `model.base`, fetched by itself if need be. Raises
    ModelError."""
    return _part(model, ["tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja"])


def _part(model: recipe.Model, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _explaining(model.base):
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=patterns))


def _snapshot(model: recipe.Model, say: Say) -> Path:
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    try:
        files = _listed(model)
    except DryRunError as error:  # no network, or no right to ask: a copy in the cache still does
        try:
            return _cached(model, model.revision)
        except LocalEntryNotFoundError:
            raise error.__cause__ or error from None
    _check_pickles(model, files)
    missing = [file for file in files if file.will_download]
    _check_disk(model.base, missing)
    _fetch(model.base, missing, say)
    return _cached(model, files[0].commit_hash)


def loaded_revision(folder: Path) -> str | None:
    """The hub commit that `folder` is a snapshot of, or None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def _patterns(model: recipe.Model) -> list[str]:
    return [*WANTED, "*.py"] if model.trust_remote_code else WANTED


def _listed(model: recipe.Model) -> list[DryRunFileInfo]:
    """What the hub has of the wanted files, and what of it is in the cache."""
    from huggingface_hub import snapshot_download

    patterns = [*_patterns(model), "*.bin"]
    files: list[DryRunFileInfo] = snapshot_download(
        model.base, revision=model.revision, allow_patterns=patterns, ignore_patterns=UNWANTED, dry_run=True
    )
    return files


def _check_pickles(model: recipe.Model, files: list[DryRunFileInfo]) -> None:
    """Says before anything is fetched that a model has no safetensors files; drops pickles from the list."""
    pickles = [file for file in files if file.filename.endswith(".bin")]
    if pickles and not any(file.filename.endswith(".safetensors") for file in files):
        fix = "take a revision that has .safetensors (often refs/pr/…), or convert them where it is safe to load them"
        raise ModelError(f"has pickle weights only ({pickles[0].filename}), never loaded", where=model.base, fix=fix)
    for pickle in pickles:
        files.remove(pickle)
    if not files:
        raise ModelError("holds no model files", where=model.base, fix="check the name and model.revision")


def _check_disk(base: str, missing: Sequence[DryRunFileInfo]) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = _bytes(missing), shutil.disk_usage(cache).free
    if needed > free:
        raise ModelError(
            f"needs {needed} bytes ({needed / 1e9:.1f} GB) on disk, and {cache} has {free} ({free / 1e9:.1f} GB) free",
            where=base,
            fix="free some, or set HF_HOME to a folder on a larger disk",
        )


def _bytes(files: Sequence[DryRunFileInfo]) -> int:
    return sum(file.file_size or 0 for file in files)


def _fetch(base: str, missing: Sequence[DryRunFileInfo], say: Say) -> None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    total, done, bars = _bytes(missing), 0, not are_progress_bars_disabled()
    if not missing:
        return
    commit = missing[0].commit_hash
    say(f"fetching {base} at {commit[:12]} from {constants.ENDPOINT}: {len(missing)} files, {total / 1e9:.2f} GB")
    disable_progress_bars()  # ours tells how far the whole is
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            jobs = {pool.submit(hf_hub_download, base, file.filename, revision=commit): file for file in missing}
            for job in as_completed(jobs):
                job.result()
                done += _bytes([jobs[job]])
                say(f"fetched {jobs[job].filename} ({done / 1e9:.2f} of {total / 1e9:.2f} GB)")
    finally:
        if bars:
            enable_progress_bars()


def _cached(model: recipe.Model, revision: str | None) -> Path:
    """The snapshot's folder in the cache; nothing is asked of the hub. Its name is the commit."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": _patterns(model), "ignore_patterns": UNWANTED}
    return Path(snapshot_download(model.base, revision=revision, local_files_only=True, **options))


@contextmanager
def _explaining(base: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the client has errors of its own, of the HTTP library it uses, and of the system
        raise _explained(base, error) from error


def _explained(base: str, error: Exception) -> ModelError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        fix = f"accept its licence at {hub}/{base} and log in with `hf auth login`"
        return ModelError("this model is gated", where=base, fix=fix)
    if isinstance(error, RepositoryNotFoundError):
        fix = "check the name; if it is private, log in with `hf auth login`"
        return ModelError(f"{hub} has no such model, or keeps it private", where=base, fix=fix)
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, HfHubHTTPError | ValueError):
        fix = "check the name and model.revision, or give a local folder"
        return ModelError(f"{hub} does not give it ({line})", where=base, fix=fix)
    fix = (
        "fetch it where there is a network and give its folder, set HF_ENDPOINT to a mirror that you can reach, "
        f"or use {embedded.NAME}, which needs no hub"
    )
    what = f"the model hub {hub} cannot be reached, and no copy is in its cache ({line[:200]})"
    return UnreachableError(what, where=base, fix=fix)
