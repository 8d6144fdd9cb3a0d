"""Names to objects, resolved only when asked for.

A registry maps a name to `"module:attribute"`, so that listing names imports nothing. Packages add entries
through the entry-point group `luthier.<kind>`; a dotted `module:attribute` works wherever a name does.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count and what is counted: `1 block`, `2 blocks`, `2 processes`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def nearest(name: str, names: list[str]) -> str:
    """A sentence part that offers the nearest names, or lists all of them: `did you mean 'rouge1'?`."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known names: " + ", ".join(sorted(names))


def nearest_path(path: Path, *others: str, root: Path | None = None) -> str:
    """A sentence part for a file that cannot be read: the one beside it that has nearly its name, or where no folder is
    named one of `others`; empty where there is none. `path` counts from `root`, and so does what is offered."""
    there = (root or Path()) / path
    if there.is_dir():
        return "it is a folder: name a file in it"
    if there.exists():
        return "it is there: give access to it"
    files = [each.name for each in there.parent.glob("*") if each.is_file()]
    offered = {name.removesuffix(path.suffix): str(path.parent / name) for name in files if name.endswith(path.suffix)}
    offered |= {name: name for name in others if path.parent == Path()}
    close = difflib.get_close_matches(path.stem, offered, n=1, cutoff=0.7)
    close = close or [name for name in offered if name in others and name.startswith(path.stem)]
    if close:
        return f"did you mean '{offered[close[0]]}'?"
    close = difflib.get_close_matches(path.name, files, n=1, cutoff=0.85)  # the end of the name is mistaken
    return f"did you mean '{path.parent / close[0]}'?" if close else ""


class Registry:
    """A named table of lazily imported objects. Names are unique: a second registration raises ValueError."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def add(self, name: str, target: str) -> None:
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is already registered as {self._entries[name]}")
        self._entries[name] = target

    def names(self) -> list[str]:
        return sorted({*self._entries, *self._plugins()})

    def get(self, name: str) -> Any:
        """The object called `name`, or at `module:attribute`. Raises RecipeError with the nearest names."""
        target = self._entries.get(name) or self._plugins().get(name) or (name if ":" in name else None)
        if target is None:
            raise RecipeError(f"unknown {self.kind} '{name}'", fix=nearest(name, self.names()))
        module, _, attribute = target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"{self.kind} '{name}' cannot be loaded from {target} ({error})") from error

    def _plugins(self) -> dict[str, str]:
        return {e.name: e.value for e in entry_points(group=f"luthier.{self.kind}")}
