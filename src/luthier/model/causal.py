"""A causal language model as training, evaluation and chat hold it: the hidden states that matter, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters.lora import Lora, Noise, attach
from luthier.allocator import keep_freed_memory
from luthier.errors import ModelError
from luthier.kernels import native, pointwise
from luthier.kernels.loss import linear_cross_entropy
from luthier.model import attention, families
from luthier.model.block import Decoder
from luthier.model.pack import share_prefix, trim

if TYPE_CHECKING:
    from luthier.data.stream import Micro

Kernels = Literal["reference", "eager", "compiled"]


class CausalModel:
    """A frozen transformers module, perhaps with an adapter, run on packed rows of tokens.

    `module` is complete in itself: generation calls it directly, adapter included.
    """

    def __init__(
        self, module: Any, lora: Lora | None, *, kernels: Kernels = "reference", recompute: bool = False
    ) -> None:
        self.module, self.lora = module, lora
        self.head: Tensor = module.get_output_embeddings().weight.detach()
        self.device, self.dtype, self.recompute = self.head.device, self.head.dtype, recompute
        self.parts = native.parts() if kernels == "compiled" else pointwise.EAGER
        self.decoder = None if kernels == "reference" else _decoder(module, self.parts, recompute=recompute)
        if recompute and self.decoder is None:
            module.activation_checkpointing_enable()

    def hidden(self, micro: Micro) -> Tensor:
        """[S, H]: the final-normed hidden states at `micro.rows`, differentiable in the adapter."""
        if self.decoder is not None:
            micro = trim(micro)
            noise = self._set_noise(micro)
            # Dropout tells the rows' prefixes apart: each has masks of its own.
            micro, prefix = (micro, 0) if self._drops else share_prefix(micro)
            return self.decoder.hidden(micro, noise, prefix)
        self._set_noise(micro)
        arguments = attention.packed_arguments(micro.positions, micro.bounds)
        with self._recomputing():
            out = self.module.base_model(input_ids=micro.ids[None], **arguments)
        return out.last_hidden_state[0, micro.rows]  # type: ignore[no-any-return]

    def loss(self, micro: Micro) -> Tensor:
        """fp32 scalar: the sum of the losses of `micro.targets`."""
        return linear_cross_entropy(self.hidden(micro), self.head, micro.targets, self.parts)

    @property
    def _drops(self) -> bool:
        return self.lora is not None and any(x.dropout for x in self.lora.layers.values()) and torch.is_grad_enabled()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """transformers recomputes in training mode only, and then has no cache: the mode is left right after."""
        self.module.train(self.recompute and torch.is_grad_enabled())
        yield
        self.module.eval()

    def _set_noise(self, micro: Micro) -> Noise | None:
        """What dropout depends on, told to the adapter's layers. It is off where no gradient is wanted."""
        if self.lora is None:
            return None
        noise = self.lora.noise
        noise.step, noise.samples, noise.positions = micro.step, None, None
        if torch.is_grad_enabled():
            lengths = torch.tensor(micro.bounds).diff()
            noise.samples = micro.samples.repeat_interleave(lengths.to(micro.samples.device))
            noise.positions = micro.positions
        return replace(noise)


def _decoder(module: Any, parts: pointwise.Pointwise, *, recompute: bool) -> Decoder:
    family = families.find(module.config)
    if family is None:
        fix = "set run.kernels to auto or reference"
        raise ModelError(f"our decoder block does not run '{module.config.model_type}' models", fix=fix)
    return Decoder(module, family, parts, recompute=recompute)


def build(
    model: recipe.Model,
    adapter: recipe.Adapter | None,
    *,
    folder: Path,
    kernels: Kernels,
    recompute: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> CausalModel:
    """Loads the base model in `folder`, freezes it and attaches a new adapter.

    `kernels`: `reference` runs the transformers module, which every family can; `eager` and `compiled` our own decoder
    block, for the families in `families.py`. `recompute` trades activations for a second forward pass.

    Raises ModelError for a folder that cannot be loaded, AdapterError for targets that match nothing.
    """
    from luthier.model.load import load_causal

    keep_freed_memory()
    module = load_causal(folder, model, device=device, dtype=dtype, attention="packed")
    lora = attach(module, adapter, seed) if adapter is not None else None
    return CausalModel(module, lora, kernels=kernels, recompute=recompute)
