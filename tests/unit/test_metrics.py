"""Scores per example, against rouge-score itself and by hand."""

import re
import string
from collections import Counter
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from luthier.data.conversation import Conversation, Origin
from luthier.evaluate.metrics import METRICS, Answer, points
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


CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=6)


@pytest.mark.parametrize(("name", "theirs"), [("bleu", BLEU(effective_order=True)), ("chrf", CHRF())])
@given(corpus=CORPUS)
@settings(max_examples=80, deadline=None)
def test_corpus_scores_equal_sacrebleu_with_any_number_of_references(name: str, theirs: BLEU | CHRF, corpus) -> None:  # type: ignore[no-untyped-def]
    metric = METRICS.get(name)
    sums = np.sum([metric.best(metric.score(asked(*wanted), Answer(said))) for said, wanted in corpus], axis=0)
    most = max(len(wanted) for _, wanted in corpus)
    streams = [[wanted[i] if i < len(wanted) else None for _, wanted in corpus] for i in range(most)]
    assert metric.figure(tuple(sums)) == pytest.approx(
        theirs.corpus_score([said for said, _ in corpus], streams).score, abs=1e-9
    )


def test_bleu_is_sacrebleu_s_default_where_one_answer_has_four_tokens() -> None:
    said, wanted = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the dog"]
    metric = METRICS.get("bleu")
    sums = np.sum([metric.score(asked(w), Answer(s))[0] for s, w in zip(said, wanted, strict=True)], axis=0)
    assert metric.figure(tuple(sums)) == pytest.approx(BLEU().corpus_score(said, [wanted]).score, abs=1e-9)


def squad(said: str, wanted: str) -> float:
    """SQuAD 2.0's own evaluation script, in short."""

    def tokens(text: str) -> list[str]:
        bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    gold, guess = tokens(wanted), tokens(said)
    same = sum((Counter(gold) & Counter(guess)).values())
    if not gold or not guess:
        return float(gold == guess)
    if not same:
        return 0.0
    precision, recall = same / len(guess), same / len(gold)
    return 2 * precision * recall / (precision + recall)


PIECES = st.lists(st.sampled_from(["the", "a", "an", "The", "cat", "at", " ", ",", "–", "'", "."]), max_size=9).map(
    "".join
)


@given(said=PIECES, wanted=PIECES)
def test_token_f1_equals_squad_s_script(said: str, wanted: str) -> None:
    scored = METRICS.get("token_f1").score(asked(wanted), Answer(said))
    assert scored[0][0] == pytest.approx(100 * squad(said, wanted), abs=1e-9)


@pytest.mark.parametrize("said", ["Yes, it is", " yes,  it\nis ", "YES, IT IS"])
def test_exact_match_ignores_case_and_white_space(said: str) -> None:
    assert METRICS.get("exact_match").score(asked("yes, it is"), Answer(said)) == points([100.0])


def test_exact_match_does_not_ignore_words_or_punctuation() -> None:
    assert METRICS.get("exact_match").score(asked("yes", "no."), Answer("no")) == points([0.0, 0.0])


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


def test_the_likeliest_choice_may_be_another_one_by_the_character_and_against_no_question() -> None:
    question = asked("the lung", choices=CHOICES, answer=2)
    answer = Answer(choices=(3.0, 4.0, 5.0, 6.0), choice_characters=(9, 13, 20, 8), unasked=(1.0, 2.0, 9.0, 4.0))
    assert METRICS.get("accuracy_likelihood").score(question, answer) == points([0.0])
    assert METRICS.get("accuracy_per_character").score(question, answer) == points([100.0])
    assert METRICS.get("accuracy_calibrated").score(question, answer) == points([100.0])


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    answers = [Answer(nll=10 * log(2), targets=10), Answer(nll=30 * log(8), targets=30)]
    scores = [PERPLEXITY.score(asked("x"), answer)[0] for answer in answers]
    assert PERPLEXITY.figure(tuple(map(sum, zip(*scores, strict=True)))) == pytest.approx(
        exp((10 * log(2) + 30 * log(8)) / 40)
    )


def test_perplexity_of_nothing_is_no_score() -> None:
    assert PERPLEXITY.score(asked("x"), Answer("x")) == []
