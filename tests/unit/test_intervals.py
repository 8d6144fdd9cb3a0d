"""What an interval, a p and a stated power promise, held on comparisons whose true difference is known."""

import sys
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest

from luthier.evaluate.metrics import METRICS, points
from luthier.evaluate.statistics.correction import holm, together
from luthier.evaluate.statistics.interval import RESAMPLES, bootstrap, degrees, left_out, resampled, tango
from luthier.evaluate.statistics.paired import CHANCE, LEAST, Paired, explain, limits, paired
from luthier.evaluate.statistics.permutation import mcnemar, sign_flip
from luthier.evaluate.statistics.power import detectable, detectable_share
from luthier.evaluate.statistics.seeds import seeded
from luthier.evaluate.statistics.student import quantile, tail

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from interval_coverage import KINDS, Recipes, covered, power  # type: ignore[import-not-found]

ROUGEL, ACCURACY, PERPLEXITY = (METRICS.get(name) for name in ("rougeL", "accuracy", "perplexity"))


def right(gains: int, losses: int, n: int) -> Paired:
    """Right or wrong: so many gained, so many lost, the rest wrong on both sides."""
    base = [0.0] * gains + [100.0] * losses + [0.0] * (n - gains - losses)
    tuned = [100.0] * gains + [0.0] * (n - gains)
    return paired(ACCURACY, points(base), points(tuned))


def scores(*values: float) -> np.ndarray:
    return np.array(points(values))


# Intervals.


def test_with_no_question_that_differs_tango_s_bounds_have_a_closed_form() -> None:
    bound = 1.95996**2 / (30 + 1.95996**2)
    assert tango(0, 0, 30) == pytest.approx((-bound, bound), abs=1e-5)


def test_tango_s_bounds_are_the_differences_that_the_score_test_just_rejects() -> None:
    gains, losses, n = 9, 3, 120
    for bound in tango(gains, losses, n):
        shares = np.linspace(0.0, 1.0, 200_001)  # of losses; the gains' share is the losses' plus the difference
        with np.errstate(all="ignore"):
            fits = (
                gains * np.log(shares + bound)
                + losses * np.log(shares)
                + (n - gains - losses) * np.log(1.0 - 2.0 * shares - bound)
            )
        lost = shares[np.nanargmax(np.where(np.isfinite(fits), fits, -np.inf))]
        z = (gains - losses - n * bound) / np.sqrt(n * (2.0 * lost + bound - bound**2))
        assert abs(z) == pytest.approx(1.96, abs=2e-3)


def test_right_or_wrong_is_told_from_points_by_the_scores_themselves() -> None:
    assert right(4, 2, 40).method == "score"
    assert paired(ROUGEL, points([0.0, 100.0] * 9), points([100.0, 0.0] * 9)).method == "score"
    assert paired(ACCURACY, points([0.0, 50.0] * 9), points([100.0, 0.0] * 9)).method == "bootstrap"
    nats = [(100.0, 1.0)] * 8
    assert paired(PERPLEXITY, [(1.0, 1.0)] * 8, [(0.0, 1.0)] * 8).method == "bootstrap"
    assert paired(ROUGEL, [(100.0, 2.0), *nats], [(0.0, 2.0), *nats]).method == "bootstrap"


def test_no_question_that_differs_is_no_proof_of_equality() -> None:
    found = right(0, 0, 50)
    assert -8.0 < found.low < -5.0
    assert 5.0 < found.high < 8.0
    assert (found.p, found.verdict) == (1.0, "no evidence")


def test_the_bootstrap_draws_whole_questions_with_replacement() -> None:
    sides = np.stack([scores(0.0, 0.0, 0.0), scores(3.0, 30.0, 300.0)])
    drawn = resampled(ROUGEL, sides, seed=0)
    values = {round(sum(three) / 3, 6) for three in product((3.0, 30.0, 300.0), repeat=3)}
    assert {round(float(one), 6) for one in drawn} == values
    assert float(drawn.mean()) == pytest.approx(111.0, abs=5 * 137 / np.sqrt(3 * RESAMPLES))


def test_a_metric_s_influences_are_the_deviations_of_a_mean() -> None:
    found = left_out(ROUGEL, scores(1.0, 2.0, 6.0))
    assert found.tolist() == pytest.approx([-2.0, -1.0, 3.0])


def test_where_few_questions_carry_a_difference_there_are_few_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    assert degrees(rng.normal(0, 1, 400)) > 300
    assert degrees(np.array([-1.0, 1.0] * 50)) == 99
    assert degrees(np.array([-1.0, 1.0, -1.0, 1.0] + [0.0] * 96)) < 10
    assert degrees(np.zeros(20)) == 19


def test_of_few_questions_the_interval_is_as_wide_as_student_s() -> None:
    gains = np.array([-3.0, -1.5, -0.5, 0.0, 1.0, 2.0, 2.5, 4.0])
    sides = np.stack([scores(*[10.0] * 8), scores(*(10.0 + gains))])
    widths = [found.high - found.low for found in (bootstrap(ROUGEL, sides, seed) for seed in range(12))]
    wanted = 2 * quantile(0.975, 7) * gains.std(ddof=1) / np.sqrt(8)
    assert np.mean(widths) == pytest.approx(wanted, rel=0.04)  # percentiles as they are: 7 % less


