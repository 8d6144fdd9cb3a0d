"""Predicted against measured peak memory: models of true shapes with random weights, two steps a cell.

    python benchmarks/plan_vs_peak.py --out benchmarks/results/h200.jsonl [--only llama] # on a GPU
    python benchmarks/plan_vs_peak.py --cpu                                              # small shapes, resident memory
    python benchmarks/plan_vs_peak.py --dry                                              # a GPU's cells, tiny, on a CPU

Each cell runs in a process of its own. Weights are made layer by layer on the device, packed as they are made, so that
the dense model never exists. Rows are as long as allowed and all supervised: what the plan calls the worst micro-batch.
The command ends with 1 where a cell failed. `--dry` tries every line of a GPU's cells; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from random_model import SHAPES

NF4, PLAIN4, INT8 = {"kind": "nf4"}, {"kind": "nf4", "double": False}, {"kind": "int8"}
TIMEOUT = 240  # seconds of a cell


class Cell(NamedTuple):
    shape: str
    quantize: dict[str, Any] | None
    length: int
    rank: int
    recompute: bool | int
    rows: int  # of a micro-batch
    kernels: str = "reference"
    dropout: float = 0.05
    gate_up: int = 0  # blocks that recompute that product alone
    unpacked: int = 0

    @property
    def name(self) -> str:
        return f"{self.shape}/{self.quantize['kind'] if self.quantize else 'none'}/{self.kernels}"


CELLS = [
    # The three cells that the plan's shares for the two paths were taken from (docs/guides/memory.md), without the rest
    # of their runs.
    Cell("llama-3.1-8b", NF4, 687, 16, False, 8, dropout=0.0),
    Cell("llama-3.1-8b", NF4, 687, 16, False, 8, "compiled", 0.0),
    Cell("phi-2", PLAIN4, 597, 32, True, 4),
    Cell("llama-3.1-8b", NF4, 720, 16, True, 4),
    Cell("llama-3.1-8b", NF4, 720, 16, True, 4, "compiled"),
    Cell("llama-3.1-8b", NF4, 720, 16, False, 2),
    Cell("llama-3.1-8b", NF4, 720, 16, False, 2, "compiled"),
    Cell("llama-3.1-8b", NF4, 4096, 64, True, 2),
    Cell("llama-3.1-8b", NF4, 4096, 64, True, 2, "compiled"),
    Cell("llama-3.1-8b", None, 720, 16, True, 8),
    Cell("llama-3.1-8b", None, 720, 16, True, 8, "compiled"),
    Cell("llama-3.1-8b", None, 720, 16, False, 4, "compiled"),
    Cell("llama-3.1-8b", NF4, 720, 16, False, 2, "eager"),
    # What a budget of memory leads to, in between.
    Cell("llama-3.1-8b", NF4, 687, 16, False, 8, "compiled", 0.0, unpacked=32),
    Cell("llama-3.1-8b", NF4, 687, 16, 16, 8, "compiled", 0.0),
    Cell("llama-3.1-8b", NF4, 687, 16, False, 8, "compiled", 0.0, gate_up=32),
    Cell("llama-3.1-8b", NF4, 1024, 16, 8, 4, "compiled", 0.0, gate_up=12, unpacked=8),
    Cell("falcon-7b", NF4, 1024, 32, True, 16),
    Cell("falcon-7b", NF4, 1024, 32, False, 2),
    Cell("falcon-7b", None, 1024, 32, True, 4),
    Cell("falcon-7b", INT8, 512, 8, True, 8),
    Cell("phi-2", PLAIN4, 2048, 32, True, 1),
    Cell("phi-2", PLAIN4, 1024, 32, False, 4),
    Cell("phi-2", None, 512, 16, False, 8),
    Cell("phi-2", INT8, 2048, 32, True, 4),
    Cell("glm-4-9b", INT8, 256, 8, True, 32),
    Cell("glm-4-9b", INT8, 256, 8, False, 4),
    Cell("glm-4-9b", NF4, 1024, 16, True, 8),
    Cell("glm-4-9b", None, 256, 8, True, 16),
]
SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8000,
    "pad_token_id": None,
}
WIDTHS: dict[str, dict[str, Any]] = {
    "falcon-7b": {},
    "phi-2": {"hidden_size": 640, "intermediate_size": 2048},
    "llama-3.1-8b": {"intermediate_size": 1536, "num_key_value_heads": 2},
    "glm-4-9b": {"intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64},
}
CPU_CELLS = [
    Cell("llama-3.1-8b", None, 512, 16, False, 4),
    Cell("llama-3.1-8b", None, 512, 16, True, 4),
    Cell("llama-3.1-8b", None, 512, 16, False, 4, "eager"),
    Cell("llama-3.1-8b", None, 512, 16, 3, 4, "eager", gate_up=3),
    Cell("llama-3.1-8b", NF4, 512, 16, False, 4, "eager"),
    Cell("phi-2", None, 512, 16, False, 4),
    Cell("falcon-7b", None, 512, 16, False, 4),
    Cell("glm-4-9b", NF4, 512, 16, False, 4),
]
DRY_CELLS = [cell._replace(length=max(16, cell.length // 32), rows=min(cell.rows, 2)) for cell in CELLS]
TINY = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 256, "head_dim": 16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name holds this, such as llama or llama-3.1-8b/nf4")
    parser.add_argument("--cpu", action="store_const", const="cpu", dest="mode", default="gpu")
    parser.add_argument("--dry", action="store_const", const="dry", dest="mode")
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells that run at a time; their step times are then worth nothing"
    )
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument("--cell", type=int, help="run this one, here")
    arguments = parser.parse_args()
    cells = {"gpu": CELLS, "cpu": CPU_CELLS, "dry": DRY_CELLS}[arguments.mode]
    if arguments.cell is not None:
        print(json.dumps(measure(cells[arguments.cell], arguments.mode)))
        return 0
    chosen = [(number, cell) for number, cell in enumerate(cells) if arguments.only in cell.name]
    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda numbered: run(*numbered, arguments.mode), chosen):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        said = f"from {min(errors):+.1%} to {max(errors):+.1%} of the measured peak"
        print(f"{len(errors)} of {len(rows)} cells; predicted is off by {said}", file=sys.stderr)
    return int(len(errors) < len(rows))


def run(number: int, cell: Cell, mode: str) -> dict[str, Any]:
    """A cell's row, from a process of its own."""
    command = [sys.executable, __file__, "--cell", str(number), *([f"--{mode}"] if mode != "gpu" else [])]
    row: dict[str, Any]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-800:]}
    except subprocess.TimeoutExpired:
        row = {"failed": f"took longer than {TIMEOUT} s"}
    settings = cell._asdict() | {"micro_tokens": cell.rows * cell.length}
    return {"benchmark": "plan_vs_peak", "mode": mode, **settings, **row}


