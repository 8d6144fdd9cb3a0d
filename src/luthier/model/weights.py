"""Brings weights from safetensors files into a transformers model one at a time, packed as they arrive.

transformers knows how each family's files name and split their tensors, and which parameters are tied; it loads them in
its own order. Here it is given handles that read a tensor when it is that tensor's turn, and, through its extension
point for quantisers, a step that packs the tensor on the target device at once. So host memory holds the packed model
and little more than one tensor, whatever the model's size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from mmap import mmap
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, dot_natural_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.adapters.linears import features, is_transposed
from luthier.errors import ModelError
from luthier.model.folder import safetensors_header
from luthier.model.quantize import packable_names

NAME = "luthier"
_STATE = ".quant_state.bitsandbytes__"
_READERS = min(8, os.cpu_count() or 1)  # threads
_PIECE = 4 << 20  # bytes that one of them reads at a time
_OWN_PAGES = 1 << 20  # bytes of the smallest tensor that is not on the heap
AHEAD = 64 << 20  # bytes that are worth reading before it is their turn, for a GPU
_PINNED = 256 << 20  # bytes of the largest tensor that is read into pinned memory
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Pack = Callable[[Tensor], nn.Module]
Unpack = Callable[[Mapping[str, Tensor], str], nn.Module]


@contextmanager
def handles(paths: Iterable[Path], *, copied: bool, pinned: bool = False, ahead: int = 0) -> Iterator[dict[str, Any]]:
    """Name -> handle of every tensor of some files; `handle[...]` reads it. Tensors in bitsandbytes' 4 bits are one
    `Stored` each. `copied`: into memory of their own, which `Handle` reads inside the context, else as a view of the
    mapped file, which costs nothing until used but counts as memory from then on. `pinned`: as of `Handle`. `ahead`:
    bytes of tensors that may be read before they are asked for."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        reading = Reading(stack.enter_context(ThreadPoolExecutor(_READERS, "reader")), ahead)
        for path in paths:
            mapped: Any = safe_open(path, framework="pt", backend="pread" if copied else "mmap")
            found |= {name: mapped.get_slice(name) for name in mapped.keys()}  # noqa: SIM118 (no mapping)
            if copied:
                file = stack.enter_context(path.open("rb", buffering=0))
                found |= {t.name: t for t in _handles(path, file, reading, pinned)}
        reading.expect(found[name] for name in sorted(found, key=dot_natural_key))
        yield _grouped(found)


def _handles(path: Path, file: FileIO, reading: Reading, pinned: bool) -> Iterator[Handle]:
    """Those of one file's tensors, but for rare dtypes, which safetensors itself reads."""
    header = safetensors_header(path)
    assert isinstance(header, dict), "safetensors has read it"
    header.pop("__metadata__", None)
    first = path.stat().st_size - max(tensor["data_offsets"][1] for tensor in header.values())
    for name, tensor in header.items():
        if dtype := _DTYPES.get(tensor["dtype"]):
            yield Handle(name, file, first + tensor["data_offsets"][0], dtype, tensor["shape"], reading, pinned)


