"""DoRA: y = m · (W + s·BA) x / ‖W + s·BA‖, the length m of each row trained apart from its direction (Liu et al. 2024,
arXiv:2402.09353, equation 5). As section 4.3 advises, the norm passes no gradient on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters.linears import dense_weight, features, without_bias
from luthier.adapters.lora import LoraLinear


class DoraLinear(LoraLinear):
    """`magnitude` is fp32 [out]. The weight is never made dense: a quantised base stays so."""

    square: Tensor  # fp32 [out]: ‖W‖² of each row

    def __init__(self, base: nn.Module, **options: Any) -> None:
        super().__init__(base, **options)
        self.magnitude = nn.Parameter(torch.zeros(features(base)[1], dtype=torch.float32, device=self.B.device))
        self.register_buffer("square", dense_weight(base).float().square().sum(dim=1), persistent=False)

    def began(self) -> None:
        """m = ‖W + s·BA‖, so that training starts from W + s·BA."""
        self.magnitude.data.copy_(self.norms(dense_weight(self.base).dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        kept = self.noise.drop(x, self.index, self.dropout)
        plain = without_bias(self.base, y if kept is x else self.base(kept))
        ratio = self.magnitude / self.norms(x.dtype)
        # Only the change to y is dropped out, as in PEFT.
        return y + (ratio - 1).to(x.dtype) * plain + ratio.to(x.dtype) * self.update(kept)

    @torch.no_grad()
    def norms(self, dtype: torch.dtype) -> Tensor:
        """fp32 [out]: ‖W + s·BA‖ of each row, as the square root of ‖W‖² + 2s·⟨WAᵀ, B⟩ + s²·⟨B(AAᵀ), B⟩."""
        A, B = self.pair()
        W_A = without_bias(self.base, self.base(A.to(dtype))).float().t()
        cross, own = (W_A * B).sum(dim=1), (B @ (A @ A.t()) * B).sum(dim=1)
        squares = self.square + 2 * self.scale * cross + self.scale**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"lora_magnitude_vector": self.magnitude}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.magnitude.data.copy_(state["lora_magnitude_vector"])

    def merged(self) -> Tensor:
        ratio = self.magnitude.detach() / self.norms(dense_weight(self.base).dtype)
        return ratio[:, None] * super().merged()
