"""The blocks of a decoder, found by shape rather than by family."""

from __future__ import annotations

from torch import nn

from luthier.errors import AdapterError


def blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of a decoder's blocks: the list of modules that holds most parameters.

    Raises AdapterError for a model that has none.
    """
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise AdapterError("the model has no list of blocks", where="adapter", fix="train a LoRA instead")
    # The outermost of equals comes first: a block may hold a list of experts.
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
