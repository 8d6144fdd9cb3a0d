"""What a study costs beside the one full run that people do anyway: 5 sizes, one seed, one loaded base, on a GPU.

    python benchmarks/study_cost.py --out benchmarks/results/h200.jsonl          # Llama-3.1-8B's shape, random weights
    python benchmarks/study_cost.py --layers 1 --rows 40                         # tries the script

The full run is `luthier train` and `luthier compare` of the science-exam recipe on 1,000 rows and 200 questions; the
study is `luthier study --sizes 200,400,600,800,1000 --seeds 1` of the same. Steps and answers alone would cost 3.0
times; `ratio` is of the seconds of whole commands, start and loading included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from full_size import JOBS, write_rows
from random_model import write_model

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="the row is appended here")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        row = {"benchmark": "study_cost", **measure(Path(made), arguments)}
    print(json.dumps(row), flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    job = JOBS["llama-block"]
    base = write_model(folder / "base", job.shape, layers=arguments.layers)
    files = {"train": arguments.rows * 6 // 5, "test": arguments.rows // 5}  # some are too long, and are dropped
    for name, count in files.items():
        write_rows(folder / f"{name}.csv", dataclasses.replace(job, samples=count), count)
    data = [f"data.{name}=[{{path: {folder / f'{name}.csv'}}}]" for name in files]
    settings = [f"data.rows={arguments.rows}", "data.heldout={rows: 0}", "run.track=[]"]
    recipe = [job.recipe, f"model.base={base}", *data, *settings, *arguments.overrides]
    run, sizes = folder / "run", ",".join(str(round(share * arguments.rows)) for share in SHARES)
    train = luthier("train", *recipe, f"run.dir={run}")
    compare = luthier("compare", str(run))
    study = luthier("study", *recipe, f"run.dir={folder / 'study'}", "--sizes", sizes, "--seeds", "1")
    cells = sorted((folder / "study" / "cells").iterdir())
    return {
        "train_s": train,
        "compare_s": compare,
        "study_s": study,
        "ratio": study / (train + compare),
        "steps_s": steps_of(run),
        "study_steps_s": [steps_of(cell) for cell in cells],
        "rows": arguments.rows,
    }


def steps_of(run: Path) -> float:
    """Seconds of the training steps themselves."""
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return sum(record.get("seconds", 0.0) for record in records)


def luthier(*command: str) -> float:
    """Wall seconds of a command."""
    started = time.perf_counter()
    whole = [sys.executable, "-m", "luthier", *command, "--json"]
    done = subprocess.run(whole, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])}: {done.stderr[-1500:]}{done.stdout[-500:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
