"""What methods share: tensors copied in by name, and weights of the model itself that are trained in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from luthier.errors import AdapterError


def copy_in(mine: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copies `state` into the tensors of `mine`.

    Raises AdapterError, and changes nothing, unless names and shapes are the same.
    """
    if odd := sorted(mine.keys() ^ state.keys()):
        which = "lacks" if odd[0] in mine else "has a tensor that this model or its settings lack:"
        raise AdapterError(
            f"the adapter {which} {odd[0]} ({len(odd)} such)", fix="use the base model it was trained on"
        )
    for name, tensor in state.items():
        if tensor.shape != mine[name].shape:
            shapes = f"{list(tensor.shape)} where the model needs {list(mine[name].shape)}"
            raise AdapterError(f"{name} has shape {shapes}", fix="use the base model and settings it was trained with")
    with torch.no_grad():
        for name, tensor in state.items():
            mine[name].copy_(tensor)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def master(weight: nn.Parameter, places: list[tuple[nn.Module, str]]) -> nn.Parameter:
    """`weight` in float32, to be trained. Its modules, each at (module, attribute), see it in the dtype it has now."""
    # A copy: `weight` may be tied to a place that is not among these, and stays as it is there.
    trained = nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=True)
    for holder, attribute in places:
        setattr(holder, attribute, trained)
        if weight.dtype != torch.float32:
            register_parametrization(holder, attribute, _Cast(weight.dtype), unsafe=True)
    return trained


def places(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Of each parameter by its first name, all (module, attribute) that hold it: several if weights are tied."""
    found: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for prefix, holder in module.named_modules():
        for attribute, weight in holder._parameters.items():
            if weight is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(weight), (name, []))[1].append((holder, attribute))
    return dict(found.values())


class Masters:
    """Weights of the model that are trained themselves, in float32, by name.

    What they were is kept on the host in the model's dtype (2 bytes a value in bfloat16), so that the base model can
    be had back.
    """

    def __init__(self, weights: dict[str, list[tuple[nn.Module, str]]]) -> None:
        """`weights`: by name, the places of one tensor, as `places` gives them."""
        self.parameters: dict[str, nn.Parameter] = {}
        self._originals: dict[str, Tensor] = {}
        for name, where in weights.items():
            holder, attribute = where[0]
            weight = holder._parameters[attribute]
            assert weight is not None
            self._originals[name] = weight.detach().to("meta" if weight.is_meta else "cpu", copy=True)
            self.parameters[name] = master(weight, where)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, they are what they were before training. Meanwhile the trained values lie on the host."""
        trained = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        try:
            self._copy(self._originals)
            yield
        finally:
            self._copy(trained)

    def _copy(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
