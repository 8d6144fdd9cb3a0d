"""Cleaning one conversation: repaired encoding, one Unicode form, no control characters, no personal data; counted."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import replace
from typing import Any

from luthier import recipe
from luthier.data.conversation import Conversation, Message
from luthier.data.personal import Redactor

# C0 and C1 controls, lone surrogates, noncharacters, and format characters that only hide or reorder text: zero-width
# space, word joiner and byte-order mark, soft hyphen, bidirectional embeddings, overrides and isolates, annotations.
_UNWANTED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Format characters that some texts need: joiners between the letters of scripts that shape them and inside emoji,
# tags inside the flags of regions, direction marks in texts written from right to left. Elsewhere they hide things.
_SHAPED = "\u0590-\u109f\u1700-\u18af\u1a00-\u1aaf\ua800-\uabff\U00010a00-\U00011fff"
_EMOJI = "\u2190-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
_STRAY = re.compile(
    f"(?<![{_SHAPED}])\u200c|(?<![{_SHAPED}{_EMOJI}])\u200d|\u200d(?![{_SHAPED}{_EMOJI}])"
    "|(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[\U000e0000-\U000e007f]"
)
_DIRECTION = re.compile("[\u061c\u200e\u200f]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
_IN_ASCII = re.compile("[^\t\n -~]")  # what these match of ASCII: most texts need no more than this one scan


class Cleaner:
    """Applies `recipe.Clean` to conversations, one at a time.

    `counts` adds up what was done: `control` (characters removed or turned into newlines), `unicode` and `mojibake`
    (texts changed), and for personal data the replacements of each kind. A text that stands in a row twice (an answer
    that is also a reference) counts once.

    Raises RecipeError if the name recogniser cannot be loaded.
    """

    def __init__(self, clean: recipe.Clean) -> None:
        self._clean = clean
        self._redact = Redactor(clean.personal, clean.names) if clean.personal or clean.names else None
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def __call__(self, conversation: Conversation) -> Conversation:
        done: dict[str, str] = {}
        messages = tuple([self._message(m, done) for m in conversation.messages])
        references = tuple([self._once(r, done) for r in conversation.references])
        choices = tuple([self._once(c, done) for c in conversation.choices])
        if (messages, references, choices) == (conversation.messages, conversation.references, conversation.choices):
            return conversation  # the usual case, and a new one would cost more than the cleaning
        return replace(conversation, messages=messages, references=references, choices=choices)

    def _message(self, message: Message, done: dict[str, str]) -> Message:
        content = self._once(message.content, done)
        if content == message.content and message.reasoning is None and not message.tool_calls:
            return message
        return replace(
            message,
            content=content,
            reasoning=None if message.reasoning is None else self._once(message.reasoning, done),
            tool_calls=self._nested(message.tool_calls, done),
        )

    def _nested(self, value: Any, done: dict[str, str]) -> Any:
        """Cleans every string of a JSON-like value but the keys."""
        if isinstance(value, str):
            return self._once(value, done)
        if isinstance(value, dict):
            return {key: self._nested(inner, done) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._nested(inner, done) for inner in value)
        return value

    def _once(self, text: str, done: dict[str, str]) -> str:
        if text not in done:
            done[text] = self.text(text)
        return done[text]

    def text(self, text: str) -> str:
        """`text`, cleaned and counted."""
        if self._clean.mojibake and not text.isascii():
            text = self._counted("mojibake", text, _repaired(text))
        if self._clean.control:
            text = self._without_control(text)
        if self._clean.unicode != "none" and not text.isascii():
            text = self._counted("unicode", text, unicodedata.normalize(self._clean.unicode, text))
        return self._redact(text, self._counts) if self._redact else text

    def _counted(self, what: str, before: str, after: str) -> str:
        if before != after:
            self._counts[what] += 1
        return after

    def _without_control(self, text: str) -> str:
        if text.isascii() and not _IN_ASCII.search(text):
            return text
        text, ends = _LINE_END.subn("\n", text)
        clean = _UNWANTED.sub("", text)
        if not clean.isascii():
            clean = _STRAY.sub(r"\1", clean)  # what the group holds is a flag, and stays
            if not _RIGHT_TO_LEFT.search(clean):
                clean = _DIRECTION.sub("", clean)
        if ends or len(clean) < len(text):
            self._counts["control"] += ends + len(text) - len(clean)
        return clean


def _repaired(text: str) -> str:
    from ftfy import fix_encoding  # 40 ms of import that few recipes need

    return str(fix_encoding(text))
