"""What every metric of METRICS and every kind of KINDS keeps: scores per reference, in range, with an identity per
question for pairing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from luthier.data.conversation import Conversation, Origin
from luthier.errors import RecipeError
from luthier.evaluate.comparison import judge
from luthier.evaluate.metrics import KINDS, METRICS, Answer, Metric, resolved
from luthier.recipe import Recipe

CHOICES = ("red wine", "green tea")
JSON = ('{"drink": {"name": "red wine"}, "warm": false}', '{"drink": {"name": "wine"}}')
QUESTION = Conversation((), Origin("q.jsonl", 1), references=("red wine", "Red wine!"), choices=CHOICES, answer=0)
RIGHT = Answer(
    "red wine",
    True,
    2,
    nll=1.0,
    targets=4,
    choices=(1.0, 9.0),
    choice_tokens=(2, 2),
    choice_characters=(8, 9),
    unasked=(2.0, 2.0),
    preferences={"judge": 100.0},
)
WRONG = replace(RIGHT, text="", tokens=0, nll=9.0, choices=(9.0, 1.0), preferences={"judge": 0.0})


def named_red(text: str, question: Conversation) -> bool:
    """What a user's own check may look like."""
    return "red" in text


OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"fields": ["drink"]},
    "regex": {"pattern": "^red"},
    "python": {"function": f"{__name__}:named_red"},
    "judge": {"url": "http://127.0.0.1:1/v1", "model": "m", "criterion": "c"},
}
FREE = {"json_valid", "json_strict", "regex", "named_red", "judge"}
"""Metrics that need nothing of the question."""


def written(kind: str) -> Any:
    """An entry of evaluate.metrics of that kind."""
    tree = "model: {base: b}\ndata: {train: [{path: r}]}\nevaluate: {metrics: [{kind: " + kind + "}]}"
    overrides = [f"evaluate.metrics.0.{key}={value}" for key, value in OPTIONS[kind].items()]
    return Recipe.parse(tree, *overrides).evaluate.metrics[0]


ENTRIES = [*METRICS.names(), *map(written, KINDS.names())]
every = pytest.mark.parametrize("entry", ENTRIES, ids=[*METRICS.names(), *KINDS.names()])


def metric_of(entry: Any) -> Metric:
    return next(iter(resolved([entry]).values()))


def case(metric: Metric) -> tuple[Conversation, Answer, Answer]:
    """A question, the best answer to it and the worst one."""
    if not metric.name.startswith("json"):
        return QUESTION, RIGHT, WRONG
    return replace(QUESTION, references=JSON), replace(RIGHT, text=JSON[0]), WRONG


def best(metric: Metric, question: Conversation, answer: Answer) -> float:
    return metric.figure(metric.best(metric.score(question, answer)))


@every
def test_the_right_answer_scores_better_than_an_empty_one(entry: Any) -> None:
    metric = metric_of(entry)
    question, *answers = case(metric)
    right, wrong = (best(metric, question, answer) for answer in answers)
    assert (right > wrong) == metric.higher


@every
def test_a_text_metric_gives_points_of_100(entry: Any) -> None:
    metric = metric_of(entry)
    question, *answers = case(metric)
    if metric.unit == "points":
        scores = [metric.figure(s) for answer in answers for s in metric.score(question, answer)]
        assert min(scores) == 0.0
        assert max(scores) == pytest.approx(100.0, abs=1e-9)


@every
def test_many_sums_are_finished_at_once_as_each_alone(entry: Any) -> None:
    metric = metric_of(entry)
    question, *answers = case(metric)
    one, two = (np.array(metric.best(metric.score(question, answer))) for answer in answers)
    draws = np.array([[a * one + (9 - a) * two for a in range(10)]])
    finished = metric.finish(draws)
    assert finished.shape == (1, 10)
    assert finished[0].tolist() == pytest.approx([metric.figure(tuple(sums)) for sums in draws[0]])


@every
def test_scores_are_the_same_each_time_and_do_not_depend_on_other_rows(entry: Any) -> None:
    metric = metric_of(entry)
    question, right, wrong = case(metric)
    first = metric.score(question, right)
    metric.score(replace(question, references=("another",)), wrong)
    assert metric.score(question, right) == first


@every
def test_a_question_that_cannot_be_scored_gives_no_score(entry: Any) -> None:
    metric = metric_of(entry)
    bare = replace(QUESTION, references=(), choices=(), answer=None)
    assert (metric.score(bare, Answer("red wine", preferences={"judge": 50.0})) == []) == (metric.name not in FREE)


@every
def test_a_metric_decides_a_verdict_in_its_own_direction(entry: Any) -> None:
    metric = metric_of(entry)
    question, right, wrong = case(metric)
    better = judge([question] * 40, [wrong] * 40, [right] * 40, [entry])
    worse = judge([question] * 40, [right] * 40, [wrong] * 40, [entry])
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert (better.metrics[metric.name].difference > 0) == metric.higher


def test_an_unknown_metric_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rougeL'"):
        METRICS.get("rougel")


def test_two_metrics_of_one_name_are_told_apart_or_refused() -> None:
    one = written("regex")
    assert list(resolved([one, one.model_copy(update={"name": "dated"})])) == ["regex", "dated"]
    with pytest.raises(RecipeError, match="two metrics are called 'regex'; give each a name of its own"):
        resolved([one, one.model_copy(update={"pattern": "x"})])