def sizes(shape: str, mode: str) -> dict[str, Any]:
    """The config: as published, small, or tiny."""
    if mode == "gpu":
        return SHAPES[shape]
    small = SHAPES[shape] | SMALL | WIDTHS[shape]
    return small if mode == "cpu" else {key: TINY.get(key, value) for key, value in small.items()}


def measure(cell: Cell, mode: str) -> dict[str, Any]:
    import torch

    from luthier.adapters.method import attach
    from luthier.allocator import keep_freed_memory, return_freed_memory
    from luthier.machine import machine
    from luthier.model.causal import CausalModel
    from luthier.plan import Setting, plan
    from luthier.recipe import Recipe
    from luthier.train.memory import peak_bytes
    from luthier.train.reproducible import reproducible

    place, config = "cuda" if mode == "gpu" else "cpu", sizes(cell.shape, mode)
    dtype = "bfloat16" if place == "cuda" else "float32"
    recipe = Recipe.model_validate(
        {
            "model": {"base": cell.shape, "quantize": cell.quantize, "compute": dtype},
            "adapter": {"rank": cell.rank, "dropout": cell.dropout},
            "data": {"train": [{"path": "none"}], "length": cell.length},
            "train": {"samples_per_step": cell.rows},
            "run": {
                "recompute": cell.recompute,
                "recompute_gate_up": cell.gate_up,
                "unpacked": cell.unpacked,
                "graphs": False,
                "micro_tokens": cell.rows * cell.length,
                "memory": "999GiB",
            },
        }
    )
    (return_freed_memory if cell.kernels == "reference" else keep_freed_memory)()
    started = time.perf_counter()
    module = random_module(config, recipe, getattr(torch, dtype), place)
    kernels: Any = cell.kernels
    model = CausalModel(
        module,
        attach(module, recipe.adapter, 0),
        kernels=kernels,
        recompute=cell.recompute,
        recompute_gate_up=cell.gate_up,
        unpacked=cell.unpacked,
    )
    built = time.perf_counter() - started
    with reproducible(place):
        seconds = steps(model, recipe, cell.rows, cell.length, len(module.get_input_embeddings().weight))
    measured = peak_bytes()
    # Only now: on a CPU the planning takes memory of this process too.
    planned = plan(recipe, config, Setting(place, dtype, kernels), machine())
    predicted = planned.measurable_bytes
    return {
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "parts": planned.parts,
        "allocated": torch.cuda.max_memory_allocated() if place == "cuda" else None,
        "built_s": built,
        "step_s": seconds,
        "predicted_step_s": planned.seconds_per_step,
        "torch": torch.__version__,
    }


