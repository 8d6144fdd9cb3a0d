"""One optimizer step of LoRA and QLoRA on a GPU: luthier beside TRL, TRL with Liger, and Unsloth.

    python benchmarks/gpu_step.py --models /dev/shm/models --out benchmarks/results/h200.jsonl --rounds 2
    python benchmarks/gpu_step.py --models /dev/shm/models --out rows.jsonl --only W1/free/luthier --profile profiles
    python benchmarks/gpu_step.py --only W3/ --variants recompute=run.recompute=true 'eager=run.kernels=eager'
    python benchmarks/gpu_step.py --dry          # every line, tiny, on a CPU; its figures mean nothing

Models of true shapes with random weights are written once; all peers load the same folder and do the same steps
(`peers/workloads.py`). Each row of the table is a process of its own, in the order A B, B A with `--rounds 2`. A peer
whose packages are missing leaves a row that says so. Rows go to `--out` as they are made; what it holds of this run
(a GPU and a day, or `--run`) is not done again without `--again`, so that the table may be made in several sittings.
`report.py` makes the table. The command ends with 1 where a row of luthier failed, or its first loss is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import trainers
from peers.stacks import Stacks
from peers.workloads import MEMORY, WORKLOADS, Workload, counts, dry, steps

LOSS_GATE = 1e-3  # relative; peers in bfloat16 differ by 3e-4 between them, a wrong mask by 4e-3
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel", "unsloth")
CUDA_12 = ("cuda12", "nvidia/cuda_runtime/lib")  # beside the packages: peers/pack.sh, and nvidia's own wheel
LACKING = "not installed"  # ends what is said of a peer whose packages are missing: it is tried again
HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Cell:
    """What one process measures. `overrides`: of luthier's recipe, in a variant."""

    workload: str
    memory: str
    peer: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.workload}/{self.memory}/{self.peer}"

    @property
    def ours(self) -> bool:
        return self.peer.partition(":")[0] == "luthier"


@dataclass(frozen=True)
class Task:
    """A cell, and all that its process needs besides. `started`: when it was, `time.time()`."""

    cell: Cell
    models: str
    dry: bool
    answer: str
    profile: str | None = None
    started: float = 0.0

    @property
    def workload(self) -> Workload:
        found = WORKLOADS[self.cell.workload]
        return dry(found) if self.dry else found

    @property
    def folder(self) -> Path:
        return Path(self.models) / self.workload.shape


# ------------------------------------------------------------------------------------------------ worker process
def work(task: Task) -> dict[str, Any]:
    """The answer of one process."""
    if task.cell.peer == "prepare":
        return prepare(task)
    stacks = Stacks() if task.profile else None
    if not task.cell.ours:
        trainers.first(task.cell.peer)
    from peers.clock import Clock
    from peers.models import config

    clock = Clock(task.started, task.workload, Path(task.profile) if task.profile else None, stacks)
    clock.phase("imports of torch")
    chosen = steps(task.workload, config(task.folder)["vocab_size"])
    clock.phase("samples")
    limit_memory(task.cell.memory)
    if task.cell.ours:
        facts = begun()
        clock.phase("facts")
        from peers import ours

        options: Any = {"memory": task.cell.memory, "overrides": list(task.cell.overrides)}
        found = ours.train(task.folder, task.workload, chosen, clock, facts, **options)
    else:
        found = trainers.train(task.cell.peer, task.folder, task.workload, chosen, clock)
    return clock.row(chosen) | found


def begun() -> Any:
    """The facts of the machine, in a process that starts as that of `luthier train` does."""
    from luthier.machine import machine
    from luthier.model import lean
    from luthier.model.place import wake

    lean.own_process, facts = True, machine()
    wake("cuda" if facts.gpus else "cpu")
    return facts


def prepare(task: Task) -> dict[str, Any]:
    """Writes the model unless it is there; what the workload's first loss must be, its arithmetic, and the rate at
    which this GPU does it."""
    from peers.bounds import flops_per_token, matmul_rate
    from peers.models import config
    from peers.models import prepare as write

    workload, started = task.workload, time.perf_counter()
    folder = write(task.folder, workload.shape, nf4=workload.nf4, dry=task.dry)
    written, kept = time.perf_counter() - started, folder / f"reference-{task.cell.workload}.json"
    chosen = steps(workload, config(folder)["vocab_size"])
    if not kept.exists():
        from peers.reference import first_loss

        kept.write_text(json.dumps(first_loss(folder, workload, chosen[0])))
    timed = counts(chosen[workload.warm : workload.warm + workload.timed])
    return {
        "rate_tflops": matmul_rate(64, 2) if task.dry else matmul_rate(),
        "reference_loss": json.loads(kept.read_text()),
        "gflop_token": flops_per_token(folder, timed) / 1e9,
        "written_s": written,
    }


