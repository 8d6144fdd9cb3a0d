"""Linear layers that read the same input, as one product, and their adapters' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from luthier.adapters.linears import dense_weight, is_quantized
from luthier.adapters.lora import LoraLinear
from luthier.adapters.method import Noise
from luthier.kernels.place import on_gpu


class Update(NamedTuple):
    """One adapted layer of a merged product."""

    layer: LoraLinear
    columns: slice  # its outputs among the merged ones
    inner: slice  # its ranks among the merged ones


class Matrices(NamedTuple):
    """A and B of the updates of a merged product, or their gradients, in the dtype of the products."""

    A: Tensor  # [P, K]
    B: list[Tensor]  # of each update, [out, rank]


class MergedLinear:
    """Linear layers that read the same input, as one product, and their LoRA updates beside it.

    The merged weight [N, K] becomes the storage of the layers it was made from; packed weights stay packed, and are
    unpacked side by side each time, into memory that all linears of a model share. Shape suffix: P, the ranks of all
    updates.
    """

    scratch: Tensor | None = None
    values: Matrices
    gradients: Matrices  # where `backward_inner` and `backward_adapters` put them

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.bases = [cast(Any, layer.base if isinstance(layer, LoraLinear) else layer) for layer in layers]
        packed = any(is_quantized(base) for base in self.bases)
        self.dense = None if packed else _merge([base.weight for base in self.bases])
        self.bias = None if self.bases[0].bias is None else _merge([base.bias for base in self.bases])
        self.columns = _slices([base.out_features for base in self.bases])
        self.features = self.bases[0].in_features
        pairs = zip(layers, self.columns, strict=True)
        self.adapted = [(layer, columns) for layer, columns in pairs if isinstance(layer, LoraLinear)]
        self.updates: list[Update] = []

    def keep(self) -> None:
        """Keeps the values of packed weights, which else are unpacked for each product."""
        self.dense = self.weight

    @property
    def weight(self) -> Tensor:
        """[N, K] in the dtype of the products; where it was packed, only until the next of these is asked for."""
        if self.dense is not None:
            return self.dense
        first, rows = self.bases[0], self.columns[-1].stop
        if self.scratch is None or (len(self.bases) == 1 and not on_gpu(first.weight)):
            parts = [dense_weight(base) for base in self.bases]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        merged = self.scratch[: rows * self.features].view(rows, self.features)
        for base, part in zip(self.bases, self.columns, strict=True):
            _write(base, merged[part])
        return merged

    @property
    def dtype(self) -> torch.dtype:
        packed = next((base for base in self.bases if is_quantized(base)), None)
        return self.bases[0].weight.dtype if packed is None else packed.compute_dtype  # type: ignore[no-any-return]

    def choose(self) -> list[Update]:
        """Takes the updates of the layers whose adapter is enabled. They need `values` then, and `gradients`."""
        live = [(layer, columns) for layer, columns in self.adapted if layer.enabled]
        inner = _slices([layer.rank for layer, _ in live])
        self.updates = [Update(*pair, ranks) for pair, ranks in zip(live, inner, strict=True)]
        return self.updates

    def forward(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """x [T, K] to y [T, N], and the updates' inner values x · Aᵀ [T, P]."""
        weight = self.weight
        if not self.updates:
            return (torch.mm(x, weight.t()) if self.bias is None else torch.addmm(self.bias, x, weight.t())), None
        A, drops = self.values.A, self._drops(noise)
        inner = torch.cat([torch.mm(drop(x), A[i].t()) for i, drop in drops], 1) if drops else torch.mm(x, A.t())
        # The large product adds what is there as it writes; a product of a few ranks would take a pass for that.
        return self._updated(inner).addmm_(x, weight.t()), inner

    def _updated(self, inner: Tensor) -> Tensor:
        """What y [T, N] gets besides x · Wᵀ."""
        y = inner.new_empty(len(inner), self.columns[-1].stop)
        for columns in self.columns:
            if all(columns != update.columns for update in self.updates):
                y[:, columns] = 0 if self.bias is None else self.bias[columns]
        for (layer, columns, ranks), B in zip(self.updates, self.values.B, strict=True):
            part = y[:, columns]
            if self.bias is None:
                _multiply(inner[:, ranks], B.t(), layer.scale, part)
            else:
                torch.addmm(self.bias[columns], inner[:, ranks], B.t(), alpha=layer.scale, out=part)
        return y

    def backward_inner(self, dy: Tensor, inner: Tensor | None) -> Tensor | None:
        """The gradient of the inner values; that of each B goes to its place."""
        if inner is None:
            return None
        dinner = torch.empty_like(inner)
        for (layer, columns, ranks), B, dB in zip(self.updates, self.values.B, self.gradients.B, strict=True):
            part = dy[:, columns]
            _multiply(part, B, layer.scale, dinner[:, ranks])
            _multiply(part.t(), inner[:, ranks], layer.scale, dB)
        return dinner

    def backward_input(self, dy: Tensor, dinner: Tensor | None, noise: Noise | None) -> Tensor:
        """The gradient of x [T, K]."""
        if dinner is None:
            return torch.mm(dy, self.weight)
        A, drops = self.values.A, self._drops(noise)
        if not drops:
            return torch.mm(dinner, A).addmm_(dy, self.weight)
        dx = torch.mm(dy, self.weight)
        for ranks, drop in drops:
            dx.add_(drop(torch.mm(dinner[:, ranks], A[ranks])))
        return dx

    def backward_adapters(self, dinner: Tensor | None, x: Tensor, noise: Noise | None) -> None:
        """Puts the gradient of each A into its place."""
        if dinner is None:
            return
        dA, drops = self.gradients.A, self._drops(noise)
        for ranks, drop in drops:
            torch.mm(dinner[:, ranks].t(), drop(x), out=dA[ranks])
        if not drops:
            torch.mm(dinner.t(), x, out=dA)

    def _drops(self, noise: Noise | None) -> list[tuple[slice, Callable[[Tensor], Tensor]]]:
        """What each layer does to x before it reads it, and its ranks. Empty where nothing is dropped: then all read x
        at once."""
        if noise is None or noise.samples is None or not any(u.layer.dropout for u in self.updates):
            return []
        return [(u.inner, partial(noise.dropped, module=u.layer.index, p=u.layer.dropout)) for u in self.updates]


