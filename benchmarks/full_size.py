"""The four recipes at full size on one GPU: random weights of the true shape, the seed's batch and lengths, 20 steps.

    python benchmarks/full_size.py --out benchmarks/results/h200.jsonl [--only falcon,llama] [--steps 20]

Each recipe is run as a user would run it, `luthier train RECIPE model.base=… data.train=…`, on a checkpoint written for
it (bfloat16, sharded, deleted afterwards) and on made-up rows of the seed's lengths, so that loading and packing, the
plan and the step are all what a real run has. What it says: peak memory, tokens a second (median of the steps after the
fifth), the most host memory, and the time of the seed's whole job, scaled to an A100 and an RTX 4090 by their rates.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_model import words, write_model

RATES = {"A100": 312.0, "RTX 4090": 165.0}  # dense bf16 TFLOP/s, as published
TIMEOUT = 240


@dataclass(frozen=True)
class Job:
    """A recipe, its base's shape, and the seed's job. Lengths are tokens: mean and deviation of the logarithm of the
    rows (measured on data of the same kind), and the most a row may have."""

    recipe: str
    shape: str
    samples: int  # of the seed's whole job, epochs included
    mean: float
    deviation: float
    most: int
    frame: int  # tokens of a row that are the template's and the instruction's
    overrides: tuple[str, ...] = ()


JOBS = {
    "falcon": Job("falcon-7b-mental-health", "falcon-7b", 320 * 64, 341, 0.75, 1024, 110),
    "phi": Job("phi-2-dialogsum", "phi-2", 1000 * 4, 250, 0.42, 2048, 70),
    "llama": Job(  # by the transformers module
        "llama-3.1-8b-science-exam", "llama-3.1-8b", 1000, 240, 0.5, 720, 250, overrides=("run.kernels=reference",)
    ),
    "llama-block": Job(  # by our own block
        "llama-3.1-8b-science-exam", "llama-3.1-8b", 1000, 240, 0.5, 720, 250, overrides=("run.kernels=compiled",)
    ),
    "llama-720": Job(
        "llama-3.1-8b-science-exam",
        "llama-3.1-8b",
        1000,
        760,  # cut to what makes rows of 720
        0.0,
        720,
        222,
        overrides=("train.samples_per_step=4", "run.memory=10.29GB"),
    ),
    "chatglm": Job("chatglm-6b-alpaca", "glm-4-9b", 3 * 50_000, 150, 0.6, 256, 70),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script")
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    shared: dict[str, Path] = {}
    rate = matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            job = JOBS[name]
            if job.shape not in shared:
                for old in shared.values():
                    shutil.rmtree(old)
                started = time.perf_counter()
                shared = {job.shape: write_model(Path(folder) / job.shape, job.shape, layers=arguments.layers)}
                print(f"{job.shape} written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            row = {"benchmark": "full_size", "job": name, "rate_tflops": rate}
            row |= measure(name, job, shared[job.shape], Path(folder), arguments, rate)
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def measure(
    name: str, job: Job, base: Path, folder: Path, arguments: argparse.Namespace, rate: float
) -> dict[str, Any]:
    from luthier.recipe import Recipe, packaged

    path = packaged(job.recipe)
    assert path is not None
    recipe = Recipe.load(path)
    rows = folder / f"{name}{Path(recipe.data.train[0].path).suffix or '.jsonl'}"
    write_rows(rows, job, recipe.train.samples_per_step * arguments.steps)
    run = folder / f"run-{name}"
    overrides = [
        f"model.base={base}",
        f"data.train=[{{path: {rows}}}]",
        "data.test=[]",
        "data.heldout={rows: 0}",
        f"train.max_steps={arguments.steps}",
        f"run.dir={run}",
        "run.track=[]",
        *job.overrides,
        *arguments.overrides,
    ]
    started = time.perf_counter()
    command = [sys.executable, "-m", "luthier", "train", str(path), *overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ)
    wall = time.perf_counter() - started
    if done.returncode:
        return {"failed": done.stderr[-1500:] + done.stdout[-500:]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "tokens_per_second" in record][min(5, arguments.steps - 1) :]
    speed = statistics.median(step["tokens_per_second"] for step in steps)
    tokens = job.samples * job.mean
    manifest = json.loads((run / "manifest.json").read_text())
    return {
        "tok_s": speed,
        "spread": [min(s["tokens_per_second"] for s in steps), max(s["tokens_per_second"] for s in steps)],
        "loss": [records[0].get("loss"), steps[-1]["loss"]],
        "peak_gib": result["peak_bytes"] / 2**30,
        "predicted_gib": result["predicted_peak_bytes"] / 2**30,
        "step_tokens": statistics.mean(step["tokens"] for step in steps),
        "wall_s": wall,
        "host_peak_gib": result.get("host_peak_bytes", 0) / 2**30,
        "micro_tokens": manifest["decisions"]["micro_tokens"],
        "recompute": manifest["decisions"]["recompute"],
        "full_job_s": {"here": tokens / speed} | {gpu: tokens / speed * rate / r for gpu, r in RATES.items()},
        "versions": manifest.get("versions"),
    }


def write_rows(path: Path, job: Job, count: int) -> None:
    """Rows in the recipe's own format; a word is two tokens (it and the space before it)."""
    rng, bag = random.Random(0), words()

    def text(tokens: float) -> str:
        return " ".join(rng.choices(bag, k=max(2, round(tokens / 2))))

    made = []
    while len(made) < count:
        center = math.log(job.mean) - job.deviation**2 / 2
        length = min(rng.lognormvariate(center, job.deviation), job.most - 40)
        made.append(MAKE[job.recipe](text, max(16, length - job.frame)))
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, made[0].keys())
            writer.writeheader()
            writer.writerows(made)
        else:
            file.writelines(json.dumps(row) + "\n" for row in made)


MAKE = {
    "falcon-7b-mental-health": lambda text, n: {"text": f"<HUMAN>: {text(n * 0.1)} <ASSISTANT>: {text(n * 0.9)}"},
    "phi-2-dialogsum": lambda text, n: {
        "id": text(4),
        "dialogue": f"#Person1#: {text(n * 0.4)}\n#Person2#: {text(n * 0.4)}",
        "summary": text(n * 0.15),
        "topic": text(4),
    },
    "llama-3.1-8b-science-exam": lambda text, n: {
        "prompt": text(n * 0.3),
        **{letter: text(n * 0.14) for letter in "ABCDE"},
        "answer": "B",
    },
    "chatglm-6b-alpaca": lambda text, n: {
        "instruction": text(n * 0.2),
        "input": text(n * 0.2),
        "output": text(n * 0.6),
    },
}


def matmul_rate() -> float:
    """Sustained dense bfloat16 TFLOP/s of this GPU: 8192 cubed, 200 times."""
    import torch

    if not torch.cuda.is_available():
        return float("nan")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        a @ b
    torch.cuda.synchronize()
    return 200 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12


if __name__ == "__main__":
    main()
