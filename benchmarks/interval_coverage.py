"""Do the intervals of a comparison hold what they say? Thousands of comparisons whose true difference is known.

    python benchmarks/interval_coverage.py [--comparisons 2000] [--processes 2] [--only perplexity] [--out FOLDER]

For each kind of score: how often the 95 % interval covers the true difference (must be 93 to 97 %), how often equals
are called "no evidence" (must be 95 % or more), and how often a difference of the size that the comparison states as
detectable is found (stated: 80 %). Then recipes with few seeds, and families of comparisons under Holm's correction.
Writes interval_coverage.jsonl and a table, interval_coverage.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate.metrics import METRICS, Metric
from luthier.evaluate.statistics.correction import together
from luthier.evaluate.statistics.paired import Paired, paired
from luthier.evaluate.statistics.seeds import seeded

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Floats, Floats]]
"""generator, questions n, true difference -> statistics [n, k] of base and tuned."""

ROUGE, ACCURACY, PERPLEXITY, BLEU = (METRICS.get(name) for name in ("rougeL", "accuracy", "perplexity", "bleu"))


@dataclass(frozen=True)
class Kind:
    """One kind of score. `sizes` are the numbers of questions, `differences` the true differences of which each
    comparison has one, and `n` the size at which detectable differences are planted."""

    name: str
    metric: Metric
    draw: Draw
    sizes: tuple[int, ...]
    differences: tuple[float, ...]
    n: int = 200


def _points(values: Any) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    return np.stack([scores, np.ones_like(scores)], axis=-1)


def _helped(rng: np.random.Generator, scores: Floats, share: float, mean: float, difference: float) -> Floats:
    """Scores 0..100 of mean `mean` of which a share comes nearer to 100, skewed, by `difference` points overall."""
    if not difference:
        return scores
    parts = share * (100.0 - mean) / difference
    helped = rng.random(scores.shape) < share
    gained: Floats = scores + helped * rng.beta(1.0, parts - 1.0, scores.shape) * (100.0 - scores)
    return gained


def _skewed(share: float) -> Draw:
    def draw(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
        """ROUGE-like: most questions are hard for both sides, a share of them is helped, some by much."""
        hard = rng.beta(1.3, 3.0, n)
        base, tuned = (100.0 * rng.beta(6.0 * hard, 6.0 * (1.0 - hard)) for _ in range(2))
        return _points(base), _points(_helped(rng, tuned, share, 100.0 * 1.3 / 4.3, difference))

    return draw


def tied(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """Four of five answers are the same on both sides; the others are new draws, helped."""
    base = 100.0 * rng.beta(1.3, 3.0, n)
    again = _helped(rng, 100.0 * rng.beta(1.3, 3.0, n), 1.0, 100.0 * 1.3 / 4.3, 5.0 * difference)
    return _points(base), _points(np.where(rng.random(n) < 0.8, base, again))


def graded(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """0, 50 or 100; four of five questions are scored the same."""
    base, again = (50.0 * rng.integers(0, 3, n) for _ in range(2))
    lifted = np.where(rng.random(n) < 5.0 * difference / 50.0, 100.0, again)  # 50 points more on average
    return _points(base), _points(np.where(rng.random(n) < 0.8, base, lifted))


def best_of_three(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """Three references, the best counts."""
    hard = rng.beta(1.3, 3.0, n)[:, None]
    base, tuned = (100.0 * rng.beta(6.0 * hard, 6.0 * (1.0 - hard), (n, 3)).max(axis=1) for _ in range(2))
    return _points(base), _points(_helped(rng, tuned, 1.0, _mean_of_best(), difference))


@cache
def _mean_of_best() -> float:
    rng = np.random.default_rng(0)
    hard = rng.beta(1.3, 3.0, 2_000_000)[:, None]
    return float(100.0 * rng.beta(6.0 * hard, 6.0 * (1.0 - hard), (len(hard), 3)).max(axis=1).mean())


def mean_of_three(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """The mean over three references of being equal to each: 0, 33, 67 or 100."""
    easy = rng.beta(0.5, 2.0, n)[:, None]
    base, tuned = (rng.random((n, 3)) < easy for _ in range(2))
    tuned = tuned | (rng.random((n, 3)) < difference / 80.0)
    return _points(100.0 * base.mean(axis=1)), _points(100.0 * tuned.mean(axis=1))


def _perplexity(sigma: float) -> Draw:
    def draw(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
        """Lengths are lognormal; long answers are easier and gain more."""
        z = rng.normal(0.0, 1.0, n)
        tokens = np.exp(3.0 + sigma * z)
        level = 2.0 - 0.2 * sigma  # tokens weigh z to a mean of sigma
        gain = -np.log1p(difference / np.exp(level)) * (1.0 + 0.3 * (z - sigma))
        base = 2.0 - 0.2 * z + rng.normal(0.0, 0.3, n)
        tuned = base - gain + rng.normal(0.0, 0.1, n)
        return np.stack([base * tokens, tokens], axis=1), np.stack([tuned * tokens, tokens], axis=1)

    return draw


def fields(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """Right fields of all fields, most of them right; one object in ten has four times as many."""
    asked = (1 + rng.poisson(4.0, n)) * np.where(rng.random(n) < 0.1, 4, 1)
    easy = rng.beta(2.0, 0.5, n)
    base, tuned = rng.binomial(asked, easy), rng.binomial(asked, easy + difference / 20.0 * (1.0 - easy))
    return np.stack([100.0 * base, asked], axis=1), np.stack([100.0 * tuned, asked], axis=1)


def corpus(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
    """BLEU's counts: n-grams of n = 1..4 that match, of answers of very unequal lengths."""
    better = float(np.interp(difference, *_bleu_by_skill()))
    base, tuned = _bleu(rng, n, 0.0, better)
    return base, tuned


