"""What a process of ours does without when it imports transformers: it is not missed, and there once it is used."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch.fx.experimental import symbolic_shapes

import tiny
from luthier.model import later

BEGUN = """
import json, sys
import torch
from luthier.model import lean
lean.own_process = {ours}
from luthier.model import attention
"""
READ = """
import sys
from luthier.model import lean
lean.own_process = True
from luthier.model import families

assert families.window_of_file({"model_type": "llama", "num_hidden_layers": 2}) is None
left_out = ("sympy.core", "torch._dynamo.eval_frame", "torch.distributed.tensor", "scipy", "sklearn", "torchvision")
assert [name for name in left_out if hasattr(sys.modules.get(name), "__file__")] == []
import torch
"""
TRAINED = """
from pathlib import Path
import transformers
from transformers.models import llama
from luthier.runs import Run
from luthier.train.launch import train

run = Run.open(Path({folder!r}))
result = train(run)
told = {{
    "loss": result["loss"],
    "planned": result["predicted_peak_bytes"],
    "names": sorted(dir(transformers)),
    "where": transformers.Qwen3ForCausalLM.__module__,
    "models": sorted(dir(transformers.models)),
    "imported": [name for name in ("sympy.core", "torch._dynamo.eval_frame", "torch.distributed.tensor",
                 "torch.fx.experimental.symbolic_shapes") if hasattr(sys.modules.get(name), "__file__")],
}}
print(json.dumps(told))
"""
COMPILED = """
import torch._dynamo.config as config, torch._dynamo
assert config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert config.__spec__.origin and torch._dynamo.__spec__.origin

graphs = []
def backend(graph, inputs):
    graphs.append(graph.code)
    return graph.forward

@torch.compile(backend=backend)
def compiled(x):
    return plain(x.cos()) + marked(x) * constant()

x = torch.arange(3.0)
assert torch.equal(compiled(x), x.cos().sin() + (x + 1) * 3)
code = "".join(graphs)
assert "cos" in code and "sin" not in code and "marked" in code, code
"""
MARKED = """
@torch.compiler.disable
def plain(x):
    return x.sin()

@torch.compiler.allow_in_graph
def marked(x):
    return x + 1

@torch.compiler.assume_constant_result
def constant():
    return 3

assert plain(torch.zeros(1)) == 0  # before there is a compiler
assert "torch._dynamo.eval_frame" not in sys.modules
"""
SYMBOLS = """
import sympy
held = sympy
product = torch.ones(3, 4, device="meta").t() * torch.ones(4, 1, device="meta")
assert product.shape == (4, 3)
assert "sympy.core" not in sys.modules

from sympy import Basic, Symbol
assert issubclass(Symbol, Basic) and isinstance(Symbol("x"), held.Basic)

from torch.fx.experimental.proxy_tensor import make_fx
traced = make_fx(lambda x: x.view(-1) * x.shape[0], tracing_mode="symbolic")(torch.ones(3, 4))
assert torch.equal(traced(torch.ones(5, 2)), torch.full((10,), 5.0))

from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():
    assert torch.vmap(lambda i: torch.arange(5)[i])(torch.tensor([1, 2])).tolist() == [1, 2]
"""


def output(code: str, *, ours: bool) -> str:
    """What the code prints in a process that has imported transformers as one of ours does, or one of others."""
    done = subprocess.run([sys.executable, "-c", BEGUN.format(ours=ours) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Of a run trained by a process of ours, and by one that imports all."""
    found = {}
    for ours in (True, False):
        folder = tmp_path_factory.mktemp("run")
        code = TRAINED.format(folder=str(tiny.run(folder, "run.kernels=eager", "run.place=cpu").folder))
        found[ours] = json.loads(output(code, ours=ours).splitlines()[-1])
    return found


def test_a_run_imports_neither_a_compiler_nor_symbols(trained: dict[bool, dict[str, Any]]) -> None:
    assert trained[True]["imported"] == []
    assert len(trained[False]["imported"]) == 4, "or the names have changed"


def test_a_run_that_leaves_them_out_plans_and_learns_the_same(trained: dict[bool, dict[str, Any]]) -> None:
    assert trained[True]["loss"] == trained[False]["loss"]
    assert trained[True]["planned"] == trained[False]["planned"]


def test_transformers_offers_the_same_names(trained: dict[bool, dict[str, Any]]) -> None:
    for what in ("names", "where", "models"):
        assert trained[True][what] == trained[False][what]


def test_what_was_marked_for_the_compiler_is_heeded_once_there_is_one() -> None:
    output(MARKED + COMPILED, ours=True)


def test_symbols_are_there_for_those_who_use_them() -> None:
    output(SYMBOLS, ours=True)


@pytest.mark.parametrize("then", [MARKED + COMPILED, SYMBOLS], ids=["compiled", "symbols"])
def test_what_a_config_leaves_out_is_asked_for_without_them_and_they_are_there_later(then: str) -> None:
    done = subprocess.run([sys.executable, "-c", READ + then], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in later.ANSWERS if hasattr(symbolic_shapes, name)])
def test_what_is_said_of_plain_numbers_is_what_torch_says_of_them(name: str) -> None:
    answer, asked = later.ANSWERS[name], getattr(symbolic_shapes, name)
    numbers = name in ("guarding_hint_or_throw", "size_hint", "has_hint", "has_guarding_hint", "is_nested_int")
    if name == "sym_eq":
        sizes = [0, 3, (), (3,), [3], (3, 4), [3, 5], torch.Size([3, 4])]
        pairs = [(x, y) for x, y in product(sizes, sizes) if isinstance(x, int) == isinstance(y, int)]
        assert [answer(x, y) for x, y in pairs] == [asked(x, y) for x, y in pairs]
    elif name in ("sym_and", "sym_or"):
        several = [all_of for count in (1, 2, 3) for all_of in product((True, False), repeat=count)]
        assert [answer(*each) for each in several] == [asked(*each) for each in several]
    else:
        for x in (True, False, *((0, 1, 7) if numbers else ())):
            assert operator.is_(answer(x), asked(x))
