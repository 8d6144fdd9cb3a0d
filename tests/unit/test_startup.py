"""Start-up counts: help loads nothing heavy."""

import os
import subprocess
import sys
from ast import literal_eval

import pytest

import luthier
from luthier.cli import parser

HEAVY = ("torch", "transformers", "numpy", "gradio", "pydantic", "rich", "tokenizers", "peft")
VERBS = sorted(next(a for a in parser()._actions if a.dest == "verb").choices)


@pytest.mark.parametrize("words", [["--help"], *[[verb, "--help"] for verb in VERBS]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys\nfrom luthier.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == luthier.__version__


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = f"import sys, luthier; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What transformers would import if it is installed, for models of images and for ways of generating that are not ours.
BESIDE = ("scipy", "sklearn", "pandas", "pyarrow", "torchvision")


def told_by(*command: str) -> tuple[list[str], str | None]:
    """What a process that trains has imported of BESIDE, and its cuBLAS workspaces."""
    script = "import os\nworkspaces = os.environ.get('CUBLAS_WORKSPACE_CONFIG')\n"
    script += "from transformers.models.llama import modeling_llama\n"
    script += f"print(([m for m in {BESIDE!r} if m in sys.modules], workspaces))"
    plain = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    words = [sys.executable, *command[:-1], command[-1] + script]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
    found: tuple[list[str], str | None] = literal_eval(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str | None]:
    command = tmp_path_factory.mktemp("bin") / "luthier"  # as an installed command is called
    command.write_text("import sys\nimport luthier.train.worker, torch\nexec(sys.argv[1])\n")
    return told_by(str(command), "")


def test_a_process_of_ours_that_trains_imports_nothing_beside_what_models_of_text_need(
    ours: tuple[list[str], str | None],
) -> None:
    assert ours[0] == []


def test_transformers_is_left_whole_where_others_may_want_it() -> None:
    pytest.importorskip("scipy")
    assert "scipy" in told_by("-c", "import sys\nimport luthier.train.worker\n")[0]


def test_the_verbs_are_those_of_the_design() -> None:
    verbs = {"demo", "init", "data", "plan", "train", "compare", "study", "predict", "chat", "runs", "doctor"}
    assert set(VERBS) == verbs


def test_cublas_is_told_of_its_workspaces_before_a_model_is_built(ours: tuple[list[str], str | None]) -> None:
    """It reads the setting once, when it first multiplies."""
    assert ours[1] == ":4096:8"
