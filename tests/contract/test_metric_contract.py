"""What every metric in METRICS keeps: scores per reference, in range, with an identity per question for pairing."""

from dataclasses import replace

import pytest

from luthier.data.conversation import Conversation, Origin
from luthier.errors import RecipeError
from luthier.evaluate.comparison import judge
from luthier.evaluate.metrics import METRICS, Answer, Metric

CHOICES = ("red wine", "green tea")
QUESTION = Conversation((), Origin("q.jsonl", 1), references=("red wine", "Red wine!"), choices=CHOICES, answer=0)
RIGHT = Answer("red wine", True, 2, nll=1.0, targets=4, choices=(1.0, 9.0), choice_tokens=(2, 2))
WRONG = Answer("", True, 0, nll=9.0, targets=4, choices=(9.0, 1.0), choice_tokens=(2, 2))

every = pytest.mark.parametrize("metric", [METRICS.get(name) for name in METRICS.names()], ids=METRICS.names())


def best(metric: Metric, answer: Answer) -> float:
    return metric.figure(metric.best(metric.score(QUESTION, answer)))


@every
def test_the_right_answer_scores_better_than_an_empty_one(metric: Metric) -> None:
    right, wrong = (best(metric, answer) for answer in (RIGHT, WRONG))
    assert (right > wrong) == metric.higher


@every
def test_a_text_metric_gives_points_of_100(metric: Metric) -> None:
    if metric.unit == "points":
        scores = [metric.figure(s) for answer in (RIGHT, WRONG) for s in metric.score(QUESTION, answer)]
        assert all(0.0 <= score <= 100.0 for score in scores)
        assert max(scores) == 100.0


@every
def test_scores_are_the_same_each_time_and_do_not_depend_on_other_rows(metric: Metric) -> None:
    first = metric.score(QUESTION, RIGHT)
    metric.score(replace(QUESTION, references=("another",)), WRONG)
    assert metric.score(QUESTION, RIGHT) == first


@every
def test_a_question_that_cannot_be_scored_gives_no_score(metric: Metric) -> None:
    bare = replace(QUESTION, references=(), choices=(), answer=None)
    assert metric.score(bare, Answer("red wine")) == []


@every
def test_a_metric_decides_a_verdict_in_its_own_direction(metric: Metric) -> None:
    better = judge([QUESTION] * 40, [WRONG] * 40, [RIGHT] * 40, [metric.name])
    worse = judge([QUESTION] * 40, [RIGHT] * 40, [WRONG] * 40, [metric.name])
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert (better.metrics[metric.name].difference > 0) == metric.higher


def test_an_unknown_metric_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rougeL'"):
        METRICS.get("rougel")
