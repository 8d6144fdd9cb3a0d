"""What `luthier init` writes where there is little to write it from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from luthier.recipe import Recipe
from luthier.scaffold import scaffold


@pytest.mark.parametrize(
    ("rows", "aside", "said"),
    [
        (1, 0, "of one row none can be set aside"),
        (3, 1, "to compare on: there is no test file; too few to tell small differences\n"),
        (119, 29, "to compare on: there is no test file; too few to tell small differences\n"),
        (120, 30, "to compare on: there is no test file\n"),
    ],
)
def test_few_rows_are_said_to_be_enough_for_what_they_are(tmp_path: Path, rows: int, aside: int, said: str) -> None:
    data, out = tmp_path / "few.jsonl", tmp_path / "few.yaml"
    lines = [json.dumps({"prompt": f"what is {i}", "completion": str(i)}) for i in range(rows)]
    data.write_text("\n".join(lines))
    scaffold(str(tiny.base(tmp_path / "base")), data, out=str(out), say=lambda text: None)
    assert Recipe.load(out).data.heldout.rows == aside
    assert said in out.read_text()
