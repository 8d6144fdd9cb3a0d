"""One optimizer step of LoRA and QLoRA on a GPU: luthier beside TRL, TRL with Liger, and Unsloth.

    python benchmarks/gpu_step.py --models /dev/shm/models --out benchmarks/results/h200.jsonl --rounds 2
    python benchmarks/gpu_step.py --models /dev/shm/models --out rows.jsonl --only W1/free/luthier --profile profiles
    python benchmarks/gpu_step.py --only W3/ --variants recompute=run.recompute=true 'eager=run.kernels=eager'
    python benchmarks/gpu_step.py --together --only W3/free/luthier,W3/free/trl-liger-off   # a shorter sitting
    python benchmarks/gpu_step.py --dry          # every line, tiny, on a CPU; its figures mean nothing

Models of true shapes with random weights are written first, side by side; all peers load the same folder and do the
same steps (`peers/workloads.py`), one after the other: nothing else runs while a row is measured. A peer whose packages
are missing leaves a row that says so. Rows go to `--out` as they are made; what it holds of this run (a GPU and a day,
or `--run`) is not done again without `--again`, so that the table may be made in several sittings; of luthier, what the
same commit did, with no changes beside it. `report.py` makes the table. The command ends with 1 where a row of luthier
failed, or its first loss is wrong.

What is compared comes in the order A B, and B A in the next round (`--rounds 2`), in which a peer that was left far
behind another one is spared; so is half the rows at a time where all of them fit.

A row is a process of its own. `--together`: a process measures all that is wanted of one peer with one model under one
cap of memory, each time with a model and a trainer of its own, and all processes import side by side before anything is
timed. It is not asked again if a row left more than half a model behind. When a first step was done is then told of the
workload `start` alone, which always has a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from peers import trainers
from peers.desk import LOOK, Desk
from peers.stacks import Stacks
from peers.workloads import MEMORY, WORKLOADS, Workload, counts, dry, steps

LOSS_GATE = 1e-3  # relative; peers in bfloat16 differ by 3e-4 between them, a wrong mask by 4e-3
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel", "unsloth")
CUDA_12 = ("cuda12", "nvidia/cuda_runtime/lib")  # beside the packages: peers/pack.sh, and nvidia's own wheel
LACKING = "not installed"  # ends what is said of a peer whose packages are missing: it is tried again
BEHIND = 0.9  # of the best peer's rate in the first round: one below is not measured in the others
START = "start"  # the workload that tells when a first step was done
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

    @property
    def process(self) -> str:
        """Names the process that may measure it, and others, one after the other."""
        shared = f"{self.peer.replace(':', '-')}-{self.memory}-{WORKLOADS[self.workload].shape}"
        return f"{shared}-{START}" if self.workload == START and self.peer != "prepare" else shared


@dataclass(frozen=True)
class Task:
    """A cell, and all that its process needs besides.

    Attributes:
        what: `measure` it; be `ready` for it, with all imports; `prepare` its model; or the `rate` of this GPU.
        started: when the process was, `time.time()`; 0 if it has done other things since, so that no start is told.
    """

    cell: Cell
    models: str
    dry: bool
    answer: str
    what: str = "measure"
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
def serve(asked: Iterable[str]) -> None:
    """Answers tasks, a line of JSON each, until there are no more."""
    for line in asked:
        tree = json.loads(line)
        cell = Cell(**tree["cell"] | {"overrides": tuple(tree["cell"]["overrides"])})
        task = Task(**tree | {"cell": cell})
        found = {"measure": measure, "ready": ready, "prepare": prepare, "rate": rate}[task.what](task)
        if task.what == "measure":
            found["left_gib"] = left() / 2**30
        part = Path(f"{task.answer}.part")
        part.write_text(json.dumps(found))
        part.rename(task.answer)


def measure(task: Task) -> dict[str, Any]:
    """The row of a cell."""
    stacks = Stacks() if task.profile and task.started else None
    facts = begun() if task.cell.ours else None
    if facts is None:
        trainers.first(task.cell.peer)
    from peers.clock import Clock
    from peers.models import config

    clock = Clock(task.started or time.time(), task.workload, Path(task.profile) if task.profile else None, stacks)
    clock.phase("facts, imports of torch")
    chosen = steps(task.workload, config(task.folder)["vocab_size"])
    clock.phase("samples")
    limit_memory(task.cell.memory)
    if facts is not None:
        from peers import ours

        options: Any = {"memory": task.cell.memory, "overrides": list(task.cell.overrides)}
        found = ours.train(task.folder, task.workload, chosen, clock, facts, **options)
    else:
        found = trainers.train(task.cell.peer, task.folder, task.workload, chosen, clock)
    row = clock.row(chosen)
    if not task.started:
        beside = ("begin_s", "first_step_s", "phases", "device_gib")  # of other rows or processes, too
        row = {key: value for key, value in row.items() if key not in beside}
    return row | found


def ready(task: Task) -> dict[str, Any]:
    """All is imported that the peer needs."""
    if task.cell.ours:
        begun()
        from peers import ours  # noqa: F401
    else:
        trainers.imported(task.cell.peer)
    return {}


def begun() -> Any:
    """The facts of the machine, in a process that starts as that of `luthier train` does: they come before torch."""
    from luthier.machine import machine
    from luthier.model import lean
    from luthier.model.place import wake

    lean.own_process, facts = True, machine()
    wake("cuda" if facts.gpus else "cpu")
    return facts


def prepare(task: Task) -> dict[str, Any]:
    """Writes the model unless it is there; what the workload's first loss must be, and its arithmetic."""
    from peers.bounds import flops_per_token
    from peers.models import config
    from peers.models import prepare as write

    workload, started = task.workload, time.perf_counter()
    folder = write(task.folder, workload.shape, nf4=workload.nf4, dry=task.dry)
    written, kept = time.perf_counter() - started, folder / f"reference-{task.cell.workload}.json"
    chosen = steps(workload, config(folder)["vocab_size"])
    if not kept.exists():
        from peers.reference import first_loss

        kept.write_text(json.dumps(first_loss(folder, workload, chosen[0])))
    timed = counts(chosen[workload.first : workload.first + workload.timed])
    return {
        "reference_loss": json.loads(kept.read_text()),
        "gflop_token": flops_per_token(folder, timed) / 1e9,
        "written_s": written,
    }


