"""Files, streams and hub data sets as rows: one at a time, each with the place it came from.

A fault of a whole file (missing, damaged, not UTF-8) ends the reading. A fault of one row is raised too, or handed to
`bad` where the caller counts such rows and goes on. Every fault is a DataError that names the file, the line and, where
there is one, the column, byte or field.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from luthier.data.conversation import Origin, Row
from luthier.errors import DataError
from luthier.recipe import Source
from luthier.registry import counted, nearest_path

if TYPE_CHECKING:
    from hashlib import _Hash

Bad = Callable[[Origin, DataError], None]
"""Is told of a row that cannot be read: where it is and what is wrong with it."""

_CHUNK = 1 << 20
_DOCUMENT = 4 << 20  # characters: a longer text file becomes several documents, each ending at a line's end
_BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_DAMAGED = (EOFError, OSError, zlib.error)
# In JSON text: an escape that may stand for half a surrogate pair or for NUL. Most rows have none, and are not walked.
_SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_SPACE = re.compile(r"[ \t\r\n]*")


def read(
    source: Source, *, root: Path | None = None, digest: _Hash | None = None, bad: Bad | None = None
) -> Iterator[Row]:
    """The rows of a source, in order.

    Args:
        source: a path (relative to `root`), `-` for standard input, or `hub:NAME`.
        root: the folder that relative paths start from; the current one by default.
        digest: is fed the bytes of the file as stored (of a hub data set: its rows as JSON).
        bad: is given the fault of each row that cannot be read; without it the first one is raised.

    Raises:
        DataError: the file is missing, empty, damaged or of an unknown kind, or a row is bad and there is no `bad`.
    """
    found = 0

    def count(origin: Origin, error: DataError) -> None:
        nonlocal found
        found += 1
        (bad or _raise)(origin, error)

    for row in _rows(source, root, digest or hashlib.sha256(), count):
        found += 1
        yield row
    if not found:
        raise DataError("holds no rows", where=source.path, fix="check that this is the right file")


def _raise(origin: Origin, error: DataError) -> NoReturn:
    raise error


def _rows(source: Source, root: Path | None, digest: _Hash, bad: Bad) -> Iterator[Row]:
    if source.path.startswith("hub:"):
        yield from _hub(source, digest, bad)
        return
    with _opened(source.path, root, digest) as file:
        reader = _READERS.get(file.suffix)
        if reader is None:
            kinds = " ".join(sorted(_READERS))
            raise DataError(
                f"unknown kind of file '{file.suffix}'", where=file.name, fix=f"known: {kinds}, also .gz, .zst"
            )
        _check_is_data(file)
        yield from reader(file, bad)
        while file.stored.read(_CHUNK):  # the digest is of the whole file, also of what no reader asked for
            pass


def _check_is_data(file: _File) -> None:
    """Raises DataError for what downloads leave in a file's place: a pointer to it, or a web page."""
    start = file.stored.peek(1 << 10)[: 1 << 10].lower().lstrip()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        fix = "fetch the file itself: git lfs pull"
        raise DataError("is a Git LFS pointer, not the data", where=file.name, fix=fix)
    if start.startswith((b"<!doctype html", b"<html")) and file.suffix not in (".txt", ".md"):
        raise DataError("is a web page, not the data", where=file.name, fix="download the file itself")


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    suffix: str
    path: Path
    stored: io.BufferedReader[Any]
    """The bytes as stored, hashed as they are read."""
    content: io.BufferedIOBase
    """The bytes after decompression."""
    plain: bool = True
    """Whether they are the same."""


def _opened(path: str, root: Path | None, digest: _Hash) -> AbstractContextManager[_File]:
    if path == "-":
        return nullcontext(_standard_input(digest))
    full = (root or Path()) / path
    try:
        handle = full.open("rb")
    except OSError as error:
        fix = nearest_path(Path(path), root=root) or "check the path"
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix=fix) from error
    return _close_after(_uncompressed(path, full, io.BufferedReader(_Hashing(handle, digest))))


def _close_after(file: _File) -> AbstractContextManager[_File]:
    class Closing(closing[Any]):
        def __enter__(self) -> _File:
            return file

    return Closing(file.stored)


def _standard_input(digest: _Hash) -> _File:
    stream = io.BufferedReader(_Hashing(sys.stdin.buffer, digest), _CHUNK)
    start = stream.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    suffix = {b"{": ".jsonl", b"[": ".json"}.get(start, ".txt")
    return _File("-", suffix, Path("-"), stream, stream)


