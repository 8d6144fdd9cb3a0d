"""The four shipped recipes: each figure of the write-ups they stand for, and data of every shape that they meet."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from rich.console import Console

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.api import prepare, show_plan, start
from luthier.demos import DEMOS
from luthier.model.toy import ARCHITECTURES, toy_folder
from luthier.recipe import Recipe, flatten, packaged

FALCON, PHI = "falcon-7b-mental-health", "phi-2-dialogsum"
LLAMA, CHATGLM = "llama-3.1-8b-science-exam", "chatglm-6b-alpaca"
RECIPES = [FALCON, PHI, LLAMA, CHATGLM]

# Typed from the four write-ups. Where the recipe differs on purpose, its comment says so and the line here does too.
FIGURES: dict[str, dict[str, Any]] = {
    FALCON: {
        "model.quantize.kind": "nf4",
        "model.quantize.double": True,
        "model.compute": "bfloat16",
        "model.norms": "float32",
        "adapter.rank": 32,
        "adapter.alpha": 32,
        "adapter.dropout": 0.05,
        "adapter.bias": "none",
        "data.template": "human-assistant",
        "data.length": 1024,
        "train.samples_per_step": 16 * 4,
        "train.max_steps": 320,
        "train.lr": 2e-4,
        "train.schedule": "cosine",
        "train.warmup": 0.03,
        "train.optimizer": "paged_adamw_32bit",
        "train.max_norm": 0.3,
        "evaluate.generate.max_new_tokens": 256,
        "evaluate.generate.temperature": 0,  # set to 0.4 there, with sampling off
        "evaluate.generate.top_p": 0.6,
        "evaluate.generate.repetition_penalty": 1.3,
        "run.log_every": 10,
        "run.save.every": 10,
    },
    PHI: {
        "model.base": "microsoft/phi-2",
        "model.quantize.kind": "nf4",
        "model.quantize.double": False,
        "model.compute": "float16",
        "model.norms": "float32",
        "adapter.rank": 32,
        "adapter.alpha": 32,
        "adapter.dropout": 0.05,
        "adapter.bias": "none",
        "data.template": "instruct-output",
        "data.instruction": "Summarize the below conversation.",
        "data.length": 2048,
        "data.too_long": "drop",
        "train.samples_per_step": 1 * 4,
        "train.max_steps": 1000,
        "train.lr": 2e-4,
        "train.schedule": "linear",
        "train.warmup": 1,
        "train.optimizer": "paged_adamw_8bit",
        "run.recompute": True,
        "evaluate.every": 25,
        "evaluate.generate.max_new_tokens": 100,
        "run.log_every": 25,
        "run.save.every": 25,
    },
    LLAMA: {
        "model.base": "unsloth/Meta-Llama-3.1-8B",
        "model.quantize.kind": "nf4",
        "model.compute": "auto",
        "adapter.rank": 16,
        "adapter.alpha": 16,
        "adapter.dropout": 0,
        "adapter.rslora": False,
        "adapter.init": "default",
        "adapter.targets": "all-linear",
        "data.labels": "option_n",
        "data.template": "alpaca",
        "data.length": 720,
        "train.samples_per_step": 2 * 4,
        "train.epochs": 1,
        "train.max_steps": None,
        "train.lr": 2e-4,
        "train.schedule": "linear",
        "train.warmup": 5,
        "train.optimizer": "adamw_8bit",
        "train.weight_decay": 0.01,
        "train.seed": 3407,
        "evaluate.every": 10,
        "evaluate.generate.max_new_tokens": 5,
        "evaluate.generate.temperature": 0,
        "run.log_every": 1,
    },
    CHATGLM: {
        "model.base": "zai-org/glm-4-9b-hf",
        "model.quantize.kind": "int8",
        "model.quantize.threshold": 6.0,
        "model.compute": "float16",
        "model.norms": "float32",
        "model.trust_remote_code": False,
        "adapter.rank": 8,
        "adapter.alpha": 8,
        "adapter.dropout": 0.05,
        "adapter.init": "default",
        "data.template": "alpaca",
        "data.length": 256,
        "data.heldout.rows": 2000,
        "train.samples_per_step": 128,
        "train.epochs": 3,
        "train.lr": 3e-4,
        "train.warmup": 100,
        "train.optimizer": "adamw",
        "run.recompute": True,
    },
}
DATA = {
    FALCON: (["hub:heliosbrahma/mental_health_chatbot_dataset"], []),
    PHI: (["hub:neil-code/dialogsum-test"], ["hub:neil-code/dialogsum-test"]),
    LLAMA: (["science-exam-train.csv"], ["science-exam-test.csv"]),
    CHATGLM: (["hub:tatsu-lab/alpaca"], []),
}
# The linear layers that the write-ups adapt, on that architecture (ChatGLM's query_key_value is three in GLM).
TARGETS = {
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "chatglm": {"q_proj", "k_proj", "v_proj"},
}
# The settings of the published config.json that decide which code runs.
SETTINGS = {
    "falcon": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}},
    "glm": {"attention_bias": True, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07},
}


def shipped(name: str, *overrides: str) -> Recipe:
    path = packaged(name)
    assert path is not None
    return Recipe.load(path, *overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_each_figure_is_the_write_ups(name: str) -> None:
    found = flatten(shipped(name).model_dump(mode="json"))
    assert {key: found[key] for key in FIGURES[name]} == FIGURES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_data_is_the_write_ups(name: str) -> None:
    data = shipped(name).data
    assert ([s.path for s in data.train], [s.path for s in data.test]) == DATA[name]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_learns_is_judged_on_rows_it_has_not_learned(name: str) -> None:
    data = shipped(name).data
    assert data.heldout.rows > 0
    assert (data.supervise, data.leaks) == ("answers", "drop")


@pytest.mark.parametrize("demo", TARGETS)
def test_the_write_ups_layers_are_adapted_and_no_others(demo: str) -> None:
    from transformers import AutoModelForCausalLM

    system = DEMOS[demo]
    assert system.toy is not None
    module = AutoModelForCausalLM.from_pretrained(toy_folder(system.toy))
    adapter = shipped(system.recipe).adapter
    assert isinstance(adapter, recipe.Lora)
    names = {name.rpartition(".")[2] for name in attach(module, adapter, seed=0).layers}
    assert names == TARGETS[demo]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_toy_has_the_settings_of_its_big_sister(architecture: str) -> None:
    config = json.loads((toy_folder(architecture) / "config.json").read_text())
    assert config["model_type"] == architecture
    assert {key: config[key] for key in SETTINGS[architecture]} == SETTINGS[architecture]


END = 2  # the end-of-text token of the embedded model

# Rows as the real data sets have them: shapes only, the texts are made up. Base and data are overridden, nothing else.


def real(name: str, folder: Path, train: str, test: str | None = None, *overrides: str) -> Any:
    tests = f"data.test=[{{path: {folder / test}}}]" if test else "data.test=[]"
    words = [f"data.train=[{{path: {folder / train}}}]", tests, "model.base=smollm2-135m", f"run.dir={folder / 'run'}"]
    return prepare(start(name, *words, *overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_for_a_gpu_that_is_not_here_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    path = packaged(name)
    assert path is not None
    planned = show_plan(Recipe.load(path), gpu="RTX 4090", console=Console(quiet=True))
    assert (planned.fits, planned.place, planned.device) == (True, "cuda", "RTX 4090")


@pytest.mark.embedded
def test_frequently_asked_questions_run_through_the_falcon_recipe(tmp_path: Path) -> None:
    rows = [(i, f"What helps against worry number {i}?", f"Talking. It doesnâ€™t hurt {i} times.") for i in range(20)]
    with (tmp_path / "faq.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question_ID", "Questions", "Answers"), *rows])
    prepared = real(FALCON, tmp_path, "faq.csv")
    assert (len(prepared.train), len(prepared.heldout)) == (4, 16)
    text = prepared.encoder.tokenizer.decode(prepared.train.as_example(0).ids)
    assert "Kindly, consult a psychiatrist for further queries.'.\n<HUMAN>: What helps" in text
    assert "doesn’t hurt" in text or "doesn't hurt" in text


@pytest.mark.embedded
def test_dialogues_with_one_summary_or_three_run_through_the_phi_recipe(tmp_path: Path) -> None:
    def row(i: int, *summaries: str) -> str:
        said = {"fname": f"r{i}", "dialogue": f"#Person1#: Is it {i}?\n#Person2#: Yes, it is {i}."}
        return json.dumps(said | dict.fromkeys(summaries, f"They agree on {i}.") | {"topic": "numbers"}) + "\n"

    (tmp_path / "dev.jsonl").write_text("".join(row(i, "summary") for i in range(110)))
    (tmp_path / "test.jsonl").write_text("".join(row(i + 500, "summary1", "summary2", "summary3") for i in range(3)))
    prepared = real(PHI, tmp_path, "dev.jsonl", "test.jsonl", "data.leaks=keep")  # they differ in numbers alone
    assert (len(prepared.train), len(prepared.heldout)) == (10, 100)
    example = prepared.train.as_example(0)
    text = prepared.encoder.tokenizer.decode(example.ids)
    assert "### Instruct: Summarize the below conversation.\n\n#Person1#" in text
    assert text.endswith(".\n\n### End")
    assert (example.ids[-1], example.supervised[-1]) == (END, 1)


@pytest.mark.embedded
def test_five_option_questions_run_through_the_llama_recipe(tmp_path: Path) -> None:
    rows = [(i, f"What is {i} plus one?", *(str(i + k) for k in range(5)), "B") for i in range(60)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt", *"ABCDE", "answer"), *rows])
    prepared = real(LLAMA, tmp_path, "train.csv")
    assert (len(prepared.train), len(prepared.heldout)) == (10, 50)
    example = prepared.train.as_example(0)
    text = prepared.encoder.tokenizer.decode(example.ids)
    assert "blank responses are not allowed.\n\n### Input:\nWhat is" in text
    assert text.endswith("### Response:\noption_2")
    assert (example.ids[-1], example.supervised[-1]) == (END, 1)


@pytest.mark.embedded
def test_alpaca_rows_run_through_the_chatglm_recipe(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}", "text": "rendered"} for i in range(8)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    prepared = real(CHATGLM, tmp_path, "alpaca.json", None, "data.heldout.rows=2")
    assert (len(prepared.train), len(prepared.heldout)) == (6, 2)
    assert "### Instruction:\nSay" in prepared.encoder.tokenizer.decode(prepared.train.as_example(0).ids)
