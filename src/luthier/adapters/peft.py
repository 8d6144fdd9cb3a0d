"""Methods that PEFT computes, by its names, under the contract of our own.

PEFT builds a method's layers into the module; from then on the module is run as ever, packed rows and all. Virtual
tokens are another matter: `virtual` puts them before each row, and such rows are not packed.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.linears import is_linear, is_quantized
from luthier.adapters.method import Noise
from luthier.adapters.tensors import copy_in, master, places
from luthier.adapters.virtual import Virtual
from luthier.errors import AdapterError
from luthier.registry import nearest

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
# Each is held against the contract in tests/contract/test_bridge.py.
LAYERS = (
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PSOFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
REFUSED = {
    "ADALORA": "it has to be told of every step, to move ranks between layers",
    "ADAMSS": "it clusters weights with a package of its own",
    "ADAPTION_PROMPT": "it computes attention itself, which knows no packed rows",
    "CARTRIDGE": "it starts from the cache of a text",
    "CPT": "each row needs token types that our data does not have",
    "LILY": "its routing averages over the tokens of a batch, so how a step is cut would change what is learned",
    "LORA": "write kind: lora, which is ours",
    "MULTITASK_PROMPT_TUNING": "each row needs the number of its task",
    "OSF": "it replaces the base weights, so that there is no base model left to compare with",
    "POLY": "each row needs the number of its task",
    "PVERA": "it draws random numbers in training, so how a step is cut would change what is learned",
    "SHADOW": "it carries a state beside the residual stream that packed rows would share",
    "TRAINABLE_TOKENS": "write kind: lora with adapter.new_tokens, which is ours",
    "XLORA": "it mixes adapters that are trained already",
}
# What PEFT's configuration holds besides a method's options.
_ORIGIN = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
# What decides the shape of a table of virtual tokens.
_SHAPE = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
_NAME = "default"  # of the one adapter that PEFT's model has


class Bridge:
    """A PEFT model around a module, whose tensors have the names that PEFT's files have."""

    dropout = 0.0  # see `_without_dropout`
    foldable = False

    def __init__(self, model: Any, tensors: dict[str, Tensor], settings: recipe.Bridge, noise: Noise) -> None:
        self.model, self.settings, self.noise = model, settings, noise
        self.tensors, self._disabled = tensors, False

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Trained tensors, which share memory with the parameters, and what PEFT writes besides: fixed projections, of
        which a file holds one each even if layers share them."""
        owners: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            owners.setdefault(tensor.data_ptr(), name)
        return {
            name: tensor.detach() if owners[tensor.data_ptr()] == name else tensor.detach().clone()
            for name, tensor in self.tensors.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_in(dict(self.tensors), state)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._disabled:
            yield
            return
        self._disabled = True
        try:
            with self._off():
                yield
        finally:
            self._disabled = False

    @contextmanager
    def _off(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def config(self) -> dict[str, Any]:
        """PEFT's own, but for what every adapter's file says of its origin."""
        values = self.model.peft_config[_NAME].to_dict()
        options = {key: _plain(value) for key, value in values.items() if key not in _ORIGIN}
        return {"peft_type": self.settings.method, **options}


class Prompts(Bridge):
    """A method of virtual tokens, which are made by a small encoder. The tensor `prompt_embeddings`, which is all that
    PEFT's file has, is what the encoder makes; where that is more than a table, its weights are `encoder.NAME`."""

    def __init__(self, model: Any, virtual: Virtual, settings: recipe.Bridge, noise: Noise) -> None:
        self.encoder: nn.Module = model.prompt_encoder[_NAME]
        parameters = dict(self.encoder.named_parameters())
        self.made = parameters.keys() != {"embedding.weight"}
        names = {name: f"encoder.{name}" if self.made else "prompt_embeddings" for name in parameters}
        super().__init__(model, {names[name]: p for name, p in parameters.items()}, settings, noise)
        self.virtual = virtual

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        with torch.no_grad():
            return state | {"prompt_embeddings": self.model.get_prompt_embedding_to_save(_NAME)} if self.made else state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        made = {"prompt_embeddings": torch.empty_like(state["prompt_embeddings"])} if self.made else {}
        copy_in(self.tensors | made, state)

    @contextmanager
    def _off(self) -> Iterator[None]:
        self.virtual.enabled = False
        try:
            yield
        finally:
            self.virtual.enabled = True


def attach(module: nn.Module, settings: recipe.Bridge, seed: int) -> Bridge:
    """Freezes `module` and builds PEFT's method into it.

    Raises AdapterError if PEFT is not installed, does not know the method or an option, refuses their values, or if the
    method needs more than our contract gives.
    """
    config = _config(settings)
    module.requires_grad_(False)
    if settings.method in PROMPTS:
        _check_room(module, config.num_virtual_tokens)
    model = _built(module, config, seed, settings)
    noise = Noise(seed)
    if settings.method in PROMPTS:
        return Prompts(model, Virtual(module, model), settings, noise)
    return Bridge(model, _tensors(model), settings, noise)


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> recipe.Bridge:
    """The settings that adapter_config.json means; `path` is for messages."""
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise AdapterError("says no 'peft_type'", where=str(path), fix="restore the file")
    options = {key: value for key, value in config.items() if key not in _ORIGIN and value is not None}
    if method in PROMPTS and tensors.keys() == {"prompt_embeddings"}:
        # What an encoder made, or a text was encoded to, is in the file: a plain table holds it.
        method = "PROMPT_TUNING" if method == "P_TUNING" else method
        options = {key: value for key, value in options.items() if key in _SHAPE}
    return recipe.Bridge(kind="peft", method=method, options=options)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        what, fix = "PEFT is not installed", "pip install luthier[peft]"
        raise AdapterError(what, where="adapter.kind", fix=fix) from error
    return peft


