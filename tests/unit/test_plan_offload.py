"""What goes to host memory so that a step is faster in the memory that it may take, and what that leaves on the GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from luthier import recipe
from luthier.api import in_less_memory, show_plan, with_gpu
from luthier.data.stream import Micro
from luthier.errors import RecipeError
from luthier.kernels.place import planned_for
from luthier.machine import GIB, Machine, named_gpu
from luthier.model import trace
from luthier.model.away import Away
from luthier.plan import Plan, Setting, plan
from luthier.recipe import Recipe

MACHINE = Machine(cores=2, busy=0, memory=256 * GIB, available=256 * GIB, flags=(), compiler=None)
WIDE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
ON_THE_GPU = ("run.offload=0", "run.offload_embedding=false", "run.offload_activations=0")
EMBEDDING = 2 * 32000 * 2048


def made(memory: int | None, *overrides: str, config: dict[str, Any] = WIDE, gpu: str = "H200", **facts: Any) -> Plan:
    """Of 16 rows of 512 tokens a step, in so many bytes."""
    machine = replace(MACHINE, gpus=(named_gpu(gpu),), **facts)
    changes = ["train.samples_per_step=16", "model.quantize={kind: nf4}", "run.graphs=false", "run.unpacked=0"]
    changes += [f"run.memory={memory}"] if memory else []
    chosen = Recipe.parse("model: {base: b}\ndata: {train: [{path: a}], length: 512}\n", *changes, *overrides)
    return plan(chosen, config, Setting("cuda", "bfloat16", "compiled"), machine)


def whole() -> Plan:
    return made(None)


def least() -> Plan:
    return made(None, *ON_THE_GPU, "run.recompute=true")


def test_with_memory_enough_nothing_goes_to_host_memory() -> None:
    found = whole()
    assert (found.offload, found.offload_embedding, found.offload_activations, found.host_bytes) == (0, False, 0, 0)
    assert (found.recompute, found.recompute_gate_up) == (False, 0)


def test_what_blocks_keep_goes_to_host_memory_rather_than_to_be_made_again() -> None:
    budget = (whole().peak_bytes + least().peak_bytes) // 2
    found, kept = (made(budget, *ON_THE_GPU[:2], *more) for more in ([], [ON_THE_GPU[2]]))
    assert found.fits
    assert kept.fits
    assert found.offload_activations > 0
    assert kept.offload_activations == 0
    assert found.seconds_per_step < 0.97 * kept.seconds_per_step
    assert found.host_bytes > 0
    assert found.peak_bytes <= budget


def test_no_more_goes_there_than_comes_and_goes_while_others_compute() -> None:
    """A slower bus carries less in the time of a pass."""
    budget = (whole().peak_bytes + 3 * least().peak_bytes) // 4
    assert made(budget, *ON_THE_GPU[:2]).host_bytes > 0
    slow = made(None, "run.offload_activations=15", gpu="A100-80")
    assert slow.seconds_per_step > 1.1 * made(None, "run.offload_activations=0", gpu="A100-80").seconds_per_step


def test_a_host_without_memory_is_sent_nothing() -> None:
    budget = (whole().peak_bytes + least().peak_bytes) // 2
    assert made(budget, *ON_THE_GPU[:2], available=GIB // 64).offload_activations == 0


def test_the_embedding_stays_in_host_memory_where_there_is_no_room_for_it() -> None:
    asked, kept = (made(None, f"run.offload_embedding={said}") for said in ("true", "false"))
    assert kept.parts["weights"] - asked.parts["weights"] == EMBEDDING
    assert asked.host_bytes >= EMBEDDING
    row = made(None, *ON_THE_GPU, "run.recompute=true", "run.micro_tokens=512")
    tight = made(row.peak_bytes - EMBEDDING // 2, "run.offload=0", "run.offload_activations=0")
    assert tight.offload_embedding
    assert tight.fits


def test_an_embedding_that_is_the_head_too_stays_on_the_gpu() -> None:
    tied = WIDE | {"tie_word_embeddings": True}
    kept = made(None, *ON_THE_GPU, "run.recompute=true", "run.micro_tokens=512", config=tied)
    assert not made(kept.peak_bytes - EMBEDDING // 2, "run.offload=0", config=tied).offload_embedding
    with pytest.raises(RecipeError, match=r"run.offload_embedding: true: .*it is the output head's weight"):
        made(None, "run.offload_embedding=true", config=tied)


def test_an_embedding_that_scales_its_rows_stays_on_the_gpu() -> None:
    scaled = WIDE | {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 128}
    scaled |= {"attn_logit_softcapping": None, "sliding_window": 4096}
    row = made(None, *ON_THE_GPU, "run.recompute=true", "run.micro_tokens=512", config=scaled)
    assert not made(row.peak_bytes - EMBEDDING // 2, "run.offload=0", config=scaled).offload_embedding
    with pytest.raises(RecipeError, match=r"run.offload_embedding: true: .*scales its rows"):
        made(None, "run.offload_embedding=true", config=scaled)


def elsewhere(setting: Setting, *overrides: str, config: dict[str, Any] = WIDE, gpu: str = "H200") -> Plan:
    chosen = Recipe.parse("model: {base: b}\ndata: {train: [{path: a}], length: 512}\n", *overrides)
    return plan(chosen, config, setting, replace(MACHINE, gpus=(named_gpu(gpu),)))


def test_an_embedding_in_host_memory_is_read_by_a_compiled_kernel_alone() -> None:
    eager = Setting("cuda", "bfloat16", "eager")
    assert not elsewhere(eager, "run.memory=1GiB").offload_embedding
    with pytest.raises(RecipeError, match=r"run.offload_embedding: true: .*run.kernels=compiled"):
        elsewhere(eager, "run.offload_embedding=true")


@pytest.mark.parametrize(
    ("dtype", "gpu", "changes", "why"),
    [
        ("float32", "H200", {}, "one launch in 16 bits"),
        ("float16", "T4", {}, "GPUs since Ampere"),
        ("bfloat16", "H200", {"head_dim": 320}, "heads of 320 features"),
    ],
    ids=str,
)
def test_blocks_keep_theirs_on_the_gpu_where_autograd_keeps_attention(
    dtype: str, gpu: str, changes: dict[str, Any], why: str
) -> None:
    setting, asked = Setting("cuda", dtype, "compiled"), ["model.quantize={kind: nf4}", "run.micro_tokens=2048"]
    whole = elsewhere(setting, *asked, *ON_THE_GPU, config=WIDE | changes, gpu=gpu)
    short = f"run.memory={whole.peak_bytes * 2 // 3}"
    assert elsewhere(setting, *asked, short, config=WIDE | changes, gpu=gpu).offload_activations == 0
    with pytest.raises(RecipeError, match=rf"run.offload_activations: 2: .*{why}.*; leave it out"):
        elsewhere(setting, "run.offload_activations=2", config=WIDE | changes, gpu=gpu)


@pytest.mark.parametrize("asked", ["run.offload_embedding=true", "run.offload_activations=2"])
def test_what_cannot_be_in_host_memory_is_refused_and_not_left_out(asked: str) -> None:
    with pytest.raises(RecipeError, match=r"CUDA GPU, and this run is on cpu; leave it out"):
        elsewhere(Setting("cpu", "float32", "eager"), asked)
    with pytest.raises(RecipeError, match="the transformers module runs here"):
        elsewhere(Setting("cuda", "bfloat16", "reference"), asked)


def test_what_is_pinned_is_no_more_than_the_host_has() -> None:
    row = made(None, *ON_THE_GPU, "run.recompute=true", "run.micro_tokens=512")
    budget = row.peak_bytes - EMBEDDING
    roomy = made(budget)
    assert roomy.fits
    assert roomy.offload_embedding or roomy.offload
    short = made(budget, available=GIB // 16)
    assert not short.fits
    assert short.lacking.count("of host memory and may use 51 MiB") == 1
    assert any(said.startswith("free host memory: ") for said in short.advice)


def test_activations_take_what_the_weights_leave_of_host_memory() -> None:
    budget = (whole().peak_bytes + least().peak_bytes) // 2
    enough = made(budget, "run.offload=0", "run.offload_embedding=true")
    tight = made(budget, "run.offload=0", "run.offload_embedding=true", available=enough.host_bytes)
    assert tight.fits
    assert tight.offload_activations > 0
    assert tight.host_bytes <= 0.8 * enough.host_bytes


def test_a_plan_for_a_gpu_tells_what_a_step_takes_in_less_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    text = f"model: {{base: {tmp_path}}}\ndata: {{train: [{{path: a}}], length: 512}}\n"
    chosen = Recipe.parse(text, "run.graphs=false", "train.samples_per_step=16")
    told = StringIO()
    found = show_plan(chosen, gpu="H200", console=Console(file=told, width=60))
    (some, later), (half, last) = found.less
    assert half <= found.peak_bytes // 2 < some <= found.peak_bytes * 3 // 4
    assert found.seconds_per_step <= later <= last
    assert told.getvalue().count("with run.memory=") == 2


def test_less_memory_is_never_told_to_be_faster() -> None:
    found = replace(whole(), seconds_per_step=0.54, less=((6 * GIB, 0.53), (4 * GIB, 0.66)))
    said = ["with run.memory=6.0GiB a step takes no longer", "with run.memory=4.0GiB about 0.66 s a step"]
    assert list(in_less_memory(found)) == said


def test_the_memory_of_this_machine_says_nothing_of_that_of_a_gpu_elsewhere() -> None:
    budget = (whole().peak_bytes + least().peak_bytes) // 2
    found = made(budget, "run.offload_activations=8", available=GIB // 64, here=False)
    assert found.fits
    assert found.host_budget_bytes is None
    assert found.host_free_bytes == pytest.approx(found.host_bytes / 0.8)
    refused = made(budget, "run.offload_activations=8", available=GIB // 64)
    assert not refused.fits
    assert "of host memory" in refused.lacking
    small = made(GIB // 2, here=False)  # of the GPU's memory there is too little anywhere
    assert not small.fits
    assert "host memory" not in " ".join([small.lacking, *small.advice])


def test_a_gpu_is_elsewhere_unless_this_machine_has_one_of_its_kind() -> None:
    one = replace(MACHINE, gpus=(replace(named_gpu("RTX 4090"), name="NVIDIA GeForce RTX 4090"),))
    for machine, gpu, vram, here in [
        (one, "rtx-4090", None, True),
        (one, None, "12GiB", True),
        (one, "H200", None, False),
        (MACHINE, "RTX 4090", None, False),
        (MACHINE, None, "12GiB", False),
    ]:
        assert with_gpu(machine, gpu, vram).here is here, (gpu, vram)


def test_what_the_host_of_a_gpu_elsewhere_has_to_have_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    text = f"model: {{base: {tmp_path}, quantize: {{kind: nf4}}}}\ndata: {{train: [{{path: a}}], length: 512}}\n"
    asked, told = Recipe.parse(text, "run.offload_activations=8"), StringIO()
    found = show_plan(asked, gpu="H200", console=Console(file=told, width=300))
    said = f"it is pinned there: {found.host_free_bytes / GIB:.1f} GiB of host memory have to be free"
    assert told.getvalue().count(said) == 1


def test_our_blocks_stream_packed_weights_where_there_is_no_room_for_them() -> None:
    """A block's weights are there before the one before it is done: it takes no longer."""
    fits = made(least().peak_bytes, "run.offload=0")
    short = made(fits.peak_bytes - fits.parts["weights"] * 7 // 8)
    assert short.fits
    assert short.kernels == "compiled"
    assert short.offload > 0
    assert short.seconds_per_step < 1.1 * fits.seconds_per_step
    assert sum(short.parts.values()) == short.peak_bytes


def test_a_streamed_block_is_on_the_gpu_with_one_other() -> None:
    some, every = (made(None, f"run.offload={count}") for count in (6, 16))
    block = (some.parts["weights"] - every.parts["weights"]) / 10
    packed = (4 * 2048 * 2048 - 2 * 2048 * 1536 + 3 * 2048 * 8192) / 2
    assert block == pytest.approx(packed * (1 + 1 / 32 + 1 / 4096), rel=0.01)  # with its scales
    assert made(None, "run.offload=0").parts["weights"] - every.parts["weights"] == pytest.approx(14 * block)
    with pytest.raises(RecipeError, match=r"run.offload: 17: the model has 16 blocks"):
        made(None, "run.offload=17")


@pytest.mark.parametrize("away", [2, 5, 7])
@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (8, 0), (0, 8)], ids=str)
def test_what_is_left_on_the_gpu_of_blocks_that_send_theirs_away_is_what_a_pass_leaves_there(
    counts: tuple[int, int], away: int
) -> None:
    """`Away` itself runs on tensors without data, and the plan is no less, and hardly more."""
    config = WIDE | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 500}
    adapter, settings = recipe.Lora(rank=4), recipe.Model(base="b", quantize=recipe.FourBit(kind="nf4"))
    gpu: Any = {"dtype": torch.bfloat16, "recompute": False, "kernels": "compiled", "capability": (9, 0)}
    model = trace.outline(config, settings, adapter, **gpu)
    assert model.decoder is not None
    alike = []
    for keeps in ((True, 0), (0, 8), (0, 0)):
        model.decoder.recompute(*keeps)
        alike.append(trace.trace(model, [300] * 8, capability=(9, 0)))
    groups = [(one, count) for one, count in zip(alike, (*counts, 8 - sum(counts)), strict=True) if count]
    planned = sum(trace.mixed(groups, away).peak.values())
    model.decoder.recompute(*counts)
    model.decoder.away = Away(away, 8, trace.META)
    found = peak(model, [300] * 8)
    kept = max(one.figures["saved",] for one, _ in groups)
    assert found <= planned <= found + kept + 2**20


def peak(model: Any, lengths: list[int]) -> int:
    """Bytes at the worst moment of a pass through all blocks."""
    rows = torch.zeros(sum(lengths), dtype=torch.int64, device=trace.META)
    bounds = (0, *accumulate(lengths))
    samples = torch.zeros(len(lengths), dtype=torch.int64, device=trace.META)
    micro = Micro(rows, rows.clone(), bounds, rows.clone(), rows.clone(), samples, step=0)
    meter = trace.Meter()
    for part, tensor in trace._fixed(model):
        meter.see(part, tensor)
    meter.see("gradients", trace._flat_gradient(model.adapter))
    with planned_for((9, 0)):
        figures = trace._measured(model, micro, meter, "model.layers", range(8))
    live: dict[str, float] = {}
    for (figure, *names), amount in figures.items():
        if figure == "live":
            live[names[0]] = live.get(names[0], 0) + amount
    assert model.adapter is not None
    moments = 8 * sum(p.numel() for p in model.adapter.parameters())
    return int(max(live.values())) + moments + 2 * trace._CUBLAS
