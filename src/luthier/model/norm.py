"""Norms of a decoder layer, as our block computes them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from luthier.kernels.pointwise import Pointwise


class Norm:
    """A norm with its weight [H] and, where it is a LayerNorm, its bias. What `forward` gives beside the output [T, H]
    is 1 / rms of each row, fp32 [T, 1], of a LayerNorm 1 / std beside the mean, fp32 [T, 2].

    Where a `gain` is added to the weight, the sum is fp32: nothing is rounded before it is multiplied (Gemma).
    """

    def __init__(self, module: nn.Module, eps: float, gain: float, pointwise: Pointwise) -> None:
        weight = cast(Tensor, module.weight)
        self.weight = weight.detach().float() + gain if gain else weight
        self.eps, self.pointwise = eps, pointwise
        self.bias = cast(Tensor, module.bias) if isinstance(module, nn.LayerNorm) else None

    def forward(self, x: Tensor, spare: int = 0) -> tuple[Tensor, Tensor]:
        """`spare`: so many columns are left free behind each row of the output."""
        if self.bias is None:
            return self.pointwise.rms_norm(x, self.weight, self.eps, spare)
        return self.pointwise.layer_norm(x, self.weight, self.bias, self.eps, spare)

    def forward_sum(self, x: Tensor, update: Tensor, spare: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x + update, in the place of `update`, and what `forward` gives of it."""
        if self.bias is None:
            return self.pointwise.add_rms_norm(x, update, self.weight, self.eps, spare)
        return update.add_(x), *self.forward(update, spare)

    def backward(
        self, dy: Tensor, x: Tensor, scale: Tensor, residual: Tensor | None, spare: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The gradient of x, plus `residual`, with `spare` columns behind each row; and the output again."""
        if self.bias is None:
            return self.pointwise.rms_norm_backward(dy, x, scale, self.weight, residual, spare)
        assert residual is not None
        return self.pointwise.layer_norm_backward(dy, x, scale, self.weight, self.bias, residual, spare)
