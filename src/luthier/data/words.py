"""Encoding by remembered words. Most time of a tokenizer goes into finding the words of a text; where it is certain
that a token never crosses the space between two words, each distinct word is encoded once and then looked up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

MEMORY = 1_000_000
"""Characters of words kept (about 40 MB); beyond it the memory starts anew."""

# A word with the one space before it. It goes on over every other kind of white space, since tokenizers look ahead
# there, except that it may end after a single newline.
_WORD = re.compile(r"\s*\S+(?:(?! \S|\n\S)\s+\S+)*(?:\n(?=\S)|\s+$)?")
# The same, faster, for text whose only white space is single spaces and single newlines.
_PLAIN_WORD = re.compile(r"\s?\S+\n?")
_NOT_PLAIN = re.compile(r"\s(?:\s|(?<=[^ \n])|(?<=[^\n])\Z)")

# Split patterns under which a token begins before each single space between two words, whatever the words, and ends
# after each single newline between two words.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = (_GPT4 % "{1,3}", _GPT4 % "", "[0-9][0-9][0-9]")


class Words:
    """Ids of texts, through a memory of words in front of `encode`. Only for tokenizers that `keeps_words_apart`."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode = encode
        self._known: dict[str, list[int]] = {}
        self._size = 0

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [words_of(text) for text in texts]
        if self._size > MEMORY:
            self._known, self._size = {}, 0
        # Not `set - dict.keys()`, which walks all that is known.
        if new := [word for word in set(chain.from_iterable(rows)) if word not in self._known]:
            self._known.update(zip(new, self._encode(new), strict=True))
            self._size += sum(map(len, new))
        return [list(chain.from_iterable(map(self._known.__getitem__, row))) for row in rows]


def words_of(text: str) -> list[str]:
    """`text` in pieces that may be encoded apart."""
    return (_WORD if _NOT_PLAIN.search(text) else _PLAIN_WORD).findall(text) or [text]


def keeps_words_apart(data: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is known to encode words separately: a byte-level one with a split pattern we know, no
    normalizer that rewrites spaces, and no added token that reaches over a space."""
    if not _is_safe_normalizer(data.get("normalizer")) or any(_reaches_out(t) for t in data.get("added_tokens") or []):
        return False
    parts = _parts(data.get("pre_tokenizer"))
    return any(_finds_words(part) for part in parts) and all(_is_safe_split(part) for part in parts)


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _is_safe_normalizer(normalizer: dict[str, Any] | None) -> bool:
    return normalizer is None or normalizer["type"] == "NFC"


def _reaches_out(token: dict[str, Any]) -> bool:
    content = token["content"]
    return bool(token["lstrip"] or token["rstrip"] or (" " in content and not content.isspace()))


def _finds_words(part: dict[str, Any]) -> bool:
    return bool(part.get("use_regex", True)) if part["type"] == "ByteLevel" else _pattern(part) in _SPLITS[:2]


def _is_safe_split(part: dict[str, Any]) -> bool:
    if part["type"] == "ByteLevel":
        return not part["add_prefix_space"]
    return part["type"] in ("Digits", "Punctuation") or (part["type"] == "Split" and _pattern(part) in _SPLITS)


def _pattern(part: dict[str, Any]) -> str | None:
    pattern: str | None = (part.get("pattern") or {}).get("Regex")
    return pattern
