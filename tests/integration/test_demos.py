"""`luthier demo NAME`, each of the four systems whole, through the real command line: what it says and leaves."""

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.cli import main
from luthier.demos import DEMOS
from luthier.recipe import Recipe, packaged

# Base, data and the size of the job; nothing else may differ from the shipped recipe, but for how it is run.
MAY_CHANGE = {
    "model.base",
    "data.train",
    "data.test",
    "data.heldout.rows",
    "train.samples_per_step",
    "train.max_steps",
    "train.warmup",
    "evaluate.every",
    "evaluate.forgetting",
    "evaluate.rows",
    "evaluate.samples",
    "evaluate.generate.max_new_tokens",
}
# (rank, alpha, adapted layers) of each write-up, on the architecture that the demonstration runs.
ADAPTERS = {
    "falcon": (32, 32, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "phi": (32, 32, {"q_proj", "k_proj", "v_proj", "dense"}),
    "llama": (16, 16, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "chatglm": (8, 8, {"q_proj", "k_proj", "v_proj"}),
}


@dataclass(frozen=True)
class Demo:
    name: str
    folder: Path
    out: str
    err: str
    again: str
    """What the second run said."""
    unchanged: bool
    """Whether the second run left the adapter and the record of the steps as they were."""

    @property
    def result(self) -> Any:
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def steps(self) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [record for record in records if "loss" in record]


def luthier(*words: str) -> tuple[int, str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def learned(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("adapter/adapter_model.safetensors", "metrics.jsonl")]


@pytest.fixture(scope="module", params=list(DEMOS))
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A demonstration as a person runs it, and runs it again."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = luthier("demo", name, "--json")
        assert code == 0, err
        run = folder / "runs" / f"demo-{name}"
        before = learned(run)
        code, _, again = luthier("demo", name, "--json")
        assert code == 0, again
    return Demo(name, run, out, err, again, before == learned(run))


pytestmark = [pytest.mark.slow, pytest.mark.embedded]


def test_a_demonstration_differs_from_the_shipped_recipe_in_base_data_and_size_alone(demo: Demo) -> None:
    path = packaged(DEMOS[demo.name].recipe)
    assert path is not None
    changes = Recipe.load(path).diff(Recipe.load(demo.folder / "recipe.yaml"))
    assert {key for key in changes if not key.startswith("run.")} <= MAY_CHANGE
    assert {"model.base", "data.train", "data.test"} <= changes.keys()
    for key in changes:
        assert f"  {key}: " in demo.err


def test_a_demonstration_trains_every_step_and_moves_the_adapter(demo: Demo) -> None:
    recipe = Recipe.load(demo.folder / "recipe.yaml")
    assert [record["step"] for record in demo.steps] == list(range(1, (recipe.train.max_steps or 0) + 1))
    tensors = load_file(demo.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_demonstration_leaves_the_write_ups_adapter_in_pefts_format(demo: Demo) -> None:
    config = json.loads((demo.folder / "adapter" / "adapter_config.json").read_text())
    rank, alpha, layers = ADAPTERS[demo.name]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, alpha)
    tensors = load_file(demo.folder / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == layers


def test_a_demonstration_ends_in_a_comparison_a_report_and_plain_words_on_its_worth(demo: Demo) -> None:
    assert demo.result["verdict"] in ("better", "no evidence", "worse")
    metric = Recipe.load(demo.folder / "recipe.yaml").evaluate.metrics[0]
    assert {"base", "tuned", "difference", "low", "high", "n"} <= demo.result["metrics"][metric].keys()
    assert (demo.folder / "report.html").is_file()
    assert f"runs/demo-{demo.name}/report.html" in demo.err
    assert "This exercise checks the path" in demo.err
    assert ("random weights" in demo.err) == (DEMOS[demo.name].toy is not None)


def test_the_llama_demonstration_ends_with_its_study_of_the_size_of_the_data(demo: Demo) -> None:
    folder = demo.folder.with_name(f"{demo.folder.name}-study")
    assert folder.exists() == (demo.name == "llama")
    if folder.exists():
        found = json.loads((folder / "findings.json").read_text())
        assert [point["size"] for point in found["points"]] == [0, 2, 4, 8]
        assert found["verdict"] == "no evidence"  # four questions carry none
        assert found["sentence"].split()[0] in demo.err
        assert (folder / "study.html").is_file()


def test_a_second_run_reuses_what_is_done_and_says_so(demo: Demo) -> None:
    assert "is trained already" in demo.again
    assert demo.unchanged


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["demo", "falcno"], 2, "did you mean 'falcon'?"),
        (["demo", "falcon", "phi"], 2, "takes one name, not falcon, phi"),
        (["demo", "train.lrr=1"], 1, "train.lrr"),
        (["demo", "phi", "train.lrr=1"], 1, "train.lrr"),
    ],
    ids=["unknown", "two", "override alone", "name and override"],
)
def test_a_mistake_in_a_demonstration_is_answered_with_a_hint(
    words: list[str], code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = luthier(*words)
    assert (found, out) == (code, "")
    assert hint in err
