"""Conversations to Segments: control tokens by name, ordinary text, and which of both is learned.

One renderer makes what training, evaluation and chat see. `Template.prompt` of the messages before an answer is,
segment by segment, the beginning of `Template.rendering` of the whole; a border between two text segments is where an
answer begins, and no token may straddle it. Every answer ends in a control token that stops generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from functools import cache
from itertools import groupby, takewhile
from typing import Any

from luthier.data.conversation import Conversation, Message, Segment
from luthier.data.sandbox import Sandbox
from luthier.data.tokens import Tokenizer
from luthier.errors import DataError, RecipeError, TemplateError
from luthier.registry import nearest

VERSION = 1
"""Of what `Template.spec` writes."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """Training text. The first `prompt` segments are what inference is given for the last answer."""

    segments: list[Segment]
    prompt: int


class Template:
    """How a conversation becomes segments. Made by `load_template` or `Template.from_spec`.

    Attributes:
        name: as in the recipe.
        stops: the control tokens at which generation ends; the first ends every answer.
        reply: the text right before an answer.
        cuts: texts at which a generated answer is cut (`finish`).
    """

    name: str
    reply: str = ""
    cuts: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str | None]) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(dict.fromkeys(name for name in stops if name))
        self._control = _any_of(tokenizer.control)
        if not self.stops:
            raise TemplateError(
                "the tokenizer has no end-of-text token", fix="name an eos_token in tokenizer_config.json"
            )

    def render(self, conversation: Conversation, supervise: str) -> list[Segment]:
        """Training text with supervision `answers`, `last` or `all`. Raises TemplateError."""
        return self.rendering(conversation, supervise).segments

    def rendering(self, conversation: Conversation, supervise: str) -> Rendering:
        """The same, with the length of the prompt."""
        role = _kind(conversation.messages)
        if role == "document":
            return self._document(conversation.messages[0].content)
        if role == "rendered":
            return self._rendered(conversation.messages[0].content, supervise)
        rendering = self._chat(conversation, supervise)
        if supervise == "all":
            segments = [Segment(s.text, s.control, True) for s in rendering.segments]
            return Rendering(segments, rendering.prompt)
        return rendering

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Segment]:
        """What inference is given to answer `messages`. Raises TemplateError."""
        role = _kind(messages)
        if role == "document":
            return self._document(messages[0].content).segments[:-1]
        if role == "rendered":
            return self._cut(messages[0].content, []).segments
        return self._prompt(messages, tools)

    def finish(self, text: str) -> str:
        """A generated answer without what the template itself writes around answers."""
        ends = [at for cut in self.cuts if (at := text.find(cut)) >= 0]
        return text[: min(ends, default=len(text))].strip()

    def spec(self) -> dict[str, Any]:
        """JSON from which `from_spec` makes the same template again."""
        return {"version": VERSION, "name": self.name}

    @staticmethod
    def from_spec(spec: dict[str, Any], tokenizer: Tokenizer) -> Template:
        """Raises TemplateError for a spec that this version cannot read, or that does not fit the tokenizer."""
        if spec.get("version") != VERSION:
            raise TemplateError(
                f"the template is of version {spec.get('version')}, not {VERSION}", fix="update luthier"
            )
        try:
            if "source" in spec:
                return ChatTemplate(tokenizer, spec["source"], date.fromisoformat(spec["date"]))
            form: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["form"].items()}
            return FormTemplate(tokenizer, spec["name"], Form(**form))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TemplateError(f"the template's description is damaged ({error})") from error

    def _chat(self, conversation: Conversation, supervise: str) -> Rendering:
        raise NotImplementedError

    def _prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Segment]:
        raise NotImplementedError

    def _document(self, text: str) -> Rendering:
        """A long text, learned whole."""
        opening = [Segment(name, True, True) for name in self.tokenizer.opening]
        end = self.tokenizer.eos or self.stops[0]
        body = [Segment(text, False, True)] if text else []
        return Rendering([*opening, *body, Segment(end, True, True)], len(opening))

    def _rendered(self, text: str, supervise: str) -> Rendering:
        """Text that already holds control tokens: they are parsed, and answers are found by what precedes them."""
        starts = [m.end() for m in re.finditer(re.escape(self.reply), text)] if self.reply else []
        last = starts[-1] if starts else 0
        if self._stop_after(text, last) is None:
            text += self.stops[0]
        if supervise == "all":
            return self._cut(text, [(0, len(text), True)])
        if not starts:
            raise TemplateError(f"{self.reply!r} is not in the rendered text", fix="set data.supervise=all")
        ends = [self._stop_after(text, start) or len(text) for start in starts]
        return self._cut(text, [(a, b, supervise == "answers" or a == last) for a, b in zip(starts, ends, strict=True)])

    def _cut(self, text: str, turns: Sequence[Turn]) -> Rendering:
        """Segments of a whole rendering, with a border where each answer begins."""
        segments: list[Segment] = []
        at = prompt = 0
        for start, end, supervised in turns:
            self._parse(text[at:start], False, segments)
            prompt = len(segments)
            self._parse(text[max(at, start) : end], supervised, segments)
            at = max(at, end)
        self._parse(text[at:], False, segments)
        return Rendering(segments, prompt)

    def _parse(self, text: str, supervised: bool, segments: list[Segment]) -> None:
        """Appends the segments of a text in which control tokens are meant. Some swallow the space beside them."""
        parts = self._control.split(text)  # text, control, text, control, …, text
        for k, part in enumerate(parts):
            if k % 2:
                segments.append(Segment(part, True, supervised))
                continue
            if segments and segments[-1].control and segments[-1].text in self.tokenizer.strip_right:
                part = part.lstrip()
            if self.tokenizer.strip_left and "".join(parts[k + 1 : k + 2]) in self.tokenizer.strip_left:
                part = part.rstrip()
            if part:
                segments.append(Segment(part if part.isascii() else self._restore(part), False, supervised))

    def _stop_after(self, text: str, start: int) -> int | None:
        """Where the first stop token at or after `start` ends."""
        return next((m.end() for m in self._control.finditer(text, start) if m[0] in self.stops), None)

    def _restore(self, text: str) -> str:
        return text


Turn = tuple[int, int, bool]  # where an answer begins and ends in a rendering, and whether it is supervised


# --- forms of our own -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A template as text around each message's content (`{}`).

    Names in `marks` are control tokens where they stand in a form, never where they stand in content. The space before
    an answer is part of `answer`, not of `reply`, because tokenizers join it to the word that follows.
    """

    user: str
    reply: str
    system: str = "{}\n"
    preamble: str = ""
    """Begins a conversation that has no system message."""
    user_input: str = ""
    """For a user message of several paragraphs, if it differs: the first is the instruction, the rest its input."""
    preamble_input: str = ""
    tool: str = ""
    answer: str = "{}"
    stop: str = ""
    """The control token that ends answers; empty: the tokenizer's eos."""
    between: str = "\n"
    """After the end of an answer that is not the last message."""
    marks: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()


