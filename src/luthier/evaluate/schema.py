"""What `compare --json` prints and comparison.json holds, for machines. Keys stay; more may come."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["better", "no evidence", "worse"]


class Part(BaseModel):
    """More keys may come with a later version."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, strict=True)


class Difference(Part):
    """One metric on two sides, paired by question."""

    base: float
    tuned: float
    difference: float
    """tuned - base, in the metric's unit (points of 100; perplexity has its own)."""
    low: float | None
    """Lower end of the 95 % interval of the difference; null for a single question."""
    high: float | None
    n: int
    """Questions."""
    higher: bool
    """Whether a higher figure is better."""
    verdict: Verdict
    p: float
    """Two-sided p of the permutation test, for this difference alone."""
    detectable: float | None
    """The least true difference that a test set like this finds four times in five."""
    differing: int
    """Questions whose scores differ."""
    adjusted: float | None
    """p after Holm's correction for `family` comparisons; null where this one stands alone."""
    family: int


class Corrected(Difference):
    p_adjusted: float
    """The p that counts: after the correction for the other pairs, where there are any."""


class Score(Part):
    """One side's score by one metric."""

    score: float
    low: float | None
    """Lower end of its 95 % interval over questions."""
    high: float | None
    n: int


class Words(Part):
    """Words of a side's answers."""

    mean: float
    median: float
    p95: float
    most: int


class Side(Part):
    """What was compared."""

    name: str
    kind: Literal["base", "run", "checkpoint", "adapter"]
    base: str
    revision: str | None
    dtype: str
    quantize: dict[str, Any] | None
    adapter: str | None
    """What was trained, in words; null for a base."""
    sha256: str | None
    """Of the trained tensors."""
    folder: str | None
    metrics: dict[str, Score]
    words: Words | None
    """Null where no answers were asked for."""
    stopped: float | None
    """Share of answers that ended by themselves, 0 to 1."""


class Pair(Part):
    """Two sides: in `metrics` the first is `base`, the second `tuned`."""

    first: str
    second: str
    metrics: dict[str, Corrected]
    verdict: Verdict
    """Of the second, by the deciding metric and the adjusted p."""


class Spread(Part):
    """A metric from seed to seed."""

    scores: list[float]
    mean: float
    spread: float
    """Standard deviation."""


class SeededRecipe(Part):
    """Sides that differ in their seed alone."""

    name: str
    sides: list[int]
    """Their places in `sides`."""
    metrics: dict[str, Spread]


class Seeds(Part):
    """What seeds do; empty where no two sides are seeds of one recipe."""

    recipes: list[SeededRecipe] = []
    pairs: list[Pair] = []
    """Recipes against each other and the base, with the noise of seeds in their intervals."""


class Comparison(Part):
    """The object that `luthier compare --json` prints."""

    verdict: Verdict
    """Whether tuned is better than its base; of two sides, the second than the first; of more, one than all others."""
    sentence: str
    metric: str
    """The metric that decides: the first of evaluate.metrics."""
    metrics: dict[str, Difference]
    """By name, of the two sides in `pair`."""
    means: dict[str, Difference]
    """The same with the mean over several references instead of the best one."""
    matched: dict[str, Difference]
    """The deciding ROUGE with both answers cut to the same number of words."""
    lengths: dict[str, float]
    """Mean words of an answer: base, tuned, reference."""
    stopped: dict[str, float]
    """Share of answers that ended by themselves: base, tuned."""
    warnings: list[str]
    settings: dict[str, Any]
    """What was compared and how: enough to do it again."""
    pair: list[str] = Field(min_length=2, max_length=2)
    """Names of the sides that `base` and `tuned` stand for."""
    winner: str | None
    """The side that is better than all others, where three or more were compared."""
    sides: list[Side]
    pairs: list[Pair]
    seeds: Seeds
    slices: dict[str, dict[str, dict[str, Difference]]]
    """By name of the slicing, value and metric: the deciding metric and perplexity. Exploratory."""


def schema() -> dict[str, Any]:
    """JSON Schema of it."""
    return Comparison.model_json_schema()


def check(value: Any) -> None:
    """Raises ValueError, naming the place, where `value` is not as the schema says."""
    Comparison.model_validate(value)
