"""The plan of our own runs beside the memory that they took on an H200 (`benchmarks/results/h200.jsonl`)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.machine import GIB, Machine, named_gpu
from luthier.train.decide import Rows, arrange

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from peers import ours  # type: ignore[import-not-found]  # noqa: E402
from peers.workloads import WORKLOADS, steps  # type: ignore[import-not-found]  # noqa: E402
from random_model import SHAPES  # type: ignore[import-not-found]  # noqa: E402

FACTS = Machine(16, 0, 128 * GIB, 120 * GIB, (), "g++", gpus=(named_gpu("H200"),))


def measured() -> dict[str, dict[str, Any]]:
    """The newest row of luthier for each workload and memory."""
    text = (BENCHMARKS / "results" / "h200.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row.get("peer") == "luthier" and "failed" not in row]
    return {f"{row['workload']}/{row['memory']}": row for row in rows if not row["overrides"] and not row["dry"]}


ROWS = measured()


@pytest.mark.parametrize("name", ROWS)
def test_the_plan_is_never_below_what_was_measured_and_at_most_a_twentieth_above(name: str) -> None:
    row, workload = ROWS[name], WORKLOADS[name.partition("/")[0]]
    done = steps(workload, SHAPES[workload.shape]["vocab_size"])
    recipe = ours.recipe_of(Path("model"), workload, row["memory"], [])
    tokens = sum(len(sample.ids) for step in done for part in step for sample in part)
    mean = tokens / (len(done) * recipe.train.samples_per_step)
    rows = Rows(workload.mix.longest, mean, ours.EPOCHS * len(done))
    planned = arrange(recipe, SHAPES[workload.shape], FACTS, rows, place="cuda", dtype="bfloat16")[1]
    assert planned.graphs == row["decisions"]["graphs"]
    assert 1 <= planned.measurable_bytes / GIB / row["peak_gib"] < 1.05
