"""Modules of others that are imported when they are used.

Nothing of ours is compiled. But transformers and torch mark functions for torch's compiler, and import it for that; and
where torch works on the meta device, it asks whether a size is a symbol of SymPy. In a process of our own others stand
for those modules: they take the marks, and answer for numbers that are numbers. Asked for anything else, they make way.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from functools import partial, reduce, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

_COMPILER, _SYMBOLS = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
_SYMPY, _FUNCTIONS = "sympy", "torch.utils._sympy.functions"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"  # has a mode for `vmap` that others import by name
_PACKAGES = (_COMPILER, _SYMPY)
_META = "torch._prims_common"  # asks them on the meta device

Tell = Callable[[Any], Any]


def defer() -> None:
    """Has them imported when they are used for the first time; those that are imported already stay as they are."""
    marks: list[tuple[str, Any]] = []
    if not any(isinstance(finder, _Modules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Modules())
    _stand(_SYMPY, {}, to_meta={"Basic": type("Basic", (), {})})  # of which nothing is an instance
    _stand(_FUNCTIONS, {}, to_meta={"Max": None})  # which it imports and does not use
    _stand(_SYMBOLS, {name: _plainly(name, answer) for name, answer in ANSWERS.items()})
    _stand(_COMPILER, _marking(marks), lambda compiler: [getattr(compiler, mark)(it) for mark, it in marks])
    _stand(_INDEXING, {"TransformGetItemToIndex": lambda: _real(_INDEXING).TransformGetItemToIndex()})


def _stand(name: str, answers: dict[str, Any], told: Tell = lambda real: None, **more: dict[str, Any]) -> None:
    if name not in sys.modules:
        sys.modules[name] = standing = _Standing(name, answers, told, **more)
        package, _, own = name.rpartition(".")
        if package in sys.modules:
            setattr(sys.modules[package], own, standing)


class _Standing(ModuleType):
    """Has `answers`; asked for anything else, it makes way for the real module, to which `told` tells what it was. What
    stands for a class has to be kept from all who would use it: only torch's module for the meta device gets that."""

    def __init__(self, name: str, answers: dict[str, Any], told: Tell, to_meta: dict[str, Any] | None = None) -> None:
        super().__init__(name, __doc__)
        if name in _PACKAGES:
            self.__path__: list[str] = []  # so that its modules are looked for
        self._answers, self._told, self._to_meta = answers, told, to_meta or {}
        self.__dict__.update(answers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system, and `inspect`, ask of any module
            raise AttributeError(name)
        if name in self._to_meta and sys._getframe(1).f_globals.get("__name__") == _META:
            return self._to_meta[name]
        return getattr(_real(self.__name__), name)

    def make_way(self) -> None:
        del sys.modules[self.__name__]
        for name in self._answers:  # some may still hold this one
            del self.__dict__[name]
        self._to_meta = {}
        self._told(import_module(self.__name__))


def _real(name: str) -> Any:
    standing = sys.modules.get(name)
    if isinstance(standing, _Standing):
        standing.make_way()
    return import_module(name)


class _Modules:
    """Finds modules of a package for which another stands."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, _Standing):
            return None
        path = _real(package.__name__).__path__
        if name in sys.modules:  # the real one has imported it by now
            return spec_from_loader(name, _Imported(sys.modules[name]))  # type: ignore[arg-type]
        return PathFinder.find_spec(name, path, target)


class _Imported:
    """A loader of what is imported already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _marking(marks: list[tuple[str, Any]]) -> dict[str, Any]:
    """What marks functions for the compiler: noted for when there is one."""

    def mark(name: str, function: Any) -> Any:
        marks.append((name, function))
        return function

    return {
        "allow_in_graph": partial(mark, "allow_in_graph"),
        "assume_constant_result": partial(mark, "assume_constant_result"),
        "disable": _disable,
        "graph_break": lambda msg="": None,  # means nothing outside of what is compiled
    }


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """A function that is never compiled: as it is, until there is something that could."""
    if fn is None:
        return partial(_disable, recursive=recursive, **options)
    if isinstance(fn, type) or not hasattr(fn, "__name__"):
        return _real(_COMPILER).disable(fn, recursive, **options)
    disabled: list[Any] = []

    @wraps(fn)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        disable = getattr(sys.modules.get(_COMPILER), "disable", _disable)
        if disable is _disable:  # there is no compiler, or it is just being imported
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(disable(fn, recursive, **options))
        return disabled[0](*args, **kwargs)

    return uncompiled


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, int):
        return bool(x == y)
    return len(x) == len(y) and all(map(_equal, x, y))


# What torch asks of sizes, and of what it found when comparing them.
ANSWERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), lambda x: x),
    **dict.fromkeys(("statically_known_true", "guarding_hint_or_throw", "size_hint"), lambda x: x),
    **dict.fromkeys(("has_guarding_hint", "has_hint"), lambda x: True),
    "is_nested_int": lambda x: False,
    "sym_and": lambda *all_of: reduce(operator.and_, all_of),
    "sym_or": lambda *any_of: reduce(operator.or_, any_of),
    "sym_eq": _equal,
}


def _plainly(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` where all that is asked about is plain, else what the real module says."""

    def asked(*args: Any, **options: Any) -> Any:
        if not options and all(map(_plain, args)):
            return answer(*args)
        return getattr(_real(_SYMBOLS), name)(*args, **options)

    return asked


def _plain(x: Any) -> bool:
    return type(x) in (bool, int) or (isinstance(x, tuple | list) and all(map(_plain, x)))
