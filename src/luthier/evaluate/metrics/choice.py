"""Metrics of multiple choice: by the likelihood of each choice, or by what a generated answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from luthier.data.conversation import Conversation
from luthier.evaluate.metrics.metric import Answer, Metric, Statistics, normalise, points


def accuracy(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the generated answer names the right choice; an answer that names none, or several, is wrong."""
    if question.answer is None:
        return []
    return points([100.0 * (parse_choice(answer.text or "", question.choices) == question.answer)])


def likeliest(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the right choice is the likeliest answer: no format has to be learned to score. lm-eval's `acc`."""
    return _lowest(question, answer.choices or ())


def likeliest_per_token(question: Conversation, answer: Answer) -> list[Statistics]:
    """The same by the mean over a choice's tokens, so that a long one is not unlikely for its length alone (Brown et
    al. 2020, section 2.4)."""
    return _lowest(question, _shares(answer, answer.choice_tokens))


def likeliest_per_character(question: Conversation, answer: Answer) -> list[Statistics]:
    """The same by the mean over a choice's characters: lm-eval's `acc_norm`, which no tokenizer changes."""
    return _lowest(question, _shares(answer, answer.choice_characters))


def likeliest_calibrated(question: Conversation, answer: Answer) -> list[Statistics]:
    """The same by how much likelier the question makes a choice: P(choice | question) / P(choice | no question), where
    the same template holds an empty question (Brown et al. 2020, section 2.4; Zhao et al. 2021 with the content-free
    input ""; lm-eval's `acc_mutual_info` leaves out the template too)."""
    pairs = zip(answer.choices or (), answer.unasked or (), strict=True)
    return _lowest(question, [asked - unasked for asked, unasked in pairs])


def _shares(answer: Answer, counts: Sequence[int]) -> list[float]:
    return [nll / count for nll, count in zip(answer.choices or (), counts, strict=True)]


def _lowest(question: Conversation, losses: Sequence[float]) -> list[Statistics]:
    if question.answer is None or not losses:
        return []
    return points([100.0 * (min(range(len(losses)), key=losses.__getitem__) == question.answer)])


def parse_choice(text: str, choices: tuple[str, ...]) -> int | None:
    """The index of the choice that a generated answer names, or None.

    In this order: the choice's whole text, `option_2`, a letter (`B`, `(B)`, `B.`, `the answer is B`), the one choice
    whose text occurs in the answer, and last a letter that leads a sentence, since "A" is a word too.
    """
    said = normalise(text)
    exact = [i for i, choice in enumerate(choices) if normalise(choice) == said]
    if exact:
        return exact[0]
    for pattern in _NAMED:
        if found := pattern.search(text):
            return _index(found[1], len(choices))
    held = [i for i, choice in enumerate(choices) if _contains(said, normalise(choice))]
    if held:
        longest = max(held, key=lambda i: len(choices[i]))
        inside = all(normalise(choices[i]) in normalise(choices[longest]) for i in held)
        return longest if inside else None
    lead = re.match(r"\s*([A-Z])\s", text)
    return _index(lead[1], len(choices)) if lead else None


_NAMED = (
    re.compile(r"\boption[_\s-]*(\d{1,2})\b", re.IGNORECASE),
    re.compile(r"^\W*([A-Za-z])\W*$"),
    re.compile(r"^\W*([A-Z])\s*[).:\n]"),
    re.compile(r"\b(?:answer|choice|option)\b(?:\s+is)?\W{0,3}([A-Z])\b"),
)


def _index(label: str, count: int) -> int | None:
    index = int(label) - 1 if label.isdigit() else ord(label.upper()) - ord("A")
    return index if 0 <= index < count else None


def _contains(text: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


_LACKS = "no question has choices and a known answer; name another metric, such as rougeL"


def _metric(name: str, title: str, **parts: Any) -> Metric:
    return Metric(name, title, lacks=_LACKS, **parts)


ACCURACY = _metric("accuracy", "accuracy", score=accuracy)
ACCURACY_LIKELIHOOD = _metric("accuracy_likelihood", "accuracy (likelihood)", score=likeliest, needs="choices")
ACCURACY_PER_TOKEN = _metric(
    "accuracy_per_token", "accuracy (likelihood per token)", score=likeliest_per_token, needs="choices"
)
ACCURACY_PER_CHARACTER = _metric(
    "accuracy_per_character", "accuracy (likelihood per character)", score=likeliest_per_character, needs="choices"
)
ACCURACY_CALIBRATED = _metric(
    "accuracy_calibrated", "accuracy (likelihood, calibrated)", score=likeliest_calibrated, needs="unasked"
)
