"""Personal data in running text, found by kind and replaced by typed placeholders such as [EMAIL]."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from luthier.registry import Registry

Span = tuple[int, int]
Names = Callable[[str], Sequence[Span]]

_EMAIL = re.compile(r"(?<![\w.+-])[\w.%+'-]+@(?:[\w-]+\.)+[^\W\d_]{2,}")
_URL = re.compile(r"(?:https?|ftp)://[^\s<>\"]+|\bwww\.[^\s<>\"]+")

RECOGNISERS = Registry("name recogniser", {})


def emails(text: str) -> Iterator[Span]:
    return (m.span() for m in _EMAIL.finditer(text)) if "@" in text else iter(())


def urls(text: str) -> Iterator[Span]:
    return (m.span() for m in _URL.finditer(text))


_FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {"url": urls, "email": emails}


class Redactor:
    """Replaces personal data of the given kinds, and names if a recogniser (`module:attribute`) is given."""

    def __init__(self, kinds: Sequence[str], names: str | None = None) -> None:
        self._kinds = [kind for kind in _FINDERS if kind in kinds]
        self._names: Names | None = RECOGNISERS.get(names) if names else None

    def __call__(self, text: str, counts: Counter[str]) -> str:
        spans = [(start, end, kind) for kind in self._kinds for start, end in _FINDERS[kind](text)]
        if self._names:
            spans += [(start, end, "name") for start, end in self._names(text)]
        return _replaced(text, spans, counts)


def _replaced(text: str, spans: list[tuple[int, int, str]], counts: Counter[str]) -> str:
    parts, at = [], 0
    for start, end, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= at:
            parts += [text[at:start], f"[{kind.upper()}]"]
            counts[kind] += 1
            at = end
    return "".join([*parts, text[at:]]) if parts else text