def limit_memory(memory: str) -> None:
    """Lets torch reserve so much of the GPU and no more."""
    import torch

    if memory != "free" and torch.cuda.is_available():
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # Unsloth has set it
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # for all: fewer holes
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(memory.removesuffix("GiB")) * 2**30 / total)


# ------------------------------------------------------------------------------------------------ parent process
class Bench:
    """The parent's state: where rows go, which are there, and what was prepared."""

    def __init__(self, options: argparse.Namespace, models: Path) -> None:
        self.options, self.models = options, models.absolute()
        self.device = device()
        self.commit = options.commit or commit()
        self.run_id = options.run or f"{time.strftime('%Y%m%d')}-{self.device['id']}"
        self.prepared: dict[str, dict[str, Any]] = {}
        self.deadline = time.monotonic() + (options.deadline or float("inf"))
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """Every cell that is wanted and not there, in its rounds."""
        done = self.done()
        for number, cell in rounds(cells(self.options.variants), self.options.rounds):
            wanted = any(part in cell.name for part in self.options.only.split(","))
            if not wanted or (not self.options.again and self.key(cell, number) in done):
                continue
            if time.monotonic() > self.deadline:
                print(f"no time is left before {cell.name}", file=sys.stderr)
                return
            self.keep(self.measure(cell, number))

    def done(self) -> set[tuple[Any, ...]]:
        path = self.options.out
        kept = map(json.loads, path.read_text().splitlines()) if path and path.exists() else []
        names = ("run_id", "workload", "memory", "peer", "round", "commit")
        rows = [row for row in kept if row.get("benchmark") == "gpu_step"]
        rows = [row for row in rows if not row.get("failed", "").endswith(LACKING)]
        return {tuple(row[name] if ours(row) or name != "commit" else "" for name in names) for row in rows}

    def key(self, cell: Cell, number: int) -> tuple[Any, ...]:
        return (self.run_id, cell.workload, cell.memory, cell.peer, number, self.commit if cell.ours else "")

    def measure(self, cell: Cell, number: int) -> dict[str, Any]:
        row = {"benchmark": "gpu_step", "run_id": self.run_id, **asdict(cell), "round": number, **self.device}
        row |= {"setting": setting(cell), "versions": versions(), "commit": self.commit, "dry": self.options.dry}
        if lacking := missing(cell):
            return row | {"failed": lacking}
        prepared = self.prepare(cell)
        found = prepared if "failed" in prepared else self.process(cell)
        return row | found | ({} if "failed" in found else judged(found, prepared))

    def prepare(self, cell: Cell) -> dict[str, Any]:
        if cell.workload not in self.prepared:
            self.prepared[cell.workload] = self.process(Cell(cell.workload, "free", "prepare"))
        return self.prepared[cell.workload]

    def process(self, cell: Cell) -> dict[str, Any]:
        """What a process of its own answers, or why it did not."""
        name = cell.name.replace("/", "-")
        with tempfile.TemporaryDirectory() as place:
            answer, log = Path(place) / "answer.json", Path(place) / "log"
            profile = self.options.profile and str(self.options.profile.absolute() / f"{name}.txt")
            task = Task(cell, str(self.models), self.options.dry, str(answer), profile, time.time())
            command = [sys.executable, str(HERE), "--work", json.dumps(asdict(task))]
            code = finish(command, log, self.options.limit, environment(cell), self.models)
            if self.options.logs:
                self.options.logs.mkdir(parents=True, exist_ok=True)
                (self.options.logs / f"{name}.log").write_bytes(log.read_bytes())
            if answer.exists():
                return dict(json.loads(answer.read_text()))
            return {"failed": f"{code}: {log.read_text(errors='replace')[-1500:]}"}

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        if self.options.out:
            with self.options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def cells(variants: dict[str, tuple[str, ...]]) -> Iterator[list[Cell]]:
    """What is compared with each other, a list at a time: luthier as it comes, its variants, and its peers."""
    for workload in WORKLOADS:
        for memory in MEMORY.get(workload, ("free",)):
            ours = [Cell(workload, memory, f"luthier:{name}", overrides) for name, overrides in variants.items()]
            peers = [Cell(workload, memory, name) for name in trainers.peers_of(WORKLOADS[workload], memory)]
            yield [Cell(workload, memory, "luthier"), *ours, *peers]


def rounds(groups: Iterator[list[Cell]], count: int) -> Iterator[tuple[int, Cell]]:
    """A B, B A, A B …: what drifts falls on all alike."""
    for group in groups:
        for number in range(count):
            for cell in reversed(group) if number % 2 else group:
                yield number, cell


def ours(row: dict[str, Any]) -> bool:
    return str(row["peer"]).partition(":")[0] == "luthier"


def setting(cell: Cell) -> str:
    """`default`, as it comes; `tuned`, in good faith; `equal`, under the same cap of memory."""
    if cell.memory != "free":
        return "equal"
    packs = cell.peer == "unsloth" and WORKLOADS[cell.workload].packed > 0
    return "default" if cell.peer in ("luthier", "transformers", "trl", "unsloth") and not packs else "tuned"


