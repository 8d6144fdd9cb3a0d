"""How a family makes logits of its last hidden states: found in its config, and verified on the model itself where that
is not one of those that our decoder runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels.loss import Head
from luthier.model import families

# Where configs say what is done to the product with the head: factors, divisors and bounds of logits.
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The same products in another order; a factor, bias or bound left out is off by more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Output:
    """The head as it is at any time: its weight may be trained, moved or replaced."""

    module: Any
    scale: float = 1.0
    softcap: float | None = None

    def head(self) -> Head:
        linear = self.module.get_output_embeddings()
        return Head(linear.weight, getattr(linear, "bias", None), self.scale, self.softcap)

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """Inside, a forward pass of the module puts the hidden states [B, T, H] that reach the head into the list, and
        makes no logits: the head is given no rows."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(arguments[0])
            return (arguments[0][..., :0, :],)

        handle = self.module.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()


def find(module: Any, ids: Tensor) -> Output | None:
    """The output of a module, or None if it is more than our loss computes: then its own logits have to be taken.

    On the meta device it is what the config says; so it is of families that our decoder runs, if that is nothing but
    the product. Else see `observed`.
    """
    linear = module.get_output_embeddings()
    # What is beside a linear layer (a low-rank update, packed weights) is not in its weight.
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        return None
    likely = _candidates(module)
    plain = len(likely) == 1 and type(linear) is nn.Linear
    if ids.is_meta or (plain and _is_of_our_families(module)):
        return likely[0]
    return observed(module, ids)


def _is_of_our_families(module: Any) -> bool:
    """Whether it is transformers' own code of one, which is held to its config by tests/contract/test_head.py: to run a
    large model for that takes a second of a start, on a CPU many."""
    return families.find(module.config) is not None and type(module).__module__.startswith("transformers.models.")


def observed(module: Any, ids: Tensor) -> Output | None:
    """`find` by running the module: every way of making logits that the config hints at is held against the module's
    own on `ids` [1, T]."""
    with torch.no_grad():
        hidden, logits = _observe(module, ids)
        if hidden is None or logits.shape[:-1] != hidden.shape[:-1]:
            return None
        return next((output for output in _candidates(module) if _agrees(output, hidden, logits)), None)


def _observe(module: Any, ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """What reached the head, if it was called once and by itself, and what came out of the module."""
    output = Output(module)
    arguments = accepted(module, input_ids=ids)
    logits: Tensor = module(**arguments).logits
    try:
        with output.reading() as seen:
            module(**arguments)
    except Exception:  # the module's own code reads the logits: it says in its own ways that there are none
        return None, logits
    return (seen[0] if len(seen) == 1 else None), logits


def _candidates(module: Any) -> list[Output]:
    """The likeliest first: all that the config says."""
    config = module.config.get_text_config()

    def said(*names: str) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v]

    scales = [*said(*_FACTORS), *(1 / divisor for divisor in said(*_DIVISORS)), 1.0]
    return [Output(module, *pair) for pair in product(scales, [*said(*_CAPS), None])]


def _agrees(output: Output, hidden: Tensor, logits: Tensor) -> bool:
    head = output.head()
    if head.weight is None or head.weight.shape != (logits.shape[-1], hidden.shape[-1]):
        return False
    return difference(head.logits(hidden), logits) <= TOLERANCE[hidden.dtype]


def accepted(module: Any, **arguments: Any) -> dict[str, Any]:
    """The arguments that the module's forward has names for, with no cache."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in {**arguments, "use_cache": False}.items() if name in names}


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other| of the row [.., H] where it is largest."""
    distance = (one.float() - other.float()).norm(dim=-1)
    return float((distance / other.float().norm(dim=-1).clamp(min=1e-12)).max())
