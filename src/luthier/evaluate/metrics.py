"""Scores per example. A metric is one `Metric` value and one line in `METRICS`.

Every metric is a function of sums over questions, so that one paired bootstrap serves them all: a text metric is
sum(points) / sum(1), perplexity is exp(sum(negative log-likelihood) / sum(tokens)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from luthier.data.conversation import Conversation
from luthier.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one side (base or tuned) made of one question.

    `text` is the generated answer without control tokens, `stopped` whether it ended by itself, `tokens` how many it
    took. `nll` is the summed negative log-likelihood (nats) of the first reference under the model, over `targets`
    tokens. `choices` are the summed negative log-likelihoods (nats) of the question's choices, each as an answer, over
    `choice_tokens` tokens. A part that was not asked for is None.
    """

    text: str | None = None
    stopped: bool = False
    tokens: int = 0
    nll: float | None = None
    targets: int = 0
    choices: Sequence[float] | None = None
    choice_tokens: Sequence[int] = ()


Statistics = tuple[float, ...]
"""What one answer adds to the sums that a metric is a function of."""


def ratio(sums: Floats) -> Floats:
    """[..., 2] -> [...]: the first sum over the second."""
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient


def exp_ratio(sums: Floats) -> Floats:
    """[..., 2] -> [...]: exp of the first sum over the second."""
    import numpy as np

    return np.exp(ratio(sums))


@dataclass(frozen=True, slots=True)
class Metric:
    """How one answer is scored.

    Attributes:
        score: question, answer -> the statistics against each reference, or one where all count together; empty where
            the question cannot be scored, for instance without references.
        needs: the part of an `Answer` it reads.
        higher: whether a higher figure is better.
        finish: sums of statistics, float64 [..., k] -> the figures that are reported [...]. Of one question's
            statistics alone it is that question's figure.
        unit: what the figure counts, for the verdict's sentence.
    """

    name: str
    title: str
    score: Callable[[Conversation, Answer], list[Statistics]]
    needs: Literal["text", "nll", "choices"] = "text"
    higher: bool = True
    finish: Callable[[Floats], Floats] = ratio
    unit: str = "points"

    def figure(self, statistics: Statistics) -> float:
        """The figure of one question, or of sums."""
        import numpy as np

        return float(self.finish(np.array(statistics)))

    def best(self, scores: Sequence[Statistics]) -> Statistics:
        """Of the statistics against several references, those of the best figure."""
        return (max if self.higher else min)(scores, key=self.figure)


def points(values: Iterable[float]) -> list[Statistics]:
    """Points of 100, a question counting once, as statistics for `ratio`."""
    return [(value, 1.0) for value in values]


def words(text: str) -> int:
    return len(text.split())


def _rouge(kind: str, title: str) -> Metric:
    """ROUGE F-measure as `rouge-score` computes it with the Porter stemmer (Lin 2004). `rougeLsum` takes each line as
    a sentence, which is the package's default. Only the letters a-z and digits count: that is ROUGE's own rule."""

    def score(question: Conversation, answer: Answer) -> list[Statistics]:
        text = answer.text or ""
        return points(100.0 * _scorer(kind).score(reference, text)[kind].fmeasure for reference in question.references)

    return Metric(kind, title, score)


@cache
def _scorer(kind: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], tokenizer=_Stemmed())


class _Stemmed:
    """`rouge-score`'s own tokeniser with its stems remembered: nearly all of its time goes into stemming again."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

        self.stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)  # what rouge-score calls on its stemmer

    def tokenize(self, text: str) -> list[str]:
        return _rouge_tokens(self, text)


@lru_cache(maxsize=20_000)
def _rouge_tokens(stemmer: _Stemmed, text: str) -> list[str]:
    from rouge_score import tokenize

    tokens: list[str] = tokenize.tokenize(text, stemmer)
    return tokens


def normalise(text: str) -> str:
    """Case folded, outer space removed, inner space made single: what `exact_match` compares."""
    return " ".join(text.split()).casefold()


def exact_match(question: Conversation, answer: Answer) -> list[Statistics]:
    said = normalise(answer.text or "")
    return points(100.0 * (said == normalise(reference)) for reference in question.references)


def accuracy(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the generated answer names the right choice; an answer that names none, or several, is wrong."""
    if question.answer is None:
        return []
    return points([100.0 * (parse_choice(answer.text or "", question.choices) == question.answer)])


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


def likeliest(question: Conversation, answer: Answer) -> list[Statistics]:
    """Whether the right choice is the likeliest answer: no format has to be learned to score."""
    return _lowest(question, answer.choices or ())


def likeliest_per_token(question: Conversation, answer: Answer) -> list[Statistics]:
    """The same by the mean over a choice's tokens, so that a long one is not unlikely for its length alone."""
    pairs = zip(answer.choices or (), answer.choice_tokens, strict=True)
    return _lowest(question, [nll / tokens for nll, tokens in pairs])


def _lowest(question: Conversation, losses: Sequence[float]) -> list[Statistics]:
    if question.answer is None or not losses:
        return []
    return points([100.0 * (min(range(len(losses)), key=losses.__getitem__) == question.answer)])


def likelihood(question: Conversation, answer: Answer) -> list[Statistics]:
    return [] if answer.nll is None or not answer.targets else [(answer.nll, float(answer.targets))]


ROUGE1 = _rouge("rouge1", "ROUGE-1")
ROUGE2 = _rouge("rouge2", "ROUGE-2")
ROUGEL = _rouge("rougeL", "ROUGE-L")
ROUGELSUM = _rouge("rougeLsum", "ROUGE-Lsum")
EXACT = Metric("exact_match", "exact match", exact_match)
ACCURACY = Metric("accuracy", "accuracy", accuracy)
ACCURACY_LIKELIHOOD = Metric("accuracy_likelihood", "accuracy (likelihood)", likeliest, needs="choices")
ACCURACY_PER_TOKEN = Metric(
    "accuracy_per_token", "accuracy (likelihood per token)", likeliest_per_token, needs="choices"
)
PERPLEXITY = Metric("perplexity", "perplexity", likelihood, needs="nll", higher=False, finish=exp_ratio, unit="")

METRICS = Registry(
    "metric",
    {
        "rouge1": "luthier.evaluate.metrics:ROUGE1",
        "rouge2": "luthier.evaluate.metrics:ROUGE2",
        "rougeL": "luthier.evaluate.metrics:ROUGEL",
        "rougeLsum": "luthier.evaluate.metrics:ROUGELSUM",
        "exact_match": "luthier.evaluate.metrics:EXACT",
        "accuracy": "luthier.evaluate.metrics:ACCURACY",
        "accuracy_likelihood": "luthier.evaluate.metrics:ACCURACY_LIKELIHOOD",
        "accuracy_per_token": "luthier.evaluate.metrics:ACCURACY_PER_TOKEN",
        "perplexity": "luthier.evaluate.metrics:PERPLEXITY",
    },
)
