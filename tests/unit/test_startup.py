"""Start-up counts: help loads nothing heavy."""

import subprocess
import sys

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


def test_the_verbs_are_those_of_the_design() -> None:
    verbs = {"demo", "init", "data", "plan", "train", "compare", "study", "predict", "chat", "runs", "doctor"}
    assert set(VERBS) == verbs