def rate(task: Task) -> dict[str, Any]:
    """At which this GPU multiplies, with nothing beside."""
    from peers.bounds import matmul_rate

    return {"rate_tflops": matmul_rate(64, 2) if task.dry else matmul_rate()}


def limit_memory(memory: str) -> None:
    """Lets torch reserve so much of the GPU and no more."""
    import torch

    if memory != "free" and torch.cuda.is_available():
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # Unsloth has set it
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # for all: fewer holes
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(memory.removesuffix("GiB")) * 2**30 / total)


def left() -> int:
    """Bytes of the GPU that a row leaves behind, when what it compiled is forgotten: the next has other shapes, and
    torch.compile gives up on a function that it saw with too many."""
    import torch

    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.unfreeze()
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def weights(folder: Path) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------ parent process
class Bench:
    """The parent's state: where rows go, which are there, what was prepared, and which processes can be asked."""

    def __init__(self, options: argparse.Namespace, models: Path, answers: Path) -> None:
        self.options, self.models, self.answers = options, models.absolute(), answers
        self.device = device()
        self.commit = options.commit or commit()
        self.run_id = options.run or f"{time.strftime('%Y%m%d')}-{self.device['id']}"
        self.before, self.rows = self.kept(), list[dict[str, Any]]()
        self.prepared, self.rate = dict[str, dict[str, Any]](), dict[str, Any]()
        self.desks, self.asked = dict[str, Desk](), count()
        self.deadline = time.monotonic() + (options.deadline or float("inf"))

    def run(self) -> None:
        """Every cell that is wanted and not there, in its rounds."""
        groups = chosen(cells(self.options.variants), self.options.only)
        left = [(number, cell) for number, cell in rounds(groups, self.options.rounds) if self.lacks(number, cell)]
        try:
            self.prepare([cell for _, cell in left if not missing(cell)])
            while left:
                number, cell = left.pop(0)
                if time.monotonic() > self.deadline:
                    print(f"no time is left before {cell.name}", file=sys.stderr)
                    return
                if not spared(number, cell, self.before + self.rows):
                    self.keep(self.row(number, cell))
                if cell.process not in {later.process for _, later in left}:
                    self.close(cell.process)
        finally:
            self.close_all()

    def kept(self) -> list[dict[str, Any]]:
        """Rows of this run that are there."""
        path = self.options.out
        rows = map(json.loads, path.read_text().splitlines()) if path and path.exists() else []
        return [row for row in rows if row.get("benchmark") == "gpu_step" and row["run_id"] == self.run_id]

    def lacks(self, number: int, cell: Cell) -> bool:
        return self.options.again or not any(
            (row["round"], name(row)) == (number, cell.name)
            and (not cell.ours or (row["commit"] == self.commit and tells(self.commit)))
            and not row.get("failed", "").endswith(LACKING)
            for row in self.before
        )

    def row(self, number: int, cell: Cell) -> dict[str, Any]:
        row = {"benchmark": "gpu_step", "run_id": self.run_id, **asdict(cell), "round": number, **self.device}
        row |= {"setting": setting(cell), "versions": versions(), "commit": self.commit, "dry": self.options.dry}
        if lacking := missing(cell):
            return row | {"failed": lacking}
        prepared = self.prepared[cell.workload] | self.rate
        found = prepared if "failed" in prepared else self.measure(cell)
        return row | found | ({} if "failed" in found else judged(found, prepared))

    def prepare(self, wanted: list[Cell]) -> None:
        """Models and what their first losses must be, a process a model, while those that will be asked import; then,
        with nothing beside, the rate of the GPU."""
        shapes: dict[str, dict[str, Cell]] = {}
        for cell in wanted:
            made = replace(cell, peer="prepare", memory="free", overrides=())
            shapes.setdefault(made.process, {})[cell.workload] = made
        imports = [
            self.told(cell, "ready") for cell in {cell.process: cell for cell in wanted if self.shares(cell)}.values()
        ]
        with ThreadPoolExecutor(max(1, len(shapes))) as pool:
            written = [pool.submit(self.write, group) for group in shapes.values()]
            try:
                for each in written:
                    each.result()
            except BaseException:  # the pool waits for its threads, and a thread for its process, or the next one
                while not all(each.done() for each in written):
                    self.close_all()
                    time.sleep(LOOK)
                raise
        for task in imports:
            self.heard(task)
        for group in list(shapes.values())[:1]:
            self.rate = self.heard(self.told(next(iter(group.values())), "rate"))
        for process in shapes:
            self.close(process)

    def write(self, group: dict[str, Cell]) -> None:
        """Prepares the workloads of a model."""
        for workload, cell in group.items():
            self.prepared[workload] = self.heard(self.told(cell, "prepare"))

    def shares(self, cell: Cell) -> bool:
        """Whether its process measures others too."""
        return bool(self.options.together) and cell.workload != START

    def measure(self, cell: Cell) -> dict[str, Any]:
        if not self.shares(cell):
            self.close(cell.process)
        found = self.heard(self.told(cell, "measure"))
        if not self.shares(cell) or found.get("left_gib", 0.0) > weights(self.folder(cell)) / 2 / 2**30:
            self.close(cell.process)
        return found

    def folder(self, cell: Cell) -> Path:
        return self.models / WORKLOADS[cell.workload].shape

    def told(self, cell: Cell, what: str) -> Task:
        """A task that its process was given. One that has just been started for it tells how long the start took."""
        profile = self.options.profile and str(self.options.profile.absolute() / f"{cell.name.replace('/', '-')}.txt")
        answer, started = str(self.answers / f"{next(self.asked)}.json"), 0.0 if self.shares(cell) else time.time()
        task = Task(cell, str(self.models), self.options.dry, answer, what, profile, started)
        self.desk(cell).tell(json.dumps(asdict(task)))
        return task

    def desk(self, cell: Cell) -> Desk:
        """Its process: the one that is there, or in the place of one that ended another."""
        found = self.desks.get(cell.process)
        if found is None or not found.open:
            self.close(cell.process)  # what the one that ended had started may hold memory yet
            found = self.desks[cell.process] = self.started(cell)
        return found

    def heard(self, task: Task) -> dict[str, Any]:
        return self.desks[task.cell.process].hear(Path(task.answer), self.options.limit)

    def started(self, cell: Cell) -> Desk:
        log = (self.options.logs or self.answers).absolute() / f"{cell.process}.log"
        folder = self.models / "compiled" / cell.process.removesuffix(f"-{START}")
        return Desk([sys.executable, str(HERE), "--serve"], log, environment(cell), folder)

    def close(self, process: str) -> None:
        if process in self.desks:
            self.desks.pop(process).close()

    def close_all(self) -> None:
        for process in list(self.desks):
            self.close(process)

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


