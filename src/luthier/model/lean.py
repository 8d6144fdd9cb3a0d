"""transformers, imported in less time.

It imports what it finds installed of other packages, for models of images, for some ways of generating and for models
that are spread over GPUs: SciPy, torchvision, scikit-learn and with it pandas and pyarrow, torch's distributed tensors.
They take as long as the rest of it, and we ask for none of that. Nor do we compile (see `later.py`).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.model import later


def _is_ours() -> bool:
    main = sys.modules["__main__"]
    name: str = main.__spec__.name if main.__spec__ else Path(getattr(main, "__file__", None) or "").name
    return name.partition(".")[0] == "luthier"


own_process = _is_ours()
"""Whether this is the command, or a process that it started: in others' transformers is left as they may want it."""

_BESIDE = ("scipy", "sklearn", "torchvision")
_NAMES = "transformers.utils.import_utils"


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules of transformers are to be imported: those beside it are left out in a process of our own, and no
    garbage is looked for, since what an import makes stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if own_process:
            later.defer()
            _leave_out()
        yield
        if own_process:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _leave_out() -> None:
    """Has transformers ask for what is beside it while that cannot be imported: it asks once."""
    from torch import distributed

    hidden = [name for name in _BESIDE if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stands for a module that is not there
    there = distributed.is_available
    try:
        with _naming_quickly():
            from transformers.utils import import_utils

        import_utils.is_scipy_available()
        import_utils.is_sklearn_available()
        import_utils.is_torchvision_available()
        distributed.is_available = lambda: False
        import_utils.is_torch_distributed_available()
    finally:
        distributed.is_available = there
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _naming_quickly() -> Iterator[None]:
    """Inside, transformers finds sooner what its modules offer, for which it reads some two thousand files, twice."""
    sys.meta_path.insert(0, _Quickened)
    try:
        yield
    finally:
        sys.meta_path.remove(_Quickened)


class _Quickened:
    """Finds the module that reads those files, and has it keep what it read, and read less of it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _NAMES else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def quickened(module: ModuleType) -> None:
            load(module)
            quicken(module)

        spec.loader.exec_module = quickened  # type: ignore[method-assign]
        return spec


def quicken(names: Any) -> None:
    """Changes transformers' `import_utils` so that it does the same in less time: it keeps what it found in 128 of 549
    folders, so in none of them when it looks for the second time, and goes through all lines of a file for the last one
    that begins with `__all__`. A version that does otherwise is left as it is."""
    read: Any = getattr(names, "create_import_structure_from_path", None)
    listed: Any = getattr(names, "fetch__all__", None)
    if hasattr(read, "__wrapped__") and listed is not None:
        names.create_import_structure_from_path = cache(read.__wrapped__)
        names.fetch__all__ = lambda text: listed(text[text.rfind("\n__all__") + 1 :])
