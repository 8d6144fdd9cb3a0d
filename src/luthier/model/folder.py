"""Whether a folder holds a model that can be loaded, told from file names, sizes and headers alone.

A folder is read from outside in, and whatever is wrong with it is listed at once. No weights are read here, no pickle
ever, and a config that would fetch or run code is refused.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier import recipe
from luthier.errors import ModelError

# No real model comes near these; a hostile config that passes them cannot fill memory before its weights are missed.
LIMITS = {
    "num_hidden_layers": 1 << 11,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "num_attention_heads": 1 << 12,
    "max_position_embeddings": 1 << 28,
}


def check_folder(folder: Path, model: recipe.Model) -> None:
    """Raises ModelError listing all that keeps the model in `folder` from being loaded. Reads no weights."""
    problems = [*_config_problems(folder, model), *_weight_problems(folder), *_tokenizer_problems(folder)]
    if not problems:
        problems = list(_packed_problems(folder))
    if problems:
        raise ModelError("cannot be loaded: " + "; ".join(problems), where=str(folder), fix=_fix(problems))


def check_config(folder: Path, model: recipe.Model) -> None:
    """The same where the folder holds no more than config.json: raises ModelError listing what it says that keeps the
    model from being loaded, wherever its weights are."""
    if problems := list(_config_problems(folder, model)):
        raise ModelError("cannot be loaded: " + "; ".join(problems), where=str(folder), fix=_fix(problems))


def _packed_problems(folder: Path) -> Iterator[str]:
    """Whole numbers where weights should be: read as they stand they would be weights without their scales."""
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and "quantization_config" in config:
        return
    for path in sorted(folder.glob("*.safetensors")):
        header = safetensors_header(path)
        tensors = header.items() if isinstance(header, dict) else ()
        odd = sorted(n for n, t in tensors if n.endswith("weight") and str(t.get("dtype", ""))[:1] in ("I", "U"))
        if odd:
            yield f"{path.name} has quantised weights, and config.json does not say how: {some(odd)}"


def _fix(problems: list[str]) -> str:
    if any("quantised" in p for p in problems):
        return "or give the model's unquantised folder, which luthier quantises itself as it loads"
    if any("pickle" in p for p in problems):
        return "convert the weights to .safetensors where it is safe to load them, or take a revision that has them"
    if any("git-lfs" in p for p in problems):
        return "run `git lfs pull` in the folder"
    if any("tokenizer.model" in p for p in problems):
        return (
            'make tokenizer.json with `pip install sentencepiece` and `python -c "from transformers import '
            "AutoTokenizer as T; T.from_pretrained('FOLDER').save_pretrained('FOLDER')\"`, FOLDER being the model's"
        )
    return "fetch the model again"


def _config_problems(folder: Path, model: recipe.Model) -> Iterator[str]:
    config = read_json(folder / "config.json")
    if isinstance(config, str):
        yield config
        return
    if "auto_map" in config and not model.trust_remote_code and not _is_native(config.get("model_type")):
        yield "config.json needs code that comes with the model (auto_map): set model.trust_remote_code if you trust it"
    if problem := _quantization_problem(config.get("quantization_config"), model.quantize):
        yield problem
    for key, value in _walk(config):
        if "_implementation" in key and not (value is None or isinstance(value, bool) or _is_plain(key, value)):
            yield f"config.json sets {key}, which can fetch and run code"
        if key in LIMITS and not (isinstance(value, int) and 0 < value <= LIMITS[key]) and value is not None:
            yield f"config.json says {key} = {str(value)[:40]}"


def _quantization_problem(found: Any, wanted: Any) -> str | None:
    """What keeps weights stored as `found` (a `quantization_config`, or None) from being loaded as `wanted`."""
    if found is None:
        return None
    method = found.get("quant_method", "a method of its own") if isinstance(found, dict) else "a method of its own"
    if method != "bitsandbytes" or not (found.get("load_in_4bit") or found.get("_load_in_4bit")):
        bits = " in 8 bits" if method == "bitsandbytes" else ""
        return f"the weights are quantised by {method}{bits}; luthier reads unquantised ones and bitsandbytes 4-bit"
    if found.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        return f"the weights are quantised and stored as {found['bnb_4bit_quant_storage']}, not as uint8"
    kind, double = found.get("bnb_4bit_quant_type", "fp4"), bool(found.get("bnb_4bit_use_double_quant"))
    if isinstance(wanted, recipe.FourBit) and (wanted.kind, wanted.double) == (kind, double):
        return None
    return f"the weights are quantised already: set model.quantize to {{kind: {kind}, double: {str(double).lower()}}}"


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


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder that `check_folder` has passed, in order."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = read_json(folder / "model.safetensors.index.json")
    assert isinstance(index, dict)
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


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
    tree = read_json(index)
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
    header = safetensors_header(path)
    if isinstance(header, str):
        yield header
        return
    missing = sorted(set(names) - header.keys())
    if missing:
        yield f"{path.name} lacks {some(missing)}"


def safetensors_header(path: Path) -> dict[str, Any] | str:
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
    tree = read_json(folder / "tokenizer.json")
    if isinstance(tree, str) and (folder / "tokenizer.model").is_file():
        yield f"{tree}, and tokenizer.model alone is not read"
    elif isinstance(tree, str):
        yield tree
    elif (folder / "tokenizer_config.json").exists():
        config = read_json(folder / "tokenizer_config.json")
        if isinstance(config, str):
            yield config


def read_json(path: Path) -> dict[str, Any] | str:
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


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
