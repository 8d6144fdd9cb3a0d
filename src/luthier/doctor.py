"""`luthier doctor`: what this machine has, and what luthier would do with it and why."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from luthier.machine import GIB, Machine, machine
from luthier.runs import versions

if TYPE_CHECKING:
    from rich.console import Console

# What each optional package is for, and the extra that brings it.
_OPTIONAL = {
    "datasets": "hub data sets (luthier[hub])",
    "pyarrow": "parquet files (luthier[parquet])",
    "zstandard": ".zst files (luthier[zstd])",
    "tensorboard": "the tensorboard tracker (luthier[trackers])",
    "wandb": "the wandb tracker",
    "trackio": "the trackio tracker",
    "mlflow": "the mlflow tracker",
    "bitsandbytes": "AdamW with 8-bit or paged moments (luthier[bitsandbytes])",
    "peft": "adapter.kind: peft (luthier[peft])",
    "lm_eval": "tasks of lm-eval in comparisons (luthier[harness])",
    "spacy": "names of people in data.clean.names (luthier[names])",
    "cudnn": "faster attention on Hopper and Blackwell (luthier[cudnn])",
}


def examine(console: Console) -> dict[str, Any]:
    """Prints and returns the findings."""
    facts = machine()
    findings = {
        "versions": versions(),
        "machine": facts.as_dict(),
        "choices": _choices(facts),
        "quantisers": _quantisers(),
        "optional": {name: find_spec(name) is not None for name in _OPTIONAL},
        "embedded": _embedded(),
    }
    _show(findings, facts, console)
    return findings


def _choices(facts: Machine) -> dict[str, str]:
    """What every `auto` would become here, each with its reason."""
    from luthier.model.load import dtype_name
    from luthier.train.decide import place_of

    place, place_why = place_of("auto", facts)
    dtype, why = dtype_name("auto", place, facts)
    several = facts.free_cores > 1
    on_cpu = {
        "engine": f"ddp: {facts.free_cores} free cores, one process each" if several else "local: one free core",
        "kernels": f"compiled where a run is long enough: {facts.compiler}"
        if facts.compiler
        else "eager: no C++ compiler on PATH",
    }
    on_gpu = {"engine": "local: one process", "kernels": "compiled for families that our block knows, else reference"}
    return {"place": f"{place}: {place_why}", "compute": f"{dtype}: {why}", **(on_cpu if place == "cpu" else on_gpu)}


def _quantisers() -> dict[str, dict[str, Any]]:
    """What each quantiser loses of a normal weight, measured here as a share of its norm, its bits a weight at
    4,096 x 4,096, and what computes it."""
    import torch

    from luthier.model import quantize
    from luthier.recipe import Model

    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in quantize.QUANTIZERS.names():
        settings = Model.model_validate({"base": "any", "quantize": {"kind": kind}}).quantize
        packed = quantize.pack(weight, None, settings, torch.float32)
        error = float((packed.dequantize() - weight).norm() / weight.norm())
        bits = quantize.packed_bytes(4096, 4096, settings) * 8 / 4096**2
        found[kind] = {"error": round(error, 4), "bits": round(bits, 2), "by": _by(kind)}
    return found


def _by(kind: str) -> str:
    import torch

    gpu = torch.cuda.is_available()
    if kind in ("nf4", "fp4"):
        return "Triton" if gpu and find_spec("triton") else "plain torch"
    if kind == "int8":
        return "integer products" if gpu else "integer products, exactly in float32"
    return "kept in 8 bits, multiplied in the compute dtype"


def _embedded() -> str:
    from luthier.model.embedded import cached_folder

    folder = cached_folder()
    return str(folder) if folder else "not fetched yet; the first use of smollm2-135m gets it"


def _show(findings: dict[str, Any], facts: Machine, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in findings["versions"].items()))
    busy = f", {facts.busy} tasks of others running" if facts.busy else ""
    table.add_row("processor", f"{facts.cores} cores{busy}; {' '.join(facts.flags) or 'no known vector instructions'}")
    table.add_row("memory", f"{facts.available / GIB:.1f} GiB free of {facts.memory / GIB:.1f}")
    for name, choice in findings["choices"].items():
        table.add_row(name, escape(choice))
    for name, quantiser in findings["quantisers"].items():
        error, bits, by = (quantiser[key] for key in ("error", "bits", "by"))
        table.add_row(name, f"{bits:.2f} bits a weight, {error:.1%} of a normal weight lost; {by}")
    table.add_row("smollm2-135m", escape(findings["embedded"]))
    for name, present in findings["optional"].items():
        table.add_row(name, ("present: " if present else "[dim]missing:[/] ") + escape(_OPTIONAL[name]))
    console.print(table)
