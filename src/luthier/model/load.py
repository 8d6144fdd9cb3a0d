"""From a recipe's `model:` to a checked local folder, a tokenizer and a frozen transformers model.

A folder is read from outside in: names and sizes first, then headers, then weights, each packed as it arrives. No
pickle is read, and no code that comes with a model runs unless the recipe says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import recipe
from luthier.errors import ModelError
from luthier.machine import Machine
from luthier.model import embedded
from luthier.model.folder import check_config, check_folder, shards, some
from luthier.model.hub import UnreachableError, config_file, loaded_revision, snapshot, tokenizer_folder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from luthier.data.tokens import Tokenizer
    from luthier.model.weights import Placing

__all__ = [
    "check_folder",
    "dtype_name",
    "load_causal",
    "load_tokenizer",
    "loaded_revision",
    "model_config",
    "model_folder",
]


def model_folder(model: recipe.Model, progress: Callable[[str], None] | None = None) -> Path:
    """The local folder of `model.base`, fetched or converted if need be, and checked.

    Raises:
        ModelError: it cannot be had, or is not complete; all that is missing is listed.
    """
    folder = _folder(model, progress)
    check_folder(folder, model)
    return folder


def model_config(model: recipe.Model) -> dict[str, Any]:
    """The `config.json` of `model.base`; from a hub nothing else is fetched. A local folder may hold it alone. Those of
    the shipped recipes' bases are known where the hub is out of reach.

    Raises ModelError where `model_folder` would, as far as that can be told from what is there.
    """
    on_hub = _is_on_hub(model)
    try:
        folder = config_file(model).parent if on_hub else _folder(model, None)
    except UnreachableError:
        if (known := _published(model.base)) is None:
            raise
        return known
    is_alone = [path.name for path in folder.iterdir()] == ["config.json"]
    (check_config if on_hub or is_alone else check_folder)(folder, model)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _published(base: str) -> dict[str, Any] | None:
    """What a shipped recipe's base has in its `config.json`, as far as it decides how the model runs."""
    text = (Path(recipe.__file__).parent / "recipes" / "bases.json").read_text(encoding="utf-8")
    found: dict[str, Any] | None = json.loads(text).get(base)
    return found


def check_new_tokens(model: recipe.Model, adapter: recipe.Adapter) -> None:
    """Raises ModelError if the tokenizer of `model.base` has a token that `adapter` adds. From a hub only the tokenizer
    is fetched."""
    if isinstance(adapter, recipe.Lora) and adapter.new_tokens:
        load_tokenizer(tokenizer_folder(model) if _is_on_hub(model) else _folder(model, None), adapter)


def _is_on_hub(model: recipe.Model) -> bool:
    local = Path(model.base).expanduser()
    return _is_hub_id(model.base) and model.base != embedded.NAME and not local.exists()


def _is_hub_id(base: str) -> bool:
    return not base.endswith(".gguf") and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) is not None


def _folder(model: recipe.Model, progress: Callable[[str], None] | None) -> Path:
    if model.base == embedded.NAME:
        return embedded.embedded_folder(progress)
    local = Path(model.base).expanduser()
    if model.base and local.is_dir():
        return local
    if local.is_file() and local.suffix == ".gguf":
        return embedded.converted_folder(local, progress)
    if local.is_file():
        fix = "give the folder it lies in, or a .gguf file"
        raise ModelError("is a file, not a model's folder", where=model.base, fix=fix)
    if not _is_hub_id(model.base):
        fix = f"give a local folder, a .gguf file, a hub id such as org/name, or {embedded.NAME}"
        raise ModelError("there is no such folder or file", where=model.base, fix=fix)
    return snapshot(model, progress)


def load_tokenizer(folder: Path, adapter: recipe.Adapter | None = None) -> Tokenizer:
    """The tokenizer of the model in `folder`, with the tokens that `adapter` adds."""
    from luthier.data.tokens import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return tokenizer.extended(adapter.new_tokens) if isinstance(adapter, recipe.Lora) else tokenizer


