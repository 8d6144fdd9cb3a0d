"""What is trained whole beside a LoRA: biases, modules, and the rows of tokens added to the vocabulary.

On disk it has PEFT's names (`bias`, `modules_to_save` and `trainable_token_indices` of its LoraConfig).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from luthier import recipe
from luthier.adapters.tensors import Masters, places
from luthier.errors import AdapterError
from luthier.registry import nearest

PREFIX = "base_model.model."  # PEFT's name of the model it wraps
_ROWS = ".token_adapter.trainable_tokens_delta"
Places = dict[str, list[tuple[nn.Module, str]]]


class Rows(nn.Module):
    """Some rows of a table [V, H], trained in float32 in the place of its own. Each use of the table copies it."""

    ids: Tensor

    def __init__(self, table: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=table.device), persistent=False)
        self.rows, self.enabled = nn.Parameter(table[self.ids].float()), True

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.ids, self.rows.to(table.dtype)) if self.enabled else table


class Whole:
    """The parameters, by PEFT's names, and what PEFT's configuration says of them."""

    def __init__(self, masters: Masters, rows: dict[str, Rows], settings: recipe.Lora, modules: list[str]) -> None:
        self.masters, self.rows, self.bias, self.modules = masters, rows, settings.bias, modules

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.masters.parameters.items()
        for table, rows in self.rows.items():
            yield f"{PREFIX}{table}{_ROWS}", rows.rows

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model; rows of added tokens have their start values."""
        before = {table: rows.enabled for table, rows in self.rows.items()}
        with ExitStack() as stack:
            if self.masters.parameters:
                stack.enter_context(self.masters.disabled())
            try:
                for rows in self.rows.values():
                    rows.enabled = False
                yield
            finally:
                for table, rows in self.rows.items():
                    rows.enabled = before[table]

    def config(self) -> dict[str, Any]:
        indices = {table: rows.ids.tolist() for table, rows in self.rows.items()}
        return {
            "bias": self.bias,
            "modules_to_save": self.modules or None,
            "trainable_token_indices": indices or None,
        }


def attach(module: Any, settings: recipe.Lora, adapted: list[str], tokens: Sequence[int] | None) -> Whole | None:
    """Makes trainable what `settings` names beside the `adapted` layers, which are still the model's own; None if that
    is nothing.

    `tokens`: ids of `settings.new_tokens`; None: those after the embedding's last row. The embedding and the head get
    rows for them where they lack any, and each new row starts as the mean of those that were there.

    Raises AdapterError if a module is not found, has no weights, is adapted too, or is quantised, or if no layer has a
    bias that could be trained.
    """
    if settings.bias == "none" and not settings.modules_to_save and not settings.new_tokens:
        return None
    ids = _grown(module, settings.new_tokens, tokens) if settings.new_tokens else []
    modules = _modules(module, settings.modules_to_save, adapted)
    weights = _biases(module, settings.bias, adapted)
    for name in modules:
        weights |= _inside(module, name)
    masters = Masters({PREFIX + name: where for name, where in weights.items()})
    return Whole(masters, _rows(module, ids, modules) if ids else {}, settings, modules)


def read(config: dict[str, Any], tensors: Iterable[str], path: Path) -> dict[str, Any]:
    """The fields of `recipe.Lora` that a LoraConfig means, with `tensors` of these names; `path`, of
    adapter_config.json, is for messages and to find the tokenizer beside it, which knows the names of added tokens."""
    indices = config.get("trainable_token_indices") or {}
    ids = sorted({i for table in indices.values() for i in table} if isinstance(indices, dict) else set(indices))
    return {
        # PEFT lets one ask for the biases of a model that has none.
        "bias": (config.get("bias") or "none") if any(name.endswith(".bias") for name in tensors) else "none",
        "modules_to_save": list(config.get("modules_to_save") or []),
        "new_tokens": _names(ids, path) if ids else [],
    }