def _bleu(rng: np.random.Generator, n: int, *betters: float) -> Any:
    wanted, skill = 4.0 + np.ceil(np.exp(rng.normal(2.7, 0.7, n))), rng.beta(3.0, 3.0, n)
    return [_counts(rng, wanted, skill + better * (1.0 - skill)) for better in betters]


def _counts(rng: np.random.Generator, wanted: Floats, skill: Floats) -> Floats:
    said = np.maximum(4.0, np.floor(wanted * rng.gamma(20.0, 1.0 / 20.0, len(wanted))))
    totals = [said - order for order in range(4)]
    matched = [rng.binomial(total.astype(int), skill ** (1.0 + 0.6 * order)) for order, total in enumerate(totals)]
    return np.stack([said, wanted, *matched, *totals], axis=1).astype(np.float64)


@cache
def _bleu_by_skill() -> tuple[list[float], list[float]]:
    """BLEU's gain over `better` 0, of half a million questions each."""
    betters = [0.0, 0.01, 0.02, 0.04, 0.08, 0.16]
    sides = _bleu(np.random.default_rng(0), 500_000, *betters)
    figures = [float(BLEU.finish(side.sum(axis=0))) for side in sides]
    figures[0] = float(np.mean([figures[0], BLEU.finish(_bleu(np.random.default_rng(1), 500_000, 0.0)[0].sum(axis=0))]))
    return [figure - figures[0] for figure in figures], betters


def _right(base_alone: float, both: float) -> Draw:
    def draw(rng: np.random.Generator, n: int, difference: float) -> tuple[Floats, Floats]:
        """Right or wrong; without a difference as many are right on one side only as on the other."""
        place = rng.random(n)
        base = place < both + base_alone
        tuned = (place < both) | ((place >= both + base_alone) & (place < both + 2 * base_alone + difference / 100.0))
        return _points(100.0 * base), _points(100.0 * tuned)

    return draw


ALL, MANY = (20, 50, 100, 200, 500), (50, 100, 200, 500)
KINDS = [
    Kind("scores, skewed", ROUGE, _skewed(1.0), ALL, (0.0, 2.0, 6.0)),
    Kind("scores, skewed, a quarter helped", ROUGE, _skewed(0.25), ALL, (0.0, 2.0, 6.0)),
    Kind("scores, best of three references", ROUGE, best_of_three, ALL, (0.0, 2.0, 6.0)),
    Kind("scores, mean of three references", ROUGE, mean_of_three, ALL, (0.0, 2.0, 6.0)),
    Kind("scores, four of five tied", ROUGE, tied, MANY, (0.0, 1.0, 3.0)),
    Kind("scores 0, 50, 100, four of five tied", ROUGE, graded, MANY, (0.0, 1.0, 3.0)),
    Kind("perplexity, unequal lengths", PERPLEXITY, _perplexity(1.2), ALL, (0.0, -0.3, -1.0)),
    Kind("perplexity, wildly unequal lengths", PERPLEXITY, _perplexity(1.6), ALL, (0.0, -0.3, -1.0)),
    Kind("fields right of all fields", ROUGE, fields, ALL, (0.0, 2.0, 6.0)),
    Kind("BLEU", BLEU, corpus, ALL, (0.0, 1.0, 3.0)),
    Kind("right or wrong, base 50 %", ACCURACY, _right(0.15, 0.35), ALL, (0.0, 3.0, 10.0)),
    Kind(
        "right or wrong, base 2 %, tuned 2 to 5 %", ACCURACY, _right(0.01, 0.01), (100, 200, 500), (0.0, 1.0, 2.0, 3.0)
    ),
    Kind("right or wrong, base 2 %, no answer shared", ACCURACY, _right(0.02, 0.0), (100, 200, 500), (0.0, 1.0, 3.0)),
]


