"""Rows of any known shape as conversations, found without configuration.

A format is a `Format` record: which columns it finds in a sample of rows, and how one row becomes a `Conversation`.
To add one, write such a record anywhere and register it: one line in FORMATS, or an entry point in the group
`luthier.format`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, cast

from luthier import recipe
from luthier.data.conversation import Conversation, Message, Row
from luthier.data.sources import kind
from luthier.errors import DataError
from luthier.registry import Registry, nearest

Columns = Mapping[str, str | list[str]]

FORMATS = Registry(
    "format",
    {
        "messages": "luthier.data.formats:MESSAGES",
        "sharegpt": "luthier.data.formats:SHAREGPT",
        "multiple-choice": "luthier.data.formats:MULTIPLE_CHOICE",
        "listed-choices": "luthier.data.formats:LISTED_CHOICES",
        "summary": "luthier.data.formats:SUMMARY",
        "alpaca": "luthier.data.formats:ALPACA",
        "prompt-completion": "luthier.data.formats:PROMPT_COMPLETION",
        "question-answer": "luthier.data.formats:QUESTION_ANSWER",
        "text": "luthier.data.formats:TEXT",
        "document": "luthier.data.formats:DOCUMENT",
        "rendered": "luthier.data.formats:RENDERED",
    },
)

# Tried tier by tier, since the columns of one can be part of another: multiple choice has a question and an answer, and
# Alpaca files often carry the rendered `text` as well. Two matches in one tier are ambiguous. `rendered` is opt-in.
_TIERS = (
    ("messages", "sharegpt", "multiple-choice", "listed-choices"),
    ("summary", "alpaca", "prompt-completion", "question-answer"),
    ("text", "document"),
)


@dataclass(frozen=True, slots=True)
class Detection:
    """What was found: the format, and the column or columns that play each of its parts."""

    format: str
    columns: dict[str, str | list[str]]

    def __str__(self) -> str:
        parts = (f"{p} = {c if isinstance(c, str) else ', '.join(c)}" for p, c in self.columns.items())
        return f"{self.format} ({'; '.join(parts)})"

    def fits(self, *, answers: bool = True) -> bool:
        """Whether these columns are enough for the format."""
        return _fits(FORMATS.get(self.format), self.columns, answers)


@dataclass(frozen=True, slots=True)
class Options:
    """What a format may need to know of the recipe. `answers`: whether a row without an answer is bad."""

    instruction: str | None = None
    labels: str = "letter"
    answers: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """One shape of rows.

    Attributes:
        needs: the parts that a row must have.
        answer: the part that rows may lack where only prompts are needed.
        may: parts a row can have.
        find: the columns that play the parts, in a sample of rows, or None where it is another shape.
        convert: a row as a conversation; raises DataError naming file, line and field.
    """

    needs: tuple[str, ...]
    find: Callable[[Sequence[Row]], dict[str, str | list[str]] | None]
    convert: Callable[[Row, Columns, Options], Conversation]
    answer: str | None = None
    may: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.needs + ((self.answer,) if self.answer else ()) + self.may


def detect(rows: Sequence[Row], *, answers: bool = True) -> Detection:
    """The format of a sample of rows. Without `answers`, rows that only hold prompts are recognised too.

    Raises DataError where no format fits, or more than one does; it lists the columns and the map that would do.
    """
    for tier in _TIERS:
        found = {name: columns for name in tier if (columns := _found(name, rows, answers))}
        if len(found) > 1:
            names = " or ".join(found)
            raise DataError(f"can be read as {names}", where=rows[0].origin.file, fix=f"set data.format to {names}")
        if found:
            return Detection(*found.popitem())
    raise _unknown(rows, answers)


def resolve(data: recipe.Data, rows: Sequence[Row], *, answers: bool = True) -> Detection:
    """The format and columns that the recipe names, completed by detection.

    Raises DataError for unknown parts or columns, and wherever `detect` does.
    """
    if data.columns == "auto":
        return detect(rows, answers=answers) if data.format == "auto" else _columns_of(data.format, rows, answers)
    columns = _present(data.columns, rows, answers)
    name = _format_of(columns, rows, answers) if data.format == "auto" else data.format
    return Detection(name, _mapped(name, columns, answers))


def converter(data: recipe.Data, detection: Detection, *, answers: bool = True) -> Callable[[Row], Conversation]:
    """The function that turns a row into a conversation. It raises DataError `file:line: field` for a bad row.

    Without `answers`, rows that end with a prompt are good ones.
    """
    options = Options(data.instruction, data.labels, answers)
    convert = cast(Format, FORMATS.get(detection.format)).convert
    return lambda row: convert(row, detection.columns, options)


def _found(name: str, rows: Sequence[Row], answers: bool) -> dict[str, str | list[str]] | None:
    format_: Format = FORMATS.get(name)
    columns = format_.find(rows)
    if columns is None or not all(part in columns for part in format_.needs):
        return None
    return None if answers and format_.answer and format_.answer not in columns else columns


def _columns_of(name: str, rows: Sequence[Row], answers: bool) -> Detection:
    """The columns of a format that the recipe names: as detected, else those called like its parts."""
    format_: Format = FORMATS.get(name)
    called = {part: column for part in format_.parts if (column := _named(rows, part))}
    columns = _found(name, rows, answers) or called
    if not _fits(format_, columns, answers):
        what = f"has no columns for format {name} (columns: {_names(rows)})"
        fix = f"set data.columns, e.g. {_example_map(format_)}"
        raise DataError(what, where=rows[0].origin.file, fix=fix)
    return Detection(name, dict(columns))


def _present(columns: Columns, rows: Sequence[Row], answers: bool) -> dict[str, str | list[str]]:
    """The columns that are there. Of a list one must be (files of one recipe may differ: `summary`, or `summary1` to
    `summary3`), and without `answers` the columns of a whole part may be missing if the others are there."""
    known = {name for row in rows for name in row.values}
    present: dict[str, str | list[str]] = {}
    for part, column in columns.items():
        names = [column] if isinstance(column, str) else column
        there = [name for name in names if name in known]
        if there:
            present[part] = column if isinstance(column, str) else there
        elif answers or not _is_answer(part):
            what = f"data.columns.{part} names a column '{names[0]}' that is not there"
            raise DataError(what, where=rows[0].origin.file, fix=nearest(names[0], sorted(known)))
    return present


def _is_answer(part: str) -> bool:
    return any(cast(Format, FORMATS.get(name)).answer == part for name in FORMATS.names())


def _format_of(columns: Columns, rows: Sequence[Row], answers: bool) -> str:
    """The format whose parts the map names; of several, the first that can read most of the rows."""
    fits = [name for tier in _TIERS for name in tier if _fits(FORMATS.get(name), columns, answers)]
    if not fits:
        known = "; ".join(f"{name}: {_example_map(FORMATS.get(name))}" for tier in _TIERS for name in tier)
        raise DataError(f"data.columns ({', '.join(columns)}) is not the parts of any format", fix=f"known: {known}")
    return next((name for name in fits if _reads(FORMATS.get(name), columns, rows)), fits[0])


def _reads(format_: Format, columns: Columns, rows: Sequence[Row]) -> bool:
    good = 0
    for row in rows:
        with suppress(DataError):
            format_.convert(row, columns, Options(answers=False))
            good += 1
    return good * 2 > len(rows)


def _fits(format_: Format, columns: Columns, answers: bool) -> bool:
    needed = set(format_.needs) | ({format_.answer} if answers and format_.answer else set())
    return needed <= set(columns) <= set(format_.parts)


def _mapped(name: str, columns: Columns, answers: bool) -> dict[str, str | list[str]]:
    format_: Format = FORMATS.get(name)
    for part in columns:
        if part not in format_.parts:
            fix = nearest(part, list(format_.parts))
            raise DataError(f"data.columns.{part}: format {name} has no such part", fix=fix)
    if not _fits(format_, columns, answers):
        missing = [p for p in format_.needs + ((format_.answer,) if format_.answer else ()) if p not in columns]
        raise DataError(
            f"data.columns lacks {', '.join(missing)} for format {name}", fix=f"e.g. {_example_map(format_)}"
        )
    return dict(columns)


def _unknown(rows: Sequence[Row], answers: bool) -> DataError:
    file = rows[0].origin.file
    for name in FORMATS.names() if answers else ():
        if name != "rendered" and _found(name, rows, answers=False):
            missing = cast(Format, FORMATS.get(name)).answer
            what = f"looks like {name}, but no column is the {missing} (columns: {_names(rows)})"
            return DataError(what, where=file, fix=f"set data.columns, with {missing}: COLUMN")
    if not any(row.values for row in rows):
        return DataError("has rows without columns", where=file, fix="check that this is the right file")
    what = f"has columns {_names(rows)}, which no known format has"
    return DataError(what, where=file, fix=f"say what they are, e.g. data.columns: {_guessed_map(rows)}")


def _guessed_map(rows: Sequence[Row]) -> str:
    """A column map that might do: the columns with the most text, in the file's order."""
    sizes = {n: sum(len(v) for r in rows if isinstance(v := r.values.get(n), str)) for n in rows[0].values}
    longest = sorted(sizes, key=lambda n: -sizes[n])[:2]
    parts = [n for n in sizes if n in longest and sizes[n]]
    return f"{{prompt: {parts[0]}, completion: {parts[1]}}}" if len(parts) == 2 else "{text: COLUMN}"