def random_module(config: dict[str, Any], recipe: Any, dtype: Any, place: str) -> Any:
    """The skeleton with random weights, a layer at a time; linear layers are packed as soon as they are made."""
    import torch
    from transformers import CONFIG_MAPPING

    from luthier.adapters.linears import dense_weight, linear_names
    from luthier.model.load import skeleton
    from luthier.model.quantize import pack

    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    module = skeleton(made, recipe.model, dtype)
    buffers = {name: buffer.dtype for name, buffer in module.named_buffers()}
    chosen = linear_names(module) if recipe.model.quantize else []
    for name in chosen:
        layer = module.get_submodule(name)
        weight = torch.empty(dense_weight(layer).shape, dtype=dtype, device=place).normal_(std=0.02)
        bias = None if layer.bias is None else torch.zeros(len(weight), dtype=dtype, device=place)
        module.set_submodule(name, pack(weight, bias, recipe.model.quantize, dtype))
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=place)
                filled = value.normal_(std=0.02) if value.ndim > 1 else value.fill_(float(not name.endswith("bias")))
                setattr(layer, name, torch.nn.Parameter(filled, requires_grad=False))
    module.tie_weights()
    with torch.device(place):  # rotary tables and the like are computed by the modules themselves
        rebuilt = type(module)._from_config(type(made).from_dict({**config, "num_hidden_layers": 1}), dtype=dtype)
    for name in buffers:
        owner, _, leaf = name.rpartition(".")
        try:
            value = rebuilt.get_buffer(name)
        except AttributeError:  # of a layer beyond the first: as the first one's
            value = rebuilt.get_buffer(name.replace(name.split(".layers.")[-1].split(".")[0], "0", 1))
        module.get_submodule(owner)._buffers[leaf] = value.detach().clone().to(place)
    del rebuilt
    return module.requires_grad_(False).eval()


def steps(model: Any, recipe: Any, rows: int, length: int, vocabulary: int) -> float:
    """Two whole steps of one micro-batch; the seconds of the second."""
    import torch

    from luthier.data.stream import Micro
    from luthier.model.memory import release
    from luthier.train import optim

    gradient = optim.flat_gradient(model.adapter.named_parameters())
    optimizer = optim.optimizer(model.adapter.named_parameters(), gradient, recipe.train)
    if gradient.is_cuda:  # as a run does, before it proves its plan
        release()
        torch.cuda.reset_peak_memory_stats()
    tokens = rows * length
    positions = torch.arange(length).repeat(rows)
    ids = torch.arange(tokens) * 7919 % vocabulary
    last = (positions < length - 1).nonzero()[:, 0]
    bounds = tuple(range(0, tokens + 1, length))
    micro = Micro(ids, positions, bounds, last, ids[last + 1], torch.arange(rows), step=0)
    for _ in range(2):
        started = time.perf_counter()
        gradient.zero_()
        loss = model.loss(micro)
        loss.backward()
        optim.finish(optimizer, gradient, loss.detach().double(), lr=1e-4, max_norm=1.0)()
        if gradient.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