def judged(found: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """The gate of the first loss, and the share of the arithmetic bound, where nothing is recomputed."""
    error = abs(found["losses"][0] / prepared["reference_loss"] - 1)
    share = found["tok_s"] * prepared["gflop_token"] / prepared["rate_tflops"] / 1e3
    passed = error <= LOSS_GATE and not found.get("unlike")
    return prepared | {"parity": passed, "loss_error": error, "bound_share": share}


def missing(cell: Cell) -> str:
    """Which modules a peer lacks here, or nothing."""
    needs = () if cell.ours else trainers.PEERS[cell.peer].module(WORKLOADS[cell.workload].nf4)
    lacking = [name for name in needs if find_spec(name) is None]
    return f"{', '.join(lacking)} {LACKING}" if lacking else ""


def environment(cell: Cell) -> dict[str, str]:
    """Of a cell's process. xformers' wheel, which gives Unsloth its best attention, is built for CUDA 12: beside a
    torch for CUDA 13 it finds that runtime where LD_LIBRARY_PATH says."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found |= {"TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONUNBUFFERED": "1"}
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths if path)
    runtimes = [Path(place, folder) for place in sys.path for folder in CUDA_12]
    runtime = next((folder for folder in runtimes if (folder / "libcudart.so.12").exists()), None)
    if cell.peer.startswith("unsloth") and runtime:
        found["LD_LIBRARY_PATH"] = f"{runtime}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return found


def finish(command: list[str], log: Path, limit: float, environment: dict[str, str], folder: Path) -> str:
    """Runs a process, and all that it starts, to its end or to the limit in seconds; says how it ended. In `folder` it
    leaves what it compiles, as Unsloth does, for the next."""
    folder.mkdir(parents=True, exist_ok=True)
    options: Any = {"stderr": subprocess.STDOUT, "env": environment, "start_new_session": True, "cwd": folder}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, **options)
        try:
            return f"exit code {process.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            return f"took longer than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def device() -> dict[str, str]:
    """The first GPU, its driver, and a short name for this one among others of its kind."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,uuid", "--format=csv,noheader"]
    try:
        name, driver, uuid = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    except (OSError, IndexError, ValueError):
        return {"device": "cpu", "driver": "", "id": "cpu"}
    return {"device": name, "driver": driver, "id": uuid.removeprefix("GPU-")[:8]}


def commit() -> str:
    asked = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def versions() -> dict[str, str]:
    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    return {name: number for name in PACKAGES if (number := found(name))}


def line(row: dict[str, Any]) -> str:
    name = f"{row['workload']}/{row['memory']}/{row['peer']}"
    if "failed" in row:
        return f"{name:34} FAILED {row['failed'].strip().splitlines()[-1][-200:]}"
    gate = "" if row["parity"] else f"  WRONG LOSS, off by {row['loss_error']:.1e}"
    return (
        f"{name:34} {row['tok_s']:9.0f} tok/s ({row['spread'][0]:.0f} to {row['spread'][1]:.0f})  "
        f"{row['bound_share']:6.1%} of bound  {row['peak_gib']:6.2f} GiB  first step {row['first_step_s']:5.1f} s  "
        f"loss {row['losses'][0]:.4f}{gate}"
    )


def named(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=OVERRIDE OVERRIDE …`."""
    name, _, overrides = text.partition("=")
    if "=" not in overrides:
        raise argparse.ArgumentTypeError(f"write NAME=section.key=value, not {text}")
    return name, tuple(overrides.split())


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="models are kept here; else in a temporary folder, until the end")
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument("--only", default="", help="rows whose WORKLOAD/MEMORY/PEER holds one of these: W1/free,S1")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", help="go on with this run")
    parser.add_argument("--commit", help="of luthier, where there is no git to tell")
    parser.add_argument("--again", action="store_true", help="rows of this run that are there too")
    parser.add_argument("--variants", type=named, nargs="+", default=[], metavar="NAME=OVERRIDES", help="of luthier")
    parser.add_argument("--profile", type=Path, help="a folder for a few more steps' kernels, and where starts go")
    parser.add_argument("--logs", type=Path, help="a folder for what the processes print")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a process")
    parser.add_argument("--deadline", type=float, help="seconds after which no process is started")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.variants = dict(options.variants)
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.work:
        tree = json.loads(options.work)
        task = Task(**tree | {"cell": Cell(**tree["cell"] | {"overrides": tuple(tree["cell"]["overrides"])})})
        Path(task.answer).write_text(json.dumps(work(task)))
        return 0
    with ExitStack() as stack:
        models = options.models or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_step_")))
        bench = Bench(options, models)
        bench.run()
    return int(any(ours(row) and not row.get("parity") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
