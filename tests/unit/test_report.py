"""report.html: one file, no network, no script but ours, and hostile data stays text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

import luthier.evaluate
from luthier.data.conversation import Conversation, Message, Origin
from luthier.evaluate.compare import keep
from luthier.evaluate.comparison import Comparison, judge
from luthier.evaluate.metrics import Answer
from luthier.evaluate.page.facts import duration
from luthier.evaluate.page.figures import Axis, chart, histogram, interval, labels, smooth
from luthier.evaluate.page.report import render, write_report
from luthier.evaluate.page.rows import fitting, marked, read
from luthier.evaluate.page.scores import chance
from luthier.recipe import Recipe
from luthier.runs import Run, write_json

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \"' & 😀"


def run_with(folder: Path, found: Comparison | None = None, **more: Any) -> Run:
    tree = f"model: {{base: tiny}}\ndata: {{train: [{{path: rows.jsonl}}]}}\nrun: {{dir: {folder / 'run'}}}"
    run = Run.create(Recipe.parse(tree), root=folder)
    if found is not None:
        place = run.results / "compare"
        place.mkdir(parents=True)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows))
        write_json(place / "comparison.json", found.as_dict() | more)
    return run


def compared(prompt: str = "question", said: str = "a b", count: int = 12) -> Comparison:
    asked = [
        Conversation((Message("user", f"{prompt} {i}"),), Origin(f"{prompt[:9]}.jsonl", i), references=("a b c",))
        for i in range(count)
    ]
    base = [Answer("x y", False, 4, nll=9.0, targets=3)] * count
    tuned = [Answer(said if i % 3 else "x", True, 2, nll=7.0, targets=3) for i in range(count)]
    return judge(asked, base, tuned, ["rougeL", "exact_match", "perplexity"])


def trained(run: Run, steps: int = 30) -> None:
    step = {"epoch": 0.5, "lr": 1e-3, "tokens": 900, "targets": 200, "seconds": 2.0, "peak_bytes": 2**30}
    records = [{"step": i + 1, "loss": 3.0 - i / steps, **step} for i in range(steps)]
    records.insert(10, {"step": 10, "eval_loss": 2.6})
    records.insert(21, {"step": 20, "eval_loss": None})  # it was not finite
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepared(run: Run, dropped: dict[str, int]) -> None:
    run.data.mkdir()
    spread = {"min": 4, "max": 30, "histogram": {"edges": [4.0, 17.0, 30.0], "counts": [9, 3]}}
    rows = {"read": 20, "kept": 12, "dropped": dropped}
    tokens = {"total": 300, "supervised": 60, "cut": 0}
    write_json(run.data / "report.json", {"rows": rows, "tokens": tokens, "lengths": spread})


class Page(HTMLParser):
    """Tags, the text outside of scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data + " "


def found_slices() -> dict[str, Any]:
    """Slices in the shape of comparison.json."""
    part = {"base": 10.0, "tuned": 14.5, "difference": 4.5, "low": -1.0, "high": 9.0, "n": 40}
    return {"topic": {"<travel>": {"rougeL": part, "exact_match": part | {"n": 41}}, "work": {"rougeL": part}}}


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    page = Page(render(run_with(tmp_path, compared())))
    body = page.text[page.text.index("Skip to the report") :]
    assert body.index("Better") < body.index("Scores") < body.index("Side by side") < body.index("How to repeat it")
    assert "ROUGE-L rises by" in body


def test_everything_from_data_is_text(tmp_path: Path) -> None:
    run = run_with(tmp_path, compared(HOSTILE, HOSTILE))
    trained(run)
    prepared(run, {HOSTILE: 3})
    page = Page(render(run))
    assert not {"img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "rows-data"},
        {},
    ]
    assert json.loads(page.scripts[0])["rows"][0]["prompt"] == f"{HOSTILE} 0"
    assert "<" not in page.scripts[0]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_the_page_asks_nothing_of_a_network(tmp_path: Path) -> None:
    page = Page(render(run_with(tmp_path, compared())))
    targets = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "action")]
    assert {target for target in targets if target and not target.startswith("#")} == set()
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in page.tags if tag == "meta")
    assert "url(" not in render(run_with(tmp_path / "again", compared()))


