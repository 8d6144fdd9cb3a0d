"""Metrics of multiple choice: by the likelihood of each choice, or by what a generated answer names."""

from __future__ import annotations

import re
import string
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
    """The index of the choice that a generated answer names; None where it names none, or several.

    What is strongest decides: the whole answer is a choice's text or a label (`B`, `(b)`, `option_2`); it concludes
    (`the answer is B`); a label leads it (`B) because …`); it says one (`I would go with B`); it holds one choice's
    text; it holds one capital that is no word. Labels that are denied (`A is wrong`, `not A`) do not count, nor does
    what follows where a model goes on to ask itself the next question.
    """
    said = _plain(_AGAIN.split(text.strip())[0])
    for shape, answer in ((normalise, text), (_outer, said)):
        whole = [i for i, choice in enumerate(choices) if shape(choice) == shape(answer)]
        if whole and shape(answer):
            return whole[0]
    claimed = _DENIED.sub(" ", said)
    for pattern in _NAMED:
        if found := {label for names in pattern.findall(claimed) for label in _labels(names, choices)}:
            return _single(found, choices)
    held = _held(said, choices)
    return held if held is not None else _single(_labels(" ".join(_LONE.findall(claimed)), choices), choices)


def _single(found: set[int], choices: tuple[str, ...]) -> int | None:
    return found.pop() if len(found) == 1 and found <= set(range(len(choices))) else None


def _plain(text: str) -> str:
    """Without marks of emphasis, code, mathematics, quotation and tags."""
    return _MARKS.sub("", _BOXED.sub(r"\1", text)).strip()


def _outer(text: str) -> str:
    return normalise(_plain(text)).strip(string.punctuation + " ")


_BOXED = re.compile(r"\\(?:boxed|text|textbf|mathrm)\{([^{}]*)\}")
_MARKS = re.compile(r"<think>.*?</think>|[*`$#\"“”]|</?\w+>", re.DOTALL)
_AGAIN = re.compile(r"\n\s*#*\s*\**\s*(?:question|q)\s*\d*\s*[:.]", re.IGNORECASE)

# A capital, a small letter before punctuation (`a` is a word too), a number.
_LABEL = r"(?:(?i:option)[\s_-]*)?[(\[]?(?:[A-Z](?!\w|['’]\w)|[a-z](?=\s*(?:[).,;:\]]|$))|\d{1,2}(?![\w%]|\.\d))[)\]]?"
_LABELS = rf"(?>{_LABEL}(?:\s*(?:,|/|&|\b(?i:or|and)\b)+\s*{_LABEL})*)"
_REASON = r"(?i:because|since|as)\b"
_NAMED = tuple(
    re.compile(pattern)
    for pattern in (
        rf"^\W*({_LABELS})\W*$",
        rf"(?i:\banswers?\b(?:\s+(?:is|are|(?:would|should|must|has to)\s+be))?)\W{{0,4}}(?<![\w'’])({_LABELS})",
        # Not where the next line has another label: then it repeats the choices.
        rf"^\W*({_LABELS})(?:\s*[).:,\]\n–—-]|\s+(?:{_REASON}|is\b|the\b)|$)"
        r"(?!.*\n[ \t]*(?!\1)[(\[]?[A-Z](?:[.):\]]|\s*\n|\Z))",
        r"(?i:\b(?:option|choice|choose|pick|select|say|think|believe|with|is|be|it['’]s|so|therefore))\W{1,3}"
        rf"({_LABELS})(?=\W*$|\s*[.,;:!\n)]|\s+(?:{_REASON}|is\b))",
    )
)
_DENIED = re.compile(
    rf"(?i:\b(?:not|neither|nor|than))\s+{_LABEL}"
    rf"|\b{_LABEL}\s+(?i:is|was|are|cannot be|can['’]t be|isn['’]t)\s+(?i:\w+\s+){{0,2}}?"
    r"(?i:wrong|incorrect|false|not)\b"
)
_ONE = re.compile(r"(?:((?i:option))[\s_-]*|(?<![A-Za-zÀ-ɏ0-9'’]))[(\[]?([A-Za-z]|\d{1,2})(?!\w)")
_LONE = re.compile(  # `A` and `I` are words too
    r"(?<![A-Za-zÀ-ɏ0-9'’.-])(?:[B-HJ-Z](?!\w|['’.-]\w)|A(?=\s*[,./&)]|\s+(?:and|or)\b|\s*$))"
)


def _labels(names: str, choices: tuple[str, ...]) -> set[int]:
    """The indices that labels mean, from 0, be there such a choice or not. A bare number may be a quantity where
    choices hold numbers, and then is no label."""
    numbered = not any(character.isdigit() for choice in choices for character in choice)
    named = [label for prefix, label in _ONE.findall(names) if prefix or numbered or not label.isdigit()]
    return {int(label) - 1 if label.isdigit() else ord(label.upper()) - ord("A") for label in named}


def _held(said: str, choices: tuple[str, ...]) -> int | None:
    """The one choice whose text occurs; of choices that lie in each other the longest. Articles need not be there."""
    for shape in (normalise, _without_articles):
        text, parts = shape(said), [shape(_plain(choice)) for choice in choices]
        held = [i for i, part in enumerate(parts) if part and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text)]
        if held:
            longest = max(held, key=lambda i: len(parts[i]))
            return longest if all(parts[i] in parts[longest] for i in held) else None
    return None


def _without_articles(text: str) -> str:
    return " ".join(word for word in normalise(text).split() if word not in ("a", "an", "the"))


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