def chosen(groups: Iterable[list[Cell]], only: str) -> list[list[Cell]]:
    """What `only` names, in its order; `$` stands for the end of a name. Raises SystemExit for a part that names
    nothing."""
    parts, offered = only.split(","), list(groups)

    def first(group: list[Cell]) -> int:
        return next(i for i, part in enumerate(parts) if any(part in f"{cell.name}$" for cell in group))

    if unknown := [part for part in parts if not any(part in f"{c.name}$" for group in offered for c in group)]:
        rows = [f"{group[0].workload}/{group[0].memory}/ {' '.join(cell.peer for cell in group)}" for group in offered]
        raise SystemExit("\n".join([f"no row is called {', '.join(unknown)}; there are", *rows]))
    found = [[cell for cell in group if any(part in f"{cell.name}$" for part in parts)] for group in offered]
    return sorted(filter(None, found), key=first)


def rounds(groups: list[list[Cell]], count: int) -> Iterator[tuple[int, Cell]]:
    """Of each group A B, and when all are through B A, and so on: what drifts falls on all alike."""
    for number in range(count):
        for group in groups:
            for cell in reversed(group) if number % 2 else group:
                yield number, cell


def spared(number: int, cell: Cell, rows: list[dict[str, Any]]) -> bool:
    """Whether a peer's cell would tell nothing: half the rows at a time where all of them fit, and another round of
    one that failed in the first or was far behind there."""
    beside = [row for row in rows if name(row).rpartition("/")[0] == cell.name.rpartition("/")[0] and not ours(row)]
    rates = {row["peer"]: row["tok_s"] for row in beside if row.get("parity") and row["round"] == 0}
    if cell.ours or not beside:
        return False
    if cell.peer.removesuffix("-half") in rates and cell.peer.endswith("-half"):
        return True
    seen = any(row["peer"] == cell.peer and row["round"] == 0 for row in beside)
    return number > 0 and seen and rates.get(cell.peer, 0.0) < BEHIND * max(rates.values(), default=1.0)


