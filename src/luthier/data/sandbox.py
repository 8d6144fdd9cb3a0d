"""Chat templates come with models, so they are strangers' programs: Jinja in its immutable sandbox, with the names that
transformers offers them, and with limits on work and on size, which the sandbox does not set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from functools import wraps
from itertools import islice
from math import prod
from typing import Any, TypeVar

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from luthier.errors import TemplateError

WORK = 1_000_000
"""Loop rounds and calls of one rendering."""
SIZE = 16_000_000
"""Characters of one rendering, and of any text it makes on the way."""
_HOSTILE = "it may be hostile: choose another data.template"
_GROWS = ("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "format", "wordwrap")


T = TypeVar("T")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles a chat template. `date` is what it is told the day is, so that a run renders the same tomorrow."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, date: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControls])
        self.work = 0
        self.filters |= {name: _guarded(self, self.filters[name]) for name in _GROWS if name in self.filters}
        self.filters |= {"tojson": tojson, "_counted": _counted, "_bounded": _bounded}
        self.globals |= {"raise_exception": _raise, "strftime_now": date.strftime}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def load(self, source: str) -> Callable[..., str]:
        """A function of the template's variables. It raises TemplateError for whatever goes wrong inside."""
        try:
            template = self.from_string(_limited(self.parse(source)))
        except JinjaError as error:
            raise TemplateError(
                f"the chat template is not valid Jinja ({error})", fix="choose data.template"
            ) from error

        def render(**variables: Any) -> str:
            self.work = 0
            try:
                return self.bounded("".join(template.generate(**variables)))
            except TemplateError:
                raise
            except RecursionError as error:
                raise TemplateError("the chat template calls itself without end") from error
            except Exception as error:  # a stranger's program may raise anything
                raise TemplateError(f"the chat template refuses: {error}") from error

        return render

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        if getattr(function, "__name__", "") in _GROWS:
            _check_growth(getattr(function, "__self__", ""), *args)
        return self.bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int):
            _check_growth(*[left] * min(right, 64))
        elif operator != "+":
            _check_growth(left, right)
        return self.bounded(super().call_binop(context, operator, left, right))

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > WORK:
            raise TemplateError(f"the chat template takes more than {WORK:,} steps", fix=_HOSTILE)

    def bounded(self, value: T) -> T:
        if isinstance(value, str) and len(value) > SIZE:
            raise TemplateError(f"the chat template writes more than {SIZE:,} characters", fix=_HOSTILE)
        return value


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, the mark some templates put around answers. Answers are found by
    structure here, so that it is read and otherwise ignored."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without underscored names, which lead to CPython's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that `namespace(self=…)` works
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r}")


def _raise(message: str) -> None:
    raise JinjaError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it. Lone surrogates stay what they are even with `ensure_ascii`: they stand
    in for other characters (`templates.Guard`)."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _LONE.sub(lambda match: chr(int(match[1], 16)), text) if ensure_ascii else text


# An escaped low surrogate that no high one precedes; the second half of a pair is not lone.
_LONE = re.compile(r"(?<!\\ud[89ab][0-9a-f]{2})\\u(dc[0-9a-f]{2})")


def _limited(tree: nodes.Template) -> nodes.Template:
    """The same program, with its loops counted and its concatenations bounded."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
    for node in list(tree.find_all((nodes.Output, nodes.Expr, nodes.Stmt))):
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, _bound(value))
            elif isinstance(value, list):
                value[:] = [_bound(item) if isinstance(item, nodes.Concat) else item for item in value]
    return tree


def _bound(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(node, "_bounded", [], [], None, None, lineno=node.lineno)


@pass_environment
def _counted(sandbox: Sandbox, items: Iterable[Any]) -> Iterable[Any]:
    """`items`, paid for before the loop over them begins."""
    sized = items if isinstance(items, Sized) else list(islice(items, WORK + 1))
    sandbox.spend(len(sized))
    return sized


@pass_environment
def _bounded(sandbox: Sandbox, value: Any) -> Any:
    return sandbox.bounded(value)


def _guarded(sandbox: Sandbox, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that may make a text much larger than what it is given, with its result estimated first."""

    @wraps(function)  # keeps the marks by which Jinja passes it the environment
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_growth(*(a for a in (*args, *kwargs.values()) if not isinstance(a, Sandbox)))
        return sandbox.bounded(function(*args, **kwargs))

    return filtered


def _check_growth(*operands: Any) -> None:
    """Refuses an operation on texts, lists and numbers that could make something huge."""
    if prod(map(_weight, operands)) > 10 * SIZE or any(isinstance(o, str) and _WIDE.search(o) for o in operands[:1]):
        raise TemplateError("the chat template makes a huge text", fix=_HOSTILE)


_WIDE = re.compile(r"[%{][^%{}]{0,8}?\d{6}")  # `%1000000d` and `{:1000000}`


def _weight(operand: Any) -> int:
    if isinstance(operand, int):
        return abs(operand) + 1
    return len(operand) + 1 if isinstance(operand, str | list | tuple | dict) else 1
