"""Scores per example, against rouge-score itself and by hand."""

from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from luthier.data.conversation import Conversation, Origin
from luthier.evaluate.metrics import METRICS, Answer, points
from luthier.evaluate.metrics.choice import parse_choice
from luthier.evaluate.metrics.text import PERPLEXITY

ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
CHOICES = ("the heart", "the left lung", "the lung", "a kidney")
WORDS = st.sampled_from(["running", "runs", "The", "cat", "cats'", "sat", "3.5", "naïve", "on", "\n", "—", "meetings"])
TEXT = st.lists(WORDS, max_size=14).map(" ".join)


def asked(*references: str, choices: tuple[str, ...] = (), answer: int | None = None) -> Conversation:
    return Conversation((), Origin("rows.jsonl", 1), references=references, choices=choices, answer=answer)


@given(st.lists(TEXT, min_size=1, max_size=3), TEXT)
@settings(max_examples=60, deadline=None)
def test_rouge_equals_rouge_score_with_stemmer_and_the_best_reference_is_its_score_multi(
    references: list[str], text: str
) -> None:
    theirs = RougeScorer(ROUGE, use_stemmer=True).score_multi(references, text)
    for name in ROUGE:
        metric = METRICS.get(name)
        mine = metric.score(asked(*references), Answer(text))
        assert len(mine) == len(references)
        assert metric.figure(metric.best(mine)) == pytest.approx(100 * theirs[name].fmeasure, abs=1e-9)


def test_rouge_lsum_takes_each_line_as_a_sentence() -> None:
    question = asked("the cat sat\nthe dog ran")
    swapped = Answer("the dog ran\nthe cat sat")
    assert METRICS.get("rougeLsum").score(question, swapped) == points([100.0])
    assert METRICS.get("rougeL").score(question, swapped)[0] < (100.0, 1.0)


@pytest.mark.parametrize("said", ["Yes, it is", " yes,  it\nis ", "YES, IT IS"])
def test_exact_match_ignores_case_and_white_space(said: str) -> None:
    assert METRICS.get("exact_match").score(asked("yes, it is"), Answer(said)) == points([100.0])


def test_exact_match_does_not_ignore_words_or_punctuation() -> None:
    assert METRICS.get("exact_match").score(asked("yes", "no."), Answer("no")) == points([0.0, 0.0])


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ("B", 1),
        ("(c)", 2),
        ("D.", 3),
        ("b) the left lung", 1),
        ("A: because it pumps", 0),
        ("The answer is C", 2),
        ("The correct answer: D", 3),
        ("option_3", 2),
        ("I would say Option 1.", 0),
        ("The Left Lung", 1),
        ("It is the left lung, surely", 1),
        ("it is a kidney", 3),
        ("B since it breathes", 1),
        ("A heart", 0),
        ("the heart or a kidney", None),
        ("none of them", None),
        ("E", None),
        ("option_9", None),
        ("", None),
    ],
)
def test_a_choice_is_found_in_what_a_model_says(said: str, index: int | None) -> None:
    assert parse_choice(said, CHOICES) == index


def test_accuracy_scores_only_questions_with_a_known_choice() -> None:
    accuracy = METRICS.get("accuracy")
    assert accuracy.score(asked("B", choices=CHOICES, answer=1), Answer("the left lung")) == points([100.0])
    assert accuracy.score(asked("B", choices=CHOICES, answer=1), Answer("no idea")) == points([0.0])
    assert accuracy.score(asked("B"), Answer("B")) == []


def test_the_likeliest_choice_may_be_another_one_by_the_token() -> None:
    question = asked("the lung", choices=CHOICES, answer=1)
    answer = Answer(choices=(3.0, 4.0, 5.0, 6.0), choice_tokens=(1, 4, 2, 2))
    assert METRICS.get("accuracy_likelihood").score(question, answer) == points([0.0])
    assert METRICS.get("accuracy_per_token").score(question, answer) == points([100.0])
    assert METRICS.get("accuracy_per_token").score(asked("the lung"), answer) == []


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    answers = [Answer(nll=10 * log(2), targets=10), Answer(nll=30 * log(8), targets=30)]
    scores = [PERPLEXITY.score(asked("x"), answer)[0] for answer in answers]
    assert PERPLEXITY.figure(tuple(map(sum, zip(*scores, strict=True)))) == pytest.approx(
        exp((10 * log(2) + 30 * log(8)) / 40)
    )


def test_perplexity_of_nothing_is_no_score() -> None:
    assert PERPLEXITY.score(asked("x"), Answer("x")) == []
