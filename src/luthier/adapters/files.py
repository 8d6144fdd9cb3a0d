"""Adapters on disk, exactly as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters.lora import Lora
from luthier.errors import AdapterError

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "luthier.json"
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# Options of PEFT that change what is computed and that we do not compute; each must be absent or empty.
_FOREIGN = (
    "alpha_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def save(lora: Lora, folder: Path, *, base: str, revision: str | None, extra: dict[str, Any]) -> None:
    """Writes the adapter to `folder`; `extra` (JSON values: the template …) goes beside it in luthier.json.

    Each file is written aside and renamed, so a reader sees the old one or the new one.
    """
    from safetensors.torch import save as serialise

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in lora.state_dict().items()}
    _write(folder / WEIGHTS, serialise(tensors, metadata={"format": "pt"}))
    _write(folder / EXTRA, _json(extra))
    _write(folder / CONFIG, _json(_config(lora, base, revision)))


def load(folder: Path) -> tuple[recipe.Adapter, dict[str, Tensor]]:
    """The adapter in `folder`: what to attach, and the fp32 tensors to load into it, under PEFT's names.

    Raises AdapterError for a missing or malformed file, an option of PEFT that luthier does not compute, a tensor that
    is not finite, or one whose shape is not of the rank.
    """
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    rank = config["r"]
    layers = [_check(name, tensor, rank, folder / WEIGHTS) for name, tensor in tensors.items()]
    targets = config.get("target_modules")
    # A string is a pattern of PEFT's; the layers that have tensors say the same.
    names = sorted(targets) if isinstance(targets, list) else sorted(set(layers))
    adapter = recipe.Adapter(
        rank=rank,
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dropout=config.get("lora_dropout") or 0.0,
        targets=names,
    )
    return adapter, tensors


def load_extra(folder: Path) -> dict[str, Any]:
    """What `save` was given as `extra`; empty for an adapter that luthier did not write."""
    path = folder / EXTRA
    return _read_json(path) if path.exists() else {}


def _config(lora: Lora, base: str, revision: str | None) -> dict[str, Any]:
    adapter = lora.adapter
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,  # readers expect integers
        "lora_dropout": adapter.dropout,
        "target_modules": lora.targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": adapter.rslora,
    }


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"is a {config.get('peft_type')} adapter", where=str(path), fix="luthier reads LORA adapters"
        )
    if odd := [key for key in _FOREIGN if config.get(key)]:
        raise AdapterError(
            f"uses '{odd[0]}', which luthier does not compute", where=str(path), fix="merge it with PEFT"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError("trains biases", where=f"{path}: bias", fix="merge it with PEFT")
    for key, kind in {"r": int, "lora_alpha": int | float}.items():
        if not isinstance(config.get(key), kind) or config[key] <= 0:
            raise AdapterError(f"'{key}' should be a positive number", where=str(path), fix="restore the file")
    return config


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
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check(name: str, tensor: Tensor, rank: int, path: Path) -> str:
    """The layer a tensor belongs to."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise AdapterError(f"holds '{name}', which is no LoRA matrix", where=str(path), fix="merge it with PEFT")
    inner = tensor.shape[0 if match["side"] == "A" else 1] if tensor.ndim == 2 else None
    if inner != rank:
        raise AdapterError(f"has shape {list(tensor.shape)}, not of rank {rank}", where=f"{path}: {name}")
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError("holds values that are not finite", where=f"{path}: {name}", fix="use an earlier checkpoint")
    return match["layer"]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
