"""Scores per example. A metric is one `Metric` value and one line in `METRICS`; one with options is a function from its
section of the recipe to a `Metric`, and one line in `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.evaluate.metrics.metric import Answer, Metric, Statistics, exp_ratio, normalise, points, ratio, words
from luthier.registry import Registry

if TYPE_CHECKING:
    from luthier.recipe import MetricEntry

__all__ = [
    "KINDS",
    "METRICS",
    "Answer",
    "Metric",
    "Statistics",
    "exp_ratio",
    "normalise",
    "points",
    "ratio",
    "resolved",
    "shown",
    "words",
]

METRICS = Registry(
    "metric",
    {
        "rouge1": "luthier.evaluate.metrics.text:ROUGE1",
        "rouge2": "luthier.evaluate.metrics.text:ROUGE2",
        "rougeL": "luthier.evaluate.metrics.text:ROUGEL",
        "rougeLsum": "luthier.evaluate.metrics.text:ROUGELSUM",
        "exact_match": "luthier.evaluate.metrics.text:EXACT",
        "token_f1": "luthier.evaluate.metrics.text:F1",
        "bleu": "luthier.evaluate.metrics.text:BLEU",
        "chrf": "luthier.evaluate.metrics.text:CHRF",
        "perplexity": "luthier.evaluate.metrics.text:PERPLEXITY",
        "accuracy": "luthier.evaluate.metrics.choice:ACCURACY",
        "accuracy_likelihood": "luthier.evaluate.metrics.choice:ACCURACY_LIKELIHOOD",
        "accuracy_per_token": "luthier.evaluate.metrics.choice:ACCURACY_PER_TOKEN",
        "accuracy_per_character": "luthier.evaluate.metrics.choice:ACCURACY_PER_CHARACTER",
        "accuracy_calibrated": "luthier.evaluate.metrics.choice:ACCURACY_CALIBRATED",
        "json_valid": "luthier.evaluate.metrics.checks:JSON_VALID",
        "json_strict": "luthier.evaluate.metrics.checks:JSON_STRICT",
        "json_fields": "luthier.evaluate.metrics.checks:JSON_FIELDS",
    },
)

# By the `kind` of an entry of evaluate.metrics: section -> Metric.
KINDS = Registry(
    "kind of metric",
    {
        "json": "luthier.evaluate.metrics.checks:json_metric",
        "regex": "luthier.evaluate.metrics.checks:regex_metric",
        "python": "luthier.evaluate.metrics.checks:python_metric",
        "judge": "luthier.evaluate.metrics.checks:judge_metric",
    },
)


def resolved(entries: Sequence[MetricEntry]) -> dict[str, Metric]:
    """The metrics that a recipe's entries mean, by name. Raises RecipeError for an unknown name, a check that cannot be
    imported, or two entries of one name."""
    found: dict[str, Metric] = {}
    for entry in entries:
        metric: Metric = METRICS.get(entry) if isinstance(entry, str) else KINDS.get(entry.kind)(entry)
        if found.setdefault(metric.name, metric) is not metric:
            fix = "give each a name of its own: {kind: …, name: …}"
            raise RecipeError(f"two metrics are called '{metric.name}'", where="evaluate.metrics", fix=fix)
    return found


def shown(name: str, described: Mapping[str, Any]) -> Metric:
    """A metric of comparison.json as a page or a table shows it; one with options cannot score again. `described` is
    its entry there."""
    if "title" not in described:  # written before entries were described
        metric: Metric = METRICS.get(name)
        return metric
    return Metric(name, described["title"], lambda *_: [], higher=described["higher"], unit=described["unit"])