def is_whole(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor of PEFT's file is one of these rather than a LoRA matrix."""
    saved = tuple(f".{module}." for module in config.get("modules_to_save") or [])
    bias = config.get("bias", "none") != "none" and name.endswith(".bias")
    return bias or name.endswith(_ROWS) or any(part in name for part in saved)


def _biases(module: nn.Module, which: str, adapted: list[str]) -> Places:
    """PEFT moves an adapted layer's own bias to `base_layer`."""
    found: Places = {}
    for name, where in places(module).items():
        layer, _, last = name.rpartition(".")
        if last == "bias" and (which == "all" or (which == "lora_only" and layer in adapted)):
            found[f"{layer}.base_layer.bias" if layer in adapted else name] = where
    if which != "none" and not found:
        whose = "no layer of this model" if which == "all" else "no adapted layer"
        raise AdapterError(f"{whose} has a bias to train", where=f"adapter.bias: {which}", fix="leave it out")
    return found


def _modules(module: nn.Module, wanted: list[str], adapted: list[str]) -> list[str]:
    names = [name for name, _ in module.named_modules() if name]
    found: dict[str, None] = {}
    for one in wanted:
        matching = [name for name in names if name == one or name.endswith(f".{one}")]
        if not matching:
            fix = nearest(one, sorted({name.rpartition(".")[2] for name in names}))
            raise AdapterError(f"no module is called '{one}'", where="adapter.modules_to_save", fix=fix)
        if not any(True for name in matching for _ in module.get_submodule(name).parameters()):
            fix = "take it out, or name a module that has some"
            raise AdapterError(f"'{one}' has no weights to train", where="adapter.modules_to_save", fix=fix)
        found |= dict.fromkeys(matching)
    for name in found:
        if any(layer == name or layer.startswith(f"{name}.") for layer in adapted):
            fix = "take it out of adapter.targets, or out of this list"
            raise AdapterError(f"'{name}' has low-rank updates too", where="adapter.modules_to_save", fix=fix)
    return list(found)


def _inside(module: nn.Module, name: str) -> Places:
    """The weights of one module. One that is tied to another module's is trained apart from it, as PEFT does."""
    found: Places = {}
    for inner, where in places(module.get_submodule(name)).items():
        weight = where[0][0]._parameters[where[0][1]]
        if weight is not None and weight.dtype.itemsize == 1:
            fix = "leave it out, or leave model.quantize out"
            raise AdapterError(f"'{name}' is quantised", where="adapter.modules_to_save", fix=fix)
        found[f"{name}.{inner}"] = where
    return found


def _grown(module: Any, names: list[str], tokens: Sequence[int] | None) -> list[int]:
    """Gives embedding and head a row for each token; returns the ids."""
    old = len(module.get_input_embeddings().weight)
    ids = list(tokens) if tokens is not None else list(range(old, old + len(names)))
    known = min(old, *ids)  # rows that belong to tokens: a table may have been made longer than its vocabulary
    if max(ids) >= old:
        module.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        module.requires_grad_(False)
    with torch.no_grad():
        for table in _tables(module):
            weight = module.get_submodule(table).weight
            weight[ids] = weight[:known].float().mean(0).to(weight.dtype)
    return ids


def _rows(module: Any, ids: list[int], saved: list[str]) -> dict[str, Rows]:
    """By the name of the table. A tied head shares the embedding's."""
    made: dict[int, tuple[str, Rows]] = {}
    for table in _tables(module):
        holder = module.get_submodule(table)
        if table not in saved:
            weight = holder.weight
            _, rows = made.setdefault(id(weight), (table, Rows(weight.detach(), ids)))
            register_parametrization(holder, "weight", rows, unsafe=True)
    return dict(made.values())


def _tables(module: Any) -> list[str]:
    """Dotted names of the embedding and of the head, in this order."""
    wanted = [module.get_input_embeddings(), module.get_output_embeddings()]
    names = {id(one): name for name, one in module.named_modules()}
    return [names[id(one)] for one in wanted if one is not None]


def _names(ids: list[int], path: Path) -> list[str]:
    tokenizer = path.parent / "tokenizer.json"
    try:
        added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
        by_id = {token["id"]: str(token["content"]) for token in added}
        return [by_id[i] for i in ids]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            "does not name the tokens that the adapter trains", where=str(tokenizer), fix="save the tokenizer with it"
        ) from error