def _config(settings: recipe.Bridge) -> Any:
    """PEFT's configuration object."""
    peft, method = _peft(), settings.method
    if reason := REFUSED.get(method.upper()):
        raise AdapterError(f"{method.upper()} cannot be used: {reason}", where="adapter.method")
    kinds = {str(kind.value): kind for kind in peft.PeftType}
    known = [name for name in (*PROMPTS, *LAYERS) if name in kinds]
    if method not in known:
        what = f"no method of PEFT {peft.__version__} is called '{method}'"
        raise AdapterError(what, where="adapter.method", fix=nearest(method.upper(), known))
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kinds[method]]
    fields = {field.name for field in dataclasses.fields(kind)} - _ORIGIN
    for option in settings.options:
        if option not in fields:
            where = f"adapter.options.{option}"
            raise AdapterError(f"{method} has no such option", where=where, fix=nearest(option, sorted(fields)))
    if method in PROMPTS:
        _check_count(settings.options.get("num_virtual_tokens"))
    with _explained(settings):
        return kind(task_type="CAUSAL_LM", **_without_dropout(settings.options, fields))


def _check_count(count: Any) -> None:
    where, fix = "adapter.options.num_virtual_tokens", "write a number, such as 20"
    if count is None:
        raise AdapterError("is missing", where=where, fix=fix)
    if not isinstance(count, int) or count < 1:
        raise AdapterError(f"{count!r} is no number of tokens", where=where, fix=fix)


def _check_room(module: Any, count: int) -> None:
    """Raises AdapterError if the model cannot tell more positions apart than the virtual tokens take."""
    most = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and count >= most:
        what = f"{count} virtual tokens leave no room for a row: the model has {most} positions"
        raise AdapterError(what, where="adapter.options.num_virtual_tokens", fix="write fewer, such as 20")


def _without_dropout(options: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """PEFT's layers draw from torch's generator, so that their dropout would depend on how a step is cut."""
    names = [name for name in sorted(fields) if name.endswith(("dropout", "dropout_p"))]
    for name in names:
        if options.get(name):
            raise AdapterError(
                "the dropout of PEFT's layers depends on how a step is cut",
                where=f"adapter.options.{name}",
                fix="leave it out",
            )
    return options | dict.fromkeys(names, 0.0)


def _built(module: nn.Module, config: Any, seed: int, settings: recipe.Bridge) -> Any:
    is_packed = any(is_linear(layer) and is_quantized(layer) for layer in module.modules())
    with _explained(settings, is_packed), torch.random.fork_rng(), warnings.catch_warnings(), _environment():
        warnings.simplefilter("ignore")  # of PEFT, about its defaults
        torch.manual_seed(seed)
        return _peft().get_peft_model(module, config).eval()


@contextmanager
def _environment() -> Iterator[None]:
    """Leaves the process's variables as they were: BOFT sets CXX=gcc for its own kernel, if that fails for good."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _explained(settings: recipe.Bridge, is_packed: bool = False) -> Iterator[None]:
    """What PEFT, or torch below it, raises of a method's options or of packed weights becomes an AdapterError."""
    method, options = settings.method, settings.options
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        if not isinstance(error, ValueError | TypeError | RuntimeError):
            reason = f"{type(error).__name__} {reason}".strip()
        if is_packed and method in LAYERS and "not found" not in reason:
            fix = "leave model.quantize out, or take kind: lora, kind: bottleneck or a method of virtual tokens"
            raise AdapterError(f"{method} does not take packed weights", where="adapter.method", fix=fix) from error
        given = textwrap.shorten(", ".join(f"{key}={value!r}" for key, value in options.items()), 160) or "its defaults"
        what, fix = f"{method} cannot be built with {given} (PEFT says: {reason})", "change its options"
        raise AdapterError(what, where="adapter.options", fix=fix) from error


def _tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of PEFT's file, by its names: the very ones of the model, those that are trained in float32."""
    variables = model.state_dict(keep_vars=True)
    named = _peft().get_peft_model_state_dict(model, state_dict=variables, save_embedding_layers=False)
    held = {id(where[0][0]._parameters[where[0][1]]): where for where in places(model).values()}
    return {name: _trained(tensor, held) for name, tensor in named.items()}


def _trained(tensor: Tensor, held: dict[int, list[tuple[nn.Module, str]]]) -> Tensor:
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.dtype != torch.float32:
        return master(tensor, held[id(tensor)])
    return tensor


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value
