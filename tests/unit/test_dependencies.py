"""What luthier imports is what it asks for, and each of it has a line in docs/design/dependencies.md."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRACKERS = {"mlflow", "trackio", "wandb"}  # imported by name if the person has them


def name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"luthier"}


def asked(*without: str) -> set[str]:
    """Names of what luthier requires, and of its extras but for those `without`."""
    extras = (one for extra, of in PROJECT["optional-dependencies"].items() if extra not in without for one in of)
    return {name(one) for one in (*PROJECT["dependencies"], *extras)}


def test_every_import_is_of_a_package_that_is_asked_for() -> None:
    known = packages_distributions()
    for path in (ROOT / "src" / "luthier").rglob("*.py"):
        for module in imported(path) - TRACKERS:
            packages = {name(each) for each in known.get(module, [module])}
            assert packages & asked("bench"), f"{path} imports {module}, and pyproject.toml names none of {packages}"


def test_each_dependency_has_its_line_in_the_design() -> None:
    page = re.sub(r"[-_.]+", "-", (ROOT / "docs" / "design" / "dependencies.md").read_text().lower())
    assert [one for one in sorted(asked("dev", "bench")) if one not in page] == []
