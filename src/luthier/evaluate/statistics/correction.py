"""Several comparisons at once: of twenty pairs of equals one looks better by chance. Holm's correction counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.evaluate.statistics.interval import CHANCE

if TYPE_CHECKING:
    from luthier.evaluate.statistics.paired import Paired


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p, in the given order: calling every difference with an adjusted p below 0.05 real is wrong anywhere
    at most once in 20 families, however the comparisons hang together (Holm 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def together(found: Sequence[Paired]) -> list[Paired]:
    """The same comparisons judged as one family: `adjusted` and `family` are set, and a verdict stands only where the
    adjusted p is below 0.05. Intervals stay each pair's own; `explain` says so."""
    family = zip(found, holm([one.p for one in found]), strict=True)
    return [
        replace(one, adjusted=p, family=len(found), verdict=one.verdict if p < CHANCE else "no evidence")
        for one, p in family
    ]
