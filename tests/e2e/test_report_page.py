"""report.html in a real Chromium: nothing sticks out, folds open, and it is readable in the dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from luthier.data.conversation import Conversation, Message, Origin
from luthier.evaluate.comparison import judge
from luthier.evaluate.metrics import Answer
from luthier.evaluate.report import render
from luthier.recipe import Recipe
from luthier.runs import Run, write_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=5000",
]
LONG = "w" * 300  # a word that no line holds
PROBE = """
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const out = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
  const text = view.getComputedStyle(page.querySelector("h1"));
  const folds = [...page.querySelectorAll("details")];
  folds.forEach(fold => fold.open = true);
  document.body.dataset.found = JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth, out: out.map(e => e.tagName + "." + e.className).slice(0, 5),
    opened: root.scrollWidth, folds: folds.length, ink: text.color,
    paper: view.getComputedStyle(page.documentElement).backgroundColor,
    unnamed: [...page.querySelectorAll("svg")].filter(
      e => e.getAttribute("aria-hidden") !== "true" && !e.getAttribute("aria-label")).length,
    charts: [...page.querySelectorAll(".plot svg")].filter(e => e.getBoundingClientRect().height > 50).length,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run with everything in it: long words, long prompts, script in its data, all sections."""
    folder = tmp_path_factory.mktemp("run")
    tree = f"model: {{base: org/{LONG}}}\ndata: {{train: [{{path: rows.jsonl}}]}}\nrun: {{dir: {folder / 'run'}}}"
    run = Run.create(Recipe.parse(tree), root=folder)
    asked = [
        Conversation(
            (Message("user", f"{LONG if i % 2 else 'a long prompt ' * 60} {i}"),),
            Origin(f"{LONG}.jsonl", i),
            references=("<script>document.title = 'owned'</script> a b", LONG),
        )
        for i in range(30)
    ]
    base = [Answer(f"{LONG} a", False, 9, nll=9.0, targets=3) for _ in asked]
    tuned = [Answer("a b" if i % 3 else "", True, 2, nll=7.0, targets=3) for i in range(30)]
    found = judge(asked, base, tuned, ["rougeL", "rouge1", "exact_match", "perplexity"])
    place = run.results / "compare"
    place.mkdir(parents=True)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows))
    write_json(place / "comparison.json", found.as_dict())
    step = {"epoch": 0.5, "lr": 1e-3, "tokens": 900, "targets": 200, "seconds": 2.0, "peak_bytes": 2**30}
    records = [{"step": i + 1, "loss": 3.0 - i / 40, **step} for i in range(40)] + [{"step": 40, "eval_loss": 2.6}]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.data.mkdir()
    spread = {"min": 4, "max": 30, "histogram": {"edges": [4.0, 17.0, 30.0], "counts": [9, 3]}}
    rows = {"read": 20, "kept": 12, "dropped": {"too_long": 8}}
    tokens = {"total": 300, "supervised": 60, "cut": 0}
    write_json(run.data / "report.json", {"rows": rows, "tokens": tokens, "lengths": spread})
    return render(run)


def measured(page: str, width: int, folder: Path, *flags: str) -> dict[str, object]:
    """What the page is like in a window of `width` pixels. It lies in a frame, since a headless window has a least
    width; a frame of the same origin can be looked into."""
    frame = f'<iframe srcdoc="{html.escape(page)}" style="border:0;width:{width}px;height:900px"></iframe>'
    path = folder / "frame.html"
    path.write_text(f"<!doctype html><body>{frame}{PROBE}", encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<body data-found="([^"]*)"', shown)
    assert found, shown[-500:]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_nothing_sticks_out_at(width: int, page: str, tmp_path: Path) -> None:
    found = measured(page, width, tmp_path)
    assert found["scroll"] == found["opened"] == found["width"], found
    assert found["out"] == []


def test_every_drawing_is_there_and_has_a_name(page: str, tmp_path: Path) -> None:
    found = measured(page, 1280, tmp_path)
    assert found["unnamed"] == 0
    assert found["charts"] == 3


def test_it_is_light_on_dark_where_the_reader_wants_that(page: str, tmp_path: Path) -> None:
    light = measured(page, 1280, tmp_path)
    dark = measured(page, 1280, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["ink"] != dark["ink"]
    assert _brightness(str(light["paper"])) > 0.9
    assert _brightness(str(dark["paper"])) < 0.15


def _brightness(color: str) -> float:
    return sum(int(c) for c in re.findall(r"\d+", color)[:3]) / (3 * 255)
