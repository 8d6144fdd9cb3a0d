"""Checks of a generated text: JSON against a reference, a pattern, a function of the user's, a judge's preference."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from luthier import recipe
from luthier.data.conversation import Conversation
from luthier.errors import RecipeError, UsageError
from luthier.evaluate.metrics.metric import Answer, Metric, Statistics, points


def parsed(text: str, *, fenced: bool = True) -> tuple[Any] | None:
    """The JSON value that a text is, in a tuple; None if it is none. With `fenced` a text around one code fence is
    passed over. What JSON does not have (NaN, Infinity) is not taken."""
    fences = _FENCE.findall(text) if fenced else []
    try:
        return (json.loads(fences[0] if len(fences) == 1 else text, parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def json_valid(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the answer is JSON, be it in a code fence with words around it."""
    return points([100.0 * (parsed(answer.text or "") is not None)])


def json_strict(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the answer is JSON as it stands; the difference to `json_valid` is fences."""
    return points([100.0 * (parsed(answer.text or "", fenced=False) is not None)])


def json_fields(question: Conversation, answer: Answer, only: Sequence[str] = ()) -> list[Statistics]:
    """Of the fields that the reference or the answer has, those with the same value in both: a missing field and an
    invented one are both wrong. Fields count equally, over all questions. With `only`, fields at or below these
    paths."""
    references = [known[0] for reference in question.references if (known := parsed(reference)) is not None]
    said = parsed(answer.text or "")
    mine = {} if said is None else _fields(said[0], only)
    scored = (_same(_fields(reference, only), mine) for reference in references)
    return [(100.0 * right, float(count)) for right, count in scored if count]


def _fields(value: Any, only: Sequence[str]) -> dict[str, Any]:
    return {path: leaf for path, leaf in _leaves(value) if not only or any(_below(path, top) for top in only)}


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of all that holds nothing else: `customer.name`, `items.0.price`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield path, value
    for key, part in inner:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def _same(wanted: dict[str, Any], said: dict[str, Any]) -> tuple[int, int]:
    """How many fields agree, and how many either has."""
    return sum(path in said and _equal(value, said[path]) for path, value in wanted.items()), len({*wanted, *said})


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)  # Python takes true for 1


def json_metric(options: recipe.JsonFields) -> Metric:
    name = options.name or "json"
    return Metric(name, name, partial(json_fields, only=options.fields), lacks=_NO_JSON)


def regex_metric(options: recipe.Pattern) -> Metric:
    """100 where the pattern is found in the answer, else 0; no reference is needed."""
    pattern, name = re.compile(options.pattern), options.name or "regex"

    def score(question: Conversation, answer: Answer) -> list[Statistics]:
        return points([100.0 * (pattern.search(answer.text or "") is not None)])

    return Metric(name, name, score)


def python_metric(options: recipe.Check) -> Metric:
    """What a function of the user's says of (answer, question): True or False, a share from 0 to 1, or None where it
    cannot tell."""
    check, name = _imported(options.function), options.name or options.function.partition(":")[2]

    def score(question: Conversation, answer: Answer) -> list[Statistics]:
        said = _called(options.function, check, question, answer)
        return [] if said is None else points([100.0 * said])

    return Metric(name, name, score, lacks=f"{options.function} gave None for every question")


def _imported(path: str) -> Callable[[str, Conversation], Any]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises while it is imported
        fix = "install its module, or name its folder: PYTHONPATH=folder luthier …"
        raise RecipeError(f"{path} cannot be loaded ({error})", where="evaluate.metrics", fix=fix) from error
    if not callable(found):
        raise RecipeError(f"{path} is no function", where="evaluate.metrics", fix="name one: module:function")
    return found  # type: ignore[no-any-return]


def _called(path: str, check: Callable[[str, Conversation], Any], question: Conversation, answer: Answer) -> Any:
    where, fix = f"evaluate.metrics, {path}, on {question.origin}", "return True, False, 0 to 1, or None"
    try:
        said = check(answer.text or "", question)
    except Exception as error:
        raise RecipeError(f"it raised {type(error).__name__}: {error}", where=where, fix="mend the function") from error
    if said is not None and not (isinstance(said, bool | int | float) and 0 <= said <= 1):
        raise RecipeError(f"it returned {said!r}", where=where, fix=fix)
    return said


def judge_metric(options: recipe.Judge) -> Metric:
    """Points against the base side's answer, as a judge model gave them (`evaluate/judge.py`): 100 won, 50 tied, 0
    lost. The base side has 50 by definition. Raises UsageError where the variable of its key is not set."""
    if options.key_env and not os.environ.get(options.key_env):
        what = f"the judge's key is not there: the variable {options.key_env} is not set"
        raise UsageError(what, where="evaluate.metrics", fix=f"export {options.key_env}=… in this terminal")
    name = options.name or "judge"

    def score(question: Conversation, answer: Answer) -> list[Statistics]:
        known = answer.preferences or {}
        return points([known[name]] if name in known else [])

    return Metric(name, f"{name} (preference)", score, needs="preferences", lacks="the judge gave no usable reply")


_NO_JSON = "no question has a reference answer that is JSON; name another metric, such as json_valid"
JSON_VALID = Metric("json_valid", "valid JSON", json_valid)
JSON_STRICT = Metric("json_strict", "bare JSON", json_strict)
JSON_FIELDS = Metric("json_fields", "JSON fields", json_fields, lacks=_NO_JSON)
