"""The shapes a row takes on its way to tokens. Values only: no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from. `line` counts from 1: the line of a text file, the row of a table."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as the source has it."""

    values: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; the two odd ones are `document` (a long text, learned
    whole) and `rendered` (text that already holds control tokens, parsed as such: opt-in)."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The only shape the rest of luthier knows.

    `references` are all accepted answers to the last user turn (the first is the one trained on); `choices` and
    `answer` (an index into choices) are set for multiple choice. `messages` ends with an assistant turn for training
    rows, and with a user or tool turn where only a prompt is known.
    """

    messages: tuple[Message, ...]
    origin: Origin
    references: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()
    answer: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant turn: what inference is given."""
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[:-1]
        return self.messages


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered conversation: either a control token by name, or ordinary text (never parsed for
    control tokens). `supervised` is decided here and never again."""

    text: str
    control: bool
    supervised: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row: `ids` and, of the same length, `supervised` (1 where the token is a target of the loss).

    `prompt` is the number of leading ids that inference would be given for the last answer.
    """

    ids: list[int]
    supervised: list[int]
    prompt: int
    origin: Origin


def to_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation as plain JSON values; what is empty is left out."""
    values = {
        "file": conversation.origin.file,
        "line": conversation.origin.line,
        "messages": [
            {k: v for k in Message.__slots__ if (v := getattr(m, k)) or k == "content"} for m in conversation.messages
        ],
        "references": conversation.references,
        "tools": conversation.tools,
        "choices": conversation.choices,
        "answer": conversation.answer,
        "meta": conversation.meta,
    }
    return {k: v for k, v in values.items() if v not in ((), None, {})}


def from_json(values: dict[str, Any]) -> Conversation:
    """The inverse of `to_json`."""
    messages = (Message(**{**m, "tool_calls": tuple(m.get("tool_calls", ()))}) for m in values["messages"])
    return Conversation(
        tuple(messages),
        Origin(values["file"], values["line"]),
        references=tuple(values.get("references", ())),
        tools=tuple(values.get("tools", ())),
        choices=tuple(values.get("choices", ())),
        answer=values.get("answer"),
        meta=values.get("meta", {}),
    )