@pytest.mark.parametrize("freedom", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (9999, 1.9602)])
def test_student_s_quantiles_are_those_of_the_tables(freedom: tuple[float, float]) -> None:
    assert quantile(0.975, freedom[0]) == pytest.approx(freedom[1], rel=2e-5)
    assert tail(freedom[1], freedom[0]) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("name", ["scores, best", "perplexity, wildly", "right or wrong, base 2 %, tuned"])
def test_the_interval_covers_the_true_difference_19_times_in_20(name: str) -> None:
    """A few hundred of the thousands of benchmarks/interval_coverage.py: 400 of them vary by 1.1 points."""
    (kind,) = (kind for kind in KINDS if kind.name.startswith(name))
    found = covered(replace(kind, sizes=(100,), n=100), 400)
    assert 91.5 <= found["coverage"] <= 98.5
    assert found["no_evidence"] >= 91.0


# The test, and its accord with the interval.


def test_few_questions_are_swapped_in_every_way() -> None:
    gains = [3.0, 1.0, -2.0, 4.0, 5.0, 0.0]
    sides = np.stack([scores(*[10.0] * 6), scores(*[10.0 + gain for gain in gains])])
    sums = [
        abs(sum(sign * gain for sign, gain in zip(signs, gains, strict=True))) for signs in product((-1, 1), repeat=6)
    ]
    assert sign_flip(ROUGEL, sides, seed=0) == np.mean([one >= 11.0 for one in sums])


def test_many_questions_are_swapped_at_random_and_close_to_every_way() -> None:
    rng = np.random.default_rng(5)
    gains = rng.normal(0.5, 1.0, 16)
    sides = np.stack([scores(*[10.0] * 16), scores(*(10.0 + gains))])
    signs = np.array(list(product((-1, 1), repeat=16)))
    exact = float((np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12).mean())
    assert sign_flip(ROUGEL, sides, seed=0) == pytest.approx(exact, abs=5 * np.sqrt(exact / RESAMPLES))


def test_p_is_never_zero() -> None:
    assert paired(ROUGEL, points([10.0 + i / 7 for i in range(60)]), points([90.0] * 60)).p == 1 / (RESAMPLES + 1)


def test_the_mid_p_counts_half_of_what_was_found() -> None:
    assert mcnemar(5, 0) == 1 / 2**5
    assert mcnemar(2, 9) == (2 * (1 + 11) + comb(11, 2)) / 2**11
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0


def test_interval_p_and_verdict_say_the_same_thing() -> None:
    for gains, losses in product(range(9), repeat=2):
        said_alike(right(gains, losses, 60))
    rng = np.random.default_rng(7)
    for _ in range(60):
        gains = rng.exponential(4.0, 15) - 2.2
        said_alike(paired(ROUGEL, points([20.0] * 15), points(20.0 + gains)))


def said_alike(found: Paired) -> None:
    outside = not found.low <= 0.0 <= found.high
    assert outside == (found.p < CHANCE) == (found.verdict != "no evidence")


def test_four_gains_and_no_loss_are_no_verdict_and_the_interval_reaches_zero() -> None:
    found = right(4, 0, 60)
    assert tango(4, 0, 60)[0] > 0.0
    assert (found.low, found.verdict) == (0.0, "no evidence")
    assert found.p > CHANCE


def test_five_gains_of_five_questions_are_too_few_questions() -> None:
    found = right(LEAST - 1, 0, LEAST - 1)
    assert (found.low, found.p, found.verdict) == (0.0, CHANCE, "no evidence")


# What would have been found.


def test_the_detectable_difference_falls_with_the_root_of_the_questions() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(0.0, 10.0, 100)
    few = paired(ROUGEL, points([50.0] * 100), points(50.0 + gains)).detectable
    many = paired(ROUGEL, points([50.0] * 400), points(np.tile(50.0 + gains, 4))).detectable
    assert few is not None
    assert many is not None
    assert few / many == pytest.approx(2.0, rel=0.03)
    assert few == pytest.approx(2.83 * gains.std() / 10.0, rel=0.03)


def test_the_detectable_share_solves_its_equation() -> None:
    share = detectable_share(12, 200)
    assert 200 * share**2 == pytest.approx(2.8016**2 * (12 / 200 + share - share**2), rel=1e-4)
    assert 1000 * detectable_share(0, 1000) == pytest.approx(7.8, abs=0.1)


def test_few_degrees_of_freedom_can_tell_only_more() -> None:
    assert detectable(1.0, 1e9) == pytest.approx(2.80, abs=0.005)
    assert detectable(1.0, 4.0) == pytest.approx(4.03, abs=0.01)


@pytest.mark.parametrize("name", ["scores, best", "right or wrong, base 50 %"])
def test_what_is_stated_as_detectable_is_found_four_times_in_five(name: str) -> None:
    (kind,) = (kind for kind in KINDS if kind.name.startswith(name))
    kind = replace(kind, sizes=(100,), n=100)
    assert 72.0 <= power(kind, covered(kind, 100)["detectable"], 300) <= 88.0


