"""Several sides on the same questions: pairs, winners, seeds of one recipe, slices; and who trains beside them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.data.conversation import Conversation, Message, Origin
from luthier.errors import MemoryPlanError
from luthier.evaluate.asking.neighbours import Taken, Training, room, trainings
from luthier.evaluate.comparison import Scored, contrast, score
from luthier.evaluate.metrics import METRICS, Answer
from luthier.evaluate.ranking import Unit, alone, decide, manner, noise, pairs, wilson
from luthier.evaluate.slices import LENGTH, OTHER, apart, cut, values
from luthier.evaluate.statistics.correction import holm
from luthier.machine import GIB, Gpu, Machine
from luthier.runs import write_json

MATCH = "exact_match"


def questions(count: int) -> list[Conversation]:
    return [
        Conversation((Message("user", f"question {i}"),), Origin("q.jsonl", i + 1), references=("yes",))
        for i in range(count)
    ]


def side(right: str) -> list[Answer]:
    """Answers that are right where `right` has a 1."""
    return [Answer("yes" if mark == "1" else "no", True, 1) for mark in right]


def scored(*sides: str) -> Scored:
    return score(questions(len(sides[0])), [side(right) for right in sides], [MATCH])


def singles(*names: str) -> list[Unit]:
    return [Unit(name, (place,)) for place, name in enumerate(names)]


def test_of_two_sides_the_verdict_is_about_the_second_and_is_not_corrected_for_the_base_beside_them() -> None:
    of, units = scored("0" * 40, "1" * 10 + "0" * 30, "1" * 20 + "0" * 20), singles("base", "a", "b")
    found = pairs(of, units, ["base"])
    assert [(pair.first, pair.second) for pair in found] == [("base", "a"), ("base", "b"), ("a", "b")]
    decision = decide(of, units, found, ["base"])
    assert [unit.name for unit in decision.pair] == ["a", "b"]
    assert decision.verdict == "better"
    assert decision.sentence.startswith("better: from a to b, exact match rises by 25.0 points")
    asked = found[2].metrics[MATCH]
    assert (asked.adjusted, asked.family) == (None, 1)
    assert [pair.metrics[MATCH].family for pair in found[:2]] == [2, 2]


def test_the_p_values_of_all_pairs_are_corrected_together() -> None:
    of = scored("1" * 5 + "0" * 35, "1" * 9 + "0" * 31, "1" * 16 + "0" * 24)
    found = pairs(of, singles("a", "b", "c"))
    judged = [pair.metrics[MATCH] for pair in found]
    assert [pair.as_dict(MATCH)["metrics"][MATCH]["p_adjusted"] for pair in found] == holm([p.p for p in judged])
    assert judged[1].adjusted == 3 * judged[1].p  # a to c, the surest of three


def test_a_side_wins_only_if_it_is_better_than_every_other() -> None:
    clear = scored("1" * 5 + "0" * 35, "1" * 10 + "0" * 30, "1" * 30 + "0" * 10)
    units = singles("a", "b", "c")
    decision = decide(clear, units, pairs(clear, units))
    assert (decision.verdict, decision.winner) == ("better", "c")
    assert [unit.name for unit in decision.pair] == ["b", "c"]
    close = scored("1" * 5 + "0" * 35, "1" * 28 + "0" * 12, "1" * 30 + "0" * 10)
    decision = decide(close, units, pairs(close, units))
    assert (decision.verdict, decision.winner) == ("no evidence", None)
    assert decision.sentence.startswith("no winner: c has the highest exact match, 75.0, but is not told from b;")


def test_of_a_metric_whose_low_figures_are_good_the_lowest_side_wins() -> None:
    sides = [[Answer("", nll=nll * (1 + i % 3), targets=4) for i in range(40)] for nll in (8.0, 4.0, 6.0)]
    of, units = score(questions(40), sides, ["perplexity"]), singles("a", "b", "c")
    decision = decide(of, units, pairs(of, units))
    assert decision.winner == "b"
    assert "lowest perplexity" in decision.sentence


def test_equal_sides_rarely_make_a_winner() -> None:
    rng, wins = np.random.default_rng(0), 0
    for _ in range(60):
        of = scored(*("".join(map(str, rng.integers(0, 2, 30))) for _ in range(3)))
        units = singles("a", "b", "c")
        wins += decide(of, units, pairs(of, units)).winner is not None
    assert wins <= 4


def test_seeds_of_one_recipe_are_judged_as_one_with_their_spread() -> None:
    base, mine = "0" * 60, ["1" * 20 + "0" * 40, "1" * 22 + "0" * 38, "1" * 24 + "0" * 36]
    of = scored(base, *mine)
    units = [Unit("base", (0,)), Unit("mine (3 seeds)", (1, 2, 3))]
    found = pairs(of, units, ["base"])
    judged = found[0].metrics[MATCH]
    assert (judged.method, judged.seeds, judged.verdict) == ("seeds", (1, 3), "better")
    assert judged.difference == pytest.approx(100 * 22 / 60)
    (spread,) = noise(of, units)
    assert spread["name"] == "mine (3 seeds)"
    assert spread["metrics"][MATCH]["spread"] == pytest.approx(np.std([100 * n / 60 for n in (20, 22, 24)], ddof=1))
    assert "mine (3 seeds)" in decide(of, units, found, ["base"]).sentence


def test_a_side_s_own_interval_is_wilson_s_for_right_or_wrong_and_a_bootstrap_s_for_others() -> None:
    metric = METRICS.get(MATCH)
    found = alone(metric, [(0.0, 1.0)] * 50)
    assert (found["score"], found["low"], found["n"]) == (0.0, 0.0, 50)
    assert found["high"] == pytest.approx(7.135, abs=0.01)  # 1.96² / (50 + 1.96²)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    values = np.random.default_rng(1).normal(40.0, 10.0, 200)
    found = alone(metric, [(float(value), 1.0) for value in values])
    error = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert found["score"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.2)
    assert alone(metric, [(100.0, 1.0)])["low"] is None


def test_how_a_side_answers_is_said_wherever_it_was_asked_to_speak() -> None:
    said = manner([Answer("one two", True), Answer("one", False), Answer("one two three", True), Answer("", True)])
    assert said["stopped"] == 0.75
    assert (said["words"]["mean"], said["words"]["median"], said["words"]["most"]) == (1.5, 1.5, 3)
    assert manner([Answer(nll=1.0, targets=2)]) == {"words": None, "stopped": None}


def topical(counts: dict[str, int]) -> list[Conversation]:
    names = [name for name, count in counts.items() for _ in range(count)]
    asked = questions(len(names))
    return [replace(question, meta={"columns": {"topic": name}}) for question, name in zip(asked, names, strict=True)]


def test_values_of_few_questions_are_pooled() -> None:
    found = values(topical({"rain": 20, "snow": 6, "hail": 3, "fog": 2}), ["topic"])["topic"]
    assert {value: found.count(value) for value in found} == {"rain": 20, "snow": 6, OTHER: 5}


def test_lengths_are_cut_into_bins_of_about_as_many_questions_and_a_few_are_not_cut() -> None:
    asked = [
        replace(question, messages=(Message("user", "word " * (i + 1)),)) for i, question in enumerate(questions(80))
    ]
    found = values(asked)[LENGTH]
    assert list(dict.fromkeys(found)) == ["1-20 words", "21-40 words", "41-60 words", "61-80 words"]
    assert values(asked[:20]) == {}


def test_a_slice_that_gains_more_than_the_whole_stands_out_and_the_rows_say_their_slice() -> None:
    asked = topical({"rain": 30, "snow": 30})
    of = score(asked, [side("0" * 60), side("1" * 28 + "0" * 32)], [MATCH])
    found = cut(contrast(asked, of), of, asked, ["topic"])
    rain, snow = (found.slices["topic"][name][MATCH] for name in ("rain", "snow"))
    assert (rain.n, rain.difference, snow.difference) == (30, pytest.approx(100 * 28 / 30), 0.0)
    assert (rain.family, rain.verdict, snow.verdict) == (2, "better", "no evidence")
    assert apart(found.slices, found.metrics[MATCH], MATCH) == [("topic", "rain"), ("topic", "snow")]
    assert found.rows[0]["slices"] == {"topic": "rain"}
    assert found.as_dict()["slices"]["topic"]["rain"][MATCH]["n"] == 30


def test_a_column_that_no_question_has_is_said() -> None:
    asked = questions(40)
    of = score(asked, [side("0" * 40), side("1" * 40)], [MATCH])
    found = cut(contrast(asked, of), of, asked, ["subject"])
    assert found.slices == {}
    assert any("no question has subject of evaluate.slices" in warning for warning in found.warnings)


FACTS = Machine(2, 0, 16 * GIB, 8 * GIB, (), None)


def test_what_trains_here_keeps_the_memory_that_it_was_promised() -> None:
    training = Training(Path("runs/x"), 7, 6 * GIB, "cpu")
    of = Taken(fixed=GIB, token=1024)
    assert room(of, 1000, 4, "cpu", FACTS, [])[0] == 4
    count, tokens = room(of, 1000, 4, "cpu", FACTS, [training])
    assert (count, tokens) == (1, (2 * GIB - GIB) // 1024)
    with pytest.raises(MemoryPlanError, match=r"answering needs about 3,\d+ MiB.* belong to what trains here: runs/x"):
        room(Taken(3 * GIB, 1024), 1000, 1, "cpu", FACTS, [training])
    gpu = replace(FACTS, gpus=(Gpu("a GPU", 8 * GIB, 2 * GIB, (8, 0)),))
    assert room(of, 1000, 1, "cuda", gpu, [training])[0] == 1  # what trains on the CPU owns nothing of the GPU
    with pytest.raises(MemoryPlanError, match="close other programs"):
        room(Taken(3 * GIB, 1024), 1000, 1, "cuda", gpu, [])


HOLD = """
import fcntl, os, socket, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on {socket.gethostname()}")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_trains_is_seen_while_it_does_and_its_lock_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "busy"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"decisions": {"predicted_peak_bytes": 50 * GIB, "place": "cpu"}})
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = (folder / ".lock").stat()
        (found,) = trainings([])
        assert (found.folder, found.process, found.place) == (folder, process.pid, "cpu")
        assert 49 * GIB < found.owed < 50 * GIB  # less what it holds already
        assert (folder / ".lock").stat() == before
        process.communicate("")
    assert trainings([]) == []
    (folder / ".lock").write_text(f"process {os.getpid()} on elsewhere")
    assert trainings([]) == []


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux")
def test_who_answers_beside_a_training_run_is_last_for_a_core_and_first_to_go() -> None:
    code = "import os; from luthier.evaluate.asking.neighbours import step_back; step_back(); print(os.nice(0))"
    code += "; print(open('/proc/self/oom_score_adj').read())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["19", "1000"]
