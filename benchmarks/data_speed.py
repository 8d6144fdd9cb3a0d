"""Rows per second and peak memory of `prepare`, on short chat rows made up for the purpose.

    python benchmarks/data_speed.py [--rows 1000000] [--near] [--heldout] [--json]

The rows are written to a temporary folder and prepared by a child process, whose peak resident memory (tokenizer,
libraries, workers and all) is what is reported. The tokenizer is a byte-level BPE of 8,000 tokens trained on the rows
themselves, with a ChatML template, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        print(json.dumps(_prepare(Path(arguments.child), arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(Path(folder) / "rows.jsonl", arguments.rows)
        _write_tokenizer(Path(folder))
        child = [sys.executable, __file__, "--child", folder, *sys.argv[1:]]
        result = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:16} {value}" for key, value in result.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--near", action="store_true", help="search for near duplicates too")
    parser.add_argument("--heldout", action="store_true", help="hold out 2,000 rows, and search for leaks into them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_rows(path: Path, rows: int) -> None:
    """Chats of about 40 words over a vocabulary of 20,000 with a natural (Zipf) distribution."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 9))) for _ in range(20_000)]
    bag = rng.choices(words, weights=[1 / (rank + 3) for rank in range(len(words))], k=2_000_000)

    def text(count: int) -> str:
        start = rng.randrange(len(bag) - count)
        return " ".join(bag[start : start + count]).capitalize() + "."

    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            turns = [
                {"role": "user", "content": text(rng.randint(4, 20))},
                {"role": "assistant", "content": text(rng.randint(6, 50))},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((line for line, _ in zip(lines, range(20_000), strict=False)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from luthier.data.prepare import prepare
    from luthier.data.tokens import Tokenizer
    from luthier.recipe import Data

    data = Data.model_validate(
        {
            "train": [{"path": "rows.jsonl"}],
            "heldout": {"rows": 2000 if arguments.heldout else 0},
            "clean": {"near_duplicates": 0.8 if arguments.near else None},
        }
    )
    tokenizer = Tokenizer.load(folder)
    start, start_cpu = time.perf_counter(), time.process_time()
    report = prepare(data, tokenizer, seed=1, folder=folder / "out", root=folder).report
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "rows": report["rows"]["read"],
        "kept": report["rows"]["kept"],
        "tokens_per_row": round(report["lengths"]["mean"], 1),
        "near_duplicates": arguments.near,
        "heldout": report["heldout"]["rows"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),  # steadier than `seconds` on a machine that others use too
        "rows_per_second": round(report["rows"]["read"] / seconds),
        "peak_rss_gib": round(_peak_kib() / 2**20, 3),
        "cores": len(os.sched_getaffinity(0)),
    }


def _peak_kib() -> int:
    """This process's peak, and the largest worker's for each core: no less than all of them together."""
    own, worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + worker * len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
