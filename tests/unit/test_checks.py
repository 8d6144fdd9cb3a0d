"""Checks of a generated text: JSON, patterns, functions of one's own."""

from typing import Any

import pytest

from luthier.data.conversation import Conversation, Origin
from luthier.errors import RecipeError
from luthier.evaluate.comparison import check_decides, judge
from luthier.evaluate.metrics import METRICS, Answer, Metric, resolved, shown
from luthier.recipe import Recipe

WANTED = '{"customer": {"name": "Ada", "vip": true}, "items": [{"id": 7}, {"id": 8}], "note": null}'
FENCED = f"Here it is:\n```json\n{WANTED}\n```\nAnything else?"


def metric(**entry: Any) -> Metric:
    tree = "model: {base: b}\ndata: {train: [{path: r}]}\nevaluate: {metrics: [{kind: json}]}"
    overrides = [f"evaluate.metrics.0.{key}={value}" for key, value in entry.items()]
    return next(iter(resolved(Recipe.parse(tree, *overrides).evaluate.metrics).values()))


def asked(*references: str) -> Conversation:
    return Conversation((), Origin("rows.jsonl", 3), references=references)


def scores(name: str, said: str) -> list[float]:
    known = METRICS.get(name)
    return [known.figure(one) for one in known.score(asked(WANTED), Answer(said))]


@pytest.mark.parametrize(
    ("said", "strict", "valid"),
    [
        (WANTED, 100, 100),
        (f"\n {WANTED} ", 100, 100),
        (f"```json\n{WANTED}\n```", 0, 100),
        (f"```\n{WANTED}\n```", 0, 100),
        (FENCED, 0, 100),
        ("3", 100, 100),
        (f"{WANTED}\n{WANTED}", 0, 0),
        (f"```\n{WANTED}\n```\n```\n{WANTED}\n```", 0, 0),
        (f"```json\n{WANTED}", 0, 0),
        ("{'customer': 1}", 0, 0),
        ('{"a": NaN}', 0, 0),
        ('{"a": 1,}', 0, 0),
        ("[" * 100_000, 0, 0),
        ("9" * 10_000, 0, 0),
        ("", 0, 0),
    ],
)
def test_json_is_what_a_strict_reader_takes_and_one_fence_is_passed_over(said: str, strict: int, valid: int) -> None:
    assert (scores("json_strict", said), scores("json_valid", said)) == ([strict], [valid])


@pytest.mark.parametrize(
    ("said", "right", "fields"),
    [
        (WANTED, 5, 5),
        (FENCED, 5, 5),
        ('{"customer": {"name": "Ada", "vip": 1}, "items": [{"id": 7}, {"id": 8}], "note": null}', 4, 5),
        ('{"customer": {"name": "Ada", "vip": true}, "items": [{"id": 7.0}], "note": null}', 4, 5),
        ('{"customer": "Ada", "items": [{"id": 8}, {"id": 7}], "note": ""}', 0, 6),
        (WANTED.replace("null", 'null, "invented": 1'), 5, 6),
        ("{}", 0, 6),
        ("no JSON", 0, 5),
    ],
)
def test_fields_are_compared_by_path_and_missing_and_invented_ones_are_wrong(
    said: str, right: int, fields: int
) -> None:
    assert METRICS.get("json_fields").score(asked(WANTED), Answer(said)) == [(100.0 * right, fields)]


def test_only_the_fields_that_are_named_count() -> None:
    named = metric(fields="[customer, items.0.id]")
    assert named.score(asked(WANTED), Answer('{"customer": {"name": "Ada"}, "items": [{"id": 7}]}')) == [(200.0, 3)]
    assert named.score(asked('{"other": 1}'), Answer('{"other": 1}')) == []


def test_the_best_of_several_references_counts_and_those_that_are_no_json_do_not() -> None:
    known = METRICS.get("json_fields")
    found = known.score(asked("not JSON", '{"a": 1}', '{"a": 2}'), Answer('{"a": 2}'))
    assert found == [(0.0, 1), (100.0, 1)]
    assert known.best(found) == (100.0, 1)


def test_a_pattern_is_searched_in_the_whole_answer() -> None:
    dated = metric(kind="regex", name="dated", pattern=r"'^\d{4}-\d{2}$'")
    assert [dated.score(asked(), Answer(text))[0][0] for text in ("2024-05", "in 2024-05", "")] == [100.0, 0.0, 0.0]
    assert metric(kind="regex", pattern="sorry").score(asked(), Answer("I am sorry.")) == [(100.0, 1.0)]
    assert (dated.name, dated.title) == ("dated", "dated")


def polite(text: str, question: Conversation) -> float | None:
    return {"": None, "please": 0.5}.get(text, True)


def broken(text: str, question: Conversation) -> Any:
    return 1 / 0 if text == "raise" else text


def test_a_function_of_one_s_own_says_how_good_an_answer_is_or_that_it_cannot_tell() -> None:
    own = metric(kind="python", function=f"{__name__}:polite")
    assert own.name == "polite"
    assert [own.score(asked(), Answer(text)) for text in ("yes", "please", "")] == [[(100.0, 1.0)], [(50.0, 1.0)], []]


def test_a_function_that_fails_says_which_row_it_failed_on() -> None:
    own = metric(kind="python", function=f"{__name__}:broken")
    with pytest.raises(RecipeError, match=r"broken, on rows.jsonl:3: it raised ZeroDivisionError: division by zero"):
        own.score(asked(), Answer("raise"))
    with pytest.raises(RecipeError, match="it returned 'fine'; return True, False, 0 to 1, or None"):
        own.score(asked(), Answer("fine"))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere:f", "No module named 'nowhere'"),
        ("json:absent", "no attribute 'absent'"),
        ("json:__doc__", "is no function"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_before_anything_is_loaded(path: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        metric(kind="python", function=path)


def test_a_check_that_can_score_nothing_cannot_decide() -> None:
    with pytest.raises(RecipeError, match="'json_fields' decides the verdict but can score no question"):
        check_decides([asked("text")], "json_fields")
    check_decides([asked()], "json_valid")


def test_a_metric_with_options_is_shown_from_the_comparison_alone() -> None:
    tree = "model: {base: b}\ndata: {train: [{path: r}]}\nevaluate: {metrics: [{kind: regex, name: dated, pattern: x}]}"
    found = judge([asked()] * 9, [Answer("")] * 9, [Answer("x")] * 9, Recipe.parse(tree).evaluate.metrics).as_dict()
    described = found["metrics"]["dated"]
    assert (described["title"], described["unit"], found["sentence"][:25]) == (
        "dated",
        "points",
        "better: dated rises by 10",
    )
    assert shown("dated", described).title == "dated"
    assert shown("rougeL", {"higher": True}).title == "ROUGE-L"