_ALPACA = "Below is an instruction that describes a task"
_RESPOND = " Write a response that appropriately completes the request.\n\n"

FORMS = {
    "chatml": Form(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        tool="<|im_start|>tool\n{}<|im_end|>\n",
        reply="<|im_start|>assistant\n",
        stop="<|im_end|>",
        marks=("<|im_start|>", "<|im_end|>"),
    ),
    "alpaca": Form(
        system="{}\n\n",
        preamble=f"{_ALPACA}.{_RESPOND}",
        preamble_input=f"{_ALPACA}, paired with an input that provides further context.{_RESPOND}",
        user="### Instruction:\n{}\n\n",
        user_input="### Instruction:\n{}\n\n### Input:\n{}\n\n",
        reply="### Response:\n",
        between="\n\n",
        cuts=("### Instruction:",),
    ),
    "human-assistant": Form(
        user="<HUMAN>: {}\n",
        reply="<ASSISTANT>:",
        answer=" {}",
        cuts=("<HUMAN>:", "<ASSISTANT>:"),
    ),
    "instruct-output": Form(
        system="{}\n\n",
        preamble=f"{_ALPACA}.{_RESPOND}",
        user="### Instruct: {}\n\n",
        reply="### Output:\n",
        answer="{}\n\n### End",
        between="\n\n",
        cuts=("### End", "### Instruct:"),
    ),
    "plain": Form(user="{}\n", reply=""),
}


