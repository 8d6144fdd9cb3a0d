"""Which layers a name, a list, `all-linear` or a regular expression means: what it means to PEFT, so that our files do
too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from luthier.errors import AdapterError
from luthier.registry import nearest

Value = TypeVar("Value")


def select(names: list[str], targets: str | list[str]) -> list[str]:
    """Those of the dotted `names` that `targets` means, in their order.

    A name in a list stands for layers whose whole dotted name or last parts it is; a string other than `all-linear` is
    a regular expression that matches a whole dotted name. Raises AdapterError for one that matches nothing.
    """
    if not targets:
        fix = "write all-linear, or a list of layers such as [q_proj, v_proj]"
        raise AdapterError("names no layer", where="adapter.targets", fix=fix)
    if targets == "all-linear":
        found = names
    elif isinstance(targets, str):
        pattern = _compiled(targets, "adapter.targets")
        found = [name for name in names if pattern.fullmatch(name)]
        if not found and any(_is(targets, name) for name in names):
            what = f"'{targets}' is no whole dotted name, and a string is a regular expression"
            raise AdapterError(what, where="adapter.targets", fix=f"write a list: [{targets}]")
    else:
        for target in targets:
            if not any(_is(target, name) for name in names):
                raise _unknown(target, names, "adapter.targets")
        found = [name for name in names if any(_is(target, name) for target in targets)]
    if not found:
        raise _unknown(str(targets), names, "adapter.targets")
    return found


def shortest(chosen: list[str], others: Iterable[str]) -> list[str]:
    """The shortest list of names that means `chosen` and none of `others`: last parts if that is enough."""
    last = sorted({_last(name) for name in chosen})
    return chosen if any(_is(target, name) for target in last for name in others) else last


def value(patterns: dict[str, Value], name: str, default: Value) -> Value:
    """The value of the first key of PEFT's `rank_pattern` or `alpha_pattern` that is the layer's name, its last parts,
    or a regular expression of them."""
    return next((value for key, value in patterns.items() if _ends(key, "").match(name)), default)


def check_patterns(patterns: Iterable[str], names: list[str], where: str) -> None:
    """Raises AdapterError for a key that no layer's name matches."""
    for key in patterns:
        pattern = _ends(key, where)
        if not any(pattern.match(name) for name in names):
            raise _unknown(key, names, where)


def _ends(key: str, where: str) -> re.Pattern[str]:
    return _compiled(rf"(.*\.)?({key})$", where)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"'{pattern}' is not a regular expression ({error})", where=where) from error


def _unknown(target: str, names: list[str], where: str) -> AdapterError:
    known = sorted({_last(name) for name in names})
    hint = nearest(target, known)
    hint = hint if hint.startswith("known") else f"{hint} the model has {', '.join(known)}"
    return AdapterError(f"no linear layer is called '{target}'", where=where, fix=hint)


def _is(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