def test_a_page_without_rows_has_no_script(tmp_path: Path) -> None:
    page = Page(render(run_with(tmp_path)))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not any("script-src" in (a.get("content") or "") for tag, a in page.tags if tag == "meta")


def test_every_link_leads_to_a_section_that_is_there(tmp_path: Path) -> None:
    run = run_with(tmp_path, compared(), slices=found_slices())
    trained(run)
    prepared(run, {})
    page = Page(render(run))
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert links == {"#main", *(f"#{a['id']}" for tag, a in page.tags if tag == "h2")}


def test_all_rows_are_in_the_page_for_its_script(tmp_path: Path) -> None:
    found = compared()
    data = json.loads(Page(render(run_with(tmp_path, found))).scripts[0])
    assert [row["origin"] for row in data["rows"]] == [row["origin"] for row in found.rows]
    assert data["rows"][1]["answers"] == ["x y", "a b"]
    assert data["rows"][1]["scores"]["rougeL"] == list(found.rows[1]["scores"]["rougeL"].values())


def test_rows_beyond_the_room_of_a_page_are_left_out_evenly(tmp_path: Path) -> None:
    run_with(tmp_path, compared(count=300))
    rows = read(tmp_path / "run/results/compare/rows.jsonl")
    kept = [int(row["origin"].rpartition(":")[2]) for row in fitting(rows, room=100 * len("question 100a b cx ya b"))]
    assert 90 < len(kept) <= 110
    assert kept == sorted(kept)
    assert 120 < sum(kept) / len(kept) < 180
    assert fitting(rows) == rows


def test_the_page_says_so_where_rows_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.evaluate.page.rows.ROOM", 100)
    page = Page(render(run_with(tmp_path, compared())))
    count = len(json.loads(page.scripts[0])["rows"])
    assert f"A random draw of {count} of 12 rows" in " ".join(page.text.split())


def test_slices_have_a_table_each_with_an_interval_for_every_value(tmp_path: Path) -> None:
    text = Page(render(run_with(tmp_path, compared(), slices=found_slices()))).text
    shown = " ".join(text.split())
    assert "<travel> 10.0 14.5 +4.5 −1.0 to +9.0 40" in shown
    assert "topic, the other metrics exact match" in shown
    assert "Slices" not in Page(render(run_with(tmp_path / "none", compared()))).text


def found_sides(*names: str) -> dict[str, Any]:
    """Sides and pairs in the shape of comparison.json; the pair that stands for the whole is the last."""
    score = {"metrics": {"rougeL": {"score": 12.5, "low": 10.0, "high": 15.0, "n": 12}}, "adapter": "LoRA <4>"}
    same = {"difference": 0.2, "p_adjusted": 1.0, "verdict": "no evidence"}
    last = {"difference": 3.25, "p_adjusted": 0.0123, "verdict": "better"}
    pairs = [(a, b, last if (a, b) == names[-2:] else same) for a, b in combinations(names, 2)]
    return {
        "sides": [{"name": name, "words": {"mean": 7.5}, **score} for name in names],
        "pairs": [{"first": a, "second": b, "metrics": {"rougeL": paired}} for a, b, paired in pairs],
        "pair": list(names[-2:]),
    }