def _example_map(format_: Format) -> str:
    parts = format_.needs + ((format_.answer,) if format_.answer else ())
    return "{" + ", ".join(f"{p}: COLUMN" for p in parts) + "}"


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(name for row in rows for name in row.values))


# --- reading fields -----------------------------------------------------------------------------------------------


def _fault(row: Row, field: str, what: str, fix: str = "") -> DataError:
    return DataError(what, where=f"{row.origin}: {field}", fix=fix)


def _value(row: Row, column: str) -> Any:
    try:
        return row.values[column]
    except KeyError:
        fix = nearest(column, list(row.values)) if row.values else ""
        raise _fault(row, column, "is missing", fix) from None


def _string(row: Row, field: str, value: Any) -> str:
    """A text with more than white space in it."""
    if isinstance(value, str) and value and not value.isspace():
        return value
    found = "is empty" if isinstance(value, str) else f"is {kind(value)}, not text"
    raise _fault(row, field, found, "give the text, or remove the row")


def _text_of(row: Row, column: str) -> str:
    return _string(row, column, _value(row, column))


def _optional_text(row: Row, column: str | None) -> str | None:
    value = row.values.get(column) if column else None
    return None if value is None or value == "" else _string(row, column or "", value)


def _one(columns: Columns, part: str) -> str:
    """The column of a part that has exactly one."""
    column = columns[part]
    if isinstance(column, str):
        return column
    if len(column) == 1:
        return column[0]
    raise DataError(f"data.columns.{part} names {len(column)} columns", fix="name one")


