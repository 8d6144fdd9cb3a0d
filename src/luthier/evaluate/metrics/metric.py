"""What a metric is: a function of sums over questions, so that one paired bootstrap serves them all. A text metric is
sum(points) / sum(1), perplexity is exp(sum(negative log-likelihood) / sum(tokens)), BLEU is of ten sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.data.conversation import Conversation

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
    `choice_tokens` tokens that spell `choice_characters` characters; `unasked` are those of the same choices where the
    question is left out. `preferences` are points against the base side's answer, by the judge's name. A part that was
    not asked for is None.
    """

    text: str | None = None
    stopped: bool = False
    tokens: int = 0
    nll: float | None = None
    targets: int = 0
    choices: Sequence[float] | None = None
    choice_tokens: Sequence[int] = ()
    choice_characters: Sequence[int] = ()
    unasked: Sequence[float] | None = None
    preferences: Mapping[str, float] | None = None


Statistics = tuple[float, ...]
"""What one answer adds to the sums that a metric is a function of."""


def ratio(sums: Floats) -> Floats:
    """[..., 2] -> [...]: the first sum over the second."""
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient


def exp_ratio(sums: Floats) -> Floats:
    """[..., 2] -> [...]: exp of the first sum over the second, infinity where no number is as large."""
    import numpy as np

    with np.errstate(over="ignore"):
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
        lacks: what is missing where no question can be scored, and what to do.
    """

    name: str
    title: str
    score: Callable[[Conversation, Answer], list[Statistics]]
    needs: Literal["text", "nll", "choices", "unasked", "preferences"] = "text"
    higher: bool = True
    finish: Callable[[Floats], Floats] = ratio
    unit: str = "points"
    lacks: str = "no question has a reference answer; give test rows with answers"

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


def normalise(text: str) -> str:
    """Case folded, outer space removed, inner space made single: what `exact_match` compares."""
    return " ".join(text.split()).casefold()
