"""transformers, imported in less time.

It imports what it finds installed of other packages, for models of images and for some ways of generating: SciPy,
torchvision, scikit-learn and with it pandas and pyarrow. They take as long as the rest of it, and we ask for none of
that.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _is_ours() -> bool:
    main = sys.modules["__main__"]
    name: str = main.__spec__.name if main.__spec__ else Path(getattr(main, "__file__", None) or "").name
    return name.partition(".")[0] == "luthier"


own_process = _is_ours()
"""Whether this is the command, or a process that it started: in others' transformers is left as they may want it."""

_BESIDE = ("scipy", "sklearn", "torchvision")


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules of transformers are to be imported: those beside it are left out in a process of our own, and no
    garbage is looked for, since what an import makes stays."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if own_process:
            _leave_out()
        yield
        if own_process:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _leave_out() -> None:
    """Has transformers ask for the packages beside it while they cannot be imported: it asks once."""
    hidden = [name for name in _BESIDE if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stands for a module that is not there
    try:
        from transformers.utils import import_utils

        import_utils.is_scipy_available()
        import_utils.is_sklearn_available()
        import_utils.is_torchvision_available()
    finally:
        for name in hidden:
            del sys.modules[name]
