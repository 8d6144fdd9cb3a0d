import gzip
import hashlib
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversation import Origin
from luthier.data.sources import _Cursor, _File, read
from luthier.errors import DataError
from luthier.recipe import Source


def rows_of(folder, name, content, **more):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read(Source(path=name), root=folder, **more))


def fault_of(folder, name, content):
    with pytest.raises(DataError) as caught:
        rows_of(folder, name, content)
    return str(caught.value)


PAIR = [{"a": "x", "b": 1}, {"a": "y\nz", "b": None}]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("r.jsonl", "".join(json.dumps(r) + "\n" for r in PAIR), [1, 2]),
        ("r.jsonl", "\n" + "\n\n".join(json.dumps(r) for r in PAIR), [2, 4]),
        ("r.jsonl", "\ufeff" + "\r\n".join(json.dumps(r) for r in PAIR), [1, 2]),
        ("r.ndjson", "".join(json.dumps(r) + "\n" for r in PAIR), [1, 2]),
        ("r.json", json.dumps(PAIR), [1, 1]),
        ("r.json", "\ufeff" + json.dumps(PAIR, indent=1), [2, 6]),
        ("r.json", "".join(json.dumps(r, indent=1) + "\n" for r in PAIR), [1, 5]),
        ("r.json", json.dumps({"version": 1, "rows": PAIR}), [1, 2]),
    ],
)
def test_json_of_any_layout_gives_its_objects_with_their_lines(tmp_path, name, content, lines):
    rows = rows_of(tmp_path, name, content)
    assert [r.values for r in rows] == PAIR
    assert [r.origin for r in rows] == [Origin(name, line) for line in lines]


def test_a_single_json_object_is_one_row_even_if_it_holds_messages(tmp_path):
    value = {"messages": [{"role": "user", "content": "hi"}]}
    assert [r.values for r in rows_of(tmp_path, "r.json", json.dumps(value))] == [value]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_give_a_row_for_each_record_and_its_first_line(tmp_path, separator):
    content = separator.join(["name", "text"]) + "\r\n" + separator.join(["a", '"two\r\nlines ""q"""']) + "\r\n"
    content += separator.join(["b", ""]) + "\n"
    first, second = rows_of(tmp_path, "t.csv", content)
    assert first.values == {"name": "a", "text": 'two\nlines "q"'}
    assert (first.origin.line, second.origin.line) == (2, 4)
    assert second.values["text"] == ""


def test_a_cell_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    (row,) = rows_of(tmp_path, "t.csv", "text,b\n" + "x" * 200_000 + ",1\n")
    assert len(row.values["text"]) == 200_000


