"""Linear layers that read the same input, as one product with their adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from luthier.adapters.linears import is_quantized
from luthier.adapters.lora import LoraLinear
from luthier.adapters.method import Noise
from luthier.kernels import spare
from luthier.kernels.adapted import Part
from luthier.kernels.place import on_gpu
from luthier.kernels.rectangles import Copies, Rectangle


class Update(NamedTuple):
    """One adapted layer of a merged product."""

    layer: LoraLinear
    columns: slice  # its outputs among the merged ones
    inner: slice  # its ranks among the merged ones


class Gradients(NamedTuple):
    """Where a product's backward pass leaves them, in the dtype of the products."""

    A: Tensor  # [P, K]
    B: Tensor  # [N, S]; only what a layer's outputs have to do with its own ranks is a gradient, still without scale


class MergedLinear:
    """Linear layers that read the same input, as one product, and their LoRA updates folded into it. One matrix
    [N + S, K + S] holds all:

        W | B
        A | -

    W [N, K] are the layers' weights, and A [S, K] and B [N, S], times its scale, the updates': each has its own ranks
    in them, beside which are zeros. So x · Wᵀ + (x · Aᵀ) · Bᵀ is one product, of x with x · Aᵀ in spare columns behind
    it (see `kernels/spare.py`); and so is the gradient of x, of that of the output with its product with B behind it.

    W becomes the storage of the layers it was made from; packed weights stay packed, and are unpacked each time, into
    memory that all linears of a model share. Shape suffixes: P, the ranks of all updates; S, rounded up.
    """

    scratch: Tensor | None = None
    border: Copies  # puts A and B where they belong
    gradients: Gradients

    def __init__(self, layers: Sequence[nn.Module], adapted_backward: Callable[..., None]) -> None:
        """`adapted_backward`: as of `Pointwise`."""
        self.bases = [cast(Any, layer.base if isinstance(layer, LoraLinear) else layer) for layer in layers]
        self.columns = _slices([base.out_features for base in self.bases])
        self.outputs, self.features = self.columns[-1].stop, self.bases[0].in_features
        pairs = zip(layers, self.columns, strict=True)
        self.adapted = [(layer, columns) for layer, columns in pairs if isinstance(layer, LoraLinear)]
        self.spare = _rounded([layer.A for layer, _ in self.adapted])
        packed = any(is_quantized(base) for base in self.bases)
        self.dense = None if packed else _merge([base.weight for base in self.bases], self.spare)
        self.bias = None if self.bases[0].bias is None else _merge([base.bias for base in self.bases])
        self.adapted_backward = adapted_backward
        self.updates: list[Update] = []

    def keep(self) -> None:
        """Keeps the values of packed weights, which else are unpacked for each product."""
        if self.dense is None:
            self.dense = self.bases[0].weight.new_empty(self.size, dtype=self.dtype).view(self.shape)
            self._unpack(self.dense)

    @property
    def kept(self) -> bool:
        """Whether `keep` kept something."""
        return self.dense is not None and any(is_quantized(base) for base in self.bases)

    def forget(self) -> None:
        """Lets go of what `keep` kept."""
        self.dense = None if self.kept else self.dense

    @property
    def kept_bytes(self) -> int:
        """Bytes of what `keep` keeps."""
        return self.size * self.dtype.itemsize if self.dense is None else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.outputs + self.spare, self.features + self.spare

    @property
    def size(self) -> int:
        """Values of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def matrix(self) -> Tensor:
        """[N + S, K + S] in the dtype of the products; where weights are packed, only until the next of these is asked
        for."""
        if self.dense is not None:
            return self.dense
        assert self.scratch is not None
        self._unpack(matrix := self.place)
        if self.updates:
            self.border()
        return matrix

    @property
    def place(self) -> Tensor:
        """Where the matrix is, or will be when it is asked for."""
        if self.dense is not None:
            return self.dense
        assert self.scratch is not None
        return self.scratch[: self.size].view(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        packed = next((base for base in self.bases if is_quantized(base)), None)
        return self.bases[0].weight.dtype if packed is None else packed.compute_dtype  # type: ignore[no-any-return]

    def choose(self) -> list[Update]:
        """Takes the updates of the layers whose adapter is enabled. They need a `border` then, and `gradients`."""
        live = [(layer, columns) for layer, columns in self.adapted if layer.enabled]
        inner = _slices([layer.rank for layer, _ in live])
        self.updates = [Update(*pair, ranks) for pair, ranks in zip(live, inner, strict=True)]
        return self.updates

    def borders(self) -> list[Rectangle]:
        """A and B of the updates, around the weights."""
        matrix, (N, K), end = self.place, (self.outputs, self.features), 0
        below, beside = matrix[N:, :K], matrix[:N, K:]
        found = []
        for layer, columns, ranks in self.updates:
            found += [Rectangle(layer.A, below[ranks]), Rectangle(layer.B, beside[columns], ranks.start, layer.scale)]
            end = ranks.stop
        A = self.adapted[0][0].A
        others = [beside[columns] for columns in self.columns if all(columns != u.columns for u in self.updates)]
        return found + [Rectangle(A.new_empty(len(x), 0), x) for x in (below[end:], *others) if len(x)]

    def forward(self, x: Tensor, noise: Noise | None, *, keep: bool, behind: int = 0) -> tuple[Tensor, Tensor | None]:
        """x [T, K] to y [T, N], with `behind` more columns free behind each row. With `keep`, the updates' inner values
        x · Aᵀ [T, S], too, apart from x."""
        matrix, (N, K) = self.matrix, (self.outputs, self.features)
        y = spare.empty(x, len(x), N, behind)
        if not self.updates:
            return self._multiply(x, matrix[:N, :K], y), None
        x, drops = spare.made(x, self.spare), self._drops(noise)
        whole = spare.whole(x, self.spare)
        inner = whole[:, K:]
        if drops:
            inner.zero_()
        for ranks, drop in drops:
            torch.mm(drop(x), matrix[N:, :K][ranks].t(), out=inner[:, ranks])
        if not drops:
            torch.mm(x, matrix[N:, :K].t(), out=inner)
        return self._multiply(whole, matrix[:N], y), inner.clone() if keep else None

    def _multiply(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return torch.mm(x, weight.t(), out=y) if self.bias is None else torch.addmm(self.bias, x, weight.t(), out=y)

    def inner(self, x: Tensor) -> Tensor | None:
        """What `forward` left behind x [T, K], which has room for it: the updates' inner values [T, S]."""
        return spare.whole(x, self.spare)[:, self.features :] if self.updates else None

    def backward(
        self, dy: Tensor, inner: Tensor | None, noise: Noise | None, *, wanted: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x [T, K], None unless `wanted`, and of the inner values [T, S]; that of B goes to its place.
        The columns behind dy [T, N] are written to, where there are any."""
        matrix, (N, K) = self.matrix, (self.outputs, self.features)
        if not self.updates:
            return torch.mm(dy, matrix[:N, :K]) if wanted else None, None
        assert inner is not None
        dy, drops = spare.made(dy, self.spare), self._drops(noise)
        whole = spare.whole(dy, self.spare)
        dinner = whole[:, N:]
        self.adapted_backward(dy, matrix[:N, K:], inner, self._parts(), dinner, self.gradients.B)
        if not wanted:
            return None, dinner
        dx = torch.mm(dy, matrix[:N, :K]) if drops else torch.mm(whole, matrix[:, :K])
        for ranks, drop in drops:
            dx.add_(drop(torch.mm(dinner[:, ranks], matrix[N:, :K][ranks])))
        return dx, dinner

    def backward_adapters(self, dinner: Tensor | None, x: Tensor, noise: Noise | None) -> None:
        """Puts the gradient of each A into its place."""
        if dinner is None:
            return
        dA, drops = self.gradients.A, self._drops(noise)
        for ranks, drop in drops:
            torch.mm(dinner[:, ranks].t(), drop(x), out=dA[ranks])
        if not drops:
            torch.mm(dinner[:, : len(dA)].t(), x, out=dA)

    def drops(self, noise: Noise | None) -> bool:
        """Whether each layer reads x with other values dropped."""
        return bool(self._drops(noise))

    def _parts(self) -> list[Part]:
        return [Part((u.columns.start, u.columns.stop), (u.inner.start, u.inner.stop)) for u in self.updates]

    def _drops(self, noise: Noise | None) -> list[tuple[slice, Callable[[Tensor], Tensor]]]:
        """What each layer does to x before it reads it, and its ranks. Empty where nothing is dropped: then all read x
        at once."""
        if noise is None or noise.samples is None or not any(u.layer.dropout for u in self.updates):
            return []
        return [(u.inner, partial(noise.dropped, module=u.layer.index, p=u.layer.dropout)) for u in self.updates]

    def _unpack(self, matrix: Tensor) -> None:
        for base, rows in zip(self.bases, self.columns, strict=True):
            _write(base, matrix[rows, : self.features])


def _rounded(factors: Sequence[Tensor]) -> int:
    """The ranks of all these A, rounded up to what a product reads at a time."""
    step = 64 if factors and on_gpu(factors[0]) else 16
    return -(-sum(map(len, factors)) // step) * step


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    return [slice(a, b) for a, b in pairwise(accumulate([0, *sizes]))]


def _write(base: Any, out: Tensor) -> None:
    """Puts the weight of a linear layer into `out` [out, in]."""
    if is_quantized(base):
        base.write(out)
    else:
        out.copy_(base.weight)


def _merge(parts: list[Tensor], border: int = 0) -> Tensor:
    """The parameters `parts`, one under the other in one tensor, of which they become views, unless they are already:
    a second model of the same base takes no memory for its weights. With a `border`, which is a model's own, there are
    so many more rows and columns; and what another model merged before stays its own copy."""
    before = getattr(parts[0], "merged", lambda: None)()
    if before is not None and not border and _is_made_of(before, parts):
        return before  # type: ignore[no-any-return]
    rows, sizes = _slices([len(p) for p in parts]), parts[0].shape[1:]
    merged = parts[0].detach().new_empty(rows[-1].stop + border, *(size + border for size in sizes))
    for part, some in zip(parts, rows, strict=True):
        part.data = merged[(some, *map(slice, sizes))].copy_(part.detach())
    parts[0].merged = (lambda: None) if border else ref(merged)  # type: ignore[attr-defined]
    return merged


def _is_made_of(merged: Tensor, parts: list[Tensor]) -> bool:
    """Whether the parts are its rows; a part that was moved or replaced since is not."""
    rows = [merged[some] for some in _slices([len(part) for part in parts])]
    return len(merged) == sum(map(len, parts)) and list(map(_place, parts)) == list(map(_place, rows))


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where it lies, and as what."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.dtype