class FormTemplate(Template):
    """A template given by a Form."""

    def __init__(self, tokenizer: Tokenizer, name: str, form: Form) -> None:
        if missing := [mark for mark in form.marks if mark not in tokenizer.control]:
            raise TemplateError(
                f"template {name} needs the control token {missing[0]}, which the tokenizer lacks",
                fix="choose another data.template, such as plain",
            )
        super().__init__(tokenizer, [form.stop or tokenizer.eos, *tokenizer.ends])
        self.name, self.form, self.reply, self.cuts = name, form, form.reply, form.cuts

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "form": asdict(self.form)}

    def _chat(self, conversation: Conversation, supervise: str) -> Rendering:
        self._refuse_what_has_no_form(conversation.messages, conversation.tools)
        return _Writer(self.form, self.tokenizer, self.stops[0]).conversation(
            conversation.messages, supervise == "last"
        )

    def _prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Segment]:
        self._refuse_what_has_no_form(messages, tools)
        return _Writer(self.form, self.tokenizer, self.stops[0]).conversation(messages, False).segments

    def _refuse_what_has_no_form(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        absent = {
            "tools": bool(tools),
            "tool calls": any(m.tool_calls for m in messages),
            "reasoning": any(m.reasoning for m in messages),
            "tool results": not self.form.tool and any(m.role == "tool" for m in messages),
        }
        for what in (what for what, present in absent.items() if present):
            raise TemplateError(f"template {self.name} has no form for {what}", fix="set data.template=tokenizer")


class _Writer:
    """Writes one conversation in a form."""

    def __init__(self, form: Form, tokenizer: Tokenizer, stop: str) -> None:
        self.form, self.stop = form, stop
        self.segments = [Segment(name, True, False) for name in tokenizer.opening if name not in form.marks]
        self.text = ""

    def conversation(self, messages: Sequence[Message], only_last: bool) -> Rendering:
        """The whole; if it does not end in an answer, up to where the next one begins."""
        answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
        prompt = 0
        self._preamble(messages)
        for k, message in enumerate(messages):
            if message.role != "assistant":
                self._message(message)
                continue
            prompt = self._reply()
            self._answer(message.content, not only_last or k == answers[-1])
            if k + 1 < len(messages):
                self._form(self.form.between)
        if not messages or messages[-1].role != "assistant":
            prompt = self._reply()
        return Rendering(self.segments, prompt)

    def _preamble(self, messages: Sequence[Message]) -> None:
        if messages and messages[0].role == "system":
            return
        question = next((m.content for m in messages if m.role == "user"), "")
        self._form(self.form.preamble_input if self._has_input(question) else self.form.preamble)

    def _has_input(self, content: str) -> bool:
        return bool(self.form.user_input) and bool(content.partition("\n\n")[2].strip())

    def _message(self, message: Message) -> None:
        if message.role == "user" and self._has_input(message.content):
            instruction, _, extra = message.content.partition("\n\n")
            return self._form(self.form.user_input, instruction, extra)
        form = {"system": self.form.system, "user": self.form.user, "tool": self.form.tool}.get(message.role)
        if form is None:
            raise TemplateError(f"unknown role {message.role!r}", fix="use system, user, assistant or tool")
        self._form(form, message.content)

    def _reply(self) -> int:
        self._form(self.form.reply)
        self._flush(False)
        return len(self.segments)

    def _answer(self, content: str, supervised: bool) -> None:
        self._form(self.form.answer, content)
        self._flush(supervised)
        self.segments.append(Segment(self.stop, True, supervised))

    def _form(self, form: str, *contents: str) -> None:
        """Appends a form, its control tokens parsed, with contents in its braces, unparsed."""
        for k, part in enumerate(form.split("{}")):
            if k:
                self.text += contents[k - 1]
            self._marked(part)

    def _marked(self, text: str) -> None:
        parts = _any_of(self.form.marks).split(text)
        for k, part in enumerate(parts):
            if k % 2:
                self._flush(False)
                self.segments.append(Segment(part, True, False))
            else:
                self.text += part

    def _flush(self, supervised: bool) -> None:
        if self.text:
            self.segments.append(Segment(self.text, False, supervised))
            self.text = ""


# --- the tokenizer's own --------------------------------------------------------------------------------------------


class Guard:
    """Keeps content from becoming control tokens while a stranger's program handles it.

    Characters at the edges of control tokens are replaced, one for one, by lone surrogates, which no valid text holds;
    afterwards they are put back in ordinary text only. A template may then trim, split, slice and join content as it
    likes: a control token in the result can only have come from the template.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, structure: Iterable[str] = ()) -> None:
        """`structure`: the control tokens that make turns in the template `source`."""
        names = set(tokenizer.control)
        edges = sorted({c for name in names for c in (name[0], name[-1]) if not (c.isalnum() or c.isspace())})
        bare = sorted(name for name in names if name[0] not in edges and name[-1] not in edges)
        stand_ins = {c: chr(0xDC00 + k) for k, c in enumerate([*edges, *sorted({name[0] for name in bare})])}
        self._characters = edges
        self._edges = {ord(c): stand_ins[c] for c in edges}
        self._back = {ord(s): c for c, s in stand_ins.items()}
        self._bare = {name: stand_ins[name[0]] + name[1:] for name in bare}
        # An answer's markup (`<think>`) is for the template to work on.
        markup = {name for name in {*names, *_MARKUP.findall(source)} if _MARKUP.fullmatch(name)}
        self._kept = _any_of(markup - tokenizer.special - set(structure))

    def value(self, value: Any, answer: bool = False) -> Any:
        """`value` (JSON) with every text in it guarded; `answer` leaves markup that is no special token."""
        if isinstance(value, str):
            return self._text(value, answer)
        if isinstance(value, dict):
            return {self.value(k, answer): self.value(v, answer) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(v, answer) for v in value]
        return value

    def restore(self, text: str) -> str:
        return text.translate(self._back)

    def _text(self, text: str, answer: bool) -> str:
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError("text holds half of a character", fix="read the file as UTF-8")
        for name, guarded in self._bare.items():
            text = text.replace(name, guarded)
        if not any(map(text.__contains__, self._characters)):
            return text
        if not answer:
            return text.translate(self._edges)
        parts = self._kept.split(text)
        return "".join(part if k % 2 else part.translate(self._edges) for k, part in enumerate(parts))


_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = re.compile(r"</?\w+>|\[/?\w+\]")


class ChatTemplate(Template):
    """The chat template of a tokenizer: Jinja. What it says the day is, is the day it was first loaded."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, source: str, day: date) -> None:
        self.tokenizer, self.source, self.day = tokenizer, source, day
        self._guard = Guard(tokenizer, source)
        self._program = Sandbox(datetime(day.year, day.month, day.day)).program(source)
        self._control = _any_of(tokenizer.control)
        self._eos = ""  # put after each answer if the template puts nothing there
        self._left_out: frozenset[str] = frozenset()  # roles that the template is silent about
        super().__init__(tokenizer, self._find_stops())
        self.reply = self._find_reply()
        self._around = self._find_around()
        messages, tools = self._variables(_PROBE[:-1], ())
        asked = self._run(messages, tools, True)
        self._guard = Guard(tokenizer, source, {*self.stops, *self._control.findall(asked)})
        self._left_out = frozenset(role for role in ("system", "tool") if self._leaves_out(role))

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "source": self.source, "date": self.day.isoformat()}

    def _find_stops(self) -> tuple[str | None, ...]:
        """The control token after an answer, and those the model itself stops at."""
        text = self._run(*self._variables(_PROBE, ()), False)
        after = self._control.search(text, max(text.rfind(_PROBE[-1].content), 0))
        if after is None:
            self._eos = self.tokenizer.eos or ""
        return after[0] if after else None, *self.tokenizer.ends

    def _find_reply(self) -> str:
        """What asking for an answer adds to a question."""
        asked = self._variables(_PROBE[:-1], ())
        without, text = (self._run(*asked, ask) for ask in (False, True))
        if text.startswith(without):
            return text.removeprefix(without)
        parts = zip(*(self._control.split(t) for t in (without, text)), strict=False)  # one that ends in eos, say
        return text[sum(len(a) for a, _ in takewhile(lambda pair: pair[0] == pair[1], parts)) :]

    def _find_around(self) -> tuple[str, str] | None:
        """What stands before and after an answer's text; None if the prompt does not say."""
        messages, _ = self._variables(_PROBE, ())
        text = self._run(messages, [], False)
        start = self._start(text, messages[:-1], [])
        before, found, after = text[start or 0 :].partition(messages[-1]["content"])
        return (before, after) if found and start is not None else None

    def _leaves_out(self, role: str) -> bool:
        """Whether the template passes over messages of a role without an error."""
        odd = Message(role, "MESSAGE")
        messages = (odd, *_PROBE[:-1]) if role == "system" else (*_PROBE, odd)
        try:
            return odd.content not in self._run(*self._variables(messages, ()), True)
        except TemplateError:
            return False

    def _chat(self, conversation: Conversation, supervise: str) -> Rendering:
        messages, tools = self._variables(conversation.messages, conversation.tools)
        if messages[-1]["role"] != "assistant":
            segments = self._prompt(conversation.messages, conversation.tools)
            return Rendering(segments, len(segments))
        text = self._run(messages, tools, False)
        start = self._start(text, messages[:-1], tools)
        if start is None:
            text, start = self._grafted(text, messages, tools)
        end = self._stop_after(text, start)
        if end is None:
            text += self.stops[0]
        turns = self._earlier(text, messages, tools, supervise == "answers")
        return self._cut(text, [*turns, (start, end or len(text), True)])

    def _grafted(self, text: str, messages: Variables, tools: Variables) -> tuple[str, int]:
        """The prompt and the answer's part of `text`: for templates that write the question differently once it is
        answered (Mistral's show a system message only beside the last question). Also where the answer begins."""
        prompt = self._run(messages[:-1], tools, True)
        answer = f"{self._around[0]}{messages[-1]['content'].strip()}{self._around[1]}" if self._around else None
        if answer is None or not text.endswith(answer):
            raise TemplateError(
                "the chat template's inference prompt is not the beginning of its training text, so that what is"
                " learned would not be what is asked",
                fix=_OTHER,
            )
        return prompt + answer, len(prompt)

    def _prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Segment]:
        variables = self._variables(messages, tools)
        text = self._run(*variables, True)
        return self._cut(text, self._earlier(text, *variables, False)).segments

    def _earlier(self, text: str, messages: Variables, tools: Variables, supervised: bool) -> list[Turn]:
        """The answers before the last message. Unsupervised ones are borders only, where the text has them."""
        turns: list[Turn] = []
        for k, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            start = self._start(text, messages[:k], tools)
            if supervised:
                turns.append((*self._as_generated(text, start, messages[: k + 1], tools), True))
            elif start is not None:
                turns.append((start, start, False))
        return turns

    def _start(self, text: str, before: Variables, tools: Variables) -> int | None:
        """Where the answer to `before` begins in `text`; None if the text does not begin with its prompt."""
        prompt = self._run(before, tools, True)
        return len(prompt) if text.startswith(prompt) else None

    def _as_generated(self, text: str, start: int | None, upto: Variables, tools: Variables) -> tuple[int, int]:
        """Where an earlier answer begins and ends. Learning it is right only if it stands in history as it was when it
        was the last: some templates strip the reasoning, or end the turn in another way."""
        then = self._run(upto, tools, False)
        end = None if start is None else self._stop_after(then, start)
        if start is None or end is None or not text.startswith(then[:end]):
            raise TemplateError(
                f"the chat template rewrites answer {sum(m['role'] == 'assistant' for m in upto)} once the conversation"
                " goes on (reasoning left out of history, for instance)",
                fix="set data.supervise=last",
            )
        return start, end

    def _variables(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[Variables, Variables]:
        if tools:
            self._require("tools", "tools")
        return [self._message(m) for m in messages], [self._guard.value(tool) for tool in tools]

    def _message(self, message: Message) -> dict[str, Any]:
        if message.role in self._left_out:
            raise TemplateError(f"the chat template would leave out the {message.role} message", fix=_OTHER)
        answer, guard = message.role == "assistant", self._guard.value
        variables = {"role": guard(message.role), "content": guard(message.content, answer)}
        if answer and self._eos:
            variables["content"] = variables["content"].rstrip() + self._eos
        if message.name:
            variables["name"] = guard(message.name)
        if message.reasoning is not None:
            self._require("reasoning", "reasoning_content", "thinking")
            variables["reasoning_content"] = variables["thinking"] = guard(message.reasoning, answer)
        if message.tool_calls:
            self._require("tool calls", "tool_calls")
            variables["tool_calls"] = guard(message.tool_calls)
        return variables

    def _require(self, what: str, *names: str) -> None:
        if not any(name in self.source for name in names):
            raise TemplateError(f"the chat template would leave out {what}", fix=_OTHER)

    def _run(self, messages: Variables, tools: Variables, ask: bool) -> str:
        return self._program(
            messages=messages, tools=tools or None, documents=None, add_generation_prompt=ask, **self.tokenizer.names
        )

    def _restore(self, text: str) -> str:
        return self._guard.restore(text)


_OTHER = "choose another data.template"

Variables = list[dict[str, Any]]

_PROBE = (Message("user", "QUESTION"), Message("assistant", "ANSWER"))


# --- by name --------------------------------------------------------------------------------------------------------


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template called `name` in a recipe; `auto` is the tokenizer's own, else `plain`.

    Raises RecipeError for an unknown name, TemplateError if the template and the tokenizer do not fit.
    """
    if name == "auto":
        name = "tokenizer" if tokenizer.chat_template else "plain"
    if name == "tokenizer":
        if tokenizer.chat_template is None:
            raise TemplateError("the tokenizer has no chat template", fix="set data.template=plain")
        return ChatTemplate(tokenizer, tokenizer.chat_template, date.today())
    if name not in FORMS:
        raise RecipeError(f"unknown template '{name}'", fix=nearest(name, ["auto", "tokenizer", *FORMS]))
    return FormTemplate(tokenizer, name, FORMS[name])


def _kind(messages: Sequence[Message]) -> str:
    """The role of a conversation that is one text, else `chat`."""
    if not messages:
        raise TemplateError("the conversation has no messages")
    odd = [m.role for m in messages if m.role in ("document", "rendered")]
    if odd and len(messages) > 1:
        raise TemplateError(f"a {odd[0]} stands among other messages", fix="make it a row of its own")
    return odd[0] if odd else "chat"


@cache
def _any_of_sorted(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({_trie(names)})" if names else "(?!)()")


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of some names, the longest where several fit; `split` gives them at odd places."""
    return _any_of_sorted(tuple(sorted(names)))


def _trie(names: Sequence[str]) -> str:
    """A pattern without common prefixes: a tokenizer may have thousands of names that begin alike."""
    groups = {c: [name[1:] for name in group] for c, group in groupby(names, key=lambda name: name[:1])}
    rest = groups.pop("", None)
    branches = "|".join(re.escape(c) + _trie(tails) for c, tails in groups.items())
    if not branches:
        return ""
    return f"(?:{branches})?" if rest is not None else f"(?:{branches})" if len(groups) > 1 else branches