def load_causal(
    folder: Path,
    model: recipe.Model,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: str = "packed",
    offload: int = 0,
    offload_embedding: bool = False,
) -> PreTrainedModel:
    """The transformers model in `folder`, frozen and in eval mode, in `dtype` on `device`, linear layers as
    `model.quantize` says.

    Weights are read one at a time and packed on `device` at once, so that host memory holds little more than what stays
    there. On a CPU, weights that are stored in `dtype` stay views of the mapped file.

    Args:
        attention: `packed` (ours, segments kept apart) or `sdpa` (transformers' own). A family that has no place for it
            gets the next of `packed`, `sdpa`, `eager`; `module.config._attn_implementation` tells which.
        offload: leave the first decoder blocks, so many, in host memory; `offload.stream` makes them run.
        offload_embedding: leave the input embedding there; `offload.embedding_to_host` makes it run.

    Raises:
        ModelError: transformers has no such architecture, or the weights do not fill it.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    fix = "fetch config.json and the weights from one place"
    placing: Placing | None = None
    try:
        empty = skeleton(_config(folder, model), model, dtype, attention)
        place = _places(empty, device, offload, offload_embedding)
        placing = _placing(model, place, dtype)
        with _quietly():
            # What stays on the host is not read into pinned memory, which torch would keep when it is packed.
            pinned = torch.device(device).type == "cuda" and not offload
            module, info = _filled(folder, empty, placing, dtype, pinned)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        refused = ModelError(f"transformers cannot load it ({_one_line(error)})", where=str(folder))
        raise (placing and placing.refused) or refused from error
    if bent := sorted(info["mismatched_keys"]):
        name, stored, wanted = bent[0]
        what = f"{name} has shape {list(stored)}, and by config.json {list(wanted)} ({len(bent)} such)"
        raise ModelError(what, where=str(folder), fix=fix)
    wrong = sorted(str(key) for key in {*info["missing_keys"], *(placing.misshapen if placing else [])})
    if wrong:
        raise ModelError(f"lacks the weights {some(wrong)}, or has them in another shape", where=str(folder))
    if beyond := sorted(str(key) for key in info["unexpected_keys"] if _is_of_a_layer(str(key), module)):
        raise ModelError(f"holds layers that its config does not have: {some(beyond)}", where=str(folder), fix=fix)
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        tensor.data = tensor.data.to(place(name))
    if model.norms == "float32":
        norms_in_float32(module, dtype)
    frozen: PreTrainedModel = module.requires_grad_(False).eval()
    return frozen


def _config(folder: Path, model: recipe.Model) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)
    if hasattr(config, "quantization_config"):  # `check_folder` has seen that we read it ourselves
        del config.quantization_config
    return config


def skeleton(config: Any, model: recipe.Model, dtype: torch.dtype, attention: str = "packed") -> Any:
    """The model of a transformers config, on the meta device, under the first attention that its family takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.model.unfilled import Unfilled

    make: Any = partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
    refused: Exception = ValueError(f"no attention is called {attention}")
    for name in _attentions(attention):
        try:
            with torch.device("meta"), Unfilled():
                empty = make(attn_implementation=name, trust_remote_code=model.trust_remote_code)
        except (ValueError, KeyError, ImportError) as error:
            refused = error
            continue
        if name != _packed() or empty.is_backend_compatible():
            return empty
    raise refused


def _attentions(first: str) -> list[str]:
    """transformers' names of the attentions to try."""
    names = ["packed", "sdpa", "eager"]
    return [_packed() if name == "packed" else name for name in names[names.index(first) :]]


def _packed() -> str:
    """The name of our attention, which importing its module registers."""
    name: str = import_module("luthier.model.attention").NAME
    return name


def _is_of_a_layer(key: str, module: Any) -> bool:
    """Whether `key` has the name of a decoder layer's weight but for the layer's number: the model was cut short.
    Checkpoints may hold more besides, such as a head for another task."""
    known = {re.sub(r"\.\d+\.", ".#.", name) for name, _ in module.named_parameters()}
    return re.sub(r"\.\d+\.", ".#.", key) in known and re.search(r"\.\d+\.", key) is not None


