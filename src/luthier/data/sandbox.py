"""Chat templates come with models, so they are strangers' programs: Jinja in its immutable sandbox, with the names that
transformers offers them, and with limits on work and on size, which the sandbox does not set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from functools import wraps
from inspect import unwrap
from itertools import islice
from math import prod
from typing import Any, TypeVar, cast

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from luthier.errors import TemplateError

WORK = 1_000_000
"""Loop rounds and calls of one rendering."""
SIZE = 16_000_000
"""Characters of one rendering, and of any text it makes on the way."""
_OTHER = "choose another data.template"
_LOOP = ("first", "last", "index", "index0", "length", "previtem", "nextitem")
_GROWS = ("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "format", "wordwrap")


T = TypeVar("T")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles a chat template. `day` is what it is told the day is, so that a run renders the same tomorrow.

    Sums of texts are checked where they are kept or passed on, which is where they could grow without end; what
    multiplies texts is checked before it is done.
    """

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, day: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControls])
        self.work = 0
        self.filters |= {name: _guarded(self.filters[name]) for name in _GROWS if name in self.filters}
        self.filters |= {"tojson": tojson, "_counted": _counted, "_bounded": _bounded}
        self.globals |= {"raise_exception": _raise, "strftime_now": day.strftime}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]  # as much filler text as is asked for, slowly

    def program(self, source: str) -> Callable[..., str]:
        """A function of the template's variables. It raises TemplateError for whatever goes wrong inside."""
        try:
            template = self.from_string(_limited(self.parse(source)))
        except JinjaError as error:
            raise TemplateError(f"the chat template is not valid Jinja ({error})", fix=_OTHER) from error
        names = dict(template.globals)  # Jinja's own chain of dicts takes longer to read than a short template to run

        def render(**variables: Any) -> str:
            self.work = 0
            try:
                context = self.context_class(self, names | variables, template.name, template.blocks)
                return self.bounded("".join(template.root_render_func(context)))
            except TemplateError:
                raise
            except RecursionError as error:
                raise TemplateError("the chat template calls itself without end", fix=_OTHER) from error
            except Exception as error:  # a stranger's program may raise anything
                raise TemplateError(f"the chat template refuses: {error}") from error

        return render

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        for value in (*args, *kwargs.values()):
            self.bounded(value)
        if getattr(function, "__name__", "") in _GROWS:
            _check_growth(getattr(unwrap(function), "__self__", ""), *args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int):
            _check_growth(*[left] * min(right, 64))
        elif not isinstance(left, int) or not isinstance(right, int):
            _check_growth(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in _LOOP:  # what templates ask most often
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > WORK:
            raise TemplateError(f"the chat template takes more than {WORK:,} steps", fix=_OTHER)

    def bounded(self, value: T) -> T:
        if isinstance(value, str | list | tuple) and len(value) > SIZE:
            raise TemplateError(f"the chat template writes more than {SIZE:,} characters", fix=_OTHER)
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
    """The same program, with its loops counted and the values it keeps bounded."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filter(loop.iter, "_counted")
    for assignment in tree.find_all(nodes.Assign):
        assignment.node = _filter(assignment.node, "_bounded")
    for block in tree.find_all(nodes.AssignBlock):
        block.filter = _filter(block.filter, "_bounded")
    return tree


def _filter(node: nodes.Node | None, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr | None, node), name, [], [], None, None, lineno=node.lineno if node else 0)


@pass_environment
def _counted(sandbox: Sandbox, items: Iterable[Any]) -> Iterable[Any]:
    """`items`, paid for before the loop over them begins."""
    sized = items if isinstance(items, Sized) else list(islice(items, WORK + 1))
    sandbox.spend(len(sized))
    return sized


@pass_environment
def _bounded(sandbox: Sandbox, value: Any) -> Any:
    return sandbox.bounded(value)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that may make a text much larger than what it is given, refused if it would."""

    @wraps(function)  # keeps the marks by which Jinja passes it the environment
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_growth(*(a for a in (*args, *kwargs.values()) if not isinstance(a, Sandbox)))
        return function(*args, **kwargs)

    return filtered


def _check_growth(*operands: Any) -> None:
    """Refuses an operation on texts, lists and numbers that could make something huge."""
    if prod(map(_weight, operands)) > 10 * SIZE or any(isinstance(o, str) and _WIDE.search(o) for o in operands[:1]):
        raise TemplateError("the chat template makes a huge text", fix=_OTHER)


_WIDE = re.compile(r"[%{][^%{}]{0,8}?\d{6}")  # `%1000000d` and `{:1000000}`


def _weight(operand: Any) -> int:
    if isinstance(operand, int):
        return abs(operand) + 1
    return len(operand) + 1 if isinstance(operand, str | list | tuple | dict) else 1
