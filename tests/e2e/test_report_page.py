"""report.html in a real Chromium, from disk and without a network: whole at any width, searchable, for keyboards, for
screen readers, on paper, without scripts; and what models say stays text."""

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from luthier.data.conversation import Conversation, Message, Origin
from luthier.evaluate.comparison import judge
from luthier.evaluate.metrics import Answer
from luthier.evaluate.page.report import render
from luthier.evaluate.page.rows import marked
from luthier.recipe import Recipe
from luthier.runs import Run, write_json

pytestmark = pytest.mark.browser
LONG = "w" * 300  # a word that no line holds
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title = 'owned'</script> <!-- a b"
ROWS = 45
TALK = ["the", "a", "cat", "Cat", "sat,", "sat", "on.", "(mat)", "猫が座る", "10%", "don't", "—", "*", "\n", "ß"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything in it: long words, long prompts, script in its data, all sections."""
    folder = tmp_path_factory.mktemp("run")
    tree = f"model: {{base: org/{LONG}}}\ndata: {{train: [{{path: rows.jsonl}}]}}\nrun: {{dir: {folder / 'run'}}}"
    run = Run.create(Recipe.parse(tree), root=folder)
    asked = [
        Conversation(
            (Message("user", f"{LONG if i % 2 else 'a long prompt ' * 60} number{i}"),),
            Origin("questions.jsonl", i + 1),
            references=(f"{HOSTILE} {i}", "a b"),
            choices=(LONG, "no") if i == 7 else (),
        )
        for i in range(ROWS)
    ]
    said = ("a b", f"{HOSTILE} {LONG}", "nothing alike")
    base = [Answer(said[i % 5 % 3], i % 4 > 0, 9, nll=9.0, targets=3) for i in range(ROWS)]
    tuned = [Answer("a b " * (1 + i % 9) if i % 3 else "", i > 3, 2, nll=7.0, targets=3) for i in range(ROWS)]
    found = judge(asked, base, tuned, ["rougeL", "rouge1", "exact_match", "perplexity"])
    paired = found.as_dict()["metrics"]["rougeL"]
    for place, row in enumerate(found.rows):
        row["answers"] = {f"{LONG}@3": f"{LONG} {HOSTILE}"}
        row["slices"] = {"topic": "odd & <b>" if place % 2 else "even"}
    found.rows[7]["choices_nll"] = {"base": [1.0, 2.0], "tuned": [3.0, 1.0], "targets": [1, 1]}
    names = ["base", LONG, f"{LONG}@3"]
    score = {"metrics": {"rougeL": {"score": 12.5, "low": 10.0, "high": 15.0, "n": ROWS}}, "adapter": LONG}
    sides = [{"name": name, **score} for name in names]
    of_pair = {"metrics": {"rougeL": paired | {"p_adjusted": 0.004}}}
    pairs = [{"first": a, "second": b, **of_pair} for a, b in pairwise(names)]
    more = {"slices": {"topic": {"odd & <b>": {"rougeL": paired}, "even": {"rougeL": paired, "rouge1": paired}}}}
    place = run.results / "compare"
    place.mkdir(parents=True)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows))
    write_json(place / "comparison.json", found.as_dict() | more | {"sides": sides, "pairs": pairs, "pair": names[:2]})
    step = {"epoch": 0.5, "lr": 1e-3, "tokens": 900, "targets": 200, "seconds": 2.0, "peak_bytes": 2**30}
    records = [{"step": i + 1, "loss": 3.0 - i / 40, **step} for i in range(40)] + [{"step": 40, "eval_loss": 2.6}]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.update_manifest(decisions={"predicted_peak_bytes": 2**30, "why": {"place": LONG}})
    run.data.mkdir()
    spread = {"min": 4, "max": 30, "histogram": {"edges": [4.0, 17.0, 30.0], "counts": [9, 3]}}
    rows = {"read": 20, "kept": 12, "dropped": {"too_long": 8}}
    tokens = {"total": 300, "supervised": 60, "cut": 0}
    file = {"path": f"{LONG}.jsonl", "part": "train", "format": "chat", "rows": 20, "sha256": "f0" * 32}
    leaks = {"exact": 2, "near": 1}
    parts = {"rows": rows, "tokens": tokens, "lengths": spread, "files": [file], "leaks": leaks}
    write_json(run.data / "report.json", parts)
    path = folder / "report.html"
    path.write_text(render(run), encoding="utf-8")
    return path


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1280, **options: Any) -> Iterator[Page]:
    """The page from disk, with the network off; anything that it complains of fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    page, complaints = context.new_page(), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    with opened(browser, report) as shown:
        yield shown


def choose(page: Page, **controls: str) -> list[int]:
    """Sets controls by name, and gives the lines of the first page of rows."""
    for name, value in controls.items():
        page.locator(f"[name={name}]").select_option(value)
    return lines(page)


def lines(page: Page) -> list[int]:
    return [int(text.rpartition(":")[2]) for text in page.locator("#list .origin").all_inner_texts()]


@pytest.fixture(scope="module")
def rows(report: Path) -> list[dict[str, Any]]:
    lines = (report.parent / "run/results/compare/rows.jsonl").read_text().splitlines()
    return [json.loads(line) | {"line": place} for place, line in enumerate(lines, 1)]


def gain(row: dict[str, Any], metric: str = "rougeL") -> float:
    return float(row["scores"][metric]["tuned"] - row["scores"][metric]["base"])


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_nothing_sticks_out_at(width: int, browser: Browser, report: Path) -> None:
    with opened(browser, report, width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        out = page.evaluate(
            """() => [...document.querySelectorAll("body *")]
              .filter(e => !e.closest(".wide, select, .skip") && e.getBoundingClientRect().right > innerWidth + 1)
              .map(e => e.tagName + "." + e.className)"""
        )
        assert out == []
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_every_drawing_is_there_and_has_a_name(page: Page) -> None:
    unnamed = "svg:not([aria-hidden=true]):not([aria-label])"
    assert page.locator(unnamed).count() == 0
    assert page.locator(".plot svg").count() == 3
    assert all(box["height"] > 50 for svg in page.locator(".plot svg").all() if (box := svg.bounding_box()))


def test_it_is_light_on_dark_where_the_reader_wants_that(browser: Browser, report: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        with opened(browser, report, color_scheme=scheme) as page:
            found[scheme] = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert _brightness(found["light"]) > 0.9
    assert _brightness(found["dark"]) < 0.15


def _brightness(color: str) -> float:
    return sum(int(c) for c in re.findall(r"\d+", color)[:3]) / (3 * 255)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(width: int, scheme: str, browser: Browser, report: Path) -> None:
    axe = (files("axe_playwright_python") / "axe.min.js").read_text()
    with opened(browser, report, width, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        found = page.evaluate(axe + "; axe.run()")
    assert len(found["passes"]) > 20
    bad = [fault for fault in found["violations"] if fault["impact"] in ("serious", "critical")]
    assert not bad, [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in bad]


def test_what_data_and_models_say_stays_text(page: Page) -> None:
    assert page.title() == "run · luthier"
    assert page.locator("img").count() == 0
    choose(page, order="file")
    assert HOSTILE in page.locator("#list .reference").first.inner_text()
    assert HOSTILE in page.locator("#list .sides > :first-child .text").nth(1).inner_text()


def test_no_script_but_ours_is_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    forged = tmp_path / "report.html"
    forged.write_text(report.read_text().replace("</body>", "<script>document.title = 'owned'</script></body>"))
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(forged.as_uri())
    assert page.title() == "run · luthier"
    assert page.locator("#list article").count() == 10
    context.close()


def test_search_finds_rows_in_any_of_their_texts(page: Page) -> None:
    page.locator("[name=search]").fill("Number17")
    assert lines(page) == [18]
    assert page.locator("#count").inner_text() == f"1 of {ROWS} rows"
    page.locator("[name=search]").fill("nothing is like this")
    assert lines(page) == []
    assert page.locator("#count").inner_text() == "No row is like that."
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#count")).to_have_text(f"{ROWS} rows")


def test_what_was_searched_for_is_highlighted(page: Page) -> None:
    page.locator("[name=search]").fill("number17")
    texts = page.evaluate("[...CSS.highlights.get('found')].map(range => range.toString())")
    assert texts == ["number17"]


def test_rows_sort_by_gain_by_each_metric_by_length_and_as_in_the_file(page: Page, rows: list[dict[str, Any]]) -> None:
    def first(key: Any) -> list[int]:
        return [row["line"] for row in sorted(rows, key=key)[:10]]

    assert choose(page, order="file") == list(range(1, 11))
    assert choose(page, order="gain") == first(lambda row: -gain(row))
    assert choose(page, order="loss") == first(gain)
    assert choose(page, order="longest") == first(lambda row: -row["words"]["tuned"])
    assert choose(page, order="shortest") == first(lambda row: row["words"]["tuned"])
    assert choose(page, order="best", metric="rouge1") == first(lambda row: -row["scores"]["rouge1"]["tuned"])
    assert choose(page, order="best", metric="perplexity") == first(lambda row: row["scores"]["perplexity"]["tuned"])
    assert choose(page, order="worst", metric="exact_match") == first(lambda r: r["scores"]["exact_match"]["tuned"])


def test_rows_are_filtered_by_outcome_by_being_cut_and_by_slice(page: Page, rows: list[dict[str, Any]]) -> None:
    def counted(**controls: str) -> int:
        choose(page, **controls)
        return int(page.locator("#count").inner_text().split()[0])

    assert counted(outcome="better") == sum(gain(row) > 0 for row in rows)
    assert counted(outcome="worse") == sum(gain(row) < 0 for row in rows)
    assert counted(outcome="same") == sum(gain(row) == 0 for row in rows)
    assert counted(outcome="cut-1") == sum(not row["stopped"]["tuned"] for row in rows)
    assert counted(outcome="cut-0") == sum(not row["stopped"]["base"] for row in rows)
    assert counted(outcome="") == ROWS
    page.locator("[data-slice=topic]").select_option("odd & <b>")
    assert page.locator("#count").inner_text() == f"{ROWS // 2} of {ROWS} rows"


def test_choices_show_their_likelihood_on_both_sides(page: Page) -> None:
    page.locator("[name=search]").fill("number7")
    assert page.locator("#list .choices td").all_inner_texts() == ["73 %", "12 %", "27 %", "88 %"]


def test_only_one_page_of_rows_is_in_the_document(page: Page) -> None:
    assert page.locator("#list > li").count() == 10
    for _ in range(4):
        page.locator("#next").click()
    assert len(lines(page)) == ROWS - 40
    assert page.locator("#next").is_disabled()


def test_all_of_it_works_from_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    page.keyboard.type("questions.jsonl")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").inner_text() == "11 to 20"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#place").inner_text() == "1 to 10"


def test_every_control_is_reached_by_tab_and_shows_that_it_has_the_focus(page: Page) -> None:
    wanted = page.locator("a, input, select, button:enabled, summary, [tabindex='0']").count()
    reached = 0
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement !== document.body"):
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        reached += 1
        page.keyboard.press("Tab")
    hidden = page.locator(".fixed summary").count()
    assert reached == wanted - hidden


def test_without_scripts_the_verdict_the_scores_and_a_sample_of_rows_are_there(browser: Browser, report: Path) -> None:
    with opened(browser, report, java_script_enabled=False) as page:
        assert page.locator("h1").is_visible()
        assert page.locator(".scores").first.is_visible()
        assert page.locator(".fixed article").count() == 9
        assert page.locator(".fixed article").first.is_visible()
        assert not page.locator("#explore").is_visible()


def test_on_paper_folds_are_open_and_controls_are_gone(page: Page) -> None:
    assert not page.locator(".fixed article").first.is_visible()
    page.emulate_media(media="print")
    assert page.locator(".fixed article").first.is_visible()
    assert not any(control.is_visible() for control in page.locator("input, select, button, nav").all())
    recipe = page.locator("details pre").last
    assert "model:" in recipe.inner_text()
    assert recipe.bounding_box()["height"] > 100  # type: ignore[index]


def test_the_page_marks_the_same_words_as_the_sample_without_scripts(page: Page) -> None:
    """`marked` in report.js and in rows.py are twins."""
    draw, show = random.Random(0), "p => typeof p === 'string' ? [p, true] : [p.textContent, false]"
    for _ in range(200):
        text, *others = (" ".join(draw.choices(TALK, k=draw.randint(0, 12))) for _ in range(draw.randint(1, 4)))
        shown = page.evaluate(f"([text, others]) => marked(text, others).map({show})", [text, others])
        assert [tuple(part) for part in shown] == marked(text, others), (text, others)
