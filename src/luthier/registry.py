"""Names to objects, resolved only when asked for.

A registry maps a name to `"module:attribute"`, so that listing names imports nothing. Packages add entries
through the entry-point group `luthier.<kind>`; a dotted `module:attribute` works wherever a name does.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from luthier.errors import RecipeError


def nearest(name: str, names: list[str]) -> str:
    """A sentence part that offers the nearest names, or lists all of them: `did you mean 'rouge1'?`."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known names: " + ", ".join(sorted(names))


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
