"""From a recipe's `model:` to a checked local folder, a tokenizer and a frozen transformers model.

A folder is read from outside in: names and sizes first, then headers, then weights. Whatever is wrong is listed at once
and before anything is loaded. No pickle is read, and no code that comes with a model runs unless the recipe says so.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import recipe
from luthier.errors import ModelError
from luthier.machine import Machine, machine
from luthier.model import embedded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.data.tokens import Tokenizer

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "LICENSE*"]
UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # the same weights a second time

# No real model comes near these; a hostile config that passes them cannot fill memory before its weights are missed.
LIMITS = {
    "num_hidden_layers": 1 << 11,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "num_attention_heads": 1 << 12,
    "max_position_embeddings": 1 << 28,
}


def model_folder(model: recipe.Model, progress: Callable[[str], None] | None = None) -> Path:
    """The local folder of `model.base`, fetched if need be and checked.

    Raises:
        ModelError: it cannot be had, or is not complete; all that is missing is listed.
    """
    folder = _folder(model, progress)
    check_folder(folder, model)
    return folder


def loaded_revision(folder: Path) -> str | None:
    """The hub commit that `folder` is a snapshot of, or None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def load_tokenizer(folder: Path) -> Tokenizer:
    from luthier.data.tokens import Tokenizer

    return Tokenizer.load(folder)


def load_causal(
    folder: Path, model: recipe.Model, *, device: torch.device | str, dtype: torch.dtype, attention: str = "packed"
) -> PreTrainedModel:
    """The transformers model in `folder`, frozen and in eval mode, weights in `dtype` on `device`.

    Args:
        attention: `packed` (ours, segments kept apart) or `sdpa` (transformers' own).

    Raises:
        ModelError: transformers has no such architecture, or the weights do not fill it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        module, info = load(
            folder,
            dtype=dtype,
            attn_implementation=_attention(attention),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, AttributeError) as error:
        raise ModelError(f"transformers cannot load it ({_one_line(error)})", where=str(folder)) from error
    wrong = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
    if wrong:
        raise ModelError(f"lacks the weights {_some(wrong)}, or has them in another shape", where=str(folder))
    frozen: PreTrainedModel = module.requires_grad_(False).eval().to(device)
    return frozen


def _attention(name: str) -> str:
    """transformers' name of an attention; ours is registered by importing its module."""
    if name != "packed":
        return name
    import_module("luthier.model.attention")
    return "luthier_packed"


def compute_dtype(model: recipe.Model, device: torch.device | str) -> torch.dtype:
    """The dtype of weights and matrix products that `model.compute` means on `device`."""
    return choose_dtype(model, device)[0]


def choose_dtype(model: recipe.Model, device: torch.device | str) -> tuple[torch.dtype, str]:
    """`compute_dtype` and, in some words, why."""
    import torch

    name, why = dtype_name(model, torch.device(device).type, machine())
    return getattr(torch, name), why


def dtype_name(model: recipe.Model, place: str, facts: Machine) -> tuple[str, str]:
    """The name of the dtype that `model.compute` means on `cpu` or `cuda`, and why. `auto` is decided from what the
    processor has, never from a timing. Imports torch only to ask about a GPU."""
    if model.compute != "auto":
        return model.compute, "as the recipe says"
    if place == "cuda":
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU multiplies bfloat16"
        return "float32", "the GPU does not multiply bfloat16"
    if facts.fast_bfloat16:
        return "bfloat16", "the processor multiplies bfloat16"
    return "float32", "the processor does not multiply bfloat16, and float32 is faster then"


# Where a folder comes from.


def _folder(model: recipe.Model, progress: Callable[[str], None] | None) -> Path:
    if model.base == embedded.NAME:
        return embedded.embedded_folder(progress)
    local = Path(model.base).expanduser()
    if model.base and local.is_dir():
        return local
    if local.is_file():
        raise ModelError("is a file, not a model's folder", where=model.base, fix="give the folder it lies in")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model.base):
        fix = f"give a local folder, a hub id such as org/name, or {embedded.NAME}"
        raise ModelError("there is no such folder", where=model.base, fix=fix)
    return _snapshot(model, progress)