@dataclass(frozen=True)
class Handle:
    """A tensor in a safetensors file, from the byte `start` on, that `handle[...]` reads by several threads at once.

    One thread would be bound by how fast it copies and how fast the system hands out pages. `pinned`: tensors that are
    not too large are read into memory that a GPU copies from by itself; torch lends it again when a tensor is gone, so
    that the system hands it out once.
    """

    name: str
    file: FileIO
    start: int
    dtype: torch.dtype
    shape: list[int]
    reading: Reading
    pinned: bool

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self.reading.take(self).view(self.dtype).view(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def begin(self, readers: ThreadPoolExecutor) -> Begun:
        """Has its bytes read."""
        out = self._place(self.size)
        view = out.numpy().data
        pieces = range(0, self.size, _PIECE)
        return Begun(out, [readers.submit(self._fill, view[at : at + _PIECE], at) for at in pieces])

    def _place(self, size: int) -> Tensor:
        """Bytes to be written. Large ones are pages of their own, which leave no hole in the heap when they go."""
        if self.pinned and size <= _PINNED:
            with suppress(RuntimeError):  # some systems let no memory, or not so much, be locked
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if size < _OWN_PAGES:
            return torch.empty(size, dtype=torch.uint8)
        return torch.frombuffer(mmap(-1, size), dtype=torch.uint8)

    def _fill(self, piece: memoryview, at: int) -> None:
        """Reads the bytes from `at` on into `piece`."""
        done = 0
        while done < len(piece):
            count = os.preadv(self.file.fileno(), [piece[done:]], self.start + at + done)
            if count == 0:
                raise OSError(f"{self.file.name} ends within {self.name}")
            done += count


class Begun(NamedTuple):
    """A tensor's bytes, which are there once all `pieces` are."""

    out: Tensor
    pieces: list[Future[None]]


class Reading:
    """Reads tensors as they are taken, and before: those that come next in the order in which they are expected, as
    many as fit into a little memory. So files are read while what was read is packed."""

    def __init__(self, readers: ThreadPoolExecutor, room: int) -> None:
        self._readers, self._room, self._lock = readers, room, Lock()
        self._begun: dict[str, Begun] = {}
        self._held, self._until = 0, 0  # their bytes; the place up to which all were begun, or taken, or passed over
        self._order: list[Handle] = []
        self._places: dict[str, int] = {}

    def expect(self, found: Iterable[Any]) -> None:
        """Tells the order."""
        self._order = [handle for handle in found if isinstance(handle, Handle)]
        self._places = {handle.name: place for place, handle in enumerate(self._order)}

    def take(self, handle: Handle) -> Tensor:
        """Its bytes. Raises OSError if they are not there."""
        with self._lock:
            if (begun := self._begun.pop(handle.name, None)) is not None:
                self._held -= handle.size
            else:
                begun = handle.begin(self._readers)
            self._go_on(self._places[handle.name] + 1)
        for piece in begun.pieces:
            piece.result()
        return begun.out

    def _go_on(self, place: int) -> None:
        """Begins those from `place` on that fit."""
        self._until = max(self._until, place)
        for handle in islice(self._order, self._until, None):
            if self._held + handle.size > self._room:
                break
            self._begun[handle.name] = handle.begin(self._readers)
            self._held, self._until = self._held + handle.size, self._until + 1


class Stored:
    """A weight in bitsandbytes' 4 bits: the handles of its parts, by name. It goes through transformers unread."""

    def __init__(self, name: str, parts: Mapping[str, Any]) -> None:
        self.name, self.parts = name, parts

    def __getitem__(self, index: Any) -> Stored:
        return self

    def to(self, *args: Any, **options: Any) -> Stored:
        return self

    def read(self, device: torch.device) -> dict[str, Tensor]:
        return {name: part[...].to(device) for name, part in self.parts.items()}


def _grouped(found: dict[str, Any]) -> dict[str, Any]:
    for weight in [name.partition(_STATE)[0] for name in found if _STATE in name]:
        parts = {name: found.pop(name) for name in list(found) if name == weight or name.startswith(f"{weight}.")}
        found[weight] = Stored(weight, parts)
    return found


def _none(parts: Mapping[str, Tensor], name: str) -> nn.Module:
    raise ValueError(f"{name} is stored in 4 bits, which config.json does not say")


class Placing(QuantizationConfigMixin):
    """What is done with weights as they arrive, in the form that transformers hands to a quantiser.

    Args:
        place: the device of a parameter, by its name.
        pack: weight [out, in] -> the module that takes a linear layer's place, still without its bias. None leaves
            linear layers as they are.
        unpack: the same from the parts of a `Stored` and its name.

    Attributes:
        misshapen: names of weights that were found in another shape.
        refused: why a weight could not be read, if so.
    """

    def __init__(
        self, place: Callable[[str], torch.device], dtype: torch.dtype, pack: Pack | None = None, unpack: Unpack = _none
    ) -> None:
        self.quant_method: Any = NAME
        self.place, self.dtype, self.pack, self.unpack = place, dtype, pack, unpack
        self.packed: dict[str, nn.Module] = {}
        self.misshapen: list[str] = []
        self.refused: ModelError | None = None

    def __deepcopy__(self, memo: Any) -> Placing:
        return self  # transformers copies the model's config, which this becomes part of

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}  # what a config that is written down says of it

    def put(self, name: str, layer: Any, value: Tensor | Stored) -> Tensor | None:
        """Keeps `value` packed if it is the weight of the linear `layer`; else returns it on its device."""
        device = self.place(name)
        if isinstance(value, Stored):
            self.packed[name] = self.unpack(value.read(device), value.name)
        elif layer is not None and self.pack is not None and value.shape == layer.weight.shape:
            weight = value.to(device)
            self.packed[name] = self.pack(weight.t() if is_transposed(layer) else weight)
        else:
            return value.to(device)
        return None

    def install(self, model: nn.Module) -> None:
        """Puts the packed layers in all the places of the linear ones, whose biases they take over."""
        packed = {model.get_submodule(name.removesuffix(".weight")): new for name, new in self.packed.items()}
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if layer in packed:
                if features(layer) != features(packed[layer]):
                    self.misshapen.append(f"{name}.weight")
                packed[layer].bias = layer.bias
                model.set_submodule(name, packed[layer])


class _Place(ConversionOps):
    """The step between a tensor's arrival and its setting: transformers calls it with the tensor under its own name."""

    def __init__(self, placing: Placing, linear: set[str]) -> None:
        self.placing, self.linear = placing, linear

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        model, missing_keys = options["model"], options["missing_keys"]
        left = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.removesuffix(".weight")) if name in self.linear else None
            shape = model.get_parameter_or_buffer(name).shape
            if isinstance(value, Tensor) and value.shape != shape:
                self.placing.misshapen.append(name)
            if (tensor := self._put(name, layer, value)) is not None:
                left[name] = tensor
            else:
                missing_keys.discard(name)
        return left

    def _put(self, name: str, layer: Any, value: Any) -> Tensor | None:
        try:
            return self.placing.put(name, layer, value)
        except ModelError as error:
            self.placing.refused = error  # transformers turns whatever is raised here into an error of its own
            raise


class Placer(HfQuantizer):
    """transformers' side of `Placing`."""

    quantization_config: Placing

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.linear = {f"{name}.weight" for name in packable_names(model)}

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        # What transformers keeps in another dtype (some buffers, some norms) it casts itself, and `load` moves it.
        return bool(model.get_parameter_or_buffer(param_name).dtype == self.quantization_config.dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return _Place(self.quantization_config, self.linear)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.quantization_config.install(model)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


register_quantization_config(NAME)(Placing)
register_quantizer(NAME)(Placer)
