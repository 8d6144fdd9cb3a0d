import pytest

from luthier.errors import RecipeError
from luthier.registry import Registry, nearest


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
