"""Fine-tune an open language model on your own data, on the hardware you have, and know whether it got better."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing's own costs milliseconds in which a Ctrl-C is not yet ours to answer

__version__ = "0.1.0"

# Public names, imported when first used (PEP 562), so that `import luthier` stays light.
_HOMES = {
    "LuthierError": "luthier.errors",
    "Recipe": "luthier.recipe",
    "Run": "luthier.runs",
    "compare": "luthier.api",
    "fit": "luthier.api",
    "prepare": "luthier.api",
    "start": "luthier.api",
    "study": "luthier.api",
}
__all__ = ["LuthierError", "Recipe", "Run", "__version__", "compare", "fit", "prepare", "start", "study"]

if TYPE_CHECKING:
    from typing import Any

    from luthier.api import compare, fit, prepare, start, study
    from luthier.errors import LuthierError
    from luthier.recipe import Recipe
    from luthier.runs import Run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
