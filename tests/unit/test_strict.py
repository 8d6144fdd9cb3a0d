"""What we write is JSON as its standard has it: no NaN, no infinity. What we read may have them: older files do."""

import ast
import json
import subprocess
import sys
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest

from luthier.evaluate.asking.answers import Memo
from luthier.runs import write_json
from luthier.strict import dumps

SOURCE = Path(__file__).parents[2] / "src" / "luthier"

# What `json.dumps` is called for besides files and lines that others read, by file; in `section.key={json.dumps(…)}`
# it quotes a value of a recipe, and those are finite.
ELSEWHERE = {
    "strict.py": "is `dumps`",
    "data/encode.py": "rows for processes of our own, who must render what they would here",
    "data/sandbox.py": "what templates render, as transformers does",
    "data/sources.py": "a digest",
    "data/tokens.py": "trees out of JSON files",
    "evaluate/asking/fit.py": "a key of a cache",
    "evaluate/asking/suite.py": "a digest",
    "evaluate/asking/workers.py": "names and numbers of rows, for processes of our own",
    "evaluate/study/conduct.py": "values of a recipe",
    "model/gguf.py": "trees of names and whole numbers",
    "plan.py": "a key of a cache",
    "scaffold.py": "values of a recipe",
    "train/launch.py": "values of a recipe",
}


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=pytest.fail)


def test_a_figure_that_is_not_finite_is_null_wherever_it_stands() -> None:
    value = {"a": nan, "b": [1.5, inf, {"c": (-inf, 2)}], "d": "NaN"}
    assert strict(dumps(value)) == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN"}


def test_what_is_finite_is_written_as_json_writes_it() -> None:
    value = {"b": [1, 0.1, "é"], "a": None, "c": True}
    assert dumps(value, indent=2, ensure_ascii=False) == json.dumps(value, indent=2, ensure_ascii=False)


def calls(tree: ast.AST) -> list[int]:
    """The lines that call `json.dump` or `json.dumps`, f-strings left out."""
    quoting = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and id(node) not in quoting
        if isinstance(node.value, ast.Name) and node.value.id == "json"
    ]


def test_everything_that_writes_json_writes_it_strictly() -> None:
    found = {str(path.relative_to(SOURCE)): calls(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines and name not in ELSEWHERE} == {}
    assert sorted(ELSEWHERE) == sorted(name for name, lines in found.items() if lines), "and nothing else is excused"


def test_files_of_a_run_and_events_of_its_processes_are_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "found.json", {"high": inf})
    assert strict((tmp_path / "found.json").read_text()) == {"high": None}
    worker = "from luthier.train.group import report\nreport(lambda emit: {'loss': float('nan')})"
    process = subprocess.Popen([sys.executable, "-c", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert strict(process.stdout.readline()) == {"event": "result", "loss": None}
    process.communicate()  # a worker ends when its stdin is closed


def test_a_likelihood_that_is_not_finite_stays_one_among_kept_answers(tmp_path: Path) -> None:
    """It is not one that nobody asked for: that would leave its question out of the score."""
    path, results = tmp_path / "answers.jsonl", {"a": {"nll": nan, "targets": 3}, "b": {"choices": [1.5, inf]}}
    Memo(path).add(results)
    assert [strict(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    with path.open("a") as file:
        file.write('{"key": "old", "nll": NaN, "targets": 2}\n')
    kept = Memo(path)
    assert isnan(kept["a"]["nll"])
    assert isnan(kept["old"]["nll"])
    assert (kept["a"]["targets"], kept["b"]["choices"][0], isnan(kept["b"]["choices"][1])) == (3, 1.5, True)
