"""Linear layers that read the same input, as one product, and their adapters' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from luthier.adapters.linears import dense_weight, is_quantized
from luthier.adapters.lora import LoraLinear
from luthier.adapters.method import Noise
from luthier.kernels.place import on_gpu

Gradients = dict[Tensor, Tensor]


class Update(NamedTuple):
    """One adapted layer of a merged product."""

    layer: LoraLinear
    columns: slice  # its outputs among the merged ones
    inner: slice  # its ranks among the merged ones
    B: Tensor  # [out, rank], in the dtype of the products


class MergedLinear:
    """Linear layers that read the same input, as one product, and their LoRA updates beside it.

    The merged weight [N, K] becomes the storage of the layers it was made from; packed weights stay packed, and are
    unpacked side by side each time, into memory that all linears of a model share. Shape suffix: P, the ranks of all
    updates.
    """

    scratch: Tensor | None = None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.bases = [cast(Any, layer.base if isinstance(layer, LoraLinear) else layer) for layer in layers]
        packed = any(is_quantized(base) for base in self.bases)
        self.dense = None if packed else _merge([base.weight for base in self.bases])
        self.bias = None if self.bases[0].bias is None else _merge([base.bias for base in self.bases])
        self.columns = _slices([base.out_features for base in self.bases])
        self.features = self.bases[0].in_features
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

    def parameters(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, LoraLinear):
                yield from (layer.A, layer.B)

    @property
    def dtype(self) -> torch.dtype:
        packed = next((base for base in self.bases if is_quantized(base)), None)
        return self.bases[0].weight.dtype if packed is None else packed.compute_dtype  # type: ignore[no-any-return]

    def refresh(self) -> Iterator[tuple[Tensor, float, Tensor]]:
        """What has to be copied for the adapters' present values to be here, in the dtype of the products: (source,
        factor, place). Places are kept from one time to the next."""
        live = [
            (x, c) for x, c in zip(self.layers, self.columns, strict=True) if isinstance(x, LoraLinear) and x.enabled
        ]
        if not self._has_places([layer for layer, _ in live]):
            self._make_places(live)
        for update in self.updates:
            yield update.layer.A.detach(), update.layer.scale, self.A[update.inner]
            yield update.layer.B.detach(), 1.0, update.B

    def _has_places(self, live: Sequence[LoraLinear]) -> bool:
        """Whether there are places for these layers. Those made in inference mode can be written to only there."""
        ranks = [(update.layer, len(self.A[update.inner])) for update in self.updates]
        inference = not self.updates or self.A.is_inference() == torch.is_inference_mode_enabled()
        return inference and ranks == [(layer, layer.rank) for layer in live]

    def _make_places(self, live: Sequence[tuple[LoraLinear, slice]]) -> None:
        inner, like = _slices([layer.rank for layer, _ in live]), self.bases[0].weight
        make = partial(torch.empty, dtype=self.dtype, device=like.device)
        places = [make(layer.B.shape) for layer, _ in live]
        self.updates = [Update(x, c, i, B) for (x, c), i, B in zip(live, inner, places, strict=True)]
        self.A = make(inner[-1].stop if inner else 0, self.features)  # [P, K]

    def forward(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """x [T, K] to y [T, N], and the updates' inner values scale · x Aᵀ [T, P]."""
        weight = self.weight
        y = torch.mm(x, weight.t()) if self.bias is None else torch.addmm(self.bias, x, weight.t())
        if not self.updates:
            return y, None
        inner = x.new_empty(len(x), len(self.A))
        for part, drop in self._readers(noise):
            torch.mm(drop(x) if drop else x, self.A[part].t(), out=inner[:, part])
        for update in self.updates:
            y[:, update.columns].addmm_(inner[:, update.inner], update.B.t())
        return y, inner

    def backward_inner(self, dy: Tensor, inner: Tensor | None, found: Gradients) -> Tensor | None:
        """The gradient of the inner values; that of each B goes to `found`."""
        if inner is None:
            return None
        dinner = torch.empty_like(inner)
        for update in self.updates:
            part = dy[:, update.columns]
            torch.mm(part, update.B, out=dinner[:, update.inner])
            found[update.layer.B] = torch.mm(inner[:, update.inner].t(), part).t()
        return dinner

    def backward_input(self, dy: Tensor, dinner: Tensor | None, noise: Noise | None) -> Tensor:
        """The gradient of x [T, K]."""
        dx = torch.mm(dy, self.weight)
        if dinner is None:
            return dx
        for part, drop in self._readers(noise):
            if drop is None:
                dx.addmm_(dinner[:, part], self.A[part])
            else:
                dx.add_(drop(torch.mm(dinner[:, part], self.A[part])))
        return dx

    def backward_adapters(self, dinner: Tensor | None, x: Tensor, noise: Noise | None, found: Gradients) -> None:
        """Puts the gradient of each A into `found`."""
        if dinner is None:
            return
        dA = torch.empty_like(self.A)
        for part, drop in self._readers(noise):
            torch.mm(dinner[:, part].t(), drop(x) if drop else x, out=dA[part])
        for update in self.updates:
            found[update.layer.A] = dA[update.inner].mul_(update.layer.scale)

    def _readers(self, noise: Noise | None) -> list[tuple[slice, Callable[[Tensor], Tensor] | None]]:
        """Which ranks read x, and what is done to it before: all at once if nothing is dropped, else each layer's own
        values are."""
        if noise is None or noise.samples is None or not any(u.layer.dropout for u in self.updates):
            return [(slice(None), None)]
        return [(u.inner, partial(noise.dropped, module=u.layer.index, p=u.layer.dropout)) for u in self.updates]


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
    """The parameters `parts`, one under the other in one tensor, of which they become views."""
    merged = torch.cat([p.detach() for p in parts])
    for part, rows in zip(parts, _slices([len(p) for p in parts]), strict=True):
        part.data = merged[rows]
    return merged
