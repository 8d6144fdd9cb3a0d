"""Host memory while a sharded checkpoint is loaded in few bits, against what it should be: a shard + the packed model.

    python benchmarks/load_memory.py --device cuda            # Llama-3.1-8B's shape, 16 GB of random bfloat16
    python benchmarks/load_memory.py --layers 4 --shard 0.5   # smaller, for a machine without a GPU

The checkpoint is written shard by shard into a folder of its own under --folder and deleted afterwards (--keep: left,
and found again by the next call). Loading runs in a process of its own; its memory is the largest resident set while it
loads, less what it had once everything was imported and, on a GPU, CUDA was started. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

GB = 1e9


def main() -> None:
    options = arguments()
    if options.worker:
        print(json.dumps(measure(Path(options.folder), options)))
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="luthier-load-"))
    try:
        if not (folder / "model.safetensors.index.json").exists():
            write(folder, options)
        command = [sys.executable, __file__, "--worker", *sys.argv[1:], "--folder", str(folder)]
        report(folder, json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout), options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", default="nf4", choices=["nf4", "fp4", "int8", "fp8"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard", type=float, default=5.0, help="GB of a shard")
    parser.add_argument("--folder", help="where the checkpoint is written, or lies from an earlier call")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def config(layers: int) -> Any:
    """Llama-3.1-8B's."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def write(folder: Path, options: argparse.Namespace) -> None:
    """Random weights in shards, of which one is in memory at a time."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config(options.layers)).state_dict()
    groups = list(grouped(empty, options.shard * GB))
    places = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.empty(empty[name].shape, dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    config(options.layers).save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def grouped(empty: dict[str, torch.Tensor], limit: float) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in empty.items():
        if names and size + 2 * tensor.numel() > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * tensor.numel()
    yield names


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Loads in this process: bytes and seconds."""
    from luthier import recipe
    from luthier.model import attention, load, quantize, weights  # noqa: F401 (imported before memory is looked at)

    device = torch.device(options.device)
    torch.zeros(1, device=device)
    chosen = recipe.Model.model_validate({"base": str(folder), "quantize": {"kind": options.kind}})
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("VmRSS"), time.perf_counter()
    module = load.load_causal(folder, chosen, device=device, dtype=torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"host": resident("VmHWM") - before, "before": before, "held": held, "gpu": gpu, "seconds": seconds}


def resident(field: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def report(folder: Path, found: dict[str, float], options: argparse.Namespace) -> None:
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    allowed = max(sizes) + found["held"]
    found |= {"checkpoint": sum(sizes), "shard": max(sizes), "ratio": found["host"] / allowed}
    if options.json:
        print(json.dumps({"device": options.device, "kind": options.kind, **found}))
        return
    print(f"checkpoint {sum(sizes) / GB:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / GB:.2f} GB")
    print(f"loaded in {options.kind} on {options.device} in {found['seconds']:.1f} s: {found['held'] / GB:.2f} GB")
    if found["gpu"]:
        print(f"GPU: {found['gpu'] / GB:.2f} GB at most")
    print(f"host: {found['host'] / GB:.2f} GB at most, {found['ratio']:.2f} x (largest shard + packed model); goal 1.3")


if __name__ == "__main__":
    main()
