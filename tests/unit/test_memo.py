"""Results that are kept in a file which somebody cuts or replaces meanwhile."""

import json
from pathlib import Path

import pytest

from luthier.evaluate.asking.answers import Memo, Places


def kept(path: Path, *names: str, text: str = "said") -> None:
    Memo(path).add({name: {"text": text} for name in names})


def found(places: Places, *names: str) -> dict[str, str]:
    records = [json.loads(line) for line in places.lines(set(names))]
    return {record["key"]: record["text"] for record in records}


@pytest.mark.parametrize("others", [1, 50])  # a shorter file, and one that is longer
def test_places_of_a_file_that_has_been_replaced_are_those_of_the_new_one(tmp_path: Path, others: int) -> None:
    path = tmp_path / "answers.jsonl"
    kept(path, *(f"old {n}" for n in range(9)))
    places = Places(path)
    assert len(found(places, *(f"old {n}" for n in range(9)))) == 9
    path.unlink()
    kept(path, *(f"new {n}" for n in range(others)), text="anew")
    assert found(places, "new 0", "old 3", "old 7") == {"new 0": "anew"}
    assert places.read == path.stat().st_size


@pytest.mark.parametrize("start", [500, 30, 10])  # past the end, in the torn line, in the first
def test_a_memo_that_starts_where_no_line_ends_reads_all_and_glues_nothing_to_a_torn_line(
    tmp_path: Path, start: int
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key": "a", "text": "1"}\n{"key": "b", "te')
    memo = Memo(path, start=start)
    assert memo.keys() == {"a"}
    memo.add({"c": {"text": "3"}})
    assert Memo(path).keys() == {"a", "c"}