def _answered(row: Row, column: str | None, options: Options) -> str | None:
    """The answer; None where there is none and none is needed."""
    if column is None:
        return None
    value = row.values.get(column)
    if not options.answers and (value is None or value == ""):
        return None
    return _text_of(row, column)


def _exchange(row: Row, prompt: str, answers: Sequence[str], system: str | None = None) -> Conversation:
    """One question and, where there is one, its answer. Further answers are references only."""
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", prompt))
    messages.extend(Message("assistant", answer) for answer in answers[:1])
    return Conversation(tuple(messages), row.origin, references=tuple(answers))


# --- finding columns ----------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def _named(rows: Sequence[Row], *names: str) -> str | None:
    """The column with the earliest of these names; case, spaces and dashes do not matter."""
    columns = {_plain(c): c for row in rows for c in row.values}
    return next((columns[n] for n in names if n in columns), None)


def _numbered(rows: Sequence[Row], *stems: str) -> list[str]:
    """The columns `stem1 stem2 …`, `stem_0 stem_1 …` or `stem_a stem_b …`, for the first stem that has two or more."""
    columns = {_plain(c).replace("_", ""): c for row in rows for c in row.values}
    for stem in stems:
        for marks in ("123456789", "0123456789", "abcdefghij"):
            run = [columns[stem + m] for m in takewhile(lambda m: stem + m in columns, marks)]  # noqa: B023
            if len(run) > 1:
                return run
    return []


