"""Virtual tokens before each row of a decoder.

They are embeddings (prompt tuning, Lester et al. 2021, arXiv:2104.08691; P-tuning, Liu et al. 2021, arXiv:2103.10385),
or keys and values of each layer (prefix tuning, Li and Liang 2021, arXiv:2101.00190).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import AdapterError


class Virtual:
    """Takes the place of the forward of a module's decoder: from outside, the virtual tokens are not to be seen.

    Rows are [B, L], padded on either side; a cache that has been filled once has the virtual tokens in it.
    """

    def __init__(self, module: Any, model: Any) -> None:
        """`model`: PEFT's model, which makes the virtual tokens."""
        self.model, self.embed, self.enabled = model, module.get_input_embeddings(), True
        self.count: int = model.active_peft_config.num_virtual_tokens
        self.is_prefix = model.active_peft_config.peft_type == "PREFIX_TUNING"
        self.inner = module.base_model.forward
        forward = functools.partial(self.forward)
        module.base_model.forward = functools.update_wrapper(forward, self.inner)  # its signature is asked for

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        if not self.enabled:
            return self.inner(input_ids, **options)
        if input_ids.is_meta:
            return self._outlined(input_ids, options)
        cache = options.get("past_key_values")
        begun = cache is not None and cache.get_seq_length() > 0
        options |= self._shifted(options)
        if begun:
            return self.inner(input_ids, **options)
        return self._after_prefix(input_ids, options) if self.is_prefix else self._after_prompt(input_ids, options)

    def _shifted(self, options: dict[str, Any]) -> dict[str, Any]:
        """Mask and positions of the real tokens, if they are given."""
        shifted = {}
        if (mask := options.get("attention_mask")) is not None:
            shifted["attention_mask"] = F.pad(mask, (self.count, 0), value=1)
        if (positions := options.get("position_ids")) is not None:
            if bool((positions.diff() < 0).any()):
                raise AdapterError("rows with virtual tokens before them cannot be packed")
            shifted["position_ids"] = positions + self.count
        return shifted

    def _outlined(self, ids: Tensor, options: dict[str, Any]) -> Any:
        """For a plan, which has no values and packs its rows: what is trained reaches the first block, so that every
        block keeps what a backward pass needs; the virtual tokens themselves are not counted."""
        embedded = self.embed(ids)
        trained = sum(p.sum() for p in self.model.prompt_encoder.parameters())
        return self.inner(**options | {"input_ids": None, "inputs_embeds": embedded + trained.to(embedded)})

    def _after_prompt(self, ids: Tensor, options: dict[str, Any]) -> Any:
        embedded = self.embed(ids)
        prompt = self.model.get_prompt(batch_size=len(ids)).to(embedded.dtype)
        if (positions := options.get("position_ids")) is not None:
            first = torch.arange(self.count, device=ids.device).expand(len(ids), -1)
            options["position_ids"] = torch.cat([first, positions], dim=1)
        out = self.inner(**options | {"inputs_embeds": torch.cat([prompt, embedded], dim=1)})
        out.last_hidden_state = out.last_hidden_state[:, self.count :]
        return out

    def _after_prefix(self, ids: Tensor, options: dict[str, Any]) -> Any:
        cache = self.model.get_prompt(batch_size=len(ids))
        return self.inner(ids, **options | {"past_key_values": cache if options.get("use_cache") else _fixed(cache)})


def _fixed(cache: Any) -> Any:
    """A cache that stays as it is: a block that is run again for the backward pass then sees what it saw before."""
    base: Any = type(cache)  # transformers', as PEFT made it

    class Fixed(base):  # type: ignore[misc]
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            layer: Any = self.layers[layer_idx]
            return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    fixed = Fixed()
    fixed.layers = cache.layers
    return fixed
