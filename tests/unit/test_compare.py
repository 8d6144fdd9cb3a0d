"""Verdicts from given answers: what an interval says, what it does not, and what stands beside it."""

import io
import json
import random
from dataclasses import asdict, replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from luthier.data.conversation import Conversation, Message, Origin
from luthier.errors import RecipeError
from luthier.evaluate.asking.answers import Memo, Places
from luthier.evaluate.asking.suite import Suite, digest
from luthier.evaluate.comparison import Comparison, first_words, judge
from luthier.evaluate.metrics import METRICS, Answer, points
from luthier.evaluate.metrics.text import PERPLEXITY, ROUGEL
from luthier.evaluate.statistics.paired import LEAST, explain, figure, paired, signed
from luthier.evaluate.terminal import draw, printable, render
from luthier.strict import dumps

NAMES = ["rougeL", "rouge1", "exact_match", "perplexity"]


def questions(count: int, *references: str) -> list[Conversation]:
    return [
        Conversation(
            (Message("user", f"question {i}"),), Origin("q.jsonl", i + 1), references=references or ("a b c d",)
        )
        for i in range(count)
    ]


def spoken(*texts: str, nll: float = 8.0) -> list[Answer]:
    return [Answer(text, True, 4, nll=nll, targets=4) for text in texts]


def compared(base: list[str], tuned: list[str], names: list[str] = NAMES) -> Comparison:
    return judge(questions(len(base)), spoken(*base), spoken(*tuned, nll=6.0), names)


def test_a_model_compared_with_itself_is_no_evidence() -> None:
    found = judge(questions(50), spoken(*["a b x"] * 50), spoken(*["a b x"] * 50), NAMES)
    assert found.verdict == "no evidence"
    assert all(p.verdict == "no evidence" and p.p == 1.0 and p.difference == 0.0 for p in found.metrics.values())


def test_noise_alone_is_no_evidence_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(150):
        hard = rng.normal(40, 15, 40)
        sides = [points(hard + rng.normal(0, 6, 40)) for _ in range(2)]
        verdicts.append(paired(ROUGEL, *sides).verdict)
    assert verdicts.count("no evidence") >= 0.9 * len(verdicts)


def test_pairing_finds_a_gain_that_the_spread_of_questions_would_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(50, 25, 60)
    found = paired(ROUGEL, points(hard), points(hard + rng.normal(3, 4, 60)))
    assert found.verdict == "better"
    assert found.low > 1.0
    assert found.high - found.low < 4.0


def test_the_interval_is_that_of_the_plain_percentile_bootstrap_for_many_rows() -> None:
    rng = np.random.default_rng(2)
    difference = rng.exponential(5, 400)
    found = paired(ROUGEL, points([0.0] * 400), points(difference))
    draws = difference[rng.integers(0, 400, (10_000, 400))].mean(axis=1)
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.03)