def _find_by_names(**parts: tuple[str, ...]) -> Callable[[Sequence[Row]], dict[str, str | list[str]] | None]:
    """A finder that looks for each part under its usual names."""

    def find(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
        found = {part: column for part, names in parts.items() if (column := _named(rows, *names))}
        return cast(dict[str, str | list[str]], found) or None

    return find


# --- conversations: OpenAI messages and ShareGPT ------------------------------------------------------------------

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_ROLES |= {"function": "tool"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "tool": "tool", "observation": "tool"}
_SHAREGPT_ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant")
_SHAREGPT_ROLES |= {"function_call": "assistant", "function_response": "tool"}


def _find_turns(keys: tuple[str, str], rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    """The column whose lists hold objects with these keys, and the tools beside it."""
    found = [c for c in rows[0].values if _holds_turns([r.values.get(c) for r in rows], keys)]
    usual = _named(rows, "messages", "conversations", "conversation")
    if usual not in found and len(found) != 1:  # several, as in a prompt and a completion, or an answer and a worse one
        return None
    columns: dict[str, str | list[str]] = {"messages": usual if usual in found else found[0]}
    for part in ("tools", "system"):
        if column := _named(rows, part):
            columns[part] = column
    return columns


def _holds_turns(values: list[Any], keys: tuple[str, str]) -> bool:
    # More than half must fit: a broken row says nothing about the shape, and is refused by name when it is read.
    fits = [isinstance(v, list) and v and isinstance(v[0], dict) and keys[0] in v[0] for v in values]
    return sum(map(bool, fits)) * 2 > len(values)


def _from_turns(
    keys: tuple[str, str], roles: dict[str, str], row: Row, columns: Columns, options: Options
) -> Conversation:
    column = _one(columns, "messages")
    turns = _value(row, column)
    if not isinstance(turns, list) or not turns:
        what = "is empty" if turns == [] else f"is {kind(turns)}, not a list of turns"
        raise _fault(row, column, what, "give at least a user and an assistant turn")
    messages = [_turn(row, f"{column}[{i}]", turn, keys, roles) for i, turn in enumerate(turns)]
    system = _optional_text(row, cast(str | None, columns.get("system")))
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    check_order(row, column, messages, options)
    return _conversation(row, messages, _tools(row, cast(str | None, columns.get("tools"))))


def _conversation(row: Row, messages: list[Message], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    last = messages[-1]
    references = (last.content,) if last.role == "assistant" and last.content else ()
    return Conversation(tuple(messages), row.origin, references=references, tools=tools)


def _turn(row: Row, field: str, turn: Any, keys: tuple[str, str], roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise _fault(row, field, f"is {kind(turn)}, not an object", f"write {{{keys[0]}: …, {keys[1]}: …}}")
    name = turn.get(keys[0])
    role = roles.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(roles)
        raise _fault(row, f"{field}.{keys[0]}", f"unknown role {_shown(name)}", f"known: {known}")
    if turn.get("weight") == 0:
        raise _fault(
            row, f"{field}.weight", "a turn that is not learned", "use data.supervise=last, or remove the turn"
        )
    if name == "function_call":
        call = _json_value(row, f"{field}.{keys[1]}", turn.get(keys[1]))
        return Message("assistant", "", tool_calls=(_call(row, f"{field}.{keys[1]}", call),))
    calls = _calls(row, f"{field}.tool_calls", turn.get("tool_calls")) if role == "assistant" else ()
    return Message(
        role,
        _content(row, f"{field}.{keys[1]}", turn.get(keys[1]), empty=bool(calls) or role == "tool"),
        reasoning=_reasoning(row, field, turn) if role == "assistant" else None,
        tool_calls=calls,
        name=turn.get("name") if isinstance(turn.get("name"), str) else None,
    )


def _content(row: Row, field: str, content: Any, *, empty: bool) -> str:
    """The text of a turn, also where it comes as a list of text parts; `empty` where a turn may say nothing."""
    if isinstance(content, list) and content:
        content = "".join(_part(row, f"{field}[{i}]", part) for i, part in enumerate(content))
    if empty and (content is None or content == ""):
        return ""
    return _string(row, field, content)


def _part(row: Row, field: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return _string(row, f"{field}.text", part.get("text"))
    found = part.get("type") if isinstance(part, dict) else kind(part)
    raise _fault(row, field, f"is {_shown(found)}, not text", "only text can be learned")


def _reasoning(row: Row, field: str, turn: dict[str, Any]) -> str | None:
    key = next((k for k in ("reasoning_content", "reasoning", "thinking") if turn.get(k)), None)
    return _string(row, f"{field}.{key}", turn[key]) if key else None


def _calls(row: Row, field: str, calls: Any) -> tuple[dict[str, Any], ...]:
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise _fault(row, field, f"is {kind(calls)}, not a list")
    return tuple(_call(row, f"{field}[{i}]", call) for i, call in enumerate(calls))


def _call(row: Row, field: str, call: Any) -> dict[str, Any]:
    """A call as templates expect it: `arguments` an object, where OpenAI's API writes it as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _fault(row, field, "is not a tool call", 'write {"function": {"name": …, "arguments": {…}}}')
    arguments = _json_value(row, f"{field}.arguments", function.get("arguments") or {})
    outer = {k: v for k, v in call.items() if k == "id"} if "function" in call else {}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Row, column: str | None) -> tuple[dict[str, Any], ...]:
    value = row.values.get(column) if column else None
    if not value:
        return ()
    tools = _json_value(row, cast(str, column), value)
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise _fault(row, cast(str, column), "is not a list of tools", "give a list of JSON schemas")
    return tuple(tools)


def _json_value(row: Row, field: str, value: Any) -> Any:
    """`value`, parsed where it is JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _fault(row, field, f"is not JSON ({error})", "write an object") from error


_AFTER: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}


def check_order(row: Row, field: str, messages: Sequence[Message], options: Options) -> None:
    """Raises DataError unless system comes first, then user and assistant in turn, tools answering calls."""
    before: str | None = None
    for i, message in enumerate(messages):
        if message.role not in _AFTER[before]:
            raise _fault(row, f"{field}[{i}]", _disorder(before, message.role), "repair or remove the row")
        before = "call" if message.tool_calls else message.role
    if before in (None, "system"):
        raise _fault(row, field, "has no user turn", "repair or remove the row")
    if options.answers and messages[-1].role != "assistant":
        raise _fault(row, field, f"has no answer: the last turn is {messages[-1].role}'s", "end with an assistant turn")


def _disorder(before: str | None, role: str) -> str:
    if before is None:
        return f"the first turn is {role}'s"
    if before == role:
        return f"two {role} turns in a row"
    return f"{role} after {'a tool call' if before == 'call' else before}"


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str) else kind(value)


def _turns_format(keys: tuple[str, str], roles: dict[str, str]) -> Format:
    find, convert = partial(_find_turns, keys), partial(_from_turns, keys, roles)
    return Format(needs=("messages",), may=("tools", "system"), find=find, convert=convert)


MESSAGES = _turns_format(("role", "content"), _ROLES)
SHAREGPT = _turns_format(("from", "value"), _SHAREGPT_ROLES)

# --- question and answer in columns -------------------------------------------------------------------------------


def _from_pair(prompt: str, answer: str, row: Row, columns: Columns, options: Options) -> Conversation:
    column = _one(columns, prompt)
    reply = _answered(row, _one(columns, answer) if answer in columns else None, options)
    system = _optional_text(row, cast(str | None, columns.get("system")))
    return _exchange(row, _text_of(row, column), [reply] if reply else [], system)


def _from_prompt(row: Row, columns: Columns, options: Options) -> Conversation:
    """Prompt and completion: texts, or both lists of messages."""
    if not isinstance(row.values.get(_one(columns, "prompt")), list):
        return _from_pair("prompt", "completion", row, columns, options)
    turns = list(_value(row, _one(columns, "prompt")))
    if "completion" in columns:
        turns += _value(row, _one(columns, "completion")) or []
    return MESSAGES.convert(Row({"prompt": turns}, row.origin), {"messages": "prompt"}, options)


def _from_alpaca(row: Row, columns: Columns, options: Options) -> Conversation:
    prompt = _text_of(row, _one(columns, "instruction"))
    if extra := _optional_text(row, cast(str | None, columns.get("input"))):
        prompt = f"{prompt}\n\n{extra}"
    reply = _answered(row, _one(columns, "output") if "output" in columns else None, options)
    return _exchange(
        row, prompt, [reply] if reply else [], _optional_text(row, cast(str | None, columns.get("system")))
    )


PROMPT_COMPLETION = Format(
    needs=("prompt",),
    answer="completion",
    may=("system",),
    find=_find_by_names(
        prompt=("prompt",), completion=("completion", "response", "output", "answer"), system=("system",)
    ),
    convert=_from_prompt,
)
QUESTION_ANSWER = Format(
    needs=("question",),
    answer="answer",
    may=("system",),
    find=_find_by_names(
        question=("question", "questions", "query"), answer=("answer", "answers", "response"), system=("system",)
    ),
    convert=partial(_from_pair, "question", "answer"),
)
ALPACA = Format(
    needs=("instruction",),
    answer="output",
    may=("input", "system"),
    find=_find_by_names(
        instruction=("instruction",), input=("input", "context"), output=("output", "response"), system=("system",)
    ),
    convert=_from_alpaca,
)

# --- document and summary -----------------------------------------------------------------------------------------

_DOCUMENTS = ("dialogue", "dialog", "conversation", "article", "document", "report", "passage", "text", "source")
_SUMMARIES = ("summary", "highlights", "abstract", "tldr")


def _find_summary(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    summary = _named(rows, *_SUMMARIES) or _numbered(rows, *_SUMMARIES)
    # `text` or `source` alone may be anything; beside a summary they are what was summarised.
    document = _named(rows, *_DOCUMENTS if summary else _DOCUMENTS[:5])
    if document is None:
        return None
    return {"document": document, "summary": summary} if summary else {"document": document}


def _from_summary(row: Row, columns: Columns, options: Options) -> Conversation:
    document = _one(columns, "document")
    named = columns.get("summary", [])
    summaries = [_answered(row, c, options) for c in ([named] if isinstance(named, str) else named)]
    what = "conversation" if _plain(document) in ("dialogue", "dialog", "conversation") else "text"
    instruction = options.instruction or f"Summarize the following {what}."
    return _exchange(row, f"{instruction}\n\n{_text_of(row, document)}", [s for s in summaries if s])


SUMMARY = Format(needs=("document",), answer="summary", find=_find_summary, convert=_from_summary)

# --- multiple choice ----------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOICE_STEMS = ("", "option", "choice", "answer", "ending", "opt")
_POINTS = {"letter": ".", "option_n": ":", "text": "."}
_INSTRUCTIONS = {
    "letter": "Answer the question with the letter of the right option, nothing else.",
    "option_n": "Answer the question with the right option, option_1 to option_{n}, nothing else.",
    "text": "Answer the question with the text of the right option, nothing else.",
}


def _find_choices(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    question = _named(rows, "question", "prompt", "query", "problem", "stem")
    choices = _named(rows, "choices", "options", "endings") or _numbered(rows, *_CHOICE_STEMS)
    if not question or not choices:
        return None
    columns: dict[str, str | list[str]] = {"question": question, "choices": choices}
    if answer := _named(
        rows, "answer", "answerkey", "answer_key", "label", "correct", "correct_answer", "target", "gold"
    ):
        columns["answer"] = answer
    return columns


def _from_choices(row: Row, columns: Columns, options: Options) -> Conversation:
    labels, texts = _choices(row, columns["choices"])
    return _asked(row, columns, options, _text_of(row, _one(columns, "question")), labels, texts)


def _asked(
    row: Row, columns: Columns, options: Options, question: str, labels: list[str], texts: list[str]
) -> Conversation:
    answer = _answer(row, columns, labels, texts) if _has_answer(row, columns, options) else None
    written = written_choices(texts, options.labels)
    if options.labels == "cloze":
        prompt = f"{options.instruction}\n\n{question}" if options.instruction else question
    else:
        lines = [f"{_mark(i, options.labels)}{_POINTS[options.labels]} {text}" for i, text in enumerate(texts)]
        instruction = options.instruction or _INSTRUCTIONS[options.labels].format(n=len(texts))
        prompt = "\n".join([instruction, "", question, *lines])
    base = _exchange(row, prompt, [] if answer is None else [written[answer]])
    return replace(base, choices=tuple(texts), answer=answer)


def written_choices(texts: Sequence[str], labels: str) -> list[str]:
    """How each choice is written where it is the answer; `labels` as in the recipe."""
    return list(texts) if labels in ("text", "cloze") else [_mark(i, labels) for i in range(len(texts))]


def _mark(index: int, labels: str) -> str:
    return f"option_{index + 1}" if labels == "option_n" else _LETTERS[index]


def _choices(row: Row, columns: str | list[str]) -> tuple[list[str], list[str]]:
    """The label and the text of each choice, from several columns or from one list or object."""
    if not isinstance(columns, str):
        return list(columns), [_text_of(row, c) for c in columns]
    value = _json_value(row, columns, _value(row, columns))
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        texts, labels = value["text"], value.get("label", [])
    elif isinstance(value, dict):
        texts, labels = list(value.values()), list(value)
    elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
        texts, labels = [v.get("text") for v in value], [v.get("label") for v in value]
    else:
        texts, labels = value, []
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(_LETTERS):
        raise _fault(row, columns, "is not a list of 2 to 26 choices", 'write ["first", "second", …]')
    names = [str(x) for x in labels] if len(labels) == len(texts) else list(_LETTERS[: len(texts)])
    return names, [_string(row, f"{columns}[{i}]", text) for i, text in enumerate(texts)]


def _has_answer(row: Row, columns: Columns, options: Options) -> bool:
    return "answer" in columns and (options.answers or row.values.get(_one(columns, "answer")) not in (None, ""))


def _answer(row: Row, columns: Columns, labels: list[str], texts: list[str]) -> int:
    """The index of the right choice: given as its label, its column, its text, a letter, or an index from 0."""
    column = _one(columns, "answer")
    value = _value(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        found = value if 0 <= value < len(texts) else None
    else:
        found = _matched(_string(row, column, value).strip(), labels, texts)
    if found is None:
        known = ", ".join(_LETTERS[: len(texts)])
        raise _fault(
            row, column, f"{_shown(value)} is none of the choices", f"write one of {known}, or the choice's text"
        )
    return found


def _matched(value: str, labels: list[str], texts: list[str]) -> int | None:
    plain = _plain(value)
    tables: Iterable[list[str]] = (
        [_plain(label) for label in labels],
        [t.strip().lower() for t in texts],
        [c.lower() for c in _LETTERS[: len(texts)]],
        [f"option_{i + 1}" for i in range(len(texts))],
        [str(i) for i in range(len(texts))],
    )
    for i, table in enumerate(tables):
        wanted = value.lower() if i == 1 else plain
        if wanted and table.count(wanted) == 1:
            return table.index(wanted)
    return None


MULTIPLE_CHOICE = Format(needs=("question", "choices"), answer="answer", find=_find_choices, convert=_from_choices)

# Choices that stand in the text of the question, as in the commonsense sets of LLM-Adapters (ARC, PIQA, HellaSwag …):
# "Please choose the correct answer to the question: … Answer1: … Answer2: … Answer format: answer1/answer2".
_LISTED = re.compile(r"\b(?:answer|option|choice|solution|ending) ?(\d{1,2}) ?:", re.I)
_OPENING = re.compile(r"^please choose the (?:correct|most suitable|best)[^:\n]*:\s*", re.I)
_CLOSING = re.compile(r"\s*\b(?:answer|option|choice|solution|ending) format:.*\Z", re.I | re.S)


def _find_listed(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    text = _named(rows, "instruction", "question", "prompt", "query")
    texts = [value for row in rows if text and isinstance(value := row.values.get(text), str)]
    if not text or sum(_listed(value) is not None for value in texts) * 2 <= len(rows):
        return None
    answer = _named(rows, "answer", "answerkey", "answer_key", "label", "correct_answer")
    return {"text": text, "answer": answer} if answer else {"text": text}


def _listed(text: str) -> tuple[str, list[str], list[str]] | None:
    """The question, the labels and the choices of a text that numbers its choices from 0 or 1 on, else None."""
    plain = _CLOSING.sub("", text)
    marks = list(_LISTED.finditer(plain))
    numbers = [int(mark[1]) for mark in marks]
    if len(marks) < 2 or numbers != list(range(numbers[0], numbers[0] + len(marks))) or numbers[0] > 1:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(plain)]
    choices = [plain[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    return _OPENING.sub("", plain[: marks[0].start()].strip()), [mark[0].rstrip(" :") for mark in marks], choices


def _from_listed(row: Row, columns: Columns, options: Options) -> Conversation:
    column = _one(columns, "text")
    found = _listed(_text_of(row, column))
    if found is None or not all(found[2]) or len(found[2]) > len(_LETTERS):
        raise _fault(row, column, "lists no choices", "write Answer1: … Answer2: …, or set data.format=alpaca")
    return _asked(row, columns, options, *found)


LISTED_CHOICES = Format(needs=("text",), answer="answer", find=_find_listed, convert=_from_listed)

# --- text ---------------------------------------------------------------------------------------------------------

_SPEAKERS = "human|user|assistant|bot|gpt|system"
_STYLES = {
    "<HUMAN>:": re.compile(rf"<\s*({_SPEAKERS})\s*>\s*:?[ \t]*", re.I),
    "### Human:": re.compile(rf"#{{2,4}}\s*({_SPEAKERS})\s*:[ \t]*", re.I),
    "Human:": re.compile(rf"^[ \t]*\**({_SPEAKERS})\**\s*:\**[ \t]*", re.I | re.M),
}
_SPEAKER_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "bot": "assistant", "gpt": "assistant"}
_SPEAKER_ROLES |= {"system": "system"}


def _style(rows: Sequence[Row], column: str) -> str | None:
    """The way that more than half of the rows mark who speaks."""
    texts = [v for r in rows if isinstance(v := r.values.get(column), str)]
    for name, pattern in _STYLES.items():
        if sum(_is_marked(text, pattern) for text in texts) * 2 > len(texts):
            return name
    return None


def _is_marked(text: str, pattern: re.Pattern[str]) -> bool:
    """Whether a text starts with a turn that is not the assistant's."""
    first = pattern.match(text.lstrip())
    return first is not None and _SPEAKER_ROLES[first[1].lower()] != "assistant"


def _find_marked(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    column = _text_column(rows)
    return {"text": column} if column and _style(rows, column) else None


def _find_document(rows: Sequence[Row]) -> dict[str, str | list[str]] | None:
    column = _text_column(rows)
    return {"text": column} if column and not _style(rows, column) else None


def _text_column(rows: Sequence[Row]) -> str | None:
    return _named(rows, "text", "content", "document")


def _from_text(row: Row, columns: Columns, options: Options) -> Conversation:
    column = _one(columns, "text")
    text = _text_of(row, column)
    pattern = next((p for p in _STYLES.values() if _is_marked(text, p)), None)
    if pattern is None:
        raise _fault(
            row, column, "starts with no role marker", "write <HUMAN>: … <ASSISTANT>: …, or set data.format=document"
        )
    messages = _marked_turns(row, column, text, pattern, options)
    check_order(row, column, messages, options)
    return _conversation(row, messages)


def _marked_turns(row: Row, column: str, text: str, pattern: re.Pattern[str], options: Options) -> list[Message]:
    marks = list(pattern.finditer(text))
    ends = [m.start() for m in marks[1:]] + [len(text)]
    turns = [(_SPEAKER_ROLES[m[1].lower()], text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]
    if not options.answers and turns[-1] == ("assistant", ""):  # a prompt that ends with the marker to go on from
        turns.pop()
    return [Message(role, _string(row, f"{column}[{i}]", said)) for i, (role, said) in enumerate(turns)]


def _from_whole(role: str, row: Row, columns: Columns, options: Options) -> Conversation:
    return Conversation((Message(role, _text_of(row, _one(columns, "text"))),), row.origin)


TEXT = Format(needs=("text",), find=_find_marked, convert=_from_text)
DOCUMENT = Format(needs=("text",), find=_find_document, convert=partial(_from_whole, "document"))
RENDERED = Format(
    needs=("text",), find=_find_by_names(text=("text", "rendered")), convert=partial(_from_whole, "rendered")
)