def _uncompressed(name: str, path: Path, stored: io.BufferedReader) -> _File:
    suffixes = [s.lower() for s in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
    content: io.BufferedIOBase = stored
    if packing == ".gz":
        content = gzip.GzipFile(fileobj=stored)
    elif packing == ".zst":
        content = io.BufferedReader(_Zstd(stored), _CHUNK)
    return _File(name, suffixes[-1] if suffixes else "", path, stored, content, plain=not packing)


class _Hashing(io.RawIOBase):
    """Passes bytes on and feeds them to a digest."""

    def __init__(self, inner: BinaryIO, digest: _Hash) -> None:
        self.inner, self.digest = inner, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        return len(data)

    def close(self) -> None:
        if self.inner is not sys.stdin.buffer:
            self.inner.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Decompresses frame by frame. Unlike zstandard's own reader it notices a file that was cut short."""

    def __init__(self, inner: io.BufferedReader) -> None:
        zstandard = _optional("zstandard", "zstd", "a .zst file")
        self._errors, self._new = zstandard.ZstdError, zstandard.ZstdDecompressor().decompressobj
        self._inner, self._frame, self._ready = inner, None, b""
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._inner.read(_CHUNK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            self._feed(packed)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _feed(self, packed: bytes) -> None:
        frame = self._frame or self._new()
        try:
            self._ready = frame.decompress(packed)
        except self._errors as error:
            raise OSError(str(error)) from error
        self._frame, self._rest = (None, frame.unused_data) if frame.eof else (frame, b"")


def _optional(module: str, extra: str, what: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise DataError(f"{what} needs {module.partition('.')[0]}", fix=f"pip install 'luthier[{extra}]'") from error


# --- text ---------------------------------------------------------------------------------------------------------


def _lines(file: _File, bad: Bad) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, each with its newline: UTF-8, no byte order mark, `\\r\\n` as `\\n`."""
    number = 0
    while True:
        number += 1
        try:
            raw = file.content.readline()
        except _DAMAGED as error:
            raise _damaged(f"{file.name}:{number}", error) from error
        if number == 1:
            raw = _without_mark(raw, file.name)
        if not raw:
            return
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            bad(Origin(file.name, number), _not_utf8(f"{file.name}:{number}", raw[error.start], error.start + 1))
            continue
        if "\0" in line:
            where = f"{file.name}:{number}:{line.index(chr(0)) + 1}"
            bad(Origin(file.name, number), DataError("holds a NUL character", where=where, fix="remove it"))
            continue
        yield number, line[:-2] + "\n" if line.endswith("\r\n") else line


def _damaged(where: str, error: BaseException) -> DataError:
    return DataError(f"is damaged or cut short ({error})", where=where, fix="copy or download the file again")


def _not_utf8(where: str, value: int, byte: int) -> DataError:
    return DataError(f"is not UTF-8 (0x{value:02x} at byte {byte})", where=where, fix="save the file as UTF-8")


def _without_mark(raw: bytes, name: str) -> bytes:
    if raw[:2] in _BYTE_ORDER_MARKS:
        raise DataError(f"is {_BYTE_ORDER_MARKS[raw[:2]]}, not UTF-8", where=name, fix="save the file as UTF-8")
    return raw.removeprefix(codecs.BOM_UTF8)


def _text(file: _File, bad: Bad) -> Iterator[Row]:
    """One row with `text` a file; of a very long file, a row for every few million characters."""
    first, size, lines = 1, 0, list[str]()
    for number, line in _lines(file, _raise):
        lines.append(line)
        size += len(line)
        if size >= _DOCUMENT:
            yield from _document(file, first, lines)
            first, size, lines = number + 1, 0, []
    yield from _document(file, first, lines)


def _document(file: _File, first: int, lines: list[str]) -> Iterator[Row]:
    text = "".join(lines)
    if text.strip():
        yield Row({"text": text}, Origin(file.name, first))


# --- JSON ---------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that stands twice, json would keep the last value and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in found if names.count(name) > 1))
    return found


class _TwiceError(ValueError):
    """An object has a key, the argument, twice."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _jsonl(file: _File, bad: Bad) -> Iterator[Row]:
    for number, line in _lines(file, bad):
        text = line.strip()
        if not text:
            continue
        origin = Origin(file.name, number)
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            bad(origin, _broken_json(str(origin), error))
            continue
        if row := _record(value, text, origin, bad):
            yield row


def _broken_json(where: str, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(
            f"broken JSON: {error.msg}", where=f"{where}:{error.colno}", fix="each line is one object {...}"
        )
    if isinstance(error, _TwiceError):
        return DataError(f"the key '{error}' stands twice in one object", where=where, fix="keep one of them")
    return DataError(f"JSON that cannot be read ({type(error).__name__})", where=where, fix="remove this row")


def _record(value: Any, text: str, origin: Origin, bad: Bad) -> Row | None:
    """The row that JSON `text` stands for, if it is an object of clean text."""
    if isinstance(value, DataError):
        bad(origin, value)
        return None
    if not isinstance(value, dict):
        bad(
            origin,
            DataError(f"is {kind(value)}, not an object", where=str(origin), fix="each row is {column: value, …}"),
        )
        return None
    return Row(value, origin) if not _SUSPECT.search(text) or _is_clean(value, origin, bad) else None


def _is_clean(value: dict[str, Any], origin: Origin, bad: Bad) -> bool:
    flaw = _flaw(value)
    if flaw:
        bad(origin, DataError(flaw[1], where=f"{origin}: {flaw[0]}", fix="remove it"))
    return not flaw


def _flaw(value: Any, path: str = "") -> tuple[str, str] | None:
    """The first string with a lone surrogate or a NUL, as (field, what is wrong); None where all is well."""
    if isinstance(value, str):
        if "\0" in value:
            return path, "holds a NUL character"
        lone = re.search("[\ud800-\udfff]", value)
        return (path, f"holds half of a surrogate pair (\\u{ord(lone[0]):04x})") if lone else None
    parts: Any = ()
    if isinstance(value, dict):
        parts = ((f"{path}.{k}" if path else str(k), v) for k, v in value.items())
    elif isinstance(value, list):
        parts = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    return next((flaw for name, part in parts if (flaw := _flaw(part, name))), None)


def _json(file: _File, bad: Bad) -> Iterator[Row]:
    """An array of objects, an object that holds one list of objects, one object alone, or JSON lines."""
    cursor = _Cursor(file)
    if not cursor.peek():
        return
    if cursor.peek() == "[":
        yield from _elements(cursor, bad)
    else:
        yield from _objects(cursor, bad)
    if cursor.peek():
        raise DataError("text after the end of the JSON value", where=cursor.place(), fix="is this file JSON lines?")


def _elements(cursor: _Cursor, bad: Bad) -> Iterator[Row]:
    cursor.take("[")
    while cursor.peek() != "]":
        if row := _next_record(cursor, bad):
            yield row
        if cursor.peek() != "]":
            cursor.take(",")
    cursor.take("]")


def _next_record(cursor: _Cursor, bad: Bad) -> Row | None:
    origin = Origin(cursor.file.name, cursor.line)
    return _record(*cursor.value(), origin, bad)


def _objects(cursor: _Cursor, bad: Bad) -> Iterator[Row]:
    """One object after another (JSON lines under another name), or a single one: a row, or the holder of the rows."""
    origin = Origin(cursor.file.name, cursor.line)
    value, text = cursor.value()
    alone = not cursor.peek()
    if alone and isinstance(value, DataError):  # it may have held all rows
        raise value
    held = _held_rows(value, origin) if alone and isinstance(value, dict) else None
    numbered = enumerate(held, 1) if held is not None else [(origin.line, value)]
    for line, each in numbered:
        if row := _record(each, text, Origin(origin.file, line), bad):
            yield row
    while cursor.peek():
        if row := _next_record(cursor, bad):
            yield row


def _held_rows(value: dict[str, Any], origin: Origin) -> list[Any] | None:
    """The one list of objects that `value` holds; None where `value` is itself a row."""
    turns = {"messages", "conversations", "conversation"}
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if not lists or turns & lists.keys():
        return None
    if len(lists) > 1:
        names = ", ".join(lists)
        raise DataError(f"holds several lists of rows ({names})", where=str(origin), fix="save one of them as a file")
    return next(iter(lists.values()))


class _Cursor:
    """A place in JSON text that is read as it is needed, so that a large array never lies in memory whole."""

    def __init__(self, file: _File) -> None:
        self.file, self.line = file, 1
        self._text, self._at, self._column, self._end = "", 0, 1, False
        self._bytes = 0
        self._decode = codecs.getincrementaldecoder("utf-8")()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # none at all is a match too
            self._advance(space.end())
            if self._at < len(self._text) or not self._more(_CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise DataError(f"broken JSON: '{character}' expected", where=self.place(), fix="repair the file")
        self._advance(self._at + 1)

    def value(self) -> tuple[Any, str]:
        """The next value, or the DataError that it has a key twice, and the text it was read from."""
        self.peek()
        size, decoder, twice = _CHUNK, _DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except _TwiceError as error:
                twice, decoder = _broken_json(self.place(), error), json.JSONDecoder()  # which finds its end
                continue
            except (ValueError, RecursionError) as error:
                # Perhaps only cut off: double the look-ahead, so that this stays linear.
                if self._more(size):
                    size *= 2
                    continue
                raise self._broken(error) from error
            text = self._text[self._at : end]
            self._advance(end)
            return twice or value, text

    def place(self) -> str:
        return f"{self.file.name}:{self.line}:{self._column}"

    def _broken(self, error: Exception) -> DataError:
        if isinstance(error, json.JSONDecodeError):
            self._advance(error.pos)
            return DataError(f"broken JSON: {error.msg}", where=self.place(), fix="repair the file")
        return _broken_json(self.place(), error)

    def _advance(self, to: int) -> None:
        newlines = self._text.count("\n", self._at, to)
        self._column = to - self._text.rfind("\n", self._at, to) if newlines else self._column + to - self._at
        self.line += newlines
        self._at = to

    def _more(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        if self._end:
            return False
        try:
            raw = self.file.content.read(size)
        except _DAMAGED as error:
            raise _damaged(self.place(), error) from error
        self._end = not raw
        start, self._bytes = self._bytes, self._bytes + len(raw)
        if not start:
            raw = _without_mark(raw, self.file.name)
        self._text, self._at = self._text[self._at :] + self._decoded(raw, start), 0
        return True

    def _decoded(self, raw: bytes, start: int) -> str:
        try:
            return self._decode.decode(raw, final=self._end)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            byte = start + len(raw) - len(error.object) + error.start + 1
            raise _not_utf8(f"{self.file.name}:{line}", error.object[error.start], byte) from error


# --- tables -------------------------------------------------------------------------------------------------------


def _csv(file: _File, bad: Bad) -> Iterator[Row]:
    """A table with a header, separated by commas, semicolons or tabs: whichever the header has most of."""
    # A line that cannot be read may be part of a longer record, so skipping it would tear two rows: always refused.
    lines = (line for _, line in _lines(file, _raise))
    header = next(lines, "")
    csv.field_size_limit(1 << 31)  # the module's own limit, 128 KiB, is shorter than many documents
    reader = csv.reader(_chain(header, lines), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = _header(next(reader, []), file.name)
    except csv.Error as error:
        raise _broken_table(f"{file.name}:1", error) from error
    while True:
        origin = Origin(file.name, reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(origin, _broken_table(str(origin), error))
            continue
        if len(cells) == len(names):
            yield Row(dict(zip(names, cells, strict=True)), origin)
        elif cells:
            what = f"has {counted(len(cells), 'field')}, the header has {len(names)}"
            bad(origin, DataError(what, where=str(origin), fix="quote fields that hold a separator or a newline"))


def _broken_table(where: str, error: csv.Error) -> DataError:
    if "new-line character" in str(error):  # lines that end in a carriage return alone, as on old Macs
        what, fix = "has carriage returns for line ends", "save it with \\n or \\r\\n at the ends of lines"
    else:
        what, fix = f"broken table: {error}", "check the quotes of this row"
    return DataError(what, where=where, fix=fix)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _header(names: list[str], file: str) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1 or not n.strip()})
    if twice:
        raise DataError(f"columns without a name of their own: {twice}", where=f"{file}:1", fix="name each column once")
    return names


def _parquet(file: _File, bad: Bad) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet", "parquet", "a .parquet file")
    arrow_error = _optional("pyarrow", "parquet", "a .parquet file").ArrowException
    content: Any = file.path if file.plain else io.BytesIO(file.content.read())
    number = 0
    try:
        with parquet.ParquetFile(content) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    origin = Origin(file.name, number)
                    if _is_clean(values, origin, bad):
                        yield Row(values, origin)
    except (arrow_error, *_DAMAGED) as error:
        raise _damaged(file.name, error) from error


def _hub(source: Source, digest: _Hash, bad: Bad) -> Iterator[Row]:
    datasets = _optional("datasets", "hub", "a hub data set")
    name = source.path.removeprefix("hub:")
    try:
        rows = datasets.load_dataset(name, split=source.split or "train", streaming=True)
        for number, values in enumerate(rows, 1):
            digest.update(json.dumps(values, sort_keys=True, default=str).encode(errors="surrogatepass"))
            origin = Origin(source.path, number)
            if _is_clean(values, origin, bad):
                yield Row(values, origin)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fix = "check the name and the split, and that the hub is in reach"
        raise DataError(f"cannot be loaded ({error})", where=source.path, fix=fix) from error


def kind(value: Any) -> str:
    """A value's type in the words of JSON, with an article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a truth value"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), type(value).__name__)


_READERS: dict[str, Callable[[_File, Bad], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
