import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.conversation import Example, Origin
from luthier.data.store import TokenStore
from luthier.errors import DataError


def example(ids, supervised, prompt=0, file="a.jsonl", line=1):
    return Example(ids, supervised, prompt, Origin(file, line))


@st.composite
def examples(draw):
    size = draw(st.integers(0, 9))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size))
    bits = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    origin = Origin(draw(st.sampled_from(["a.jsonl", "b.csv"])), draw(st.integers(1, 2**40)))
    return Example(ids, bits, draw(st.integers(0, size)), origin)


@given(st.lists(examples(), max_size=8))
def test_what_was_written_is_read_back(tmp_path_factory, rows):
    store = TokenStore.write(tmp_path_factory.mktemp("store") / "s", iter(rows))
    assert [store.as_example(i) for i in range(len(store))] == rows
    assert store.lengths.tolist() == [len(r.ids) for r in rows]
    assert store.prompts.tolist() == [r.prompt for r in rows]
    assert [store.targets(i) for i in range(len(store))] == [sum(r.supervised[1:]) for r in rows]
    assert store.supervised_tokens == sum(sum(r.supervised[1:]) for r in rows)


def test_arrays_have_the_dtypes_that_training_expects(tmp_path):
    store = TokenStore.write(tmp_path / "s", [example([5, 6], [0, 1])])
    ids, supervised = store.example(0)
    assert (ids.dtype, supervised.dtype) == (np.int32, np.uint8)
    assert (store.lengths.dtype, store.offsets.dtype) == (np.int64, np.int64)


def test_rows_are_mapped_and_not_writable(tmp_path):
    store = TokenStore.write(tmp_path / "s", [example([5, 6], [0, 1])])
    assert isinstance(store.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.example(0)[0][0] = 1


def test_a_selection_keeps_everything_about_its_rows(tmp_path):
    rows = [example([i, i + 1], [0, 1], 1, file, i + 1) for i, file in enumerate(["a", "b", "a", "c"])]
    store = TokenStore.write(tmp_path / "s", rows)
    chosen = store.select(tmp_path / "t", np.array([3, 0]))
    assert [chosen.as_example(i) for i in range(2)] == [rows[3], rows[0]]
    assert len(store.select(tmp_path / "u", np.array([], np.int64))) == 0


def test_a_value_by_file_reaches_every_row(tmp_path):
    store = TokenStore.write(tmp_path / "s", [example([1], [1], file=f) for f in "abba"])
    assert store.by_file({"a": 2.0, "b": 0.5}).tolist() == [2.0, 0.5, 0.5, 2.0]


def test_a_store_that_was_not_finished_is_not_there(tmp_path):
    def broken():
        yield example([1], [1])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        TokenStore.write(tmp_path / "s", broken())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="holds no token store"):
        TokenStore.open(tmp_path / "s")


def test_a_new_store_takes_the_place_of_the_old_one(tmp_path):
    TokenStore.write(tmp_path / "s", [example([1], [1])] * 3)
    assert len(TokenStore.write(tmp_path / "s", [example([1], [1])])) == 1


@pytest.mark.parametrize("name", ["ids", "supervised", "offsets", "prompts"])
def test_a_truncated_array_is_refused_by_name(tmp_path, name):
    TokenStore.write(tmp_path / "s", [example([1, 2], [0, 1])])
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"s/{name}"):
        TokenStore.open(tmp_path / "s")


def test_a_store_of_another_version_is_refused(tmp_path):
    TokenStore.write(tmp_path / "s", [])
    header = tmp_path / "s" / "header.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        TokenStore.open(tmp_path / "s")
