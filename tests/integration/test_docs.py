"""What the documents say is checked: recipes parse, commands exist, links lead somewhere, the example runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from luthier.cli import parser
from luthier.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MINIMAL = "{model: {base: any}, data: {train: [{path: rows.jsonl}]}}"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def recipes() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            tree = YAML(typ="safe").load(block)
            if isinstance(tree, dict) and {"model", "data"} <= tree.keys():
                yield str(page.relative_to(ROOT)), block


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            if line.startswith("luthier "):
                yield str(page.relative_to(ROOT)), line


@pytest.mark.parametrize(("page", "block"), [*recipes()])
def test_every_recipe_in_the_documents_parses(page: str, block: str) -> None:
    Recipe.parse(block, name=page)


@pytest.mark.parametrize(("page", "line"), [*commands()])
def test_every_command_in_the_documents_is_one(page: str, line: str) -> None:
    args = parser().parse_args(shlex.split(line, comments=True)[1:])
    Recipe.parse(MINIMAL, *getattr(args, "overrides", []), name=page)


def test_the_documents_show_recipes_and_commands() -> None:
    assert list(recipes())
    assert len(list(commands())) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.embedded
@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # our own page, not a user's text
    assert capsys.readouterr().out.strip() in ("better", "no evidence", "worse")
    assert (tmp_path / "runs" / "example" / "report.html").is_file()
