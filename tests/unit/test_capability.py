"""What runs on which GPU, by its compute capability. None of them is here: the facts are made, the tensors empty."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from luthier.cli import main
from luthier.kernels import quantize
from luthier.kernels.place import planned_for
from luthier.kernels.varlen import takes
from luthier.machine import GIB, Gpu, Machine
from luthier.model.load import dtype_name
from luthier.train.decide import planned

Capability = tuple[int, int]
PASCAL, VOLTA, TURING = (6, 1), (7, 0), (7, 5)
LATER = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
ALL = [PASCAL, VOLTA, TURING, *LATER]
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def facts(capability: Capability) -> Machine:
    gpu = Gpu("a GPU", 16 * GIB, 16 * GIB, capability)
    return Machine(cores=2, busy=0, memory=16 * GIB, available=12 * GIB, flags=(), compiler=None, gpus=(gpu,))


@pytest.mark.parametrize("capability", ALL)
def test_products_are_in_the_16_bits_that_the_gpu_multiplies(capability: Capability) -> None:
    wanted = {PASCAL: "float32", VOLTA: "float16", TURING: "float16"}.get(capability, "bfloat16")
    dtype, why = dtype_name("auto", "cuda", facts(capability))
    assert dtype == wanted
    assert (dtype == "float32") == ("16 bits" in why)
    assert ("scaled" in why) == (dtype == "float16")
    assert dtype_name("float32", "cuda", facts(capability)) == ("float32", "as the recipe says")


@pytest.mark.parametrize("capability", ALL)
def test_our_block_runs_where_triton_does(capability: Capability) -> None:
    found = planned(tiny.recipe(), LLAMA, facts(capability), "cuda")
    assert found.fits
    assert found.kernels == ("reference" if capability == PASCAL else "compiled")
    assert ("since Volta" in found.why["kernels"]) == (capability == PASCAL)


def test_our_block_s_parts_of_plain_torch_run_on_any_gpu() -> None:
    assert planned(tiny.recipe("run.kernels=eager"), LLAMA, facts(PASCAL), "cuda").kernels == "eager"


@pytest.mark.parametrize("capability", ALL)
def test_flash_attention_is_asked_of_gpus_since_ampere_alone(capability: Capability) -> None:
    with planned_for(capability):
        q, k = (torch.empty(16, heads, 64, dtype=torch.float16, device="meta") for heads in (4, 2))
        assert takes(q, k, k) == (capability in LATER)
        assert not takes(q.float(), k.float(), k.float())


class Called(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capability", [None, *ALL])
def test_integers_are_multiplied_by_gpus_since_turing(capability: Capability | None) -> None:
    a, b = (torch.empty(n, 64, dtype=torch.int8, device="meta") for n in (32, 48))
    with planned_for(capability), Called() as called:
        assert quantize.int8_matmul(a, b).shape == (32, 48)
    assert ("_int_mm.default" in called.names) == (capability is not None and capability >= TURING)


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", "float16"), ("RTX 4090", "bfloat16")])
def test_the_plan_for_a_gpu_says_what_it_computes_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gpu: str, dtype: str
) -> None:
    folder = tiny.base(tmp_path / "base")
    recipe = {"model": {"base": str(folder)}, "data": {"train": [{"path": "rows.jsonl"}], "length": 64}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["plan", str(tmp_path / "recipe.json"), "--gpu", gpu]) == 0
    said = capsys.readouterr().out
    assert dtype in said
