"""How often a study's intervals hold what they promise, by simulation.

    python benchmarks/study_coverage.py [--studies 1000] [--questions 250] [--json]

Each simulated study asks questions of unequal hardness of models whose true score follows a curve; a cell's seed moves
its level. Counted are: whether the interval of the next doubling holds what is then measured with the same seeds and
questions, whether the smaller sizes foresee the largest, whether a band holds the true score, and how often a study
says `no evidence`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from luthier.evaluate.metrics.metric import ratio
from luthier.evaluate.study import curve
from luthier.evaluate.study.curve import Curve

TRUTHS: dict[str, Callable[[float], float]] = {
    "power, exponent 0.5": lambda size: 0.70 - 0.30 * (size / 100) ** -0.5,
    "power, exponent 0.2": lambda size: 0.75 - 0.30 * (size / 100) ** -0.2,
    "power, exponent 1.5": lambda size: 0.60 - 0.15 * (size / 100) ** -1.5,
    "same gain each doubling": lambda size: min(0.95, 0.40 + 0.04 * np.log2(size / 100)),
    "flat": lambda size: 0.27,
    "S-shaped, no power law": lambda size: 0.30 + 0.35 / (1 + (500 / size) ** 2),
}
SHAPES = (([200, 400, 600, 800, 1000], 3), ([100, 200, 400, 800], 2), ([200, 400, 600, 800, 1000], 1))
BASE = 0.27
_SPREAD = 1.5
_RANKS = (np.arange(400) + 0.5) / 400
_HARDNESS = _SPREAD * np.log(_RANKS / (1 - _RANKS))  # of all questions there are
_LEVELS = np.linspace(-9, 9, 1441)
_SHARES = (1 / (1 + np.exp(_HARDNESS[None] - _LEVELS[:, None]))).mean(axis=1)


def answers(rng: Any, share: float, hardness: Any, spread: float) -> Any:
    """float64 [n, 2]: statistics of one cell of a model that would have `share` of all questions right."""
    level = np.interp(share, _SHARES, _LEVELS) + rng.normal(0, spread)
    right = rng.random(len(hardness)) < 1 / (1 + np.exp(hardness - level))
    return np.stack([100.0 * right, np.ones(len(hardness))], axis=-1)


def study(rng: Any, truth: Callable[[float], float], sizes: list[int], seeds: int, questions: int) -> dict[str, Any]:
    """What one study promised, and whether it was kept."""
    hardness, largest = rng.logistic(0, _SPREAD, questions), sizes[-1]
    cells = {
        size: np.stack([answers(rng, truth(size), hardness, 0.06) for _ in range(seeds)])
        for size in [*sizes, 2 * largest]
    }
    scores = {size: dict(enumerate(ratio(some.sum(axis=1)).tolist())) for size, some in cells.items()}
    means = {size: float(np.mean(list(some.values()))) for size, some in scores.items()}
    fit = curve.fit({size: scores[size] for size in sizes}, (0.0, 100.0))
    assert fit is not None
    points = Curve({str(size): cells[size] for size in sizes}, ratio, answers(rng, BASE, hardness, 0.0), draws=2000)
    if not points.noise.freedom:
        points.noise = curve.residual_noise({size: scores[size] for size in sizes})
    band = points.band(str(largest))
    gain, gain_p = points.combined({str(largest): 1.0, "": -1.0})
    trend, trend_p = points.combined(dict(zip(map(str, sizes), curve.per_doubling(sizes), strict=True)))
    verdict = curve.verdict(gain.value, gain_p, trend.value, trend_p, higher=True)
    return {
        "next": fit.next.low <= means[2 * largest] <= fit.next.high,
        "width": fit.next.high - fit.next.low,
        "check": fit.check is None or fit.check.low <= means[largest] <= fit.check.high,
        "band": band.low <= 100 * truth(largest) <= band.high,
        "no evidence": verdict == "no evidence",
    }


def rows(studies: int, questions: int) -> Iterator[dict[str, Any]]:
    for sizes, seeds in SHAPES:
        for name, truth in TRUTHS.items():
            rng = np.random.default_rng(7)
            found = [study(rng, truth, sizes, seeds, questions) for _ in range(studies)]
            shares = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
            yield {"truth": name, "sizes": sizes, "seeds": seeds, "studies": studies, "questions": questions, **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for row in rows(args.studies, args.questions):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        shape = f"{row['truth']:24} {len(row['sizes'])} sizes × {row['seeds']} seeds"
        kept = f"next {row['next']:.3f} (width {row['width']:.1f})  check {row['check']:.3f}  band {row['band']:.3f}"
        print(f"{shape}  {kept}  no evidence {row['no evidence']:.3f}", flush=True)


if __name__ == "__main__":
    main()