def name(row: dict[str, Any]) -> str:
    """Of its cell."""
    return f"{row['workload']}/{row['memory']}/{row['peer']}"


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


def tells(commit: str) -> bool:
    """Whether it says which code ran: without git, or beside changes, it may have been any."""
    return commit != "unknown" and not commit.endswith("+")


def versions() -> dict[str, str]:
    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    return {name: number for name in PACKAGES if (number := found(name))}


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name(row):34} FAILED {row['failed'].strip().splitlines()[-1][-200:]}"
    gate = "" if row["parity"] else f"  WRONG LOSS, off by {row['loss_error']:.1e}"
    start = f"first step {row['first_step_s']:5.1f} s  " if "first_step_s" in row else ""
    return (
        f"{name(row):34} {row['tok_s']:9.0f} tok/s ({row['spread'][0]:.0f} to {row['spread'][1]:.0f})  "
        f"{row['bound_share']:6.1%} of bound  {row['peak_gib']:6.2f} GiB  {start}loss {row['losses'][0]:.4f}{gate}"
    )


def variant(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=OVERRIDE OVERRIDE …`."""
    name, _, overrides = text.partition("=")
    if "=" not in overrides:
        raise argparse.ArgumentTypeError(f"write NAME=section.key=value, not {text}")
    return name, tuple(overrides.split())


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="models are kept here; else in a temporary folder, until the end")
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument(
        "--only", default="", help="rows whose WORKLOAD/MEMORY/PEER holds one of these, in this order: W1/free,S1"
    )
    parser.add_argument("--together", action="store_true", help="a process a peer and model, not one a row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", help="go on with this run")
    parser.add_argument("--commit", help="of luthier, where there is no git to tell")
    parser.add_argument("--again", action="store_true", help="rows of this run that are there too")
    parser.add_argument("--variants", type=variant, nargs="+", default=[], metavar="NAME=OVERRIDES", help="of luthier")
    parser.add_argument("--profile", type=Path, help="a folder for a few more steps' kernels, and where starts go")
    parser.add_argument("--logs", type=Path, help="a folder for what the processes print")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a row")
    parser.add_argument("--deadline", type=float, help="seconds after which no row is begun")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.variants = dict(options.variants)
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.serve:
        serve(sys.stdin)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no process is left behind by `timeout`
    with tempfile.TemporaryDirectory(prefix="gpu_step_") as place:
        bench = Bench(options, options.models or Path(place) / "models", Path(place))
        bench.run()
    return int(any(ours(row) and not row.get("parity") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
