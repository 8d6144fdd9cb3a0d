"""Frozen linear layers in few bits, made of ordinary tensors: they move, shard and save like any other layer's.

To add one: a class like those below, and a line in QUANTIZERS; `tests/contract/test_quantize.py` runs it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.linears import dense_weight, is_transposed
from luthier.errors import ModelError
from luthier.kernels import quantize as plain
from luthier.kernels.place import on_gpu
from luthier.model.memory import attempt
from luthier.registry import Registry

QUANTIZERS = Registry(
    "quantiser",
    {
        "nf4": "luthier.model.quantize:FourBitLinear",
        "fp4": "luthier.model.quantize:FourBitLinear",
        "int8": "luthier.model.quantize:Int8Linear",
        "fp8": "luthier.model.quantize:Float8Linear",
    },
)


class PackedLinear(nn.Module, ABC):
    """A frozen linear layer whose weight [out, in] is packed.

    Large tensors (`weight` and its scales) are parameters without gradient, small ones buffers. `bias` [out] is a
    parameter in the compute dtype, or None. `Module.to(dtype)` leaves them all as they are: scales would be damaged,
    and products are computed in `compute_dtype` whatever the input's dtype is.
    """

    weight: nn.Parameter
    rounds_inputs = False
    """Whether inputs are rounded too: then the product is not that of the dequantised weight."""
    bias: nn.Parameter | None
    streamed = False
    """Whether the weight comes and goes (see `offload.py`)."""
    kept: Tensor | None = None
    """Inside `unpacked`, the weight [out, in] as the product reads it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, settings: Any, dtype: torch.dtype, device: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.settings, self.compute_dtype = settings, dtype
        self.register_parameter("bias", _frozen((out_features,), dtype, device) if bias else None)

    @classmethod
    @abstractmethod
    def packed_bytes(cls, in_features: int, out_features: int, settings: Any) -> int:
        """Bytes of all tensors but the bias."""

    def dequantize(self) -> Tensor:
        """[out, in] in the compute dtype; not to be written to."""
        return self._unpack() if self.kept is None else self.kept

    @abstractmethod
    def _unpack(self) -> Tensor:
        """A new tensor [out, in] in the compute dtype."""

    def write(self, out: Tensor) -> None:
        """Puts what `dequantize` gives into `out` [out, in]."""
        out.copy_(self.dequantize())

    @property
    def kept_bytes(self) -> int:
        """Bytes of what `keep` keeps."""
        return self.out_features * self.in_features * self.compute_dtype.itemsize

    def keep(self) -> None:
        self.kept = self._unpack()

    @abstractmethod
    def requantize(self, weight: Tensor) -> None:
        """Packs `weight` [out, in], fp32, bf16 or fp16, in the place of the old one."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        y: Tensor = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., in] in the compute dtype times the weight: [..., out] plus the bias, as `dtype`; no gradient."""
        return F.linear(x, self.dequantize(), _as(self.bias, x.dtype)).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.settings.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return cast(Self, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """y = W x + b with the gradient of x (and of b where it is trained). The weight is unpacked again in the backward
    pass; nothing is kept in between.

    The layer itself is kept, and not its tensors: those may be elsewhere in the meantime (sharded, in host memory).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        return layer.multiply(x.to(layer.compute_dtype), x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dy = gradients[0].to(ctx.layer.compute_dtype)
        dx = (dy @ ctx.layer.dequantize()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        db = (
            gradients[0].reshape(-1, ctx.layer.out_features).sum(0).to(ctx.bias_dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return dx, db, None


class FourBitLinear(PackedLinear):
    """NF4 or FP4. `weight` is uint8 [⌈out · in / 2⌉, 1], bitsandbytes' own shape. `absmax` [⌈out · in / 64⌉] holds fp32
    scales, or with `double` uint8 indices that `code`, `nested` and `offset` turn into scales."""

    nested: Tensor
    offset: Tensor
    code: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        settings: recipe.FourBit,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, settings, dtype, device)
        pairs, blocks, groups = _four_bit_counts(in_features * out_features)
        self.weight = _frozen((pairs, 1), torch.uint8, device)
        self.absmax = _frozen((blocks,), torch.uint8 if settings.double else torch.float32, device)
        if settings.double:
            for name, shape in {"nested": (groups,), "offset": (), "code": (256,)}.items():
                self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))

    @classmethod
    def packed_bytes(cls, in_features: int, out_features: int, settings: recipe.FourBit) -> int:
        pairs, blocks, groups = _four_bit_counts(in_features * out_features)
        return pairs + (blocks + 4 * (groups + 1 + 256) if settings.double else 4 * blocks)

    def _unpack(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        unpack = _kernels().dequantize_4bit if _has_kernels(self.weight) else plain.dequantize_4bit
        return unpack(self.weight, self._scales(), self.settings.kind, shape, self.compute_dtype)

    def write(self, out: Tensor) -> None:
        if self.kept is None and _has_kernels(self.weight):
            _kernels().write_4bit(self.weight, self._scales(), self.settings.kind, out)
        else:
            super().write(out)

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        packed, absmax = plain.quantize_4bit(weight, self.settings.kind)
        self.weight.copy_(packed)
        if not self.settings.double:
            self.absmax.copy_(absmax)
            return
        for place, value in zip(self._scales(), plain.quantize_scales(absmax), strict=True):
            place.copy_(value)

    def _scales(self) -> Tensor | plain.NestedScales:
        if not self.settings.double:
            return self.absmax
        return plain.NestedScales(self.absmax, self.nested, self.offset, self.code)


def _has_kernels(packed: Tensor) -> bool:
    """Whether our kernel turns these 4-bit indices into values, as it does on a GPU: it needs no other library, and
    undoes double quantisation in the same pass."""
    return on_gpu(packed) and (packed.is_meta or find_spec("triton") is not None)


def _kernels() -> Any:
    return import_module("luthier.kernels.nf4")


def _four_bit_counts(values: int) -> tuple[int, int, int]:
    """Bytes of indices, scales, and scales of scales."""
    blocks = -(-values // plain.BLOCK)
    return -(-values // 2), blocks, -(-blocks // plain.NESTED)


class Int8Linear(PackedLinear):
    """LLM.int8(): `weight` int8 [out, in], `absmax` fp32 [out]. The gradient goes through the dequantised weight."""

    rounds_inputs = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        settings: recipe.EightBit,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, settings, dtype, device)
        self.weight = _frozen((out_features, in_features), torch.int8, device)
        self.absmax = _frozen((out_features,), torch.float32, device)

    @classmethod
    def packed_bytes(cls, in_features: int, out_features: int, settings: recipe.EightBit) -> int:
        return out_features * (in_features + 4)

    def dequantize(self) -> Tensor:
        return self._unpack()  # what is kept are the integers

    def _unpack(self) -> Tensor:
        return plain.dequantize_int8(self.weight, self.absmax, self.compute_dtype)

    @property
    def kept_bytes(self) -> int:
        return 0 if on_gpu(self.weight) else self.out_features * self.in_features * torch.float32.itemsize

    def keep(self) -> None:
        """The integers in float32, in which a CPU multiplies them; a GPU does as they are."""
        self.kept = None if on_gpu(self.weight) else self.weight.float()

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        packed, absmax = plain.quantize_int8(weight)
        self.weight.copy_(packed)
        self.absmax.copy_(absmax)

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.rounds_inputs:
            return super().multiply(x, dtype)
        weight = self.weight if self.kept is None else self.kept
        rows = x.reshape(-1, self.in_features)
        y = plain.int8_linear(rows, weight, self.absmax, self.settings.threshold, self.bias, dtype=dtype)
        return y.view(*x.shape[:-1], self.out_features)


@contextmanager
def unpacked(module: nn.Module, room: int) -> Iterator[None]:
    """Inside, packed layers keep what products read of their weights, as many of them as `room` bytes hold, and compute
    the same to the bit. To unpack a weight costs more than to multiply it by a few rows."""
    layers = []
    for layer in module.modules():
        if isinstance(layer, PackedLinear) and not layer.streamed and layer.kept_bytes <= room:
            room -= layer.kept_bytes
            layers.append(layer)
            attempt(layer.keep)
            if layer.kept is None:  # there is no memory after all
                break
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def forget_unpacked(module: nn.Module) -> bool:
    """Lets go of what packed layers keep of their weights inside `unpacked`; returns whether they kept any."""
    kept = [layer for layer in module.modules() if isinstance(layer, PackedLinear) and layer.kept is not None]
    for layer in kept:
        layer.kept = None
    return bool(kept)


@contextmanager
def unrounded(module: nn.Module) -> Iterator[None]:
    """Inside, layers that round their inputs do not: what they make of a token does not depend on what is beside."""
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "rounds_inputs", False)]
    for layer in layers:
        layer.rounds_inputs = False
    try:
        yield
    finally:
        for layer in layers:
            del layer.rounds_inputs  # the class's own is left


class Float8Linear(PackedLinear):
    """`weight` float8 e4m3 [out, in], `scale` fp32 [out]. Products are in the compute dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        settings: recipe.Float8,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, settings, dtype, device)
        self.weight = _frozen((out_features, in_features), plain.FLOAT8, device)
        self.scale = _frozen((out_features,), torch.float32, device)

    @classmethod
    def packed_bytes(cls, in_features: int, out_features: int, settings: recipe.Float8) -> int:
        return out_features * (in_features + 4)

    def _unpack(self) -> Tensor:
        return plain.dequantize_float8(self.weight, self.scale, self.compute_dtype)

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        packed, scale = plain.quantize_float8(weight)
        self.weight.copy_(packed)
        self.scale.copy_(scale)


