"""The layers of docs/design: each imports only those to its left."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "luthier"
LAYERS = [
    {"errors", "registry", "strict", "machine", "allocator", "recipe"},
    {"data"},
    {"kernels"},
    {"adapters"},
    {"model"},
    {"runs"},
    {"plan"},
    {"train"},
    {"evaluate"},
    {"serve"},
    {"ui", "export"},
    {"api", "demos", "doctor", "scaffold"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py" or p.parent != SOURCE)
FORBIDDEN = {
    "data": {"torch", "transformers"},
    "kernels": {"transformers"},
    "recipe": {"torch", "transformers", "numpy"},
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, at any depth; those only for type checkers are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return found


def layer(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_the_scan_sees_the_package() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_imports_only_layers_to_its_left(path: Path) -> None:
    mine = RANK[layer(path)]
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "luthier" and len(parts) > 1:
            assert RANK[parts[1]] <= mine, f"{path}:{line}: {layer(path)} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_keeps_heavy_libraries_where_they_belong(path: Path) -> None:
    banned = set() if path.name == "stream.py" else FORBIDDEN.get(layer(path), set())
    for line, module in imports(path):
        assert module.split(".")[0] not in banned, f"{path}:{line}: {layer(path)} must not import {module}"
        if module.split(".")[0] == "transformers":
            assert layer(path) == "model", f"{path}:{line}: transformers is imported in model/ only"