def test_several_sides_have_their_scores_and_a_matrix_of_verdicts_with_corrected_p_values(tmp_path: Path) -> None:
    found = compared()
    for row in found.rows:
        row["answers"] = {"base": "what the base said", "rank 4": row["base"], "rank <16>": row["tuned"]}
    run = run_with(tmp_path, found, **found_sides("base", "rank 4", "rank <16>"))
    page = Page(render(run))
    shown = " ".join(page.text.split())
    assert "rank 4 LoRA <4> 12.5 10.0 to 15.0 7.5" in shown
    assert "rank <16> no evidence +0.2, p = 1 better +3.2, p = 0.012 –" in shown
    assert "rank 4 no evidence +0.2, p = 1 – worse −3.2, p = 0.012" in shown
    assert "rank 4 rank <16> difference" in shown  # the table's head: these two, and not a base and a tuned one
    data = json.loads(page.scripts[0])
    assert data["sides"] == ["rank 4", "rank <16>", "base"]
    assert data["rows"][1]["answers"] == ["x y", "a b", "what the base said"]


def test_what_does_it_again_is_written_as_a_shell_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    page = render(run_with(folder, compared()))
    assert f"luthier train &#39;{folder}/run&#39; &#39;run.dir={folder}/run-again&#39;\n" in page
    assert f"luthier compare &#39;{folder}/run-again&#39;" in page
    steps = [f"{folder}/run/checkpoints/step-{step:08}" for step in (10, 20)]
    sides = [{"name": step[-2:], "kind": "checkpoint", "folder": step} for step in steps]
    page = render(run_with(tmp_path / "two", compared(), sides=sides, pair=["10", "20"]))
    assert f"luthier compare &#39;{steps[0]}&#39; &#39;{steps[1]}&#39;" in page
    assert "luthier train" not in page


def test_seeds_of_one_recipe_stand_together_in_the_matrix(tmp_path: Path) -> None:
    found = compared()
    more = found_sides("base", "rank 4", "rank 8")
    for row in found.rows:
        row["answers"] = dict.fromkeys(("base", "rank 4", "rank 8"), "x")
    of_recipe = more["pairs"][0] | {"second": "rank (2 seeds)"}
    noise = {"rougeL": {"scores": [12.5, 13.5], "mean": 13.0, "spread": 0.707}}
    seeds = {"pairs": [of_recipe], "recipes": [{"name": "rank (2 seeds)", "sides": [1, 2], "metrics": noise}]}
    text = " ".join(Page(render(run_with(tmp_path, found, **more, seeds=seeds))).text.split())
    assert "rank (2 seeds) no evidence +0.2, p = 1 –" in text
    together = replace(found, metrics={name: replace(paired, seeds=(1, 2)) for name, paired in found.metrics.items()})
    pair = more | {"pair": ["base", "rank 8"]}
    page = Page(render(run_with(tmp_path / "together", together, **pair, seeds=seeds)))
    assert "These are base and rank (2 seeds)." in " ".join(page.text.split())
    assert "rank (2 seeds): rank 4 12.5, rank 8 13.5; mean 13.0, standard deviation 0.71." in text


def test_what_was_forgotten_stands_with_the_scores(tmp_path: Path) -> None:
    lost = {"base": 20.0, "tuned": 24.0, "difference": 4.0, "low": 2.0, "high": 6.0, "n": 40, "verdict": "worse"}
    lost["higher"] = False
    more = {"forgetting": {"perplexity": lost | {"title": "general text: perplexity"}}}
    text = " ".join(Page(render(run_with(tmp_path, compared(), **more))).text.split())
    assert "general text: perplexity lower is better 20.0 24.0 +4.0 +2.0 to +6.0 worse" in text


def test_two_sides_have_no_matrix(tmp_path: Path) -> None:
    assert "All sides" not in Page(render(run_with(tmp_path, compared(), **found_sides("base", "tuned")))).text


