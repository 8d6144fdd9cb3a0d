"""Three of the recipes on real data with the embedded model: base and data are overridden. Before/after, intervals.

    python benchmarks/real_data.py DATA [--only dialogsum,exam,faq] [--at-once] [--out ROWS.jsonl]

DATA holds what each source says: dialogsum/dialogsum.{dev,test}.jsonl (github.com/cylnlp/dialogsum),
llm_science_exam/train.csv (the competition's 200 questions with their answers: even rows train, odd rows test) and
mental_health_faq/Mental_Health_FAQ.csv (98 rows, of which the recipe holds out 16).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RECIPES = {
    "dialogsum": "phi-2-dialogsum",
    "exam": "llama-3.1-8b-science-exam",
    "faq": "falcon-7b-mental-health",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--at-once", action="store_true", help="all of them beside each other: a GPU has room")
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument("--runs", type=Path, help="where the runs lie; the same command goes on there")
    parser.add_argument("overrides", nargs="*", help="for training, such as run.place=cpu")
    arguments = parser.parse_args()
    names, failed = arguments.only.split(","), False
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(len(names) if arguments.at_once else 1) as pool:
        folder = arguments.runs or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for row in pool.map(lambda name: measure(name, arguments.data, folder, arguments.overrides), names):
            failed |= "failed" in row
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return int(failed)


def measure(name: str, data: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains and compares; the row with every metric of both sides."""
    run, row = folder / name, {"benchmark": "real_data", "data": name, "recipe": RECIPES[name]}
    command = ["train", RECIPES[name], "model.base=smollm2-135m", f"run.dir={run}", *files(name, data, folder)]
    trained, train_s = luthier(*command, *overrides)
    if "failed" in trained:
        return row | trained
    compared, compare_s = luthier("compare", str(run))
    if "failed" in compared:
        return row | compared
    decisions = json.loads((run / "manifest.json").read_text())["decisions"]
    kept = {key: trained[key] for key in ("steps", "tokens_per_second", "peak_bytes", "predicted_peak_bytes")}
    ran = {key: decisions[key] for key in ("place", "dtype", "kernels", "micro_tokens")}
    found = {
        key: compared[key] for key in ("verdict", "sentence", "metrics", "matched", "stopped", "lengths", "warnings")
    }
    return row | kept | ran | {"train_s": train_s, "compare_s": compare_s} | found


def files(name: str, data: Path, folder: Path) -> list[str]:
    """The recipe's overrides that name the data."""
    if name == "dialogsum":
        parts = [data / "dialogsum" / f"dialogsum.{part}.jsonl" for part in ("dev", "test")]
    elif name == "exam":
        parts = halves(data / "llm_science_exam" / "train.csv", folder)
    else:
        parts = [data / "mental_health_faq" / "Mental_Health_FAQ.csv"]
    named = [f"[{{path: {json.dumps(str(part.resolve()))}}}]" for part in parts]
    return [f"data.{key}={value}" for key, value in zip(("train", "test"), named, strict=False)]


def halves(source: Path, folder: Path) -> list[Path]:
    """Even rows and odd rows, in files of their own."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [folder / "exam-train.csv", folder / "exam-test.csv"]
    for start, path in enumerate(paths):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows[start::2])
    return paths


def luthier(*command: str) -> tuple[dict[str, Any], float]:
    """What the command prints as JSON, and its wall seconds."""
    started = time.perf_counter()
    whole = [sys.executable, "-m", "luthier", *command, "--json"]
    done = subprocess.run(whole, capture_output=True, text=True, env=os.environ)
    seconds = time.perf_counter() - started
    if done.returncode:
        return {"failed": f"{command[0]}: {done.stderr[-1500:]}{done.stdout[-500:]}"}, seconds
    return json.loads(done.stdout.strip().splitlines()[-1]), seconds


if __name__ == "__main__":
    sys.exit(main())