def test_parquet_rows_are_numbered_from_one(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(PAIR), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    rows = rows_of(tmp_path, "t.parquet", content)
    assert [r.values for r in rows] == PAIR
    assert [r.origin.line for r in rows] == [1, 2]
    assert "damaged" in fault_of(tmp_path, "t.parquet", content[:-20])
    assert [r.values for r in rows_of(tmp_path, "t.parquet.gz", gzip.compress(content, mtime=0))] == PAIR


def test_an_optional_reader_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'luthier[parquet]'" in fault_of(tmp_path, "t.parquet", b"PAR1")


@pytest.mark.parametrize("name", ["d.txt", "d.md"])
def test_a_text_file_is_one_document(tmp_path, name):
    (row,) = rows_of(tmp_path, name, "\n one\r\ntwo\u2028still two\n")
    assert row.values == {"text": "\n one\ntwo\u2028still two\n"}


def test_a_very_long_text_file_is_several_documents_that_hold_all_of_it(tmp_path):
    text = "".join(f"line {i} {'x' * 100}\n" for i in range(90_000))
    rows = rows_of(tmp_path, "d.txt", text)
    assert len(rows) > 1
    assert "".join(r.values["text"] for r in rows) == text
    assert text.splitlines()[rows[1].origin.line - 1] == rows[1].values["text"].splitlines()[0]


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
class TestCompressed:
    content = "".join(json.dumps({"text": f"row {i} {i**9}"}) + "\n" for i in range(5000)).encode()

    def test_rows_are_those_of_the_plain_file(self, tmp_path, suffix, pack):
        plain = [r.values for r in rows_of(tmp_path, "r.jsonl", self.content)]
        assert [r.values for r in rows_of(tmp_path, f"r.jsonl.{suffix}", pack(self.content))] == plain

    def test_members_that_follow_each_other_are_all_read(self, tmp_path, suffix, pack):
        half = self.content.index(b"\n", len(self.content) // 2) + 1
        packed = pack(self.content[:half]) + pack(self.content[half:])
        assert len(rows_of(tmp_path, f"r.jsonl.{suffix}", packed)) == 5000

    @pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
    def test_a_truncated_file_is_refused(self, tmp_path, suffix, pack, keep):
        packed = pack(self.content)
        assert "damaged or cut short" in fault_of(tmp_path, f"r.jsonl.{suffix}", packed[: int(len(packed) * keep)])

    def test_garbage_is_refused(self, tmp_path, suffix, pack):
        assert "damaged or cut short" in fault_of(tmp_path, f"r.jsonl.{suffix}", b"garbage " * 9)


GOOD = b'{"text": "fine"}\n'
LINE_FAULTS = [
    (b'{"text": "a"\n', "r.jsonl:2:13: broken JSON"),
    (b'{"text": "a"} {"text": "b"}\n', "r.jsonl:2:15: broken JSON"),
    (b'["a"]\n', "r.jsonl:2: is a list, not an object"),
    (b"12\n", "r.jsonl:2: is a number, not an object"),
    (b'{"text": "caf\xe9"}\n', "r.jsonl:2: is not UTF-8 (0xe9 at byte 14)"),
    (b'{"a": [{"b": "x\\ud83d"}]}\n', "r.jsonl:2: a[0].b: holds half of a surrogate pair"),
    (b'{"text": "a\\u0000b"}\n', "r.jsonl:2: text: holds a NUL character"),
    (b'{"text": "a\0b"}\n', "r.jsonl:2:12: holds a NUL character"),
    (b'{"text": ' + b"[" * 100_000 + b"\n", "r.jsonl:2: JSON that cannot be read"),
    (b'{"text": ' + b"9" * 5000 + b"}\n", "r.jsonl:2: JSON that cannot be read"),
]


@pytest.mark.parametrize(("line", "message"), LINE_FAULTS)
def test_a_bad_line_is_refused_by_file_line_and_place(tmp_path, line, message):
    assert message in fault_of(tmp_path, "r.jsonl", GOOD + line + GOOD)


@pytest.mark.parametrize(("line", "message"), LINE_FAULTS)
def test_a_bad_line_is_handed_over_where_it_is_counted_and_the_rest_is_read(tmp_path, line, message):
    found = []
    rows = rows_of(tmp_path, "r.jsonl", GOOD + line + GOOD, bad=lambda origin, error: found.append((origin, error)))
    assert [r.origin.line for r in rows] == [1, 3]
    ((origin, error),) = found
    assert origin == Origin("r.jsonl", 2)
    assert message in str(error)


@pytest.mark.parametrize(
    "content", ['[{{"i": 0}},\n {0},\n {{"i": 2}}]', '{{"i": 0}}\n {0}\n{{"i": 2}}', '{0}\n{{"i": 2}}']
)
@pytest.mark.parametrize("size", [1, 3 << 20])
def test_a_key_that_stands_twice_in_one_of_many_rows_of_json_is_a_fault_of_that_row(tmp_path, content, size):
    """Also where the row ends beyond what has been read when the key is found."""
    row = '{"a": {"b": 1, "b": 2}, "c": "%s"}' % ("x" * size)
    text, found = content.format(row), []
    rows = rows_of(tmp_path, "r.json", text.encode(), bad=lambda origin, error: found.append((origin, str(error))))
    line, column = text[: text.index(row)].count("\n") + 1, 1 + text[: text.index(row)].endswith(" ")
    assert [r.values["i"] for r in rows] == [0, 2][-len(rows) :]
    assert rows[-1].origin.line == line + 1
    (fault,) = found
    assert fault[0] == Origin("r.json", line)
    assert fault[1].startswith(f"r.json:{line}:{column}: the key 'b' stands twice in one object")


def test_a_key_that_stands_twice_in_the_one_object_that_holds_all_rows_is_never_one_bad_row(tmp_path):
    content = b'{"rows": [{"i": 0}, {"i": 1, "i": 2}, {"i": 3}]}'
    with pytest.raises(DataError, match=r"r\.json:1:1: the key 'i' stands twice"):
        rows_of(tmp_path, "r.json", content, bad=lambda origin, error: None)


def test_a_surrogate_pair_written_as_escapes_is_one_character(tmp_path):
    (row,) = rows_of(tmp_path, "r.jsonl", rb'{"text": "\ud83d\ude00 \\ud83d"}')
    assert row.values["text"] == "😀 \\ud83d"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b"", "holds no rows"),
        ("r.jsonl", b"\n \n", "holds no rows"),
        ("r.json", b"", "holds no rows"),
        ("r.json", b"[]", "holds no rows"),
        ("t.csv", b"", "holds no rows"),
        ("t.csv", b"a,b\n", "holds no rows"),
        ("d.txt", b" \n", "holds no rows"),
        ("r.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("r.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16"),
        ("r.json", '[{"text": "a"}]'.encode("utf-16"), "is UTF-16"),
        ("r.json", b'[{"a": 1},\n {"a": }]', "r.json:2:8: broken JSON"),
        ("r.json", b'[{"a": 1},\n {"a": 2}', "r.json:2:10: broken JSON: ',' expected"),
        ("r.json", b'[{"a": 1}]\nmore', "r.json:2:1: text after the end"),
        ("r.json", b'[{"a": "\xff"}]', "r.json:1: is not UTF-8 (0xff at byte 9)"),
        ("r.json", b"[\n1]", "r.json:2: is a number"),
        ("r.json", b'[{"a": "\\ud800"}]', "r.json:1: a: holds half of a surrogate pair"),
        ("r.json", b'{"x": [{"a": 1}], "y": [{"a": 1}]}', "holds several lists of rows (x, y)"),
        ("t.csv", b"a,b\n1,2\n3\n", "t.csv:3: has 1 field, the header has 2"),
        ("t.csv", b'a,b\n1,2\n"3,4\n', "t.csv:3: broken table"),
        ("t.csv", b"a,b\r1,2\r", "t.csv:1: has carriage returns for line ends"),
        ("t.csv", b'a,"b\n1,2\n', "t.csv:1: broken table"),
        ("r.jsonl", b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', "r.jsonl:2: the key 'c' stands twice in one object"),
        ("r.json", b'[{"a": 1, "a": 2}]', "r.json:1:2: the key 'a' stands twice in one object"),
        ("r.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        ("r.json", b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        ("t.csv", b"a,a\n1,2\n", "t.csv:1: columns without a name of their own: ['a']"),
        ("t.csv", b"a,b\n1,caf\xe9\n", "t.csv:2: is not UTF-8 (0xe9 at byte 6)"),
        ("d.txt", b"one\ntwo\0\n", "d.txt:2:4: holds a NUL character"),
        ("d.bin", b"x", "unknown kind of file '.bin'"),
    ],
)
def test_a_faulty_file_is_refused_by_name_and_place(tmp_path, name, content, message):
    fault = fault_of(tmp_path, name, content)
    assert message in fault
    assert fault.startswith(name)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in ("no.jsonl", "."):
        with pytest.raises(DataError, match="cannot be read"):
            list(read(Source(path=path), root=tmp_path))


def test_a_file_that_is_not_there_is_answered_with_its_neighbour_of_nearly_that_name(tmp_path):
    (tmp_path / "support.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"did you mean 'support\.jsonl'"):
        list(read(Source(path="suport.jsonl"), root=tmp_path))


def test_a_bad_table_row_can_be_counted_and_the_rest_is_read(tmp_path):
    found = []
    rows = rows_of(tmp_path, "t.csv", "a,b\n1,2\n3\n4,5\n", bad=lambda origin, error: found.append(origin.line))
    assert [r.values["a"] for r in rows] == ["1", "4"]
    assert found == [3]


@pytest.mark.parametrize(
    ("content", "values"),
    [(b'{"a": "x"}\n', {"a": "x"}), (b'[{"a": "x"}]', {"a": "x"}), (b"plain words\n", {"text": "plain words\n"})],
)
def test_standard_input_is_recognised_by_its_first_character(monkeypatch, content, values):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (row,) = read(Source(path="-"))
    assert row.values == values
    assert str(row.origin) == "-:1"


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz", "t.csv", "d.txt"])
def test_the_digest_is_that_of_the_file(tmp_path, name):
    content = b'{"a": "x"}\n' if "json" in name else b"a,b\n1,2\n"
    content = gzip.compress(content, mtime=0) if name.endswith("gz") else content
    digest = hashlib.sha256()
    rows_of(tmp_path, name, content, digest=digest)
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_a_parquet_files_digest_is_that_of_the_file(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(PAIR), tmp_path / "t.parquet")
    digest = hashlib.sha256()
    list(read(Source(path="t.parquet"), root=tmp_path, digest=digest))
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "t.parquet").read_bytes()).hexdigest()


@pytest.mark.slow  # the import of `datasets` alone takes seconds
def test_a_hub_data_set_is_read_by_its_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(GOOD)
    (folder / "test.jsonl").write_bytes(b'{"text": "other"}\n')
    (row,) = read(Source(path=f"hub:{folder}"))
    assert (row.values, row.origin) == ({"text": "fine"}, Origin(f"hub:{folder}", 1))
    assert next(read(Source(path=f"hub:{folder}", split="test"))).values == {"text": "other"}
    with pytest.raises(DataError, match="cannot be loaded"):
        list(read(Source(path=f"hub:{folder}", split="nonsense")))


def test_reading_is_lazy(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD + b"broken\n")
    rows = read(Source(path="r.jsonl"), root=tmp_path)
    assert next(rows).values == {"text": "fine"}
    rows.close()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4),
    max_leaves=8,
)


class Trickle(io.BytesIO):
    """Gives few bytes at a time, so that every value is cut somewhere."""

    def read(self, size=-1):
        return super().read(min(size, 3))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.dictionaries(st.text(), values), min_size=1), st.sampled_from([None, 1]))
def test_json_read_in_pieces_is_the_json_that_was_written(values, indent):
    text = json.dumps(values, ensure_ascii=False, indent=indent).encode(errors="replace")
    cursor = _Cursor(_File("r.json", ".json", Path("r.json"), Trickle(), Trickle(text)))
    cursor.take("[")
    found = []
    while cursor.peek() != "]":
        found.append(cursor.value()[0])
        if cursor.peek() == ",":
            cursor.take(",")
    assert found == json.loads(text)
    cursor.take("]")
    lines = text.decode().split("\n")
    assert cursor.place() == f"r.json:{len(lines)}:{len(lines[-1]) + 1}"