def _multiply(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    """scale · a b, rounded once."""
    out.addmm_(a, b, beta=0, alpha=scale)


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    return [slice(a, b) for a, b in pairwise(accumulate([0, *sizes]))]


def _write(base: Any, out: Tensor) -> None:
    """Puts the weight of a linear layer into `out` [out, in]."""
    if is_quantized(base):
        base.write(out)
    else:
        out.copy_(base.weight)


def _merge(parts: list[Tensor]) -> Tensor:
    """The parameters `parts`, one under the other in one tensor, of which they become views, unless they are already:
    a second model of the same base takes no memory for its weights."""
    before = getattr(parts[0], "merged", lambda: None)()
    if before is not None and _is_made_of(before, parts):
        return before  # type: ignore[no-any-return]
    merged = torch.cat([p.detach() for p in parts])
    for part, rows in zip(parts, _slices([len(p) for p in parts]), strict=True):
        part.data = merged[rows]
    parts[0].merged = ref(merged)  # type: ignore[attr-defined]
    return merged


def _is_made_of(merged: Tensor, parts: list[Tensor]) -> bool:
    """Whether the parts are its rows; a part that was moved or replaced since is not."""
    rows = [merged[some] for some in _slices([len(part) for part in parts])]
    return len(merged) == sum(map(len, parts)) and list(map(_place, parts)) == list(map(_place, rows))


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where it lies, and as what."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.dtype