def _snapshot(model: recipe.Model, progress: Callable[[str], None] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*WANTED, "*.py"] if model.trust_remote_code else WANTED
    if progress:
        progress(f"looking for {model.base} in the hub's cache, else fetching it")
    try:
        folder = snapshot_download(model.base, revision=model.revision, allow_patterns=wanted, ignore_patterns=UNWANTED)
    except GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{model.base} and log in with `hf auth login`"
        raise ModelError("this model is gated", where=model.base, fix=fix) from error
    except LocalEntryNotFoundError as error:
        fix = f"fetch it where there is a network and give its folder, or use {embedded.NAME}, which needs no hub"
        raise ModelError(
            "the model hub cannot be reached, and no copy is in its cache", where=model.base, fix=fix
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        fix = "check the name and model.revision, or give a local folder"
        raise ModelError(f"the hub does not give it ({_one_line(error)})", where=model.base, fix=fix) from error
    return Path(folder)


# What a folder must hold.


def check_folder(folder: Path, model: recipe.Model) -> None:
    """Raises ModelError listing all that keeps the model in `folder` from being loaded. Reads no weights."""
    problems = [*_config_problems(folder, model), *_weight_problems(folder), *_tokenizer_problems(folder)]
    if problems:
        raise ModelError("cannot be loaded: " + "; ".join(problems), where=str(folder), fix=_fix(problems))


def _fix(problems: list[str]) -> str:
    if any("pickle" in p for p in problems):
        return "convert the weights to .safetensors where it is safe to load them, or take a revision that has them"
    if any("git-lfs" in p for p in problems):
        return "run `git lfs pull` in the folder"
    return "fetch the model again"


def _config_problems(folder: Path, model: recipe.Model) -> Iterator[str]:
    config = _read_json(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    if "auto_map" in config and not model.trust_remote_code and not _is_native(config.get("model_type")):
        yield "config.json needs code that comes with the model (auto_map): set model.trust_remote_code if you trust it"
    if "quantization_config" in config:
        yield "the weights are quantised, and luthier trains on unquantised ones"
    for key, value in _walk(config):
        if "_implementation" in key and not (value is None or isinstance(value, bool) or _is_plain(key, value)):
            yield f"config.json sets {key}, which can fetch and run code"
        if key in LIMITS and not (isinstance(value, int) and 0 < value <= LIMITS[key]) and value is not None:
            yield f"config.json says {key} = {str(value)[:40]}"


def _is_plain(key: str, value: Any) -> bool:
    """Whether an attention choice left in a config is a mere name; a repository's would be fetched by transformers."""
    return not key.endswith("_internal") and isinstance(value, str) and re.fullmatch(r"[a-z0-9_]+", value) is not None


def _is_native(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every mapping in a JSON tree, nested ones too."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from node.items()
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _weight_problems(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        yield from _shard_problems(folder / "model.safetensors", {})
    elif index.exists():
        yield from _index_problems(folder, index)
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        yield "its weights are pickle files, which can run code and are never loaded"
    else:
        yield "model.safetensors is missing"


def _index_problems(folder: Path, index: Path) -> Iterator[str]:
    tree = _read_json(index)
    names = tree if isinstance(tree, str) else tree.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        yield names if isinstance(names, str) else f"{index.name} has no weight_map"
        return
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            yield f"{index.name} names '{shard}', which is not a file of the folder"
        else:
            yield from _shard_problems(folder / shard, {name for name, place in names.items() if place == shard})


def _shard_problems(path: Path, names: set[str] | dict[str, Any]) -> Iterator[str]:
    """What is wrong with one safetensors file, by its first bytes and its size; `names` are tensors it should hold."""
    header = _safetensors_header(path)
    if isinstance(header, str):
        yield header
        return
    missing = sorted(set(names) - header.keys())
    if missing:
        yield f"{path.name} lacks {_some(missing)}"


def _safetensors_header(path: Path) -> dict[str, Any] | str:
    """The header of a safetensors file, or what is wrong with the file."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return f"{path.name} is a git-lfs pointer, not the file"
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            return f"{path.name} is empty, torn or no safetensors file ({size} bytes)"
        header = _parse(file.read(length))
    if header is None:
        return f"{path.name} has an unreadable header"
    ends = [_end(tensor) for name, tensor in header.items() if name != "__metadata__"]
    if not ends or None in ends or 8 + length + max(end for end in ends if end is not None) != size:
        return f"{path.name} is torn: {size} bytes are not what its header says"
    return header


def _end(tensor: Any) -> int | None:
    """Where a tensor's bytes end in the data section, or None if its record is not one."""
    match tensor:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return end
    return None


def _tokenizer_problems(folder: Path) -> Iterator[str]:
    tree = _read_json(folder / "tokenizer.json")
    if isinstance(tree, str):
        yield tree
    elif (folder / "tokenizer_config.json").exists():
        config = _read_json(folder / "tokenizer_config.json")
        if isinstance(config, str):
            yield config


def _read_json(path: Path) -> dict[str, Any] | str:
    """The mapping in a JSON file, or what is wrong with the file."""
    if not path.is_file():
        return f"{path.name} is missing"
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        return f"{path.name} is a git-lfs pointer, not the file"
    tree = _parse(data)
    return tree if tree is not None else f"{path.name} is empty or not a JSON mapping"


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