def covered(kind: Kind, comparisons: int) -> dict[str, Any]:
    """Each comparison with one of the kind's differences; those with none say how often equals are told apart."""
    rng = np.random.default_rng(1)
    hits: dict[int, list[bool]] = {size: [] for size in kind.sizes}
    equals: dict[int, list[Paired]] = {size: [] for size in kind.sizes}
    for size in kind.sizes:  # one size after another: equal sizes share their draws
        for _ in range(comparisons // len(kind.sizes)):
            difference = float(rng.choice(kind.differences))
            found = paired(kind.metric, *_listed(kind.draw(rng, size, difference)))
            hits[size].append(found.low <= difference <= found.high)
            equals[size] += [] if difference else [found]
    return {
        "comparisons": sum(map(len, hits.values())),
        "coverage": _share([hit for size in kind.sizes for hit in hits[size]]),
        "by_size": {str(size): _share(hits[size]) for size in kind.sizes},
        "no_evidence": _share(_silent([found for size in kind.sizes for found in equals[size]])),
        "n": kind.n,
        "detectable": round(float(np.mean([found.detectable for found in equals[kind.n]])), 3),
    }


def power(kind: Kind, stated: float, comparisons: int) -> float:
    """How often the difference that equals state as detectable is found where it is planted, in percent."""
    rng, planted = np.random.default_rng(2), stated if kind.metric.higher else -stated
    drawn = (kind.draw(rng, kind.n, planted) for _ in range(comparisons))
    return _share([paired(kind.metric, *_listed(sides)).verdict == "better" for sides in drawn])


def _listed(sides: Iterable[Floats]) -> list[Any]:
    return [side.tolist() for side in sides]


def _silent(found: Iterable[Paired]) -> list[bool]:
    return [one.verdict == "no evidence" for one in found]


def _share(hits: list[bool]) -> float:
    """In percent."""
    return round(100.0 * float(np.mean(hits)), 1)


@dataclass(frozen=True)
class Recipes:
    """Recipes that were trained under few seeds, on 200 questions whose answers differ from seed to seed by 10 points.
    `noise` is the standard deviation of the score from seed to seed, in points; for the mean of 200 questions alone
    it is 0.9. A base with `fixed` was not trained."""

    base: int
    tuned: int
    noise: float
    fixed: bool = False

    def draw(self, rng: np.random.Generator, difference: float) -> tuple[Floats, Floats]:
        hard = rng.normal(40.0, 15.0, 200)
        sides = ((self.base, 0.0, 0.0 if self.fixed else self.noise), (self.tuned, difference, self.noise))
        return tuple(_points(hard + gain + _seeds(rng, seeds, noise)) for seeds, gain, noise in sides)  # type: ignore[return-value]

    def judged(self, rng: np.random.Generator, difference: float) -> Paired:
        return seeded(ROUGE, *self.draw(rng, difference), fixed=self.fixed)


def _seeds(rng: np.random.Generator, seeds: int, noise: float) -> Floats:
    """What recipe, seed, and seed and question together add, [seeds, 200]."""
    recipe, seed, both = (
        rng.normal(0.0, 5.0, 200),
        rng.normal(0.0, noise, (seeds, 1)),
        rng.normal(0.0, 10.0, (seeds, 200)),
    )
    moved: Floats = recipe + seed + both
    return moved


SEEDS = [
    *(Recipes(3, 3, noise) for noise in (0.0, 0.5, 1.5, 4.0)),
    *(Recipes(2, 5, noise) for noise in (0.5, 1.5, 4.0)),
    *(Recipes(1, 3, noise) for noise in (0.5, 1.5, 4.0)),
    *(Recipes(1, 3, noise, fixed=True) for noise in (0.5, 1.5, 4.0)),
]


def few_seeds(recipes: Recipes, comparisons: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    drawn = [recipes.judged(rng, 1.0) for _ in range(comparisons)]
    equal = [recipes.judged(rng, 0.0) for _ in range(comparisons // 2)]
    stated = float(np.mean([one.detectable for one in equal]))
    plain = [_two_level(rng, *recipes.draw(rng, 1.0)) for _ in range(comparisons // 8)]
    return {
        "coverage": _share([one.low <= 1.0 <= one.high for one in drawn]),
        "width": round(float(np.mean([one.high - one.low for one in drawn])), 1),
        "no_evidence": _share(_silent(equal)),
        "detectable": round(stated, 1),
        "power": _share([recipes.judged(rng, stated).verdict == "better" for _ in range(comparisons // 2)]),
        "plain_bootstrap": _share([low <= 1.0 <= high for low, high in plain]),
    }


def _two_level(rng: np.random.Generator, base: Floats, tuned: Floats, draws: int = 1000) -> tuple[float, float]:
    """What is not done: seeds and questions both drawn with replacement, plain percentiles."""
    n = base.shape[1]
    counts = rng.multinomial(n, np.full(n, 1.0 / n), draws) / n
    means = [
        (counts @ side[..., 0].T * rng.multinomial(len(side), np.full(len(side), 1.0 / len(side)), draws)).sum(axis=1)
        / len(side)
        for side in (base, tuned)
    ]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)


def families(sides: int, comparisons: int) -> dict[str, Any]:
    """Equals, each pair compared on 100 questions: how often a family holds any verdict, with Holm and without."""
    rng = np.random.default_rng(4)
    alone, corrected = [], []
    for _ in range(comparisons):
        hard = rng.beta(1.3, 3.0, 100)
        scores = [_points(100.0 * rng.beta(6.0 * hard, 6.0 * (1.0 - hard))).tolist() for _ in range(sides)]
        found = [paired(ROUGE, *pair) for pair in combinations(scores, 2)]
        alone.append(not all(_silent(found)))
        corrected.append(not all(_silent(together(found))))
    return {"pairs": sides * (sides - 1) // 2, "any_alone": _share(alone), "any_with_holm": _share(corrected)}


def _measure(job: tuple[str, int, int]) -> dict[str, Any]:
    what, place, comparisons = job
    if what == "kind":
        kind = KINDS[place]
        found = covered(kind, comparisons)
        return {"what": what, "name": kind.name, **found, "power": power(kind, found["detectable"], comparisons // 4)}
    if what == "seeds":
        return {"what": what, **vars(SEEDS[place]), **few_seeds(SEEDS[place], comparisons)}
    return {"what": what, "sides": place, **families(place, comparisons // 4)}


def table(rows: list[dict[str, Any]]) -> str:
    kinds, seeds, several = ([row for row in rows if row["what"] == what] for what in ("kind", "seeds", "family"))
    lines = [
        "| kind | covered | by questions | equals: no evidence | detectable at n | found |",
        "|---|---|---|---|---|---|",
    ]
    for row in kinds:
        sizes = ", ".join(f"{size}: {share:.1f}" for size, share in row["by_size"].items())
        found = f"{row['no_evidence']:.1f} % | {row['detectable']:.3g} at {row['n']} | {row['power']:.1f} %"
        lines.append(f"| {row['name']} | {row['coverage']:.1f} % | {sizes} | {found} |")
    lines += [
        "",
        "| seeds | noise | covered | width | equals: no evidence | detectable | found | plain bootstrap covers |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in seeds:
        sides = f"{'untrained' if row['fixed'] else row['base']} and {row['tuned']} | {row['noise']}"
        found = (
            f"{row['no_evidence']:.1f} % | {row['detectable']} | {row['power']:.1f} % | {row['plain_bootstrap']:.1f} %"
        )
        lines.append(f"| {sides} | {row['coverage']:.1f} % | {row['width']} | {found} |")
    lines += ["", "| equal sides | pairs | any verdict, uncorrected | with Holm |", "|---|---|---|---|"]
    for row in several:
        lines.append(f"| {row['sides']} | {row['pairs']} | {row['any_alone']:.1f} % | {row['any_with_holm']:.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = _arguments()
    jobs = [("kind", place, arguments.comparisons) for place, kind in enumerate(KINDS) if arguments.only in kind.name]
    if not arguments.only:
        jobs += [("seeds", place, arguments.comparisons) for place in range(len(SEEDS))]
        jobs += [("family", sides, arguments.comparisons) for sides in (3, 4, 6)]
    rows = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for row in pool.map(_measure, jobs):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if not arguments.only:
        (arguments.out / "interval_coverage.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (arguments.out / "interval_coverage.md").write_text(table(rows))
    print(table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comparisons", type=int, default=2000, help="of each kind (a quarter as many for power and families)"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