def _places(empty: Any, device: torch.device | str, offload: int, embedding: bool) -> Callable[[str], torch.device]:
    """Where each parameter and buffer goes, by its name."""
    import torch

    from luthier.model.offload import blocks_name

    chosen, host = torch.device(device), torch.device("cpu")
    stays = [f"{blocks_name(empty)}.{i}." for i in range(offload)]
    if embedding:
        table = empty.get_input_embeddings().weight
        stays += [name for name, parameter in empty.named_parameters() if parameter is table]
    return lambda name: host if name.startswith(tuple(stays)) else chosen


def _placing(model: recipe.Model, place: Callable[[str], torch.device], dtype: torch.dtype) -> Placing | None:
    """How weights are packed as they arrive; None where nothing is to be done with them."""
    from luthier.model.weights import Placing

    if model.quantize is None:
        return None if place("").type == "cpu" else Placing(place, dtype)
    from luthier.model import quantize

    pack = partial(quantize.pack, bias=None, settings=model.quantize, dtype=dtype)
    return Placing(place, dtype, pack, partial(quantize.from_bitsandbytes, bias=None, dtype=dtype))


def _filled(
    folder: Path, empty: Any, placing: Placing | None, dtype: torch.dtype, pinned: bool
) -> tuple[Any, dict[str, Any]]:
    """A model like `empty` with the weights of `folder`, and what transformers found wrong with them. `pinned`: as of
    `weights.Handle`."""
    from transformers import GenerationConfig

    from luthier.model.weights import AHEAD, handles

    own = (folder / "generation_config.json").is_file()
    ahead = AHEAD if pinned else 0
    with handles(shards(folder), copied=placing is not None, pinned=pinned, ahead=ahead) as weights:
        done: tuple[Any, dict[str, Any]] = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation=empty.config._attn_implementation,
            quantization_config=placing,
            generation_config=GenerationConfig.from_pretrained(folder, local_files_only=True) if own else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the information
        )
    return done


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' table of what it finds wrong with weights, of which we say what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def norms_in_float32(module: Any, dtype: torch.dtype) -> None:
    """Keeps normalisation layers and the output head in float32; everything between them computes in `dtype`."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    for layer in [*filter(_is_norm, module.modules()), head]:
        layer.float().register_forward_pre_hook(_float32_inputs)
    for layer in [*filter(_is_norm, module.modules()), embedding]:  # the embedding may be tied to the head
        layer.register_forward_hook(partial(_output_in, dtype))


def _is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower() and any(True for _ in layer.parameters(recurse=False))


def _float32_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _output_in(dtype: torch.dtype, layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def dtype_name(wanted: str, place: str, facts: Machine) -> tuple[str, str]:
    """The dtype that weights and products have at `place` (`cpu`, `cuda` or `mps`) where `model.compute` is `wanted`,
    and why: decided from what the processor or the first GPU has, never from a timing.

    A CPU that does not multiply `wanted` in hardware computes in float32, which is finer and several times as fast.
    Imports torch only for a GPU that `facts` does not know.
    """
    if place == "cpu":
        return _cpu_dtype(wanted, facts)
    if wanted != "auto":
        return wanted, "as the recipe says"
    if place == "mps":
        return "bfloat16", "Apple's GPU multiplies bfloat16"
    bfloat16, float16 = (facts.gpus[0].bfloat16, facts.gpus[0].float16) if facts.gpus else _torch_multiplies()
    if bfloat16:
        return "bfloat16", "the GPU multiplies bfloat16"
    if float16:
        return "float16", "the GPU multiplies float16 but no bfloat16; gradients beyond its range are scaled"
    return "float32", "the GPU has no fast products in 16 bits"


def _cpu_dtype(wanted: str, facts: Machine) -> tuple[str, str]:
    name = "bfloat16" if wanted == "auto" else wanted
    if facts.multiplies(name):
        return name, "the processor multiplies bfloat16" if wanted == "auto" else "as the recipe says"
    if wanted == "auto":
        return "float32", "the processor does not multiply bfloat16, and float32 is faster then"
    return "float32", f"in place of {name}, which this processor multiplies several times more slowly"


def _torch_multiplies() -> tuple[bool, bool]:
    """Whether the GPU that torch reaches multiplies bfloat16, and float16."""
    import torch

    if not torch.cuda.is_available():
        return False, False
    return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_capability() >= (7, 0)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
