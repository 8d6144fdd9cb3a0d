"""What every engine must do: its processes share a step's rows, and together they are one.

That the loss curve equals `local` is in `tests/integration/test_promise_1_split_invariance.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LENGTHS = [5, 9, 2, 7, 7, 1, 30, 4]


def member(name: str) -> dict[str, Any]:
    """One process of an engine: what it is answered."""
    import torch

    from luthier.train.engines import ENGINES

    engine = ENGINES.get(name)()
    gradient = torch.arange(4.0) + 10 * engine.rank
    engine.reduce(gradient)
    loss = torch.tensor(1e-9 + engine.rank, dtype=torch.float64)
    engine.reduce(loss)
    answers = {
        "rank": engine.rank,
        "ranks": engine.ranks,
        "share": engine.share(LENGTHS),
        "nothing": engine.share([]),
        "reduced": gradient.tolist(),
        "loss": float(loss),
        "total": engine.total(1e-9 + engine.rank, 1.0),
        "highest": engine.highest(15 * engine.rank),
    }
    engine.close()
    return answers


def members(name: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """The answers of all processes of an engine, each started as `launch.py` starts it."""
    common = {"WORLD_SIZE": str(ranks), "LUTHIER_RENDEZVOUS": str(folder / "meeting"), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name], env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


@pytest.fixture(scope="module", params=[("local", 1), ("ddp", 1), ("ddp", 3)], ids=lambda p: f"{p[0]} of {p[1]}")
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return members(*request.param, tmp_path_factory.mktemp("engine"))


def test_ranks_are_numbered_from_zero(answers: list[dict[str, Any]]) -> None:
    assert [(a["rank"], a["ranks"]) for a in answers] == [(rank, len(answers)) for rank in range(len(answers))]


def test_every_row_of_a_step_is_some_ranks_and_only_one_s(answers: list[dict[str, Any]]) -> None:
    assert sorted(row for a in answers for row in a["share"]) == list(range(len(LENGTHS)))
    assert all(a["nothing"] == [] for a in answers)


def test_gradients_are_summed_on_every_rank(answers: list[dict[str, Any]]) -> None:
    tens = 10.0 * sum(range(len(answers)))
    assert all(a["reduced"] == [len(answers) * i + tens for i in range(4)] for a in answers)


def test_a_loss_is_summed_in_double_precision(answers: list[dict[str, Any]]) -> None:
    expected = sum(1e-9 + rank for rank in range(len(answers)))
    assert all(a["loss"] == pytest.approx(expected, rel=1e-14) for a in answers)


def test_totals_are_sums_in_double_precision(answers: list[dict[str, Any]]) -> None:
    expected = sum(1e-9 + rank for rank in range(len(answers)))
    assert all(a["total"] == [pytest.approx(expected, rel=1e-14), float(len(answers))] for a in answers)


def test_all_ranks_learn_the_highest_value(answers: list[dict[str, Any]]) -> None:
    assert all(a["highest"] == 15 * (len(answers) - 1) for a in answers)


if __name__ == "__main__":
    print(json.dumps(member(sys.argv[1])))