def empty(
    in_features: int, out_features: int, bias: bool, settings: Any, dtype: torch.dtype, device: Any = "meta"
) -> PackedLinear:
    """A layer of the right shapes and dtypes without values: for planning, or to be filled."""
    layer: PackedLinear = QUANTIZERS.get(settings.kind)(in_features, out_features, bias, settings, dtype, device)
    return layer


def pack(weight: Tensor, bias: Tensor | None, settings: Any, dtype: torch.dtype) -> PackedLinear:
    """The layer of `weight` [out, in] and `bias` [out] as `settings` (a section of the recipe) says, on the weight's
    device, computing in `dtype`."""
    layer = empty(weight.shape[1], weight.shape[0], bias is not None, settings, dtype, weight.device)
    layer.requantize(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def packed_bytes(in_features: int, out_features: int, settings: Any) -> int:
    """Bytes that a layer holds, its bias not counted."""
    count: int = QUANTIZERS.get(settings.kind).packed_bytes(in_features, out_features, settings)
    return count


def from_bitsandbytes(
    tensors: Mapping[str, Tensor], prefix: str, bias: Tensor | None, dtype: torch.dtype
) -> FourBitLinear:
    """The layer that bitsandbytes stored in 4 bits, value for value, computing in `dtype`.

    `tensors` holds the packed weight under the name `prefix` (`….weight`), and beside it `prefix.absmax`,
    `prefix.quant_map`, with double quantisation `prefix.nested_absmax` and `prefix.nested_quant_map`, and the JSON text
    `prefix.quant_state.bitsandbytes__nf4` (or `fp4`) as uint8. The layer takes them over without a copy.

    Raises ModelError where they do not fit together, or are of a variant that is not computed here.
    """
    state = _bitsandbytes_state(tensors, prefix)
    settings = recipe.FourBit(kind=state["quant_type"], double="nested_offset" in state)
    out_features, in_features = state["shape"]
    layer = FourBitLinear(in_features, out_features, bias is not None, settings, dtype, "meta")
    found = _bitsandbytes_parts(tensors, prefix, state)
    if bias is not None:
        found["bias"] = bias.to(dtype)
    for name, place in layer.state_dict().items():
        if name not in found or (found[name].shape, found[name].dtype) != (place.shape, place.dtype):
            raise _unreadable(prefix, f"its {name} is missing, or of another shape or dtype")
    layer.load_state_dict(found, assign=True)
    return layer


def _bitsandbytes_parts(tensors: Mapping[str, Tensor], prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """What is there of a weight, under our names."""
    names = {"weight": prefix, "absmax": f"{prefix}.absmax"}
    names |= {"nested": f"{prefix}.nested_absmax", "code": f"{prefix}.nested_quant_map"}
    found = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    if "nested_offset" in state:
        offset = state["nested_offset"]
        found["offset"] = torch.tensor(offset, dtype=torch.float32, device=tensors[prefix].device)
    return found


def _bitsandbytes_state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The checked JSON of one weight."""
    kind = next((kind for kind in ("nf4", "fp4") if f"{prefix}.quant_state.bitsandbytes__{kind}" in tensors), None)
    if kind is None:
        raise _unreadable(prefix, "its quant_state is missing")
    try:
        state: dict[str, Any] = json.loads(bytes(tensors[f"{prefix}.quant_state.bitsandbytes__{kind}"].tolist()))
    except (ValueError, TypeError) as error:
        raise _unreadable(prefix, "its quant_state is not JSON") from error
    match state:
        case {"quant_type": str(found), "blocksize": plain.BLOCK, "shape": [int(rows), int(columns)]} if found == kind:
            if min(rows, columns) < 1 or prefix not in tensors or tensors[prefix].numel() != -(-rows * columns // 2):
                raise _unreadable(prefix, f"it does not hold {rows} x {columns} values")
        case _:
            raise _unreadable(prefix, f"its quant_state is not {kind} in blocks of {plain.BLOCK}")
    if "nested_offset" in state and not _nested(state):
        raise _unreadable(prefix, f"its scales are not quantised in groups of {plain.NESTED}")
    levels = tensors.get(f"{prefix}.quant_map")
    if levels is None or levels.shape != (16,) or not torch.allclose(levels.cpu(), plain.levels(kind), atol=1e-6):
        raise _unreadable(prefix, f"its quant_map is not that of {kind}")
    return state


def _nested(state: dict[str, Any]) -> bool:
    offset = state["nested_offset"]
    return state.get("nested_blocksize") == plain.NESTED and isinstance(offset, float) and math.isfinite(offset)


def _unreadable(prefix: str, why: str) -> ModelError:
    return ModelError(
        f"cannot be read as bitsandbytes' 4 bits: {why}",
        where=prefix,
        fix="take the unquantised model and model.quantize",
    )


def quantize_module(module: nn.Module, settings: Any, dtype: torch.dtype) -> list[str]:
    """Replaces the linear layers of a transformers model, but not its output head, in place; returns their names.

    GPT-2's Conv1D, whose weight is [in, out], is one too. Experts kept as one 3-D parameter stay as they are, and so
    do layers that are no plain product (routers that derive from nn.Linear).
    """
    done: dict[nn.Module, PackedLinear] = {}  # a layer may stand in several places
    names = packable_names(module)
    for name in names:
        layer: Any = module.get_submodule(name)
        if layer not in done:
            done[layer] = pack(dense_weight(layer), layer.bias, settings, dtype)
    for name in names:
        module.set_submodule(name, done[module.get_submodule(name)])
    return names


def packable_names(module: nn.Module) -> list[str]:
    """Dotted names of what `quantize_module` replaces; a layer that stands in several places has several."""
    output = getattr(module, "get_output_embeddings", None)  # transformers' name for the head
    head = output() if callable(output) else None
    layers = module.named_modules(remove_duplicate=False)
    return [name for name, layer in layers if layer is not head and (is_transposed(layer) or _is_product(layer))]


def _is_product(layer: nn.Module) -> bool:
    """Whether it computes W x + b and no more: nn.Linear, or a class of its own that says the same in other words."""
    kind = type(layer)
    return isinstance(layer, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ == "FalconLinear")


def _frozen(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
