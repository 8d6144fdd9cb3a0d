"""report.html: one file, no network, no script, and hostile data stays text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import luthier.evaluate
from luthier.data.conversation import Conversation, Message, Origin
from luthier.evaluate.comparison import Comparison, judge
from luthier.evaluate.figures import Axis, chart, histogram, interval, smooth
from luthier.evaluate.metrics import Answer
from luthier.evaluate.report import duration, marked, render, write_report
from luthier.recipe import Recipe
from luthier.runs import Run, write_json

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \"' & 😀"


def run_with(folder: Path, found: Comparison | None = None) -> Run:
    tree = f"model: {{base: tiny}}\ndata: {{train: [{{path: rows.jsonl}}]}}\nrun: {{dir: {folder / 'run'}}}"
    run = Run.create(Recipe.parse(tree), root=folder)
    if found is not None:
        place = run.results / "compare"
        place.mkdir(parents=True)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows))
        write_json(place / "comparison.json", found.as_dict())
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
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepared(run: Run, dropped: dict[str, int]) -> None:
    run.data.mkdir()
    spread = {"min": 4, "max": 30, "histogram": {"edges": [4.0, 17.0, 30.0], "counts": [9, 3]}}
    rows = {"read": 20, "kept": 12, "dropped": dropped}
    tokens = {"total": 300, "supervised": 60, "cut": 0}
    write_json(run.data / "report.json", {"rows": rows, "tokens": tokens, "lengths": spread})


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


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
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_the_page_asks_nothing_of_a_network(tmp_path: Path) -> None:
    page = Page(render(run_with(tmp_path, compared())))
    targets = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "action")]
    assert targets == ["#main"]
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in page.tags if tag == "meta")
    assert "url(" not in render(run_with(tmp_path / "again", compared()))


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
    assert marked("the Cat ate a fish.", ["The cat sat"]) == [("the Cat", True), ("ate a fish.", False)]
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


@pytest.mark.parametrize(("seconds", "text"), [(48.2, "48 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
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
