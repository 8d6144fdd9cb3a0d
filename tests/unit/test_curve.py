"""Learning curves and differences between settings, on scores made in code whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from luthier.evaluate.metrics import METRICS
from luthier.evaluate.metrics.metric import ratio
from luthier.evaluate.study import curve
from luthier.evaluate.study.curve import Curve
from luthier.evaluate.study.findings import Cell, Findings, find
from luthier.evaluate.study.page import render
from luthier.evaluate.study.view import Shown
from luthier.strict import dumps

SIZES = [100, 200, 400, 800]
_SETTINGS = {"study": "study", "base": "tiny", "method": "lora", "recipe": ""}
Truth = Callable[[float], float]


def power(size: float) -> float:
    return 0.7 - 0.3 * (size / 100) ** -0.5


def flat(size: float) -> float:
    return 0.27


_RANKS = (np.arange(400) + 0.5) / 400
_HARDNESS = 1.5 * np.log(_RANKS / (1 - _RANKS))  # of all questions there are
_LEVELS = np.linspace(-9, 9, 721)
_SHARES = (1 / (1 + np.exp(_HARDNESS[None] - _LEVELS[:, None]))).mean(axis=1)


def statistics(rng: Any, share: float, seeds: int, hardness: Any, spread: float = 0.06) -> Any:
    """float64 [seeds, n, 2]: right or wrong answers to questions of that hardness, of a model that would have `share`
    of all questions right, but for what a seed does."""
    level = np.interp(share, _SHARES, _LEVELS)
    right = [
        rng.random(len(hardness)) < 1 / (1 + np.exp(hardness - level - rng.normal(0, spread))) for _ in range(seeds)
    ]
    return np.stack([100.0 * np.array(right), np.ones((seeds, len(hardness)))], axis=-1)


def simulated(rng: Any, truth: Truth, sizes: list[int], seeds: int, n: int = 200) -> dict[int, Any]:
    hardness = rng.logistic(0, 1.5, n)
    return {size: statistics(rng, truth(size), seeds, hardness) for size in sizes}


def scores(found: dict[int, Any]) -> dict[int, dict[int, float]]:
    return {size: dict(enumerate(ratio(some.sum(axis=1)).tolist())) for size, some in found.items()}


@pytest.mark.parametrize(("truth", "seeds"), [(power, 3), (flat, 2), (power, 1)])
def test_the_interval_of_the_next_doubling_holds_what_is_then_measured(truth: Truth, seeds: int) -> None:
    """95 % over many studies; the full simulation is benchmarks/study_coverage.py."""
    rng, inside, foreseen = np.random.default_rng(3), 0, 0
    for _ in range(40):
        seen = scores(simulated(rng, truth, [*SIZES, 1600], seeds))
        after = np.mean(list(seen.pop(1600).values()))
        fit = curve.fit(seen, (0.0, 100.0))
        assert fit is not None
        assert fit.check is not None
        inside += fit.next.low <= after <= fit.next.high
        foreseen += fit.check.low <= np.mean(list(seen[800].values())) <= fit.check.high
    assert inside >= 34  # at 95 %, fewer come once in a hundred times
    assert foreseen >= 34


def test_a_power_law_without_noise_is_found_as_it_is() -> None:
    seen = {size: {seed: 100 * power(size) for seed in (1, 2)} for size in SIZES}
    fit = curve.fit(seen)
    assert fit is not None
    assert fit.exponent == pytest.approx(0.5)
    assert (fit.limit, fit.amount) == pytest.approx((70.0, -30.0), abs=0.01)
    assert fit.next.value == pytest.approx(100 * power(1600), abs=0.1)
    assert dict(fit.path) == pytest.approx({size: 100 * power(size) for size, _ in fit.path}, abs=0.01)


def test_the_drawn_curve_ends_at_what_is_foretold() -> None:
    """Noise that a single exponent would follow out of the window."""
    fit = curve.fit({50: {1: 46.0, 2: 49.0}, 100: {1: 44.0, 2: 46.0}, 200: {1: 52.0, 2: 51.0}, 400: {1: 51.0, 2: 53.5}})
    assert fit is not None
    assert (fit.path[0][0], fit.path[-1][0]) == (50, 800)
    assert fit.path[-1][1] == pytest.approx(fit.next.value, abs=0.5)


def test_the_check_uses_the_smaller_sizes_alone() -> None:
    seen = scores(simulated(np.random.default_rng(0), power, SIZES, 2))
    odd = {**seen, 800: dict.fromkeys(seen[800], 5.0)}
    found, other = curve.fit(seen), curve.fit(odd)
    assert found is not None
    assert other is not None
    assert found.check == other.check
    assert found.next != other.next
    assert other.check is not None
    assert not other.check.low <= 5.0 <= other.check.high


def test_seeds_that_differ_in_level_alone_do_not_widen_the_prediction() -> None:
    level = {1: -6.0, 2: 6.0}
    seen = {size: {seed: 100 * power(size) + add for seed, add in level.items()} for size in SIZES}
    fit = curve.fit(seen)
    assert fit is not None
    assert fit.next.high - fit.next.low < 0.5


def test_fewer_than_three_sizes_give_no_curve_and_three_no_check() -> None:
    seen = scores(simulated(np.random.default_rng(0), power, [100, 200, 400], 2))
    fit = curve.fit(seen)
    assert fit is not None
    assert fit.check is None
    assert curve.fit({size: seen[size] for size in (100, 200)}) is None


def test_a_band_holds_the_score_of_other_questions_and_other_seeds() -> None:
    rng, inside = np.random.default_rng(4), 0
    for _ in range(60):
        points = {str(size): some for size, some in simulated(rng, flat, SIZES, 3, n=100).items()}
        band = Curve(points, ratio, draws=1000).band("400")
        inside += band.low <= 27.0 <= band.high
    assert inside >= 53


def test_seed_noise_is_pooled_over_points_and_widens_bands() -> None:
    rng, hardness = np.random.default_rng(5), np.zeros(100)
    same = {str(i): np.repeat(statistics(rng, 0.5, 1, hardness), 3, axis=0) for i in range(3)}
    apart = {str(i): statistics(rng, 0.5, 3, hardness, spread=1.0) for i in range(3)}
    quiet, loud = Curve(same, ratio), Curve(apart, ratio)
    assert (quiet.noise.deviation, quiet.noise.freedom) == (0.0, 6)
    deviations = [ratio(some.sum(axis=1)).var(ddof=1) for some in apart.values()]
    assert loud.noise.deviation == pytest.approx(np.mean(deviations) ** 0.5)
    widths = [found.band("1").high - found.band("1").low for found in (quiet, loud)]
    assert widths[0] < widths[1]


def test_bands_stay_where_scores_can_be() -> None:
    points = {"100": statistics(np.random.default_rng(0), 0.02, 2, np.zeros(40), spread=2.0)}
    assert Curve(points, ratio, bounds=(0.0, 100.0)).band("100").low == 0.0
    assert Curve(points, ratio).band("100").low < 0.0


def constant(score: float, seeds: int = 3, n: int = 50) -> Any:
    """float64 [seeds, n, 2]: all questions score the same."""
    return np.broadcast_to([score, 1.0], (seeds, n, 2)).copy()


@pytest.mark.parametrize(("n", "share"), [(4, 60.24), (50, 7.11)])
def test_questions_that_all_agree_at_a_bound_leave_open_what_others_would_do(n: int, share: float) -> None:
    """By as much as the exact limit (Clopper and Pearson) of a share that none of n has."""
    points = {"wrong": constant(0.0, n=n), "right": constant(100.0, n=n)}
    found = Curve(points, ratio, constant(0.0, n=n)[0], (0.0, 100.0))
    for band in (found.band("wrong"), found.base_band()):
        assert (band.low, band.value, band.high) == (0.0, 0.0, pytest.approx(share, abs=0.05))
    assert (found.band("right").low, found.band("right").high) == (pytest.approx(100 - share, abs=0.05), 100.0)


def test_a_difference_of_points_that_all_agree_carries_what_is_open_of_both() -> None:
    found = Curve({"wrong": constant(0.0, n=4)}, ratio, constant(0.0, n=4)[0], (0.0, 100.0))
    gain, p = found.combined({"wrong": 1.0, "": -1.0})
    assert gain.value == 0.0
    assert gain.low == pytest.approx(-47, abs=3)
    assert gain.high == pytest.approx(47, abs=3)
    assert p > 0.5
    sure, p = Curve({"right": constant(100.0)}, ratio, constant(0.0)[0], (0.0, 100.0)).combined({"right": 1, "": -1})
    assert 85 < sure.low < sure.high == 100.0
    assert p < 0.001


@pytest.mark.parametrize(("score", "bounds"), [(0.0, curve.EVERYWHERE), (0.0, (0.0, np.inf)), (30.0, (0.0, 100.0))])
def test_away_from_bounds_questions_that_all_agree_say_nothing_of_others(score: float, bounds: curve.Bounds) -> None:
    found = Curve(
        {"alike": constant(score)}, ratio, statistics(np.random.default_rng(0), 0.5, 1, np.zeros(50))[0], bounds
    )
    for interval, p in (found.combined({"alike": 1.0}), found.combined({"alike": 1.0, "": -1.0})):
        assert (interval.low, interval.high, p) == (-np.inf, np.inf, 1.0)
    assert found.band("alike").low == -np.inf
    assert np.isfinite(found.base_band().low)


def better(one: Any, points: float) -> Any:
    """The same answers, each worth so many points more."""
    return one + np.array([points, 0.0])


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_a_difference_that_is_the_same_for_every_question_says_nothing_of_others(more: float) -> None:
    one = statistics(np.random.default_rng(0), 0.5, 1, np.zeros(50))
    found = Curve({"100": one, "200": better(one, more)}, ratio, bounds=(0.0, 100.0))
    difference, p = found.combined({"100": -1.0, "200": 1.0})
    assert (difference.value, difference.low, difference.high, p) == (pytest.approx(more), -np.inf, np.inf, 1.0)
    assert np.isfinite(found.band("100").high)
    seeds = {"100": np.concatenate([one, better(one, 2.0)]), "200": np.concatenate([one, better(one, 3.0)])}
    difference, _ = Curve(seeds, ratio).combined({"100": -1.0, "200": 1.0})
    assert -np.inf < difference.low < 0 < difference.high < np.inf, "what seeds do is known"


def test_a_difference_of_what_is_no_number_is_beyond_no_chance() -> None:
    rng = np.random.default_rng(0)
    one, other = (np.stack([rng.normal(2, 0.1, (2, 50)), np.ones((2, 50))], axis=-1) for _ in range(2))
    other[0, 3, 0] = np.nan
    difference, p = Curve({"one": one, "other": other}, ratio, draws=500).combined({"other": 1.0, "one": -1.0})
    assert (difference.low, difference.high, p) == (-np.inf, np.inf, 1.0)


# --- verdicts over sizes


def cells(found: dict[Any, Any]) -> list[Cell]:
    def kept(one: Any) -> dict[str, Any]:
        return {"rows": list(range(len(one))), "statistics": one.tolist(), "heldout": [[2.0, 4.0], [1.0, 4.0]]}

    return [Cell(at, seed, f"{at}-{seed}", kept(one)) for at, some in found.items() for seed, one in enumerate(some)]


def study(found: dict[Any, Any], base: Any, *, over: str | None = None, chance: float | None = 25.0) -> Findings:
    metric = METRICS.get("accuracy_likelihood")
    (first,) = cells({0: base})
    assert first.scores is not None
    return find(metric, cells(found), first.scores, over=over, chance=chance, draws=2000)


def of(truth: Truth, base: float, seed: int = 0, seeds: int = 3, n: int = 200) -> Findings:
    rng = np.random.default_rng(seed)
    hardness = rng.logistic(0, 1.5, n)
    found = {size: statistics(rng, truth(size), seeds, hardness) for size in SIZES}
    return study(found, statistics(rng, base, 1, hardness, spread=0.0))


def test_a_curve_that_rises_says_that_more_data_helps() -> None:
    found = of(power, 0.3)
    assert found.verdict == "more helps"
    assert found.trend is not None
    assert found.trend.low > 0
    assert found.sentence.startswith("more data helps: accuracy (likelihood) ")
    assert "the next doubling, to 1,600 rows, gives +" in found.sentence
    assert "±" in found.sentence


def test_a_gain_that_does_not_grow_with_the_data_is_told_apart() -> None:
    found = of(lambda size: 0.6, 0.3)
    assert found.verdict == "helps"
    assert "more data is not seen to" in found.sentence


def test_training_that_changes_nothing_is_no_evidence_and_chance_is_named() -> None:
    found = of(flat, 0.27)
    assert found.verdict == "no evidence"
    assert "more data of this kind does not show help with this model" in found.sentence
    assert "guessing gives 25" in found.sentence
    assert [point["size"] for point in found.points] == [0, *SIZES]


def test_studies_of_nothing_say_no_evidence_nineteen_times_in_twenty() -> None:
    wrong = sum(of(flat, 0.27, seed=seed, n=100).verdict != "no evidence" for seed in range(40))
    assert wrong <= 4  # at 5 %, more come once in twenty times


def test_a_score_that_falls_is_worse_and_where_lower_is_better_it_is_not() -> None:
    assert of(lambda size: 0.3, 0.6).verdict == "worse"
    assert curve.verdict(-5.0, 0.001, -1.0, 0.001, higher=False) == "more helps"
    assert curve.verdict(-5.0, 0.001, 1.0, 0.5, higher=False) == "helps"


def test_two_chances_to_be_wrong_are_both_counted() -> None:
    assert curve.verdict(5.0, 0.03, 1.0, 0.9, higher=True) == "no evidence"
    assert curve.verdict(5.0, 0.03, None, 1.0, higher=True) == "helps"


def test_one_seed_takes_its_noise_from_what_is_left_around_the_curve() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.logistic(0, 1.5, 200)
    measured = {size: statistics(rng, power(size), 1, hardness, spread=0.5) for size in SIZES}
    found = study(measured, statistics(rng, 0.3, 1, hardness))
    assert any("one seed" in warning for warning in found.warnings)
    without = Curve({str(size): some for size, some in measured.items()}, ratio, draws=2000).band("400")
    assert found.points[3]["high"] - found.points[3]["low"] > 1.2 * (without.high - without.low)


def test_sizes_may_have_unequal_seeds_and_one_that_diverged() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.logistic(0, 1.5, 100)
    found = {
        size: statistics(rng, power(size), seeds, hardness) for size, seeds in zip(SIZES, (3, 2, 3, 1), strict=True)
    }
    given = [*cells(found), Cell(200, 9, "200-9", None)]
    (base,) = cells({0: statistics(rng, 0.3, 1, hardness)})
    assert base.scores is not None
    told = find(METRICS.get("accuracy_likelihood"), given, base.scores, over=None, chance=None)
    assert [len(point["seeds"]) for point in told.points] == [0, 3, 2, 3, 1]
    assert told.points[2]["failed"] == [9]
    assert [(cell["seed"], cell["score"], cell["report"]) for cell in told.cells if cell["failed"]] == [(9, None, None)]
    assert any("at 200, 1 of 3 trainings diverged" in warning for warning in told.warnings)
    assert told.fit is not None


def test_validation_loss_is_the_mean_over_tokens() -> None:
    found = of(power, 0.3)
    assert all(point["validation_loss"] == pytest.approx(3.0 / 8.0) for point in found.points)


def test_a_study_in_which_nothing_is_ever_right_foretells_nothing_and_shows_what_is_open() -> None:
    found = study({size: constant(0.0) for size in SIZES}, constant(0.0, seeds=1))
    assert (found.verdict, found.fit) == ("no evidence", None)
    assert [point["high"] for point in found.points] == pytest.approx([7.11] * 5, abs=0.05)
    assert found.trend is not None
    assert found.trend.low < -0.5 < 0.5 < found.trend.high
    assert "next doubling" not in found.sentence


def test_a_study_whose_chance_is_not_known_says_so_everywhere_and_is_json() -> None:
    for over in (None, "adapter.rank"):
        found = study({size: constant(30.0) for size in SIZES}, constant(30.0, seeds=1), over=over)
        assert found.verdict in ("no evidence", "no winner")
        assert "chance is not known" in found.sentence
        assert "without training, all 50 questions score alike: chance is not known" in found.warnings
        assert "at 800, all 50 questions score alike: chance is not known" in found.warnings
        alike = [text for text in found.warnings if "all 50 questions score alike" in text]
        assert alike[1:] == [f"at {size:,}, all 50 questions score alike: chance is not known" for size in SIZES]
        known = json.loads(json.dumps(found.as_dict() | {"settings": _SETTINGS}, allow_nan=False))
        assert [point["low"] for point in known["points"]] == [None] * len(known["points"])
        shown = Console(width=100)
        with shown.capture() as capture:
            shown.print(Shown(known))
        assert capture.get().count("not known") >= 4
        assert "not known" in render(known)


def test_sizes_whose_answers_are_the_same_do_not_say_that_a_doubling_gives_nothing_for_sure() -> None:
    one = statistics(np.random.default_rng(0), 0.5, 1, np.zeros(50))
    found = study({100: one, 200: one}, constant(0.0, seeds=1))
    assert "a doubling gave 0 points (chance is not known)" in found.sentence
    assert found.as_dict()["trend"]["low"] is None


def likelihoods(found: dict[int, Any], base: Any, over: str | None) -> Findings:
    """A study decided by perplexity; `base` [n, 2]."""
    (first,) = cells({0: base[None]})
    assert first.scores is not None
    return find(METRICS.get("perplexity"), cells(found), first.scores, over=over, chance=None, draws=500)


def losses(rng: Any, mean: float, seeds: int = 3) -> Any:
    """float64 [seeds, n, 2]: of 50 questions the loss of one token."""
    return np.stack([rng.normal(mean, 0.05, (seeds, 50)), np.ones((seeds, 50))], axis=-1)


def cells_by_point(found: Findings) -> list[tuple[list[float], list[int]]]:
    """What the cells say of each size: the scores of those that have one, and the seeds of those that failed."""
    sizes = [[cell for cell in found.cells if cell["at"] == size] for size in SIZES]
    return [
        ([cell["score"] for cell in some if not cell["failed"]], [cell["seed"] for cell in some if cell["failed"]])
        for some in sizes
    ]


@pytest.mark.parametrize("over", [None, "train.lr"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6, 3e4])  # exp() of their mean is no number, or its square is none
def test_a_training_that_leaves_a_model_without_a_finite_score_diverged_and_never_wins(
    bad: float, over: str | None
) -> None:
    rng = np.random.default_rng(0)
    measured = {size: losses(rng, mean) for size, mean in zip(SIZES, (3.0, 2.0, 3.0, 3.0), strict=True)}
    without = likelihoods({**measured, 800: measured[800][:2]}, base := losses(rng, 3.0, 1)[0], over)
    measured[800][2, 7, 0] = measured[100][:, 7, 0] = bad
    found = likelihoods(measured, base, over)
    assert (found.points[-1]["failed"], found.points[-1]["score"]) == ([2], without.points[-1]["score"])
    assert (found.points[-4]["failed"], found.points[-4]["score"]) == ([0, 1, 2], None)
    assert "at 100, 3 of 3 trainings diverged" in found.warnings
    assert (found.verdict, found.winner) == (("worse", None) if over is None else ("winner", 200))
    known = json.loads(dumps(found.as_dict() | {"settings": _SETTINGS}))
    assert cells_by_point(found) == [(point["seed_scores"], point.get("failed", [])) for point in found.points[-4:]]
    page = render(known)
    assert "not finite" not in page
    assert '<a href="100-0/report.html">100-0</a></th><td class="n">diverged</td>' in page
    with (shown := Console(width=100)).capture() as capture:
        shown.print(Shown(known))
    assert "diverged" in capture.get()


def test_a_question_that_the_base_gives_no_finite_figure_for_is_left_out_and_told() -> None:
    rng = np.random.default_rng(0)
    hard = {size: np.stack([rng.normal(2, 0.5, (3, 50)), np.ones((3, 50))], axis=-1) for size in (0, *SIZES)}
    base = hard.pop(0)[0]
    kept = likelihoods({size: some[:, 1:] for size, some in hard.items()}, base[1:], None)
    for some in (base[None], *hard.values()):
        some[:, 0, 0] = np.nan
    found = likelihoods(hard, base, None)
    assert found.points == kept.points
    assert cells_by_point(found) == [(point["seed_scores"], []) for point in found.points[1:]]
    assert "not finite" not in render(json.loads(dumps(found.as_dict() | {"settings": _SETTINGS})))
    assert "1 question left out, for which no figure without training is finite" in found.warnings


def shown(found: Findings) -> str:
    """The page and the terminal, 60 columns wide."""
    known = json.loads(dumps(found.as_dict() | {"settings": _SETTINGS}))
    with (console := Console(width=60)).capture() as capture:
        console.print(Shown(known))
    return render(known) + capture.get()


@pytest.mark.parametrize("each", [np.nan, np.inf, 800.0, 706.0, 350.0])  # exp() of the last two has no square
def test_a_base_without_a_finite_score_is_no_evidence_of_a_gain_and_all_else_is_told(each: float) -> None:
    rng = np.random.default_rng(0)
    measured = {size: losses(rng, mean) for size, mean in zip(SIZES, (3.0, 2.9, 2.8, 2.7), strict=True)}
    found = likelihoods(measured, losses(rng, each, 1)[0], None)
    start = "no evidence: perplexity is not finite without training, so that no gain is known; with 800 rows it is 14."
    assert found.verdict == "no evidence"
    assert found.sentence.startswith(start)
    assert "; a doubling gave −1." in found.sentence
    assert "; the next doubling, to 1,600 rows, gives −" in found.sentence
    assert found.points[0]["score"] is None
    assert cells_by_point(found) == [(point["seed_scores"], []) for point in found.points[1:]]
    assert found.warnings == []
    assert ("diverged" in (text := shown(found)), "not finite</td>" in text) == (False, True)


@pytest.mark.parametrize("over", [None, "train.lr"])
def test_where_neither_the_base_nor_a_training_has_a_finite_score_that_is_told(over: str | None) -> None:
    bad = losses(np.random.default_rng(0), 3.0) * np.nan
    found = likelihoods(dict.fromkeys(SIZES, bad), bad[0], over)
    told = {
        None: "no evidence: perplexity is finite neither without training nor with it",
        "train.lr": "no winner: no training came to its end",
    }
    assert found.sentence == told[over]
    assert ("without training perplexity is not finite" in found.warnings) == (over is not None)
    assert not any("one seed" in warning for warning in found.warnings)
    assert ("diverged" in (text := shown(found)), "not finite</td>" in text) == (True, True)


def test_values_are_held_against_each_other_where_the_base_has_no_finite_score() -> None:
    rng = np.random.default_rng(0)
    measured = {size: losses(rng, mean) for size, mean in zip(SIZES, (3.0, 2.0, 3.0, 3.0), strict=True)}
    found = likelihoods(measured, losses(rng, 3.0, 1)[0] * np.nan, "train.lr")
    assert (found.verdict, found.winner) == ("winner", 200)
    assert found.warnings == ["without training perplexity is not finite"]


def test_a_held_out_loss_that_is_not_finite_has_no_curve_and_the_scores_have_theirs() -> None:
    rng = np.random.default_rng(0)
    given = cells({size: statistics(rng, power(size), 3, rng.logistic(0, 1.5, 100)) for size in SIZES})
    (base,) = cells({0: statistics(rng, 0.3, 1, rng.logistic(0, 1.5, 100))})
    assert base.scores is not None
    assert given[-1].scores is not None
    given[-1].scores["heldout"][0][0] = np.nan
    found = find(METRICS.get("accuracy_likelihood"), given, base.scores, over=None, chance=None, draws=500)
    assert (found.loss_fit, found.points[-1]["validation_loss"]) == (None, None)
    assert found.fit is not None
    assert "next doubling" in render(json.loads(dumps(found.as_dict() | {"settings": _SETTINGS})))


# --- over a setting


def values(seed: int, shares: dict[int, float], seeds: int = 3, n: int = 200) -> Findings:
    rng = np.random.default_rng(seed)
    hardness = rng.logistic(0, 1.5, n)
    found = {value: statistics(rng, share, seeds, hardness) for value, share in shares.items()}
    return study(found, statistics(rng, 0.3, 1, hardness), over="adapter.rank")


def test_a_planted_winner_is_found() -> None:
    found = values(0, {4: 0.4, 8: 0.7, 16: 0.45})
    assert (found.verdict, found.winner) == ("winner", 8)
    assert "adapter.rank=8" in found.sentence
    assert len(found.differences) == 3


def test_no_winner_is_declared_inside_the_noise() -> None:
    won = sum(values(seed, {4: 0.5, 8: 0.5, 16: 0.5}, n=100).winner is not None for seed in range(40))
    assert won <= 4
    found = values(0, {4: 0.4, 8: 0.7, 16: 0.7})
    assert (found.verdict, found.winner) == ("no winner", None)
    assert found.sentence.startswith("no winner: ")


def test_one_seed_never_wins() -> None:
    found = values(0, {4: 0.3, 8: 0.9}, seeds=1)
    assert found.winner is None
    assert "with one seed a setting cannot be told from its seed" in found.sentence
