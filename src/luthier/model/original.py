"""The weights that a quantised model was made from, read again from its folder one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def original(folder: Path) -> Callable[[str], Tensor | None]:
    """The name of a linear layer to its weight [out, in] in the folder's .safetensors files, None where they have none
    that is floating-point. A name may lack its first part: some files leave out the prefix of the base model."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def find(name: str) -> Tensor | None:
        for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
            if key in places:
                with safe_open(places[key], "pt") as file:
                    weight: Tensor = file.get_tensor(key)
                return weight if weight.is_floating_point() else None
        return None

    return find
