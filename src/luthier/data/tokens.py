"""Text to ids and back, over the `tokenizers` library alone: the Tokenizer of a model folder, and the Encoder that
turns conversations into Examples.

Two rules hold here. Ordinary text never yields a control token, because the encoder that reads it does not know any.
And the ids of an inference prompt are the first ids of the training row, because wherever a template marks a border
between prompt and answer, no token is allowed to straddle it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tokenizers import Tokenizer as Backend

from luthier.data.conversation import Conversation, Example, Message, Origin, Segment
from luthier.data.words import Words, keeps_words_apart
from luthier.errors import DataError, ModelError, TemplateError

if TYPE_CHECKING:
    from luthier.data.templates import Rendering, Template

T = TypeVar("T")
Encoded = tuple[list[int], list[tuple[int, int]]]

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a model folder. `Tokenizer.load(folder)`.

    Attributes:
        control: name -> id of every control token: each special token, and each other added token that is markup
            (`<think>`). Added tokens without a bracket (words, runs of spaces) are ordinary vocabulary.
        special: the names among them that the tokenizer calls special.
        names: what chat templates call `bos_token`, `eos_token` …; absent ones are not in it.
        spec: JSON values from which `Tokenizer(**spec)` makes the same again.
        opening: the control tokens that the tokenizer itself puts before a text, usually none or `bos`.
        ends: the control tokens that generation stops at by the model's own settings, `eos` first.
        chat_template: the Jinja source of the chat template, or None.
    """

    def __init__(self, data: dict[str, Any], *, config: dict[str, Any] | None = None, eos_ids: Iterable[int] = ()):
        """Args: `data`, the content of tokenizer.json; `config`, of tokenizer_config.json with its `chat_template`."""
        config = config or {}
        eos_ids = list(eos_ids)
        self._data = data
        self.spec: dict[str, Any] = {"data": data, "config": config, "eos_ids": eos_ids}
        self._backend = Backend.from_str(json.dumps(data))
        self.names = _names(config)
        added = {token["content"]: token for token in data.get("added_tokens") or []}
        self.special = {n for n, t in added.items() if t["special"]} | self._known(self.names.values())
        self.control = {n: self._id(n) for n in {*added, *self.special} if n in self.special or _is_markup(n)}
        self.strip_left = frozenset(n for n in self.control if added.get(n, {}).get("lstrip"))
        self.strip_right = frozenset(n for n in self.control if added.get(n, {}).get("rstrip"))
        self.chat_template = _template_text(config.get("chat_template"))
        self.bos, self.eos = (self._present(self.names.get(k)) for k in ("bos_token", "eos_token"))
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        self.opening = self._opening(config.get("add_bos_token"))
        by_id = {i: n for n, i in self.control.items()}
        stops = [self.eos, *(by_id.get(i) for i in eos_ids)]
        self.ends = tuple(dict.fromkeys(name for name in stops if name))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and what lies beside it. Raises ModelError naming the file that is missing or broken."""
        data = _read_json(folder / "tokenizer.json")
        if data is None:
            raise ModelError("has no tokenizer.json", where=str(folder), fix="take a model that ships a fast tokenizer")
        config = {**(_read_json(folder / "special_tokens_map.json") or {})}
        config |= {k: v for k, v in (_read_json(folder / "tokenizer_config.json") or {}).items() if v is not None}
        if (template := folder / "chat_template.jinja").is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        eos = (_read_json(folder / "generation_config.json") or {}).get("eos_token_id")
        try:
            return cls(data, config=config, eos_ids=eos if isinstance(eos, list) else [] if eos is None else [eos])
        except ModelError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(f"cannot be used ({error})", where=str(folder / "tokenizer.json")) from error

    def extended(self, tokens: Sequence[str]) -> Tokenizer:
        """The same with `tokens` after its last one, in their order. Those with a bracket (`<|step|>`) are control
        tokens, for templates and never of ordinary text; others are found in text.

        Raises ModelError for a token that it has.
        """
        if not tokens:
            return self
        for i, token in enumerate(tokens):
            if not token or token in tokens[:i] or self._backend.token_to_id(token) is not None:
                raise ModelError(f"'{token}' is no new token", where="adapter.new_tokens", fix="leave it out")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        added = [{"id": self.vocab_size + i, "content": token, **flags} for i, token in enumerate(tokens)]
        data = {**self._data, "added_tokens": [*(self._data.get("added_tokens") or []), *added]}
        return Tokenizer(**{**self.spec, "data": data})

    def id(self, token: str) -> int:
        """The id of a token by its exact name. Raises ModelError if there is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise ModelError(f"the tokenizer has no token '{token}'", fix="check its spelling")
        return found

    def save(self, folder: Path) -> None:
        """Writes what `load` reads, in transformers' own files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tree in (("tokenizer.json", self._data), ("tokenizer_config.json", self.spec["config"])):
            (folder / name).write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character offsets of ordinary texts, each from its beginning. Never yields a control id."""
        encodings = _run(self._plain.encode_batch, texts)
        self._check([e.ids for e in encodings], texts)
        return [(e.ids, e.offsets) for e in encodings]

    def ids(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """The same without offsets, faster. `start=False`: the texts go on from other text, so that a tokenizer which
        puts a space before a text's first word must not."""
        if self._words is not None:
            return self._words.ids(texts)
        return self._fast(self._plain if start else self._inner, texts)

    def _fast(self, encoder: Backend, texts: Sequence[str]) -> list[list[int]]:
        ids = [e.ids for e in _run(encoder.encode_batch_fast, texts)]
        self._check(ids, texts)
        return ids

    @cached_property
    def _words(self) -> Words | None:
        return Words(partial(self._fast, self._plain)) if keeps_words_apart(self._plain_data) else None

    def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
        """The text of ids; with `control`, special tokens are written out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not control))

    @cached_property
    def spaced_after_control(self) -> bool:
        """Whether text after a control token is encoded like the start of a text (it differs for SentencePiece)."""
        return '"prepend_scheme": "first"' not in json.dumps(self._data.get("pre_tokenizer"))

    @cached_property
    def _plain_data(self) -> dict[str, Any]:
        return _without_control(self._data, self.control)

    @cached_property
    def _plain(self) -> Backend:
        return Backend.from_str(json.dumps(self._plain_data))

    @cached_property
    def _inner(self) -> Backend:
        bare = self._plain_data | {k: _without_prefix(self._data.get(k)) for k in ("normalizer", "pre_tokenizer")}
        return self._plain if bare == self._plain_data else Backend.from_str(json.dumps(bare))

    @cached_property
    def _forbidden(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [vocab_size]: ids that ordinary text must not have. Unknown words have the unknown token, if that is
        all it is for."""
        table = np.zeros(self.vocab_size, dtype=np.bool_)
        unknown = {_unknown(self._data["model"])} - {self.bos, self.eos}
        table[[i for name, i in self.control.items() if name not in unknown]] = True
        return table

    def _check(self, batch: list[list[int]], texts: Sequence[str]) -> None:
        flat = np.fromiter((i for ids in batch for i in ids), dtype=np.int64)
        if not self._forbidden[flat].any():
            return
        text = next(t for ids, t in zip(batch, texts, strict=True) if self._forbidden[ids].any())
        raise DataError(f"ordinary text would become a control token: {text[:80]!r}", fix="remove it from the row")

    def _known(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self._backend.token_to_id(name) is not None}

    def _present(self, name: str | None) -> str | None:
        return name if name in self.control else None

    def _id(self, name: str) -> int:
        found = self._backend.token_to_id(name)
        assert found is not None, name
        return found

    def _opening(self, add_bos: bool | None) -> tuple[str, ...]:
        if add_bos is not None:
            return (self.bos,) if add_bos and self.bos else ()
        tokens = self._backend.encode("", add_special_tokens=True).tokens
        return tuple(t for t in tokens if t in self.control and t != self.eos)


class Encoder:
    """Conversations to ids by one template: the same for training, evaluation and chat.

    `apart` counts the rows in which a token would have straddled the border between prompt and answer, so that the
    two sides were encoded apart.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, supervise: str = "answers", system: str | None = None):
        self.tokenizer, self.template, self.supervise, self.system = tokenizer, template, supervise, system
        self.stop_ids = frozenset(tokenizer.control[name] for name in template.stops)
        self.apart = 0

    def examples(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Training rows. An Example may supervise nothing (a row without an answer): the caller counts and drops it.

        Raises TemplateError or DataError with the row's file and line.
        """
        return _all_or_each(self._examples, conversations)

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """What inference is given to write each conversation's last answer. Raises as `examples` does."""
        return _all_or_each(self._prompts, conversations)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a generated answer, without special tokens and without the template's own end marks."""
        return self.template.finish(self.tokenizer.decode(ids))

    def _examples(self, conversations: Sequence[Conversation]) -> list[Example]:
        rendered = [self.template.rendering(self._with_system(c), self.supervise) for c in conversations]
        encoded = self._encode([r.segments for r in rendered])
        return [
            _example(r, ids, ends, c.origin) for r, (ids, ends), c in zip(rendered, encoded, conversations, strict=True)
        ]

    def _prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        rows = [self._with_system(c) for c in conversations]
        return [ids for ids, _ in self._encode([self.template.prompt(row.prompt, row.tools) for row in rows])]

    def _with_system(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        if self.system is None or not messages or messages[0].role in ("system", "document", "rendered"):
            return conversation
        return replace(conversation, messages=(Message("system", self.system), *messages))

    def _encode(self, rows: Sequence[Sequence[Segment]]) -> list[_Ids]:
        """Every distinct text is encoded once."""
        keys = [self._keys(row) for row in rows]
        wanted = dict.fromkeys(key for row in keys for key in row if key)
        table: dict[_Key, list[int]] = {}
        for start in (True, False):
            texts = [text for text, at_start in wanted if at_start is start]
            table.update(zip(((text, start) for text in texts), self.tokenizer.ids(texts, start=start), strict=True))
        return [self._row(row, row_keys, table) for row, row_keys in zip(rows, keys, strict=True)]

    def _keys(self, row: Sequence[Segment]) -> list[_Key | None]:
        """For each text segment, the text from the last control token up to its end; None for control tokens."""
        keys: list[_Key | None] = []
        text, start = "", True
        for segment in row:
            text = "" if segment.control else text + segment.text
            start = self.tokenizer.spaced_after_control if segment.control else start
            keys.append(None if segment.control else (text, start))
        return keys

    def _row(self, row: Sequence[Segment], keys: list[_Key | None], table: dict[_Key, list[int]]) -> _Ids:
        ids: list[int] = []
        ends: list[int] = []
        stretch = 0  # where the text since the last control token begins in ids
        for segment, key in zip(row, keys, strict=True):
            if key is None:
                ids.append(self.tokenizer.control[segment.text])
                stretch = len(ids)
            else:
                ids += self._continue(ids[stretch:], table[key], segment.text)
            ends.append(len(ids))
        return ids, ends

    def _continue(self, before: list[int], whole: list[int], text: str) -> list[int]:
        """The ids that follow `before`: the rest of `whole`, or, if a token straddles the border, those of `text`."""
        if not before:
            return whole
        if whole[: len(before)] == before:
            return whole[len(before) :]
        self.apart += 1
        return self.tokenizer.ids([text], start=False)[0]


_Key = tuple[str, bool]  # a text, and whether it is encoded like the start of a text
_Ids = tuple[list[int], list[int]]  # the ids of a row, and where in them each segment ends


def _all_or_each(work: Callable[[Sequence[Conversation]], list[T]], rows: Sequence[Conversation]) -> list[T]:
    """`work` on all rows at once; if one is at fault, on each, so that the error names its file and line."""
    try:
        return work(rows)
    except (TemplateError, DataError) as error:
        if len(rows) > 1:
            return [one for row in rows for one in _all_or_each(work, [row])]
        raise type(error)(error.what, where=str(rows[0].origin), fix=error.fix) from error


def _example(rendering: Rendering, ids: list[int], ends: list[int], origin: Origin) -> Example:
    supervised: list[int] = []
    for segment, end in zip(rendering.segments, ends, strict=True):
        supervised += [int(segment.supervised)] * (end - len(supervised))
    return Example(ids, supervised, ends[rendering.prompt - 1] if rendering.prompt else 0, origin)


def _run(encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
    try:
        return encode(list(texts), add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:  # Rust has no text with half a surrogate pair in it
        raise DataError("text holds half of a character", fix="read the file as UTF-8") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"is not valid JSON ({error})", where=str(path), fix="fetch the model again") from error
    if not isinstance(data, dict):
        raise ModelError("is not a JSON object", where=str(path), fix="fetch the model again")
    return data


def _names(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` … as text: files write them as text or as {"content": text}."""
    values = {key: config.get(key) for key in _NAMED}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _template_text(value: Any) -> str | None:
    """A chat template is a text, or a list of named ones of which `default` is meant."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _is_markup(name: str) -> bool:
    return any(c in name for c in "<>[]{}|")


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that a tokenizer.json model gives to what its vocabulary cannot spell."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token: str | None = model.get("unk_token")
    return token


def _without_control(data: dict[str, Any], control: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json that reads text as text: control tokens keep their ids under names that text does not hold, in
    the added tokens as in the model; no post-processor."""
    added = [{**t, "content": _hidden(t["content"], control)} for t in data.get("added_tokens") or []]
    off = {"post_processor": None, "truncation": None, "padding": None}
    return {**data, **off, "added_tokens": added, "model": _model_without(data["model"], control)}


def _hidden(name: str, control: Container[str]) -> str:
    # U+FFFF is a noncharacter: text holds it only by intent, and then the check of ids still refuses the row.
    return f"\uffff{name}\uffff" if name in control else name


def _model_without(model: dict[str, Any], control: dict[str, int]) -> dict[str, Any]:
    model, vocab = dict(model), model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] by id
        model["vocab"] = [[_hidden(piece, control), score] for piece, score in vocab]
    else:
        model["vocab"] = {_hidden(piece, control): i for piece, i in vocab.items()}
    if model.get("unk_token"):
        model["unk_token"] = _hidden(model["unk_token"], control)
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if not _touches(m, control)]
    return model


def _touches(merge: str | list[str], control: dict[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left + right in control or left in control or right in control


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before the first word."""
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            return {**part, key: [p for p in map(_without_prefix, part[key]) if p is not None]}
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part
