"""Our text metrics beside rouge-score and sacrebleu themselves, on real outputs.

    python benchmarks/metric_parity.py DIALOGSUM.jsonl [--rows results/compare/rows.jsonl]

Without a run's rows the first two turns of each dialogue stand in for its summary. A row of the data has `dialogue`
and `summary`, or `summary1` … for several references. Prints each figure twice and exits with 1 where they differ by
0.00005 points or more. Multiple choice is held to lm-eval by lm_eval_parity.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from luthier.data.conversation import Conversation, Origin
from luthier.evaluate.metrics import METRICS, Answer

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Corpus = list[tuple[str, list[str]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=Path, help="rows.jsonl of a comparison, instead of stand-ins")
    options = parser.parse_args()
    corpora = {"stand-ins": stand_ins(options.data)} if options.rows is None else of_run(options.rows)
    unlike = 0
    for name, corpus in corpora.items():
        print(f"{name}: {len(corpus)} rows, {sum(len(wanted) for _, wanted in corpus)} references")
        for metric, theirs in peers(corpus).items():
            mine = ours(metric, corpus)
            unlike += abs(mine - theirs) >= 5e-5
            print(f"  {metric:10} {mine:.6f}  {theirs:.6f}")
    return int(unlike > 0)


def stand_ins(path: Path) -> Corpus:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(" ".join(row["dialogue"].splitlines()[:2]), [row[k] for k in sorted(row) if wanted(k)]) for row in rows]


def wanted(column: str) -> bool:
    return column.startswith("summary")


def of_run(path: Path) -> dict[str, Corpus]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {side: [(row[side], row["references"]) for row in rows] for side in ("base", "tuned")}


def ours(name: str, corpus: Corpus) -> float:
    metric = METRICS.get(name)
    scored = [
        metric.best(metric.score(Conversation((), Origin("", i), references=tuple(known)), Answer(said)))
        for i, (said, known) in enumerate(corpus)
    ]
    return metric.figure(tuple(np.sum(scored, axis=0)))


def peers(corpus: Corpus) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scored = [scorer.score_multi(known, said) for said, known in corpus]
    said, most = [text for text, _ in corpus], max(len(known) for _, known in corpus)
    streams = [[known[i] if i < len(known) else None for _, known in corpus] for i in range(most)]
    found = {name: 100 * fmean(one[name].fmeasure for one in scored) for name in ROUGE}
    return found | {"bleu": BLEU().corpus_score(said, streams).score, "chrf": CHRF().corpus_score(said, streams).score}


if __name__ == "__main__":
    sys.exit(main())
