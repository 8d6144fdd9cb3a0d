"""The public names are those that are listed, and no others."""

import ast
import subprocess
import sys
from pathlib import Path

import luthier


def test_every_public_name_resolves() -> None:
    assert [name for name in luthier.__all__ if getattr(luthier, name, None) is None] == []


def test_nothing_else_is_public() -> None:
    script = "import luthier, json; print(json.dumps([dir(luthier), sorted(luthier._HOMES)]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    shown, lazy = ast.literal_eval(done.stdout)
    assert shown == sorted(luthier.__all__)
    assert {*lazy, "__version__"} == set(luthier.__all__)
    defined = vars(luthier).keys() - {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    public = {name for name in defined if not name.startswith("_") and not _is_module(name)}
    assert public <= set(luthier.__all__)


def _is_module(name: str) -> bool:
    return f"luthier.{name}" in sys.modules


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(luthier, "fine_tune")


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (Path(luthier.__file__).parent / "py.typed").is_file()
