"""benchmarks/gpu_proofs.py, tiny and on a CPU: every proof runs, and each can fail."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_proofs  # type: ignore[import-not-found]

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes, on their way to other versions


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gpu_proofs.Bench(tmp_path_factory.mktemp("models"), dry=True)


def test_every_proof_holds_and_leaves_a_row(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for more in ([], ["--full"]):
        assert gpu_proofs.main(["--dry", "--models", str(bench.models), "--out", str(out), *more]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [row for row in made if "part" not in row]
    assert [row["proof"] for row in rows] == ["gradients", "curves", "memory", "budgets", "curves-8b", "memory-8b"]
    assert all(row["passed"] and row["dry"] for row in rows)
    assert [row["part"] for row in made if row["proof"] == "curves" and "part" in row] == ["seed 0", "seed 1", "seed 2"]
    memory = rows[2]
    assert memory["ran_out"] >= len(memory["limits_gib"]) == 4
    assert memory["forward"] > 0
    assert memory["backward"] > 0
    assert memory["later"] > 0


def test_a_proof_that_cannot_be_made_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu_proofs.Bench(tmp_path, dry=True)
    (bench.folder(nf4=True) / "config.json").write_text("{}")
    assert gpu_proofs.main(["--dry", "--models", str(tmp_path), "--only", "budgets"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_proof_that_does_not_exist_is_named() -> None:
    with pytest.raises(SystemExit, match="no proof is called speed; there are gradients, curves"):
        gpu_proofs.main(["--dry", "--only", "speed"])


def test_a_sitting_goes_on_where_the_one_before_it_ended(tmp_path: Path) -> None:
    def sitting(commit: str = "a", deadline: float = float("inf")) -> Any:
        return gpu_proofs.Bench(tmp_path, dry=True, out=tmp_path / "rows.jsonl", deadline=deadline, commit=commit)

    assert sitting().part("curves", "seed 0", lambda: [1.0]) == [1.0]
    assert sitting(deadline=0).part("curves", "seed 0", list) == [1.0]
    for other in (("curves", "seed 1"), ("curves-8b", "seed 0")):
        with pytest.raises(gpu_proofs.Later, match="is left for another sitting"):
            sitting(deadline=0).part(*other, list)
    assert sitting(commit="b").part("curves", "seed 0", lambda: [2.0]) == [2.0]
    for other in ("c+", "unknown"):  # says nothing of the code
        for made in ([3.0], [4.0]):
            assert sitting(commit=other).part("curves", "seed 0", made.copy) == made
    left = gpu_proofs.main(["--dry", "--models", str(tmp_path), "--only", "curves,budgets", "--deadline", "-1"])
    assert left == 1


def test_curves_that_stray_or_learn_nothing_prove_nothing() -> None:
    def passed(ours: float, theirs: float, fallen: float = 1.0) -> bool:
        true = [12.0 - fallen * step / 29 for step in range(30)]
        curves = {"fp32": true, "peft_bfloat16": [x + theirs for x in true], "luthier": [x + ours for x in true]}
        found: bool = gpu_proofs.judged([curves], 10.0).passed
        return found

    assert passed(0.0149, 0.01)
    assert not passed(0.0151, 0.01)
    assert not passed(0.01, 0.01, fallen=0.1)


def test_gradients_and_losses_that_are_further_off_than_theirs_prove_nothing() -> None:
    ones, signs = torch.ones(100, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)

    def learned(gradient: float = 1e-2, kind: float = 1e-2, losses: float = 5e-3, loss: float = 0.0) -> Any:
        """Off by so much: `losses` from token to token, `loss` in all of them."""
        kinds = {"q_proj.lora_A": ones * 1.01, "q_proj.lora_B": ones * (1 + kind)}
        return gpu_proofs.Learned(ones + signs * losses + loss, ones * (1 + gradient), kinds)

    def near(**off: float) -> bool:
        true = gpu_proofs.Learned(ones, ones, {"q_proj.lora_A": ones, "q_proj.lora_B": ones})
        found: bool = gpu_proofs.near(learned(**off), learned(), true).passed
        return found

    assert near(gradient=1.09e-2, kind=1.49e-2, losses=1.09 * 5e-3)
    assert not near(gradient=1.11e-2)
    assert not near(kind=1.51e-2)
    assert not near(losses=1.11 * 5e-3)
    assert near(losses=0, loss=3.9e-3)
    assert not near(losses=0, loss=4.1e-3)


def test_a_run_that_ran_out_of_memory_elsewhere_or_learned_something_else_proves_nothing() -> None:
    ones, limits = torch.ones(100, dtype=torch.float64), {(0, 0, False): 50.0, (2, 1, True): 60.0}

    def run(change: float = 0.0, norm: float = 0.0, short: tuple[str, str, str] = ("", "", "")) -> Any:
        """Off by so much, the norm in its last step; `short`: which ways memory ran out on in each step."""
        ran_out = [[{"f": "forward", "b": "backward"}[way] for way in step] for step in short]
        taken = dict.fromkeys(limits, 100)
        return gpu_proofs.Run(ones * (1 + change), taken, taken, [1, 1, 2], [1.0, 1.0, 1 + norm], ran_out)

    alone, smaller, squeezed = run(), run(1e-3, 1e-2), ("f", "", "fb")

    def holds(cut: Any, whole: Any = alone, least: Any = smaller) -> bool:
        found: bool = gpu_proofs.lived_through(limits, cut, whole, least).passed
        return found

    assert holds(run(1.49e-3, 1.49e-2, squeezed))
    assert not holds(run(1.51e-3, 0, squeezed))
    assert not holds(run(0, 1.51e-2, squeezed))
    assert holds(run(1.4e-6, 1.4e-6, squeezed), least=alone)
    assert not holds(run(1.6e-6, 0, squeezed), least=alone)
    assert not holds(run(short=("fb", "", "")))
    assert not holds(run(short=("f", "b", "b")))
    assert not holds(run(short=("f", "", "f")))
    assert not holds(run(short=("b", "", "b")))
    assert not holds(run(short=squeezed), whole=run(short=("", "f", "")))
    assert not holds(run(short=squeezed), least=run(short=("", "f", "")))


def test_a_gradient_that_lacks_a_sample_is_not_taken_for_ours(bench: Any) -> None:
    side, other = _learned(bench, ()), _learned(bench, (0,))
    assert gpu_proofs.error(other.gradient, side.gradient) > 0.01


def _learned(bench: Any, without: tuple[int, ...]) -> Any:
    side = gpu_proofs.ours(bench, bench.folder(nf4=False), bench.workload("W1", 1, nf4=False))
    rows = [tuple(s for i, s in enumerate(row) if i not in without) for row in side.steps[0]]
    start = gpu_proofs.start_of(side.model, 0, spread=0.01)
    return gpu_proofs.learned_by_ours(side._replace(steps=[tuple(rows)]), start)


@given(st.lists(st.integers(1000, 9000), min_size=20, max_size=60), st.integers(500, 700), st.integers(1, 5))
def test_a_squeezed_step_lacks_memory_and_its_smallest_pass_does_not(needed: list[int], least: int, count: int) -> None:
    passes = {(i // 3, i % 3, i % 2 > 0): amount for i, amount in enumerate(needed)}
    limits = gpu_proofs.squeezes(passes, least, count)
    assert len({step for step, _, _ in limits}) == len(limits) == count
    assert all(least < amount < passes[chosen] for chosen, amount in limits.items())


def test_where_nothing_lies_between_a_step_and_its_smallest_pass_there_is_no_proof() -> None:
    with pytest.raises(RuntimeError, match="1 steps need clearly more"):
        gpu_proofs.squeezes({(0, 0, False): 1000, (1, 0, False): 1200, (1, 1, True): 1200}, 1000, 2)


def test_the_distance_of_curves_is_that_of_their_running_means() -> None:
    flat = [1.0] * 30
    assert gpu_proofs.furthest([*flat[:29], 2.0], flat) == pytest.approx(1 / gpu_proofs.SMOOTH)
    assert gpu_proofs.furthest([x + 0.5 for x in flat], flat) == pytest.approx(0.5)


def test_memory_that_is_held_beyond_its_limit_runs_out_on_both_ways() -> None:
    room, x = gpu_proofs.HeldMemory(), torch.ones(100, requires_grad=True)
    room.limit(500)
    with torch.autograd.graph.saved_tensors_hooks(room.keep, room.take):
        with pytest.raises(torch.OutOfMemoryError):
            x.exp() * x
        room.limit(None)
        loss = (x.exp() * x).sum()
        room.limit(500)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    assert room.spent == ["forward", "backward"]
