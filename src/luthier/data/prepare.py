"""The whole journey of the data: files to rows to conversations to tokens, in one pass and in bounded memory.

Nothing is lost silently: every row that does not arrive is counted by reason in `report.json` and named in
`dropped.jsonl`; rows that were shortened are in `cut.jsonl`, rows found among the test rows in `leaks.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from luthier import recipe
from luthier.data.clean import Cleaner
from luthier.data.conversation import Conversation, Example, Origin, Row, from_json, to_json
from luthier.data.duplicates import Duplicates, Leaks, NearDuplicates, common_shingles, fingerprint
from luthier.data.encode import encode
from luthier.data.formats import converter, resolve
from luthier.data.sources import read
from luthier.data.store import TokenStore, Writer
from luthier.data.templates import Template, load_template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.errors import DataError, LuthierError
from luthier.registry import nearest
from luthier.strict import dumps

Progress = Callable[[str, int], None]

_SAMPLE = 64  # rows that are looked at to find the format
_CHUNK = 1024  # rows that are encoded together
_SHOWN = 5  # places that an error names
_COMMON = 2000  # rows that show which shingles belong to an instruction repeated in every row
_HELDOUT_CHECKED = 10_000  # the most held-out rows that training rows are compared with

# The policy that decides about each reason to drop a row, and so what to write in the recipe to let it go.
_POLICIES = {
    "bad_row": "data.bad_rows=drop",
    "unsupervised": "data.bad_rows=drop",
    "too_long": "data.too_long=drop, or a larger data.length",
    "leak": "data.leaks=drop",
    "near_leak": "data.leaks=drop",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's data: token stores, the report and the encoder that made them."""

    folder: Path
    train: TokenStore
    heldout: TokenStore
    report: dict[str, Any]
    encoder: Encoder

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> Prepared:
        """Raises DataError where the folder does not hold prepared data."""
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            made = json.loads((folder / "template.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError("holds no prepared data", where=str(folder), fix="run `luthier data` first") from error
        encoder = Encoder(tokenizer, Template.from_spec(made["template"], tokenizer), made["supervise"], made["system"])
        return cls(folder, TokenStore.open(folder / "train"), TokenStore.open(folder / "heldout"), report, encoder)

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """float64 [len(train)]: how often each row is seen an epoch; None where every row is seen once."""
        by_file = {f["path"]: f["weight"] for f in self.report["files"] if f["part"] == "train"}
        return self.train.by_file(by_file) if set(by_file.values()) != {1.0} else None

    def changed(self, root: Path) -> list[str]:
        """The files that no longer hold what was prepared. One that is gone does not count, nor a hub data set."""
        files = {f["path"]: f["sha256"] for f in self.report["files"] if (root / f["path"]).is_file()}
        return [path for path, before in files.items() if sha256_of(root / path) != before]


def test_conversations(folder: Path) -> list[Conversation]:
    """The test rows of prepared data, in the order of their files."""
    return list(_conversations(folder / "test.jsonl"))


def with_columns(conversation: Conversation, values: dict[str, Any], names: Sequence[str]) -> Conversation:
    """The conversation with the row's values of the columns `names` in its `meta`; lists and mappings are no values."""
    found = {name: values[name] for name in names if _is_value(values.get(name))}
    return replace(conversation, meta={**conversation.meta, "columns": found}) if found else conversation


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float)


def heldout_conversations(folder: Path) -> list[Conversation]:
    """The rows set aside for the evaluation loss, as conversations."""
    return list(_conversations(folder / "heldout.jsonl"))


def prepare(
    data: recipe.Data,
    tokenizer: Tokenizer,
    *,
    seed: int,
    folder: Path,
    root: Path | None = None,
    progress: Progress | None = None,
    template: dict[str, Any] | None = None,
    keep: Sequence[str] = (),
) -> Prepared:
    """Reads, converts, cleans, deduplicates, checks for leaks, encodes and splits the data; writes it to `folder`.
    `template` is the spec of one that was made before, with its day, to take instead of the one that `data` names.
    `keep` names columns whose values stay with test and held-out rows, under `meta` (`evaluate.slices`).

    Test rows may lack answers. A training row leaks if a test row has its prompt or its text, exactly or with a Jaccard
    similarity of word 3-shingles of 0.8 or more; training rows are compared with the held-out rows in the same way.

    Raises DataError where a row is bad and the recipe refuses bad rows (it names the first places and the count), where
    no test row (without test rows: no row) has a value of a column to keep, and where no rows are left. The folder
    appears when all is done; a failure leaves the old one as it was.
    """
    made = Template.from_spec(template, tokenizer) if template else load_template(data.template, tokenizer)
    encoder = Encoder(tokenizer, made, data.supervise, data.system)
    with _aside(folder) as aside:
        with _Journey(data, encoder, seed, aside, root, progress or _silent, keep) as journey:
            report = journey.run()
        described = {"template": encoder.template.spec(), "supervise": data.supervise, "system": data.system}
        _write_json(aside / "template.json", described)
        _write_json(aside / "report.json", report)
    return Prepared.open(folder, tokenizer)


def _silent(stage: str, rows: int) -> None:
    pass


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Journey(ExitStack):
    """One pass over the data: a chain of generators over conversations, and what they count on the way."""

    def __init__(
        self,
        data: recipe.Data,
        encoder: Encoder,
        seed: int,
        folder: Path,
        root: Path | None,
        progress: Progress,
        keep: Sequence[str],
    ) -> None:
        super().__init__()
        self.data, self.encoder, self.folder, self.root, self.progress = data, encoder, folder, root, progress
        self.keep = keep
        self.cleaner = Cleaner(data.clean)
        self.files: list[dict[str, Any]] = []
        dropped = self._file("dropped.jsonl")
        self.train, self.test = _Ledger(dropped), _Ledger(dropped)
        self.cuts, self.leaks = self._file("cut.jsonl"), self._file("leaks.jsonl")
        self.duplicates, self.leaked = Counter(exact=0, near=0), Counter(exact=0, near=0)
        self.rows_cut = self.tokens_cut = 0
        self.split = _Split(data.heldout, seed, self._file("conversations.jsonl"))

    def _file(self, name: str) -> TextIO:
        return self.enter_context((self.folder / name).open("w", encoding="utf-8"))

    def run(self) -> dict[str, Any]:
        tests = list(self._read(self.data.test, self.test, answers=False))
        self.test.check()
        if tests:
            self._check_columns(self.test, "test row")
        _write_conversations(self.folder / "test.jsonl", tests)
        rows = self._distinct(self._read(self.data.train, self.train, answers=True))
        if self.data.clean.near_duplicates:
            rows = self._unlike(rows, self.data.clean.near_duplicates)
        with Writer(self.folder / "all") as store:
            for conversation, examples in self._encoded(self._unleaked(rows, tests)):
                self.split.add(conversation, len(examples))
                for example in examples:
                    store.add(example)
        held, near = self._set_apart()
        self.train.check()
        if not tests:
            self._check_columns(self.train, "row")
        if not np.count_nonzero(~held & ~near):
            raise self._nothing_left(int(held.sum()))
        return self._report(tests, *self._divide(held, near), held)

    # --- rows to conversations

    def _read(self, sources: Sequence[recipe.Source], ledger: _Ledger, *, answers: bool) -> Iterator[Conversation]:
        """Every source's rows as clean conversations; bad rows go to the ledger."""
        for source in sources:
            before, digest = ledger.read, hashlib.sha256()
            rows = _rows_and_faults(source, self.root, digest)
            first = list(_first_rows(rows))
            sample = [row for row in first if isinstance(row, Row)]
            if not sample:  # not one row that can be read: the first fault says more than their number
                raise next(fault.error for fault in first if isinstance(fault, _Fault))
            detection = resolve(self.data, sample, answers=answers)
            yield from self._convert(chain(first, rows), converter(self.data, detection, answers=answers), ledger)
            self.files.append(
                {
                    "path": source.path,
                    "part": "train" if answers else "test",
                    "format": detection.format,
                    "columns": detection.columns,
                    "rows": ledger.read - before,
                    "weight": source.weight,
                    "sha256": digest.hexdigest(),
                }
            )

    def _convert(
        self, rows: Iterable[Row | _Fault], convert: Callable[[Row], Conversation], ledger: _Ledger
    ) -> Iterator[Conversation]:
        for row in rows:
            ledger.read += 1
            if ledger.read % _CHUNK == 0:
                self.progress("reading", ledger.read)
            try:
                if isinstance(row, _Fault):
                    raise row.error
                conversation = with_columns(self.cleaner(convert(row)), row.values, self.keep)
                _check_not_emptied(conversation)
            except DataError as error:
                self._bad(ledger, row.origin, error)
            else:
                if self.keep:
                    ledger.columns.update(name for name, value in row.values.items() if _is_value(value))
                yield conversation

    def _check_columns(self, ledger: _Ledger, what: str) -> None:
        """Raises DataError with the nearest name for a column to keep that no row has a value of."""
        for name in self.keep:
            if name not in ledger.columns:
                names = sorted(ledger.columns)
                fix = nearest(name, names) if names else "leave it out: no row has such columns"
                raise DataError(f"no {what} has a value of '{name}'", where="evaluate.slices", fix=fix)

    def _bad(self, ledger: _Ledger, origin: Origin, error: LuthierError) -> None:
        detail = re.sub(r"^:(\d+)(?=:)", r": column \1", str(error).removeprefix(str(origin))).removeprefix(": ")
        ledger.drop("bad_row", origin, detail, refuse=self.data.bad_rows == "refuse")

    # --- conversations that stay

    def _distinct(self, rows: Iterator[Conversation]) -> Iterator[Conversation]:
        """Counts rows whose text was seen before, and drops them as the recipe says."""
        seen, origins = Duplicates(), _Origins()
        for conversation in rows:
            origins.add(conversation.origin)
            first = seen.add(conversation)
            self.duplicates["exact"] += first is not None
            if first is not None and self.data.clean.duplicates == "drop":
                self.train.drop("duplicate", conversation.origin, f"the same text as {origins[first]}")
            else:
                yield conversation

    def _unlike(self, rows: Iterator[Conversation], threshold: float) -> Iterator[Conversation]:
        """Drops rows that are nearly the same as an earlier one."""
        sample = list(islice(rows, _COMMON))
        seen, origins = self.enter_context(closing(NearDuplicates(threshold, common_shingles(sample)))), _Origins()
        for conversation in chain(sample, rows):
            origins.add(conversation.origin)
            if (first := seen.add(conversation)) is None:
                yield conversation
            else:
                self.duplicates["near"] += 1
                self.train.drop("near_duplicate", conversation.origin, f"much like {origins[first]}")

    def _unleaked(self, rows: Iterator[Conversation], tests: Sequence[Conversation]) -> Iterator[Conversation]:
        leaks = Leaks(tests) if tests else None
        for conversation in rows:
            if leaks is None or not self._leaks(leaks, conversation, tests, refuse=self.data.leaks == "refuse"):
                yield conversation

    def _leaks(self, leaks: Leaks, conversation: Conversation, others: Sequence[Conversation], *, refuse: bool) -> bool:
        """Counts and lists a row that gives one of the others away; whether it is to be dropped for it."""
        leak = leaks.find(conversation)
        if leak is None:
            return False
        near = leak.kind == "near"
        self.leaked["near" if near else "exact"] += 1
        origin, other = conversation.origin, others[leak.row].origin
        entry = {"file": origin.file, "line": origin.line, "of": str(other), "kind": leak.kind}
        _write_line(self.leaks, entry | {"similarity": round(leak.similarity, 4)})
        if self.data.leaks == "keep":
            return False
        detail = f"has {'nearly the text' if near else f'the {leak.kind}'} of {other}"
        self.train.drop("near_leak" if near else "leak", origin, detail, refuse=refuse)
        return True

    # --- tokens

    def _encoded(self, rows: Iterator[Conversation]) -> Iterator[tuple[Conversation, list[Example]]]:
        """Each row with its examples: one, or a long document's windows."""
        for chunk, encoded in encode(self.encoder, _chunks(rows)):
            for conversation, example in zip(chunk, encoded, strict=True):
                if isinstance(example, LuthierError):
                    self._bad(self.train, conversation.origin, example)
                elif examples := self._fitted(conversation, example):
                    yield conversation, examples
            self.progress("encoding", self.train.read)

    def _fitted(self, conversation: Conversation, example: Example) -> list[Example]:
        """The examples of a row, no longer than `data.length`; none where it is dropped."""
        if not any(example.supervised[1:]):
            refuse, fix = self.data.bad_rows == "refuse", "set data.supervise=all for texts without an answer"
            self.train.drop("unsupervised", conversation.origin, f"no token would be learned; {fix}", refuse=refuse)
            return []
        if len(example.ids) <= self.data.length:
            return [example]
        if conversation.messages[0].role == "document":
            return _windows(example, self.data.length)
        shorter = self._cut(conversation, example) if self.data.too_long == "cut" else None
        if shorter is None:
            detail = f"{len(example.ids):,} tokens, data.length is {self.data.length:,}"
            self.train.drop("too_long", conversation.origin, detail, refuse=self.data.too_long == "refuse")
            return []
        return [shorter]

    def _cut(self, conversation: Conversation, example: Example) -> Example | None:
        """The row with its last question cut at the end, then its answer; both keep at least a token, and the answer
        its end of turn. None where that is not enough."""
        if conversation.messages[0].role == "rendered":  # a cut could fall inside a control token
            return None
        shorter = example
        for part in range(len(conversation.prompt) - 1, len(conversation.messages)):
            # Tokens may join up anew where the text was cut, so that one round can miss by a few.
            while (over := len(shorter.ids) - self.data.length) > 0:
                before, conversation = conversation, _shortened(conversation, part, over, self.encoder.tokenizer)
                if conversation == before:
                    break
                shorter = self.encoder.examples([conversation])[0]
        if len(shorter.ids) > self.data.length:
            return None
        origin, cut = conversation.origin, len(example.ids) - len(shorter.ids)
        _write_line(self.cuts, {"file": origin.file, "line": origin.line, "tokens": cut})
        self.rows_cut += 1
        self.tokens_cut += cut
        return shorter

    # --- the split

    def _set_apart(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """bool [conversations] twice: held out; and left out of both sets because it gives a held-out row away."""
        held = self.split.held()
        near = np.zeros_like(held)
        wanted = np.flatnonzero(held)
        if 0 < len(wanted) <= _HELDOUT_CHECKED:
            heldout = [c for c, is_held in zip(self.split.conversations(), held, strict=True) if is_held]
            leaks = Leaks(heldout)
            for i, conversation in enumerate(self.split.conversations()):
                near[i] = not held[i] and self._leaks(leaks, conversation, heldout, refuse=False)
        return held, near

    def _divide(self, held: NDArray[np.bool_], near: NDArray[np.bool_]) -> tuple[TokenStore, TokenStore]:
        """The two stores, and the held-out rows as conversations; what was needed to make them goes."""
        counts = np.asarray(self.split.counts)
        rows_held, rows_near = np.repeat(held, counts), np.repeat(near, counts)
        everything = TokenStore.open(self.folder / "all")
        train = everything.select(self.folder / "train", np.flatnonzero(~rows_held & ~rows_near))
        heldout = everything.select(self.folder / "heldout", np.flatnonzero(rows_held))
        kept = (c for c, is_held in zip(self.split.conversations(), held, strict=False) if is_held)
        _write_conversations(self.folder / "heldout.jsonl", kept)
        shutil.rmtree(self.folder / "all")
        (self.folder / "conversations.jsonl").unlink()
        return train, heldout

    # --- the report

    def _nothing_left(self, held: int) -> DataError:
        reasons = (
            ", ".join(f"{reason} {count:,}" for reason, count in self.train.dropped.items()) or "none were dropped"
        )
        if held:
            reasons += f"; {held:,} held out"
        what = f"no rows are left to train on: {self.train.read:,} read; {reasons}"
        return DataError(what, fix="see data.length, data.leaks, data.heldout and data.clean")

    def _report(
        self, tests: Sequence[Conversation], train: TokenStore, heldout: TokenStore, held: NDArray[np.bool_]
    ) -> dict[str, Any]:
        total = len(train.ids) + len(heldout.ids)
        supervised = train.supervised_tokens + heldout.supervised_tokens
        kept = self.train.read - self.train.dropped.total()
        return {
            "rows": {"read": self.train.read, "kept": kept, "dropped": dict(self.train.dropped), "cut": self.rows_cut},
            "tokens": {"total": total, "supervised": supervised, "cut": self.tokens_cut},
            "supervised_share": supervised / total,
            "duplicates": dict(self.duplicates),
            "leaks": dict(self.leaked),
            "lengths": _lengths(np.concatenate([train.lengths, heldout.lengths])),
            "train": {"rows": len(train), "tokens": len(train.ids)},
            "heldout": {"rows": int(held.sum()), "examples": len(heldout), "tokens": len(heldout.ids)},
            "test": {
                "read": self.test.read,
                "rows": len(tests),
                "answered": sum(bool(t.references) or t.answer is not None for t in tests),
                "dropped": dict(self.test.dropped),
            },
            "cleaned": self.cleaner.counts,
            "files": self.files,
        }


@dataclass(frozen=True, slots=True)
class _Fault:
    """A row that could not be read."""

    origin: Origin
    error: DataError


def _rows_and_faults(source: recipe.Source, root: Path | None, digest: hashlib._Hash) -> Iterator[Row | _Fault]:
    """Rows and faults in the order of the file."""
    faults: list[_Fault] = []
    for row in read(source, root=root, digest=digest, bad=lambda *fault: faults.append(_Fault(*fault))):
        yield from faults
        faults.clear()
        yield row
    yield from faults


def _first_rows(rows: Iterator[Row | _Fault]) -> Iterator[Row | _Fault]:
    """As many as it takes to see the format."""
    seen = 0
    for row in rows:
        yield row
        seen += isinstance(row, Row)
        if seen == _SAMPLE:
            return


def _chunks(rows: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


class _Ledger:
    """Rows read, and rows that did not arrive: each is named in a file and counted; refused ones end the journey."""

    def __init__(self, out: TextIO) -> None:
        self._out, self.read = out, 0
        self.columns: set[str] = set()  # that some row which was not bad has a value of
        self.dropped: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def drop(self, reason: str, origin: Origin, detail: str, *, refuse: bool = False) -> None:
        self.dropped[reason] += 1
        _write_line(self._out, {"file": origin.file, "line": origin.line, "reason": reason, "detail": detail})
        if refuse:
            self._refused[reason] += 1
            places = self._places.setdefault(reason, [])
            if len(places) < _SHOWN:
                places.append(f"{origin}: {detail}")

    def check(self) -> None:
        """Raises DataError if a row was refused: the first places of each reason, and how many there are."""
        lines: list[str] = []
        for reason, count in self._refused.items():
            places = self._places[reason]
            lines += places
            if count > 1:
                lines.append(f"{count:,} rows in all are refused as {reason}")
        if lines:
            policies = " and ".join(dict.fromkeys(_POLICIES[reason] for reason in self._refused))
            them = "it" if len(lines) == 1 else "them"
            raise DataError("\n".join(lines), fix=f"repair {them}, or drop and count such rows with {policies}")


class _Origins:
    """Where rows came from, by number: 12 bytes a row."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._starts = array("q")  # the first row of each stretch from one file
        self._lines = array("q")

    def add(self, origin: Origin) -> None:
        if not self._names or self._names[-1] != origin.file:
            self._names.append(origin.file)
            self._starts.append(len(self._lines))
        self._lines.append(origin.line)

    def __getitem__(self, number: int) -> Origin:
        return Origin(self._names[bisect_right(self._starts, number) - 1], self._lines[number])


class _Split:
    """Decides which rows are held out: those with the smallest keys, where a key is a hash of the seed and the row's
    prompt. So the split depends on the rows and the seed only, not on their order, and rows that ask the same are on
    the same side."""

    def __init__(self, heldout: recipe.Heldout, seed: int, spool: TextIO) -> None:
        self._heldout, self._seed, self._spool = heldout, seed.to_bytes(8, "little"), spool
        self._wanted = bool(heldout.fraction or heldout.rows)
        self._keys = array("Q")
        self.counts = array("i")  # examples of each conversation

    def add(self, conversation: Conversation, examples: int) -> None:
        self.counts.append(examples)
        if self._wanted:
            asked = fingerprint(replace(conversation, messages=conversation.prompt))
            digest = blake2b(asked, digest_size=8, key=self._seed).digest()
            self._keys.append(int.from_bytes(digest, "little"))
            _write_line(self._spool, to_json(conversation))

    def held(self) -> NDArray[np.bool_]:
        """bool [conversations]"""
        rows = len(self.counts)
        wanted = max(self._heldout.rows, round(self._heldout.fraction * rows))
        if not rows or not wanted:
            return np.zeros(rows, np.bool_)
        keys = np.asarray(self._keys)
        last = min(wanted, rows) - 1
        held: NDArray[np.bool_] = keys <= np.partition(keys, last)[last]
        return held

    def conversations(self) -> Iterator[Conversation]:
        """Those added so far, read back from the spool; none where nothing is held out."""
        self._spool.flush()
        yield from _conversations(Path(self._spool.name))


def _check_not_emptied(conversation: Conversation) -> None:
    for i, message in enumerate(conversation.messages):
        if not message.tool_calls and message.role != "tool" and not message.content.strip():
            where = f"{conversation.origin}: turn {i + 1}"
            raise DataError("is empty once it is cleaned", where=where, fix="remove the row, or change data.clean")


def _windows(example: Example, length: int) -> list[Example]:
    """A long document cut into windows of at most `length` tokens. Each starts with the last token of the one before,
    so that every token of the document but its first is learned exactly once."""
    starts = range(0, len(example.ids) - 1, length - 1)
    return [
        Example(
            example.ids[s : s + length], example.supervised[s : s + length], max(example.prompt - s, 0), example.origin
        )
        for s in starts
    ]


def _shortened(conversation: Conversation, part: int, over: int, tokenizer: Tokenizer) -> Conversation:
    """The conversation with `over` tokens fewer at the end of one message, which keeps its first token."""
    message = conversation.messages[part]
    ends = [end for _, end in tokenizer.encode([message.content])[0][1]]
    kept = ends[max(len(ends) - over, 1) - 1] if ends else 0
    messages = list(conversation.messages)
    messages[part] = replace(message, content=message.content[:kept].rstrip() or message.content[:kept])
    return replace(conversation, messages=tuple(messages))


def _lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Tokens of an example: their spread, and a histogram of twenty equal bins."""
    counts, edges = np.histogram(lengths, bins=20)
    quantiles = np.percentile(lengths, [50, 90, 99]).tolist()
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        **dict(zip(("median", "p90", "p99"), quantiles, strict=True)),
        "max": int(lengths.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


# --- files of conversations ---------------------------------------------------------------------------------------


def _write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for conversation in conversations:
            _write_line(out, to_json(conversation))


def _conversations(path: Path) -> Iterator[Conversation]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield from_json(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                fix = f"restore it; or move {path.parent} away and write it again: luthier data {path.parent.parent}"
                raise DataError("is no conversation", where=f"{path}:{number}", fix=fix) from error


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_line(out: TextIO, value: dict[str, Any]) -> None:
    out.write(dumps(value, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