def test_the_interval_of_few_rows_is_wider_than_the_plain_one() -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(2, 5, 10)
    found = paired(ROUGEL, points([0.0] * 10), points(difference))
    draws = difference[rng.integers(0, 10, (10_000, 10))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low < low
    assert found.high > high


def test_the_same_answers_give_the_same_interval_each_time() -> None:
    sides = [points([1.0, 5.0, 2.0, 9.0] * 5), points([2.0, 5.0, 4.0, 9.5] * 5)]
    assert paired(ROUGEL, *sides) == paired(ROUGEL, *sides)


def test_lower_perplexity_is_better_and_its_difference_is_negative() -> None:
    found = compared(["a"] * 30, ["a"] * 30, ["perplexity"])
    score = found.metrics["perplexity"]
    assert (score.base, score.tuned) == pytest.approx((np.exp(2.0), np.exp(1.5)))
    assert found.verdict == "better"
    assert score.difference < 0
    assert "perplexity falls by" in found.sentence


def test_perplexity_is_resampled_by_rows_with_their_tokens() -> None:
    tokens = [1.0, 100.0] * 20
    base, tuned = [3.0 * t for t in tokens], [(0.1 if t == 1.0 else 3.0) * t for t in tokens]
    found = paired(PERPLEXITY, list(zip(base, tokens, strict=True)), list(zip(tuned, tokens, strict=True)))
    assert found.tuned == pytest.approx(np.exp(sum(tuned) / sum(tokens)))
    assert abs(found.difference) < 1.0  # the short rows improved a lot, and hardly count


@pytest.mark.parametrize("count", range(1, LEAST))
def test_fewer_than_six_rows_never_carry_a_verdict(count: int) -> None:
    found = compared(["x"] * count, ["a b c d"] * count)
    assert found.verdict == "no evidence"
    assert any("cannot carry a verdict" in warning for warning in found.warnings)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_small_test_set_is_warned_of_with_the_interval_s_width() -> None:
    found = compared(["x", "a"] * 6, ["a b c d", "a b"] * 6)
    width = found.metrics["rougeL"].high - found.metrics["rougeL"].low
    assert f"only 12 questions: the interval is {figure(width)} points wide; 30 or more say much more" in found.warnings


def test_no_rows_and_unequal_rows_are_programming_errors() -> None:
    with pytest.raises(ValueError, match="at least one"):
        paired(ROUGEL, [], [])
    with pytest.raises(ValueError, match="same questions"):
        paired(ROUGEL, points([1.0]), points([1.0, 2.0]))


def test_a_gain_that_is_only_length_is_said_to_be_length() -> None:
    found = compared(["a b c d x x x x x x x x"] * 40, ["a b c d"] * 40)
    assert found.verdict == "better"
    assert found.matched["rougeL"].difference == 0.0
    assert any("cut to the same length" in warning for warning in found.warnings)


def test_a_gain_in_content_stays_at_matched_length() -> None:
    found = compared(["x y z a b c d e f g"] * 40, ["a b c"] * 40)
    assert found.matched["rougeL"].verdict == "better"
    assert found.matched["rougeL"].base == 0.0
    assert not any("cut to the same length" in warning for warning in found.warnings)


def test_words_are_cut_with_their_white_space_kept() -> None:
    assert first_words("one  two\nthree four", 3) == "one  two\nthree"
    assert first_words("one", 5) == "one"
    assert first_words(" one", 0) == ""


def test_of_several_references_the_best_counts_and_the_mean_stands_beside_it() -> None:
    asked = questions(10, "a b c d", "x y")
    found = judge(asked, spoken(*["a b c d"] * 10), spoken(*["x y"] * 10), ["rougeL"])
    assert found.metrics["rougeL"].base == found.metrics["rougeL"].tuned == 100.0
    assert found.means["rougeL"].base == 50.0


def test_with_one_reference_there_is_no_mean_beside_it() -> None:
    assert compared(["a"] * 8, ["b"] * 8).means == {}


def test_the_deciding_metric_must_be_able_to_score() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.metrics: 'accuracy' decides .* name another metric"):
        compared(["a"] * 8, ["a"] * 8, ["accuracy", "rougeL"])


def test_another_metric_that_cannot_score_is_left_out_and_said_so() -> None:
    found = compared(["a"] * 8, ["a"] * 8, ["rougeL", "accuracy"])
    assert "accuracy" not in found.metrics
    assert any(warning.startswith("accuracy is left out") for warning in found.warnings)


def test_only_questions_that_both_sides_can_be_scored_on_are_paired() -> None:
    asked = questions(9)
    asked[4] = replace(asked[4], references=())
    found = judge(asked, spoken(*["a"] * 9), spoken(*["a b"] * 9), ["rougeL"])
    assert found.metrics["rougeL"].n == 8
    assert len(found.rows) == 9
    assert found.rows[4]["scores"] == {}


def test_rouge_on_a_script_that_it_cannot_see_is_warned_of() -> None:
    found = judge(questions(8, "琴师做小提琴"), spoken(*["琴"] * 8), spoken(*["琴师"] * 8), ["rougeL"])
    assert any("which 8 of 8 references lack" in warning for warning in found.warnings)
    assert not any("references lack" in warning for warning in compared(["a"] * 8, ["b"] * 8).warnings)


def test_stop_rate_and_lengths_are_always_reported() -> None:
    base = [Answer("one two three", False, 3) for _ in range(10)]
    found = judge(questions(10), base, spoken(*["one"] * 10), ["rougeL"])
    assert found.stopped == {"base": 0.0, "tuned": 1.0}
    assert found.lengths == {"base": 3.0, "tuned": 1.0, "reference": 4.0}


def test_a_tuned_model_that_does_not_stop_is_warned_of() -> None:
    tuned = [Answer("a b c d", i % 2 == 0, 4) for i in range(40)]
    found = judge(questions(40), spoken(*["x"] * 40), tuned, ["rougeL"])
    assert any("50% of the tuned answers did not stop" in warning for warning in found.warnings)


def test_json_has_the_stable_keys_and_no_infinity() -> None:
    found = json.loads(json.dumps(compared(["x"] * 40, ["a b c d"] * 40).as_dict(), allow_nan=False))
    assert found["verdict"] == "better"
    assert set(found["metrics"]["rougeL"]) >= {"base", "tuned", "difference", "low", "high", "n"}
    assert {"matched", "lengths", "stopped", "settings", "warnings"} <= set(found)


@pytest.mark.parametrize("broken", [nan, inf])
@pytest.mark.parametrize("place", ["base", "tuned"])
def test_a_likelihood_that_is_not_finite_carries_no_verdict_and_its_row_is_named(broken: float, place: str) -> None:
    asked, sound = questions(40), [Answer("a", nll=2.0 + i % 3, targets=1) for i in range(40)]
    odd = [*sound[:6], replace(sound[6], nll=broken), *sound[7:]]
    base, tuned = (odd, sound) if place == "base" else (sound, odd)
    found = judge(asked, base, tuned, ["perplexity", "rougeL"])
    assert (found.verdict, found.metrics["rougeL"].n) == ("no evidence", 40)
    assert "perplexity is not judged: a row has no finite figure, the first q.jsonl:7" in found.warnings
    told = json.loads(dumps(found.as_dict()), parse_constant=pytest.fail)["metrics"]["perplexity"]
    assert (told[place], told["difference"], told["low"], told["p"]) == (None, None, None, 1.0)


def test_the_sentence_says_what_moved_how_far_and_how_sure() -> None:
    metric = METRICS.get("rougeL")
    found = replace(paired(metric, points([10.0] * 120), points([20.0] * 120)), difference=9.84, low=7.93, high=11.71)
    assert explain(metric, found) == "better: ROUGE-L rises by 9.8 points (95 % interval 7.9 to 11.7, 120 rows)"
    worse = replace(found, difference=-2.0, low=-3.0, high=-1.04, verdict="worse")
    assert explain(metric, worse) == "worse: ROUGE-L falls by 2.0 points (95 % interval 1.0 to 3.0, 120 rows)"
    unsure = replace(found, difference=0.4, low=-1.0, high=1.8, verdict="no evidence")
    expected = "no evidence of a difference: ROUGE-L +0.4 points (95 % interval −1.0 to +1.8, 120 rows)"
    assert explain(metric, unsure) == expected


def test_rows_keep_both_texts_scores_words_and_stops() -> None:
    row = compared(["x"] * 7, ["a b"] * 7).rows[3]
    assert (row["origin"], row["base"], row["tuned"]) == ("q.jsonl:4", "x", "a b")
    assert row["prompt"] == [{"role": "user", "content": "question 3"}]
    assert row["words"] == {"base": 1, "tuned": 2, "references": [4]}
    assert row["scores"]["rougeL"] == {"base": 0.0, "tuned": 66.6667}


def printed(width: int) -> list[str]:
    rng = random.Random(0)
    base = [" ".join(rng.choices(["a", "b", "c", "d", "x", "y", "z"], k=9)) for _ in range(40)]
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render(compared(base, ["a b c"] * 40)))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [40, 60, 72, 100, 160])
def test_the_terminal_table_is_whole_at(width: int) -> None:
    lines = printed(width)
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)
    scored = next(place for place, line in enumerate(lines) if line.startswith("ROUGE-L "))
    assert "+" in lines[scored]
    assert " to " in (lines[scored] if width >= 60 else lines[scored + 1])


