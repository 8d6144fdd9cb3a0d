"""Our suite beside lm-eval on the same rows: equal accuracies, and what one `compare` takes beside two lm-eval runs.

    python benchmarks/lm_eval_parity.py ROWS.jsonl [--rows 200] [--batch 16] [--base smollm2-135m]

ROWS.jsonl holds {"question", "choices", "answer"}. A short training makes an adapter. `luthier compare` then weighs
each choice's text on both sides, and lm-eval's own HF model reads the same prompts (as our template writes them) from a
local task file, once as it is and once with the adapter. Last, lm-eval's task loop runs over our model
(evaluate/harness.py), with plain prompts, beside its own. On a busy machine the CPU seconds say more than the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from luthier.evaluate.asking.answers import Memo
from luthier.evaluate.asking.subject import Subject
from luthier.evaluate.asking.suite import suite
from luthier.evaluate.harness import scores
from luthier.model.load import model_folder
from luthier.runs import Run

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: "{delimiter}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
RECIPE = """
model: {{base: {base}, compute: float32}}
data: {{train: [{{path: {data}}}], test: [{{path: {data}}}], labels: text, leaks: keep, length: 512}}
train: {{max_steps: 3, samples_per_step: 4, lr: 1.0e-3}}
evaluate: {{samples: 0, forgetting: false, metrics: [accuracy_likelihood, accuracy_per_character], rows: {rows}}}
run: {{dir: {dir}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch", default="16", help="lm-eval's batch size")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("runs/lm_eval_parity"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    run = trained(options, work)
    mine = timed([sys.executable, "-m", "luthier", "compare", str(run.folder)])
    ours = [json.loads(line) for line in (run.results / "compare" / "rows.jsonl").read_text().splitlines()]
    prompted = task(work, "ours", prompts(run), "{{prompt}}", "")
    folder = str(model_folder(run.recipe.model))
    theirs = []
    for side, peft in (("base", ""), ("tuned", f",peft={run.adapter}")):
        samples, spent = lm_eval(work, prompted, f"pretrained={folder},dtype=float32{peft}", options.batch, side)
        theirs.append(spent)
        report(side, ours, samples)
    for kind in Spent._fields:
        one, two = getattr(mine, kind), sum(getattr(spent, kind) for spent in theirs)
        print(f"{kind}: compare {one:.1f} s, two lm-eval runs {two:.1f} s, share {one / two:.0%}", flush=True)
    harness(run, work, prompts(run), folder, options.batch)


def trained(options: argparse.Namespace, work: Path) -> Run:
    data = options.data.resolve()
    recipe = RECIPE.format(base=options.base, data=data, rows=options.rows, dir=work / "run")
    (work / "recipe.yaml").write_text(recipe)
    if not (work / "run" / "adapter").exists():
        timed([sys.executable, "-m", "luthier", "train", str(work / "recipe.yaml")])
    for kept in (work / "run" / "results").glob("*/*.jsonl"):
        kept.unlink()  # so that the time is that of a first comparison
    return Run.open(work / "run")


class Spent(NamedTuple):
    """Seconds of a command: on the wall, and of processors."""

    wall: float
    cpu: float


def timed(command: list[str], **environment: str) -> Spent:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet = subprocess.DEVNULL
    subprocess.run(command, check=True, stdout=quiet, stderr=quiet, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.monotonic() - started, cpu)


def prompts(run: Run) -> list[dict[str, Any]]:
    """The rows with the prompt as our template writes it, and without one."""
    subject, questions = Subject.open(run), suite(run).questions
    texts = [subject.encoder.tokenizer.decode(ids, control=True) for ids in subject.encoder.prompts(questions)]
    return [
        {"prompt": text, "plain": q.prompt[-1].content, "choices": list(q.choices), "answer": q.answer}
        for text, q in zip(texts, questions, strict=True)
    ]


def task(work: Path, name: str, rows: list[dict[str, Any]], text: str, delimiter: str) -> Path:
    (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = work / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=work / f"{name}.jsonl", text=text, delimiter=delimiter))
    return path


def lm_eval(work: Path, path: Path, arguments: str, batch: str, side: str) -> tuple[list[dict[str, Any]], Spent]:
    """lm-eval's own command: its samples and what it took."""
    out = work / f"lm_eval-{path.stem}-{side}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", str(path)]
    command += ["--batch_size", batch, "--device", "cpu", "--log_samples", "--output_path", str(out)]
    spent = timed(command, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    newest = max(out.rglob("samples_*.jsonl"), key=lambda file: file.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"]), spent


def report(side: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    furthest, apart = 0.0, [row for row in ours if begins(row["choices"])]
    for mine, sample in zip(ours, theirs, strict=True):
        if mine in apart:
            continue
        pairs = zip(mine["choices_nll"][side], sample["filtered_resps"], strict=True)
        furthest = max(furthest, *(abs(nll + float(other[0])) for nll, other in pairs))
    count = len(ours) - len(apart)
    print(f"{side}: largest difference of a choice's log-likelihood {furthest:.2g} nats over {count} rows;")
    print(f"  {len(apart)} left out, where one choice begins another: there we weigh the end of the turn too")
    for name, other in (("accuracy_likelihood", "acc"), ("accuracy_per_character", "acc_norm")):
        mine = [row["scores"][name][side] / 100 for row in ours]
        peer = [float(sample[other]) for sample in theirs]
        unlike = sum(a != b for a, b in zip(mine, peer, strict=True))
        print(
            f"  {name} {sum(mine) / len(mine):.4f}   lm-eval {other} {sum(peer) / len(peer):.4f}   rows unlike {unlike}"
        )


def begins(choices: list[str]) -> bool:
    return any(a != b and b.startswith(a) for a in choices for b in choices)


def harness(run: Run, work: Path, rows: list[dict[str, Any]], folder: str, batch: str) -> None:
    """lm-eval's tasks over our model beside its own model, plain prompts."""
    path = task(work, "plain", rows, "Question: {{plain}}\\nAnswer:", " ")
    samples, _ = lm_eval(work, path, f"pretrained={folder},dtype=float32", batch, "base")
    (work / "memo.jsonl").unlink(missing_ok=True)
    found = scores(Subject.open(run), "base", [str(path)], None, Memo(work / "memo.jsonl"))
    for name in ("acc", "acc_norm"):
        mine = [row[0] / 100 for row in found[f"plain/{name}"]["statistics"]]
        peer = [float(sample[name]) for sample in samples]
        unlike = sum(a != b for a, b in zip(mine, peer, strict=True))
        print(
            f"harness {name} {sum(mine) / len(mine):.4f}   lm-eval {sum(peer) / len(peer):.4f}   rows unlike {unlike}"
        )


if __name__ == "__main__":
    main()
