from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.registry import Registry, nearest, nearest_path


def test_a_name_is_resolved_only_when_asked_for() -> None:
    registry = Registry("thing", {"broken": "no.such.module:thing", "path": "pathlib:Path"})
    assert registry.names() == ["broken", "path"]
    assert registry.get("path").__name__ == "Path"
    with pytest.raises(RecipeError, match="cannot be loaded"):
        registry.get("broken")


def test_a_dotted_name_needs_no_registration() -> None:
    assert Registry("thing", {}).get("pathlib:Path").__name__ == "Path"


def test_a_miss_offers_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="unknown metric 'rouge_l'; did you mean 'rougeL'"):
        Registry("metric", {"rougeL": "x:y", "accuracy": "x:z"}).get("rouge_l")


def test_a_second_registration_of_a_name_is_refused() -> None:
    registry = Registry("thing", {"a": "x:y"})
    with pytest.raises(ValueError, match="already registered"):
        registry.add("a", "x:z")


def test_without_a_near_name_all_are_listed() -> None:
    assert nearest("zzz", ["b", "a"]) == "known names: a, b"


def test_a_file_that_is_not_there_is_answered_with_one_of_nearly_its_name_written_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "support.jsonl").touch()
    (tmp_path / "in" / "data" / "suport-.jsonl").mkdir()
    asked = Path("data/suport.jsonl")
    assert nearest_path(asked, root=tmp_path / "in") == "did you mean 'data/support.jsonl'?"
    assert nearest_path(tmp_path / "in" / asked) == f"did you mean '{tmp_path}/in/data/support.jsonl'?"


@pytest.mark.parametrize("asked", ["other.jsonl", "support.csv", "no-such-folder/support.jsonl", "x"])
def test_nothing_is_offered_for_an_unlike_name_however_long_its_folder_is(tmp_path: Path, asked: str) -> None:
    folder = tmp_path / "a-folder" / "with-a-long-name" / "in-a-folder-with-a-long-name"
    folder.mkdir(parents=True)
    (folder / "support.jsonl").touch()
    assert nearest_path(folder / asked) == ""


@pytest.mark.parametrize(("asked", "there"), [("rows.yml", "rows.yaml"), ("rows.json", "rows.jsonl")])
def test_an_ending_that_is_nearly_right_is_answered_with_the_right_one(tmp_path: Path, asked: str, there: str) -> None:
    for name in ("rows.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    assert nearest_path(Path(asked), root=tmp_path) == f"did you mean '{there}'?"


def test_a_file_that_is_there_is_not_offered_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").touch()
    assert nearest_path(Path("rows.yaml"), root=tmp_path) == "it is there: give access to it"


def test_of_other_names_those_that_begin_so_are_offered_where_no_folder_is_named() -> None:
    assert nearest_path(Path("tick"), "tickets") == "did you mean 'tickets'?"
    assert nearest_path(Path("runs/tickets"), "tickets") == ""