@pytest.mark.parametrize(
    ("more", "said"),
    [({"winner": "rank 4"}, "Best: rank 4"), ({"sentence": "no winner: rank 4 has the highest"}, "No winner")],
)
def test_of_several_the_headline_names_the_best_or_says_that_there_is_none(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in Page(render(run_with(tmp_path, compared(), **more))).text


def test_what_the_test_set_can_tell_and_how_likely_chance_is_stand_with_the_scores(tmp_path: Path) -> None:
    found = compared()
    metrics = found.as_dict()["metrics"]
    metrics["rougeL"] |= {"detectable": 5.75, "p": 0.0004}
    text = Page(render(run_with(tmp_path, found, metrics=metrics))).text
    assert "12 questions like these find a true difference of 5.8 points four times in five." in text
    assert ", p < 0.001" in text
    metrics["rougeL"] |= {"adjusted": 0.0012, "family": 6}
    text = Page(render(run_with(tmp_path / "adjusted", found, metrics=metrics))).text
    assert ", p = 0.0012 corrected for 6" in text
    assert chance(0.0421) == "p = 0.042"


def test_the_planned_and_the_measured_peak_stand_side_by_side(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    trained(run)
    assert "The peak was" not in Page(render(run)).text
    run.update_manifest(decisions={"predicted_peak_bytes": 2**29})
    text = " ".join(Page(render(run)).text.split())
    assert "planned 0.50 GiB measured 1.00 GiB The peak was 100% above the plan." in text


def test_questions_scored_by_likelihood_alone_are_shown_with_their_choices(tmp_path: Path) -> None:
    asked = [
        Conversation((Message("user", "q"),), Origin("q.jsonl", i), choices=("yes", "no"), answer=0) for i in range(8)
    ]
    base = [Answer(choices=(2.0, 1.0), choice_tokens=(1, 1))] * 8
    tuned = [Answer(choices=(1.0, 3.0), choice_tokens=(1, 1))] * 8
    found = judge(asked, base, tuned, ["accuracy_likelihood"])
    text = " ".join(Page(render(run_with(tmp_path, found))).text.split())
    assert "choice base tuned yes 27 % 88 % no 73 % 12 %" in text


@pytest.mark.parametrize("older", [False, True], ids=["null", "NaN"])
def test_a_score_that_is_not_finite_is_left_out_of_its_row_and_the_page_stays_whole(
    tmp_path: Path, older: bool
) -> None:
    asked = [
        Conversation((Message("user", "q"),), Origin("q.jsonl", i), ("a",), choices=("yes", "no"), answer=0)
        for i in range(8)
    ]
    sound = [Answer("a", nll=2.0, targets=1, choices=(2.0, 1.0), choice_tokens=(1, 1))] * 8
    broken = [Answer("a", nll=nan, targets=1, choices=(nan, inf), choice_tokens=(1, 1)), *sound[1:]]
    found = judge(asked, sound, broken, ["rougeL", "perplexity", "accuracy_likelihood"])
    run = run_with(tmp_path, found)
    if not older:
        keep(found, run.results / "compare")
    script = next(text for text in Page(render(run)).scripts if text.lstrip().startswith("{"))
    rows = json.loads(script, parse_constant=pytest.fail)["rows"]
    assert [("perplexity" in row["scores"], len(row["choices"])) for row in rows] == [(False, 0)] + [(True, 2)] * 7


def test_leaks_are_on_the_page(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    prepared(run, {})
    write_json(run.data / "report.json", json.loads((run.data / "report.json").read_text()) | {"leaks": {"exact": 2}})
    assert "2 exact duplicates of the test rows also among the training rows" in Page(render(run)).text


def test_a_run_without_a_comparison_says_what_to_do(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    trained(run)
    text = Page(render(run)).text
    assert "Trained, not compared yet" in text
    assert f"luthier compare {run.folder}" in text
    assert "Loss per supervised token" in text


def test_a_new_run_has_a_page_too(tmp_path: Path) -> None:
    assert write_report(run_with(tmp_path)).read_text().startswith("<!doctype html>")


def test_dropped_rows_are_on_the_page_with_their_reasons(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    prepared(run, {"near_duplicate": 5, "too_long": 3})
    text = " ".join(Page(render(run)).text.split())
    assert "near duplicate 5 too long 3" in text
    assert "data/dropped.jsonl" in text


def test_rows_appear_once_among_gains_losses_and_random_ones(tmp_path: Path) -> None:
    text = Page(render(run_with(tmp_path, compared()))).text
    places = re.findall(r"question\.jsonl:\d+", text)
    assert len(places) == len(set(places)) >= 6


def test_a_long_prompt_is_folded_away(tmp_path: Path) -> None:
    tags = [tag for tag, _ in Page(render(run_with(tmp_path, compared("many words " * 60)))).tags]
    assert tags.count("details") > 1


def test_one_question_has_a_page_without_an_interval(tmp_path: Path) -> None:
    text = Page(render(run_with(tmp_path, compared(count=1)))).text
    assert "No evidence" in text
    assert "one question has no interval" in text


def test_several_references_show_their_mean(tmp_path: Path) -> None:
    asked = [Conversation((Message("user", "q"),), Origin("q.jsonl", 1), references=("a b", "c d"))] * 8
    found = judge(asked, [Answer("c d")] * 8, [Answer("a b")] * 8, ["rougeL"])
    assert "mean over the references" in Page(render(run_with(tmp_path, found))).text


def test_words_that_no_reference_has_are_marked() -> None:
    assert marked("the Cat ate a fish.", ["The cat sat"]) == [("the Cat ", True), ("ate a fish.", False)]
    assert marked("line\n\nline two", ["line two"]) == [("line\n\n", True), ("line", False), (" two", True)]
    assert marked("猫が座る", ["猫は座る"]) == [("猫", True), ("が", False), ("座る", True)]
    assert marked("a b", ["x y z", "a b"]) == [("a b", True)]
    assert marked("anything", []) == [("anything", True)]
    assert marked("", ["a"]) == []


def test_an_interval_lies_where_its_numbers_say() -> None:
    drawn = interval(-5.0, 0.0, 10.0, Axis(-10.0, 10.0), "label")
    assert 'class="zero" x1="50.0"' in drawn
    assert 'class="bar" x1="25.0" x2="100.0"' in drawn


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.3, 2.9), (-40.0, 3.0), (0.0, 1e-4), (0.0, 12_345.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high).ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)


def test_nothing_to_draw_is_no_figure() -> None:
    assert chart([], label="", x_title="") == ""
    assert histogram([0, 1], [0], label="", x_title="") == ""
    assert Axis(1.0, 1.0).ticks() == [1.0]


def test_smoothing_keeps_places_and_levels() -> None:
    points = [(float(i), 2.0) for i in range(40)]
    assert smooth(points) == points
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (10.81, 10.9, ["10.82", "10.84", "10.86", "10.88", "10.90"]),
        (0.0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0.0, 1200.0, ["0", "500", "1,000"]),
        (0.9, 2.9, ["1.0", "1.5", "2.0", "2.5"]),
    ],
)
def test_ticks_have_as_many_decimals_as_tell_them_apart(low: float, high: float, said: list[str]) -> None:
    assert [text for _, text in labels(Axis(low, high))] == said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.431, "0.43 s"), (48.2, "48 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    found = compared()
    flipped = replace(found, metrics={"rougeL": replace(found.metrics["rougeL"], verdict="worse", difference=-9.0)})
    assert "Worse" in Page(render(run_with(tmp_path, flipped))).text


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["paper", "raised", "wash"])
@pytest.mark.parametrize("ink", ["ink", "soft", "accent"])
def test_every_text_colour_is_readable_on_every_ground_in_light_dark_and_print(ink: str, ground: str) -> None:
    style = (Path(luthier.evaluate.__file__).parent / "report.css").read_text()
    for scheme in re.findall(r":root \{([^}]*)\}", style):
        colors = {name: expand(value) for name, value in re.findall(r"--(\w+): (#\w+)", scheme)}
        light, dark = sorted((luminance(colors[ink]), luminance(colors[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, scheme


def expand(color: str) -> str:
    return color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:])