def test_no_evidence_says_what_it_cannot_tell() -> None:
    found = replace(right(5, 4, 200), detectable=6.04)
    assert limits(ACCURACY, found) == "200 rows cannot tell differences under 6.0 points"
    assert (
        limits(PERPLEXITY, replace(found, detectable=0.42))
        == "200 rows cannot tell differences under 0.42 in perplexity"
    )
    assert limits(ACCURACY, right(40, 4, 200)) is None
    assert limits(ROUGEL, paired(ROUGEL, points([13.0] * 40), points([13.0] * 40))) is None


# Several comparisons.


def test_holm_s_adjusted_p_are_those_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_of_several_comparisons_a_verdict_stands_only_after_correction() -> None:
    sure, unsure, none = together([right(30, 2, 100), right(12, 3, 100), right(3, 4, 100)])
    assert (sure.verdict, sure.family) == ("better", 3)
    assert right(12, 3, 100).verdict == "better"
    unsure_of_six = together([right(12, 3, 100), *[right(3, 4, 100)] * 5])[0]
    assert unsure_of_six.verdict == "no evidence"
    assert unsure_of_six.low == right(12, 3, 100).low > 0.0
    assert "p = 0.13 among 6 comparisons, the interval is for this one alone" in explain(ACCURACY, unsure_of_six)
    assert none.verdict == "no evidence"
    assert unsure.adjusted is not None


# Seeds.


def test_one_lucky_seed_is_no_better_recipe() -> None:
    """Each pair of models differs beyond doubt; the recipes do not, since seeds differ as much."""
    rng = np.random.default_rng(1)
    hard = rng.normal(40.0, 10.0, 300)
    base, tuned = (
        np.stack([scores(*(hard + seed + rng.normal(0, 1, 300))) for seed in side]) for side in ((0, 4), (3, 7))
    )
    assert paired(ROUGEL, base[0].tolist(), tuned[0].tolist()).verdict == "better"
    found = seeded(ROUGEL, base, tuned)
    assert found.verdict == "no evidence"
    assert found.difference == pytest.approx(3.0, abs=0.5)
    assert (found.seeds, found.method) == ((2, 2), "seeds")
    assert "300 rows, 2 and 2 seeds" in explain(ROUGEL, found)


def test_seeds_that_agree_leave_the_questions_chance() -> None:
    rng = np.random.default_rng(2)
    base, gains = rng.normal(40.0, 10.0, 300), rng.normal(2.0, 5.0, 300)
    sides = [np.stack([scores(*side)] * 3) for side in (base, base + gains)]
    found, alone = seeded(ROUGEL, *sides), paired(ROUGEL, points(base), points(base + gains))
    assert [found.low, found.high] == pytest.approx([alone.low, alone.high], abs=0.05)


def test_what_is_a_question_s_and_a_seed_s_at_once_is_counted_once() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(40.0, 10.0, 400)
    base, tuned = (np.stack([scores(*(hard + rng.normal(0.0, 9.0, 400))) for _ in range(20)]) for _ in range(2))
    found = seeded(ROUGEL, base, tuned)
    assert (found.high - found.low) / 2 == pytest.approx(2.0 * 9.0 * np.sqrt(2 / (400 * 20)), rel=0.15)


def test_one_seed_borrows_the_other_side_s_noise_and_an_untrained_base_has_none() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(40.0, 10.0, 200)
    base, tuned = (np.stack([scores(*(hard + seed)) for seed in side]) for side in ((0.0,), (2.0, 4.0, 6.0)))
    borrowed, untrained = seeded(ROUGEL, base, tuned), seeded(ROUGEL, base, tuned, fixed=True)
    assert borrowed.high - borrowed.low == pytest.approx(2 * 4.3027 * 2.0 * np.sqrt(1 + 1 / 3), rel=1e-3)
    assert untrained.high - untrained.low == pytest.approx(2 * 4.3027 * 2.0 * np.sqrt(1 / 3), rel=1e-3)


@pytest.mark.parametrize("recipes", [Recipes(3, 3, 1.5), Recipes(1, 3, 1.5), Recipes(1, 3, 1.5, fixed=True)], ids=str)
def test_three_seeds_cover_the_true_difference_19_times_in_20(recipes: Recipes) -> None:
    rng = np.random.default_rng(4)
    found = [recipes.judged(rng, 1.0) for _ in range(300)]
    assert 0.91 <= np.mean([one.low <= 1.0 <= one.high for one in found]) <= 0.99


def test_the_noise_of_seeds_is_not_guessed_from_one() -> None:
    side = np.stack([scores(*range(9))])
    with pytest.raises(ValueError, match="not known from one seed"):
        seeded(ROUGEL, side, side)
    with pytest.raises(ValueError, match="not known from one seed"):
        seeded(ROUGEL, np.concatenate([side, side]), side, fixed=True)
    with pytest.raises(ValueError, match="same questions"):
        seeded(ROUGEL, side[:, :5], np.concatenate([side, side]))
