"""PEFT's LoraConfig, as adapter_config.json holds it, to and from the recipe's LoRA section."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor

from luthier import recipe
from luthier.adapters import targets, whole
from luthier.adapters.linears import is_transposed
from luthier.errors import AdapterError

if TYPE_CHECKING:
    from luthier.adapters.lora import Lora

_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)")
# Options of PEFT that change what is computed and that we do not compute; each must be absent or empty.
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Ways to start that leave the base weights alone, and those we can repeat from them. Others have changed the base in a
# way that the file does not tell.
_HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_REPEATED = ("pissa", "olora")


def write(lora: Lora) -> dict[str, Any]:
    """What PEFT reads. Where a start is subtracted the file has twice the rank, and twice the alpha (rank-stabilised:
    √2 times), which leaves the scale; with that it fits the base as it is."""
    settings = lora.settings
    layers = lora.layers.values()
    times = 2 if any(layer.start_A is not None for layer in layers) else 1
    alpha_times = math.sqrt(times) if settings.rslora else times
    return {
        "peft_type": "LORA",
        "r": settings.rank * times,
        "lora_alpha": _number(settings.alpha * alpha_times),
        "rank_pattern": {key: rank * times for key, rank in settings.ranks.items()},
        "alpha_pattern": {key: _number(alpha * alpha_times) for key, alpha in settings.alphas.items()},
        "lora_dropout": settings.dropout,
        "target_modules": lora.targets,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers),
        "init_lora_weights": True,
        "use_dora": settings.dora,
        "use_rslora": settings.rslora,
    } | ({} if lora.whole is None else lora.whole.config())


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> recipe.Lora:
    """The settings that a LoraConfig means; `path` is for messages.

    Raises AdapterError for an option that luthier does not compute, a malformed one, or a tensor that is no LoRA matrix
    or not of its rank.
    """
    _refuse(config, path)
    rank, ranks = config["r"], config.get("rank_pattern") or {}
    matrices = {name: tensor for name, tensor in tensors.items() if not whole.is_whole(name, config)}
    layers = [_check(name, tensor, rank, ranks, path) for name, tensor in matrices.items()]
    try:
        return recipe.Lora(
            rank=rank,
            alpha=config["lora_alpha"],
            ranks=ranks,
            alphas=config.get("alpha_pattern") or {},
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            init=start if (start := config.get("init_lora_weights")) in _REPEATED else "default",
            dropout=config.get("lora_dropout") or 0.0,
            targets=_targets(config, layers),
            **whole.read(config, tensors, path),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise AdapterError(f"'{key}': {problem['msg']}", where=str(path), fix="restore the file") from error


def _refuse(config: dict[str, Any], path: Path) -> None:
    if odd := [key for key in _FOREIGN if config.get(key)]:
        raise AdapterError(
            f"uses '{odd[0]}', which luthier does not compute", where=str(path), fix="merge it with PEFT"
        )
    if (start := config.get("init_lora_weights")) not in (*_HARMLESS, *_REPEATED):
        fix = "write it with PEFT's path_initial_model_for_weight_conversion"
        raise AdapterError(f"needs a base that '{start}' has changed", where=f"{path}: init_lora_weights", fix=fix)
    for key, kind in {"r": int, "lora_alpha": int | float}.items():
        if not isinstance(config.get(key), kind) or config[key] <= 0:
            raise AdapterError(f"'{key}' should be a positive number", where=str(path), fix="restore the file")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"'{key}' should be a mapping", where=str(path), fix="restore the file")


def _targets(config: dict[str, Any], layers: list[str]) -> str | list[str]:
    """Layers chosen by options that a recipe does not have are those that the file has tensors of."""
    chosen = config.get("target_modules")
    if not chosen or any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules")):
        return sorted(set(layers))
    return chosen if isinstance(chosen, str) else sorted(chosen)


def _check(name: str, tensor: Tensor, rank: int, ranks: dict[str, int], path: Path) -> str:
    """The layer a tensor belongs to."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise AdapterError(f"holds '{name}', which is no LoRA matrix", where=str(path), fix="merge it with PEFT")
    part, rank = match["part"], targets.value(ranks, match["layer"], rank)
    if part == "magnitude_vector":
        return match["layer"]
    inner = tensor.shape[0 if part[0] == "A" else 1] if tensor.ndim == 2 else None
    if inner != rank:
        shape, fix = list(tensor.shape), "restore the file, or the adapter_config.json beside it"
        raise AdapterError(f"has shape {shape}, not of rank {rank}", where=f"{path.parent}: {name}", fix=fix)
    return match["layer"]


def _number(value: float) -> int | float:
    """Readers of the file expect integers where they can be had."""
    return int(value) if float(value).is_integer() else value