def test_a_narrow_terminal_loses_the_drawing_and_a_wide_one_has_it() -> None:
    assert not any("●" in line for line in printed(40))
    assert any("●" in line for line in printed(72))


def test_a_drawn_interval_that_holds_zero_crosses_its_line() -> None:
    score = replace(paired(ROUGEL, points([1.0] * 9), points([1.0] * 9)), low=-2.0, difference=3.0, high=8.0)
    assert draw(score, (-2.0, 8.0), 11) == "━━┿━━●━━━━━"
    assert draw(replace(score, low=1.0), (-2.0, 8.0), 11) == "··│━━●━━━━━"


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    found = compared(["\x1b]0;owned\x07" + "a"] * 8, ["\x1b[2J"] * 8)
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    console.print(render(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert printable("tab\tnew\nline\x1b") == "tab\tnew\nline\ufffd"


@pytest.mark.parametrize(
    ("value", "text"), [(9.84, "+9.8"), (-0.4, "−0.4"), (0.0, "0"), (5e199, "+5e+199"), (float("-inf"), "−∞")]
)
def test_figures_are_signed_for_people(value: float, text: str) -> None:
    assert signed(value) == text


def test_the_digest_of_questions_is_that_of_their_list_made_in_parts() -> None:
    for texts in ([], ["a"], ["a", "é", '"b"']):
        asked = [Conversation((Message("user", text),), Origin("q.jsonl", 1)) for text in texts]
        assert Suite(asked, "test").digest == digest([asdict(question) for question in asked])


def test_a_memo_holds_of_what_was_there_only_what_is_wanted_and_loses_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Memo(path).add({"a": {"text": "one"}, "b": {"text": "two"}})
    with path.open("ab") as file:
        file.write(b'{"key": "c", "te')  # torn by a crash
    memo = Memo(path, only={"b", "d"})
    memo.add({"d": {"text": "three"}})
    assert memo.keys() == {"b", "d"}
    assert memo["b"]["text"] == "two"
    whole = Memo(path)
    assert {key: whole[key]["text"] for key in sorted(whole.keys())} == {"a": "one", "b": "two", "d": "three"}


def test_places_leave_a_line_that_is_not_whole_until_it_is_and_read_no_line_twice(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    places = Places(path)
    assert (places.lines({"a"}), places.read) == ([], 0)
    Memo(path).add({"a": {"text": "one"}, "b": {"text": "two"}})
    first = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"key": "c", "te')  # another process writes it, or was killed as it did
    assert [json.loads(line)["text"] for line in places.lines({"b", "c"})] == ["two"]
    assert places.read == first
    there = Memo(path, only={"a", "c", "d"}, start=places.read)
    assert (there.keys(), path.stat().st_size) == (set(), first)
    there.add({"c": {"text": "three"}, "d": {"text": "four"}})
    assert Memo(path, start=first).keys() == {"c", "d"}
    assert [json.loads(line)["text"] for line in places.lines({"a", "c"})] == ["one", "three"]
    assert Memo(path).keys() == {"a", "b", "c", "d"}
    path.write_bytes(path.read_bytes()[:first])
    assert Memo(path, start=places.read).keys() == {"a", "b"}
    assert path.stat().st_size == first, "what somebody made shorter is not filled up"
