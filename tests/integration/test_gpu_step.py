"""benchmarks/gpu_step.py, tiny and on a CPU: peers take the same steps, and only what ran together is compared."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from select import select
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_proofs  # type: ignore[import-not-found]
import gpu_step  # type: ignore[import-not-found]
import report  # type: ignore[import-not-found]
from peers import clock, workloads  # type: ignore[import-not-found]
from peers.desk import Desk  # type: ignore[import-not-found]


def test_every_machine_makes_the_same_samples() -> None:
    digests = {}
    for name in ("W1-8", "W2", "W3"):
        first = workloads.steps(workloads.WORKLOADS[name], 128256)[0]
        digests[name] = sha256(json.dumps(first).encode()).hexdigest()[:8]
    assert digests == {"W1-8": "2e3ee4d2", "W2": "3e500363", "W3": "f9f7ab04"}


@given(st.lists(st.integers(1, 50), max_size=60))
def test_packed_rows_hold_every_sample_once_and_no_row_overflows(lengths: list[int]) -> None:
    rows = workloads.best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert sum(sum(lengths[i] for i in row) <= 25 for row in rows) <= 1  # two half-empty rows would be one


@pytest.mark.filterwarnings("ignore")  # transformers' own Trainer, on its way to version 6
def test_luthier_and_a_peer_take_the_steps_whose_first_loss_the_reference_foretells(tmp_path: Path) -> None:
    def answer(peer: str, work: Any = gpu_step.measure) -> dict[str, Any]:
        cell = gpu_step.Cell("S1-8", "free", peer)
        profile = str(tmp_path / "profiles" / f"{peer}.txt")
        return work(gpu_step.Task(cell, str(tmp_path), True, "", profile=profile, started=time.time()))

    prepared = answer("prepare", gpu_step.prepare) | {"rate_tflops": 1.0}
    rows = [answer("luthier"), answer("transformers")]
    for row in rows:
        assert gpu_step.judged(row, prepared)["parity"]
        assert row["tok_s"] > 0
        assert row["profile"]["kernels"] > 0
        assert sum(row["phases"].values()) == pytest.approx(row["first_step_s"], abs=0.1)
    assert {"plan", "model", "rehearsal"} < rows[0]["phases"].keys()
    stacks = gpu_step.Stacks()
    until = time.monotonic() + 60
    while not stacks.within and time.monotonic() < until:  # a busy machine looks later
        pass
    stacks.write(tmp_path / "start.txt")
    assert "test_gpu_step.py:test_luthier_and_a_peer_take" in (tmp_path / "start.txt").read_text()
    assert rows[1]["unlike"] == ""
    other = rows[0] | {"losses": [1.01 * rows[0]["losses"][0]]}
    assert not gpu_step.judged(other, prepared)["parity"]


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_a_peer_that_is_not_installed_leaves_a_row_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert gpu_step.main(["--dry", "--only", "S1-8/free/unsloth", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["peer"] for row in rows] == ["unsloth", "unsloth-off"]
    assert all("unsloth" in row["failed"] and row["failed"].endswith("not installed") for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_a_process_that_measures_several_rows_tells_of_no_first_step(tmp_path: Path) -> None:
    asked = [("S1-8", "prepare"), ("S1-8", "measure"), ("S1", "prepare"), ("S1", "measure")]

    def task(workload: str, what: str) -> str:
        cell, answer = gpu_step.Cell(workload, "free", "luthier"), str(tmp_path / f"{workload}-{what}.json")
        return json.dumps(asdict(gpu_step.Task(cell, str(tmp_path), True, answer, what)))

    gpu_step.serve([task(*each) for each in asked])
    for workload in ("S1-8", "S1"):
        prepared, row = (json.loads((tmp_path / f"{workload}-{w}.json").read_text()) for w in ("prepare", "measure"))
        assert gpu_step.judged(row, prepared | {"rate_tflops": 1.0})["parity"]
        assert not {"first_step_s", "begin_s", "phases"} & row.keys()
        assert row["left_gib"] == 0.0


def test_a_process_that_ends_says_what_it_printed_last(tmp_path: Path) -> None:
    desk = desk_of("input(); print('at work'); sys.exit('no such kernel')", tmp_path)
    desk.tell("task")
    failed = desk.hear(tmp_path / "answer", 60)["failed"]
    assert failed.startswith("exit code 1: ")
    assert "no such kernel" in failed
    desk.close()


LASTING = """
pipe = open("pipe", "w")
subprocess.Popen(["sleep", "150"], stdout=pipe)
print("up", file=pipe, flush=True)
"""
ANSWERING = """
part = Path(f"{input()}.part")
part.write_text('{"tok_s": 1}')
print(7, flush=True)
part.rename(part.with_suffix(""))
time.sleep(60)
"""


def test_a_process_that_is_too_slow_says_what_it_printed_last_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    with pipe(tmp_path) as ended:
        desk = desk_of(LASTING + ANSWERING, tmp_path)
        desk.tell(str(tmp_path / "answer"))
        assert desk.hear(tmp_path / "answer", 60) == {"tok_s": 1}
        assert not ended()
        assert desk.hear(tmp_path / "other", 0) == {"failed": "took longer than 0 s: 7\n"}
        assert not desk.open
        assert ended(60)
    desk.close()


def desk_of(code: str, folder: Path) -> Any:
    imports = "import signal, subprocess, sys, time\nfrom pathlib import Path\n"
    return Desk([sys.executable, "-c", imports + code], folder / "log", os.environ, folder)


@contextmanager
def pipe(folder: Path) -> Iterator[Callable[..., bool]]:
    """Makes `pipe` in a folder; gives what says whether all have ended that held it open, once one of them was up."""
    os.mkfifo(folder / "pipe")
    end, up = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK), list[bytes]()

    def ended(seconds: float = 0.0) -> bool:
        if not up:
            assert select([end], [], [], 60)[0], "nothing was started"
            up.append(os.read(end, 100))
        return bool(select([end], [], [], seconds)[0])

    yield ended
    os.close(end)


def bench_of(folder: Path, *given: str, kind: Any = gpu_step.Bench) -> Any:
    options = gpu_step.arguments(
        ["--dry", "--models", str(folder), "--out", str(folder / "rows.jsonl"), "--run", "monday", *given]
    )
    return kind(options, folder, Path(mkdtemp(dir=folder)))


def test_what_a_process_that_ended_had_started_is_ended_before_another_takes_its_place(tmp_path: Path) -> None:
    bench, cell = bench_of(tmp_path), gpu_step.Cell("S1", "free", "luthier")
    with pipe(tmp_path) as ended:
        bench.desks[cell.process] = dead = desk_of(LASTING, tmp_path)
        dead.process.wait()
        assert not ended()
        bench.told(cell, "ready")
        assert ended(60)
        assert bench.desks[cell.process].open
        bench.close_all()


def test_a_benchmark_that_is_ended_while_models_are_made_ends_what_makes_them(tmp_path: Path) -> None:
    """The process waits for ever, at a pipe in the place of a file that would be there."""
    (tmp_path / "smollm2-135m").mkdir()
    kept = tmp_path / "smollm2-135m" / "reference-S1-8.json"
    os.mkfifo(kept)
    given = ["--dry", "--models", str(tmp_path), "--only", "S1-8/free/luthier$,S1/free/luthier$"]
    running, end = subprocess.Popen([sys.executable, gpu_step.__file__, *given]), None
    while end is None and running.poll() is None:
        time.sleep(0.02)
        with suppress(OSError):  # nobody reads it yet
            end = os.open(kept, os.O_WRONLY | os.O_NONBLOCK)
    running.terminate()
    assert running.wait(60) == 143
    assert end is not None
    with pytest.raises(BrokenPipeError):
        os.write(end, b"1")
    os.close(end)


def test_rows_of_two_workloads_are_made_by_one_process_and_not_made_again(tmp_path: Path) -> None:
    """The whole command; its two processes start as they do on a GPU, which takes seconds."""
    given = ["--dry", "--together", "--only", "S1-8/free/luthier$,S1/free/luthier$", "--models", str(tmp_path)]
    given += [
        "--out",
        str(tmp_path / "rows.jsonl"),
        "--logs",
        str(tmp_path / "logs"),
        "--run",
        "monday",
        "--commit",
        "a",
    ]
    for _ in range(2):
        assert gpu_step.main(given) == 0
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [gpu_step.name(row) for row in rows] == ["S1-8/free/luthier", "S1/free/luthier"]
    assert all(row["parity"] and row["dry"] and "first_step_s" not in row for row in rows)
    assert {log.stem for log in (tmp_path / "logs").iterdir()} == {
        f"{p}-free-smollm2-135m" for p in ("luthier", "prepare")
    }


CLERK = """
import json, os, sys
from pathlib import Path
rows = json.loads(Path("rows.json").read_text())
for task in map(json.loads, sys.stdin):
    row = rows.get(f"{task['cell']['workload']}/{task['cell']['peer']}", {})
    if task["what"] == "measure" and "fails" in row:
        sys.exit("out of memory")
    row |= {"tok_s": 1.0, "spread": [1.0, 1.0], "losses": [1.0], "peak_gib": 1.0, "process": os.getpid()}
    prepared = {"reference_loss": 1.0, "gflop_token": 1.0, "rate_tflops": 1.0}
    part = Path(task["answer"] + ".part")
    part.write_text(json.dumps(row if task["what"] == "measure" else prepared))
    part.rename(task["answer"])
"""


class Quick(gpu_step.Bench):  # type: ignore[misc]
    """The parent, of processes that answer at once. Rows tell which of them were there when they were kept."""

    def started(self, cell: Any) -> Any:
        return Desk([sys.executable, "-c", CLERK], self.models / "log", gpu_step.environment(cell), self.models)

    def keep(self, row: dict[str, Any]) -> None:
        super().keep(row | {"open": len(self.desks)})


def quick(folder: Path, *given: str, **answers: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a run of the parent makes. `answers`: more of those of a workload and a peer."""
    (folder / "rows.json").write_text(json.dumps(answers))
    only = "S1-8/free/luthier$,S1-8/free/transformers$,S1/free/luthier$"
    bench = bench_of(folder, "--only", only, "--commit", "a", *given, kind=Quick)
    bench.run()
    assert not bench.desks
    rows: list[dict[str, Any]] = bench.rows
    return rows


def named(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['round']} {row['workload']}/{row['peer']}" for row in rows]


def test_of_two_rounds_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    assert named(quick(tmp_path)) == ["0 S1-8/luthier", "0 S1-8/transformers", "0 S1/luthier"]
    assert named(quick(tmp_path, "--rounds", "2")) == ["1 S1-8/transformers", "1 S1-8/luthier", "1 S1/luthier"]
    assert named(quick(tmp_path, "--rounds", "2")) == []
    assert named(quick(tmp_path, "--commit", "b")) == ["0 S1-8/luthier", "0 S1/luthier"]
    assert len(quick(tmp_path, "--again", "--together", "--deadline", "1e-9")) == 0
    assert len(quick(tmp_path, "--again")) == 3


def test_a_peer_that_failed_is_spared_in_the_next_round_and_its_process_takes_no_other_down(tmp_path: Path) -> None:
    rows = quick(tmp_path, "--together", "--rounds", "2", **{"S1-8/transformers": {"fails": True}})
    first = ["0 S1-8/luthier", "0 S1-8/transformers", "0 S1/luthier"]
    assert named(rows) == [*first, "1 S1-8/luthier", "1 S1/luthier"]
    assert [row.get("failed", "").partition(":")[0] for row in rows] == ["", "exit code 1", "", "", ""]


def test_a_process_is_asked_again_unless_it_left_much_behind_and_ended_when_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    with (tmp_path / "smollm2-135m" / "model.safetensors").open("wb") as file:
        file.truncate(2**21)

    def processes(left: float, *given: str) -> tuple[bool, list[int]]:
        """Whether luthier's rows come of one, and how many there are after each row. `left`: of half the model."""
        rows = quick(tmp_path, "--again", *given, **{"S1-8/luthier": {"left_gib": left * 2**-10}})
        return rows[0]["process"] == rows[2]["process"], [row["open"] for row in rows]

    assert processes(0.9, "--together") == (True, [2, 2, 1])
    assert processes(1.1, "--together") == (False, [1, 1, 1])
    assert processes(0.9) == (False, [0, 0, 0])


def test_rows_of_luthier_are_taken_up_where_their_commit_tells_of_the_same_code(tmp_path: Path) -> None:
    def lacks(commit: str, peer: str = "luthier", number: int = 0, again: str = "") -> bool:
        bench = bench_of(tmp_path, "--commit", commit, *filter(None, [again]))
        lacking: bool = bench.lacks(number, gpu_step.Cell("W2", "free", peer))
        return lacking

    there = [row("monday", peer, 1, commit=commit) for commit in ("a", "b+", "unknown") for peer in ("luthier", "trl")]
    there += [row("tuesday", "luthier", 1, commit="c"), row("monday", "unsloth", 1, failed="unsloth not installed")]
    (tmp_path / "rows.jsonl").write_text(
        "".join(f"{json.dumps({'benchmark': 'gpu_step', **each})}\n" for each in there)
    )
    assert not lacks("a")
    assert lacks("a", number=1)
    assert lacks("a", again="--again")
    assert lacks("b")
    assert lacks("c")
    assert lacks("b+")
    assert lacks("unknown")
    assert not lacks("b+", "trl")
    assert lacks("a", "unsloth")


def test_a_part_of_only_that_names_no_row_is_refused() -> None:
    with pytest.raises(SystemExit, match="no row is called W1/free/lutier, W9; there are\nW1/free/ luthier luthier:x "):
        gpu_step.chosen(gpu_step.cells({"x": ()}), "W1/free/lutier,W1/free/luthier$,W9")
    every = [cell.name for group in gpu_step.chosen(gpu_step.cells({}), "") for cell in group]
    assert len(every) == len(set(every)) > 50


def test_what_gpu_sh_asks_for_exists(tmp_path: Path) -> None:
    """Its commands, as `echo` writes them."""
    parts, given = ["table-8b", "table-others", "proofs", "proofs-full"], {"PYTHON": "echo", "COMMIT": "abc"}
    command = ["bash", str(Path(gpu_step.__file__).with_name("gpu.sh")), *parts]
    subprocess.run(command, env=os.environ | given | {"OUT": str(tmp_path)}, check=True)
    for part in parts:
        program, *asked = (tmp_path / f"{part}.log").read_text().split()
        module = gpu_step if program.endswith("gpu_step.py") else gpu_proofs
        options = module.arguments(asked)
        assert options.commit == "abc"
        if module is gpu_step:
            assert gpu_step.chosen(gpu_step.cells({}), options.only)
        else:
            assert options.full == (part == "proofs-full")


def test_rows_are_made_in_the_order_that_is_asked_for_and_backwards_in_the_next_round() -> None:
    groups = gpu_step.chosen(gpu_step.cells({}), "W3/free/luthier,W1/free/luthier,W1/free/unsloth$")
    names = [(number, cell.name) for number, cell in gpu_step.rounds(groups, 3)]
    first = ["W3/free/luthier", "W1/free/luthier", "W1/free/unsloth"]
    second = ["W3/free/luthier", "W1/free/unsloth", "W1/free/luthier"]
    assert names == [(number, name) for number, row in enumerate((first, second, first)) for name in row]


def test_only_rows_that_tell_nothing_are_spared() -> None:
    def row(peer: str, tok_s: float, **other: Any) -> dict[str, Any]:
        return {"workload": "W1", "memory": "24GiB", "peer": peer, "round": 0, "tok_s": tok_s, "parity": True} | other

    def spared(number: int, peer: str, *rows: dict[str, Any]) -> bool:
        found: bool = gpu_step.spared(number, gpu_step.Cell("W1", "24GiB", peer), list(rows))
        return found

    failed = {"workload": "W1", "memory": "24GiB", "peer": "unsloth-off", "round": 0, "failed": "out of memory"}
    assert spared(0, "unsloth-off-half", row("unsloth-off", 10))
    assert not spared(0, "unsloth-off-half", failed, row("unsloth", 10))
    assert spared(1, "unsloth-off", failed, row("unsloth", 10))
    assert spared(1, "trl", row("trl", 8.9), row("unsloth", 10))
    assert not spared(0, "trl", row("trl", 8.9), row("unsloth", 10))
    assert not spared(1, "trl", row("trl", 9.1), row("unsloth", 10))
    assert not spared(1, "trl", row("trl", 8.9), row("unsloth", 10, parity=False))
    assert not spared(1, "trl", row("unsloth", 10))
    assert not spared(1, "luthier", row("luthier", 1), row("unsloth", 10))
    assert not spared(1, "trl", row("trl", 8.9), row("unsloth", 10, memory="free"))


def row(run: str, peer: str, tok_s: float, **other: Any) -> dict[str, Any]:
    """Of a result."""
    said = {"run_id": run, "workload": "W2", "memory": "free", "peer": peer, "round": 0, "commit": "a", "device": "GPU"}
    rates = {"tok_s": tok_s, "spread": [tok_s, tok_s], "samples_s": 1.0, "bound_share": 0.5, "first_step_s": 9.0}
    memory = {"peak_gib": 8.0, "peak_allocated_gib": 7.0}
    return said | rates | memory | {"driver": "", "versions": {}, "losses": [12.6], "parity": True} | other


def test_luthier_counts_only_beside_a_peer_of_the_same_run_whose_loss_is_right() -> None:
    def best(*rows: dict[str, Any]) -> str | None:
        found = next(iter(report.groups(list(rows))))
        assert report.markdown([found], list(rows))
        return found.best.peer if found.compared else None

    ours, trl = row("monday", "luthier", 18000), row("monday", "trl", 8000)
    assert best(ours, row("tuesday", "trl", 8000)) is None
    assert best(ours, trl, row("tuesday", "luthier", 19000)) == "trl"
    assert best(ours, trl, row("monday", "unsloth", 10000, parity=False)) == "trl"
    assert best(ours, trl, row("monday", "unsloth", 10000)) == "unsloth"
    assert best(ours | {"parity": False}, trl) is None


def test_the_report_tells_what_is_compared_what_is_alone_and_what_an_aim_lacks() -> None:
    def said(*rows: dict[str, Any]) -> str:
        text: str = report.markdown(list(report.groups(list(rows))), list(rows))
        return text

    compared = [row("monday", "luthier", 17100), row("monday", "trl", 9000)]
    assert "| W2 | free | 17,100 | 50% | 8.0 | TRL | 9,000 | 8.0 | **1.90** | 18,000, lacks 5.0% |" in said(*compared)
    again = [{**old, "round": 1, "tok_s": 1.1 * old["tok_s"]} for old in compared]
    assert "| **1.90 (1.73 to 2.09)** | 18,000, lacks 0.2% |" in said(*compared, *again)
    assert "without a peer" not in said(*compared)
    later = said(*compared, row("tuesday", "luthier", 18500, commit="b"))
    assert "| W2 | free | 18,500 | 18,500 to 18,500 | tuesday | b |" in later
    assert "| 17,100 |" in later
    starts = [row("monday", peer, 1, workload="start", first_step_s=s) for peer, s in (("luthier", 9.5), ("trl", 17))]
    assert "Start to the first step: luthier 9.5 s, TRL 17.0 s" in said(*compared, *starts)


def test_a_start_without_a_peer_is_told_and_so_is_one_that_failed_or_had_a_wrong_loss() -> None:
    def start(run: str, peer: str, **other: Any) -> dict[str, Any]:
        return row(run, peer, 100, workload="start", **other)

    def said(*rows: dict[str, Any]) -> str:
        text: str = report.markdown(list(report.groups(list(rows))), list(rows))
        return text

    alone = "Start to the first step, without a peer in the same run, so not compared: luthier 8.5 s (tuesday, b)."
    later, trl = start("tuesday", "luthier", first_step_s=8.5, commit="b"), start("monday", "trl", first_step_s=17)
    both = said(start("monday", "luthier", first_step_s=9.5), trl, later)
    assert "Start to the first step: luthier 9.5 s, TRL 17.0 s (aim: 10 s)." in both
    assert alone in both
    assert alone in said(later)
    assert "compared" not in said(start("monday", "luthier"), trl)
    assert "| start | free | **luthier** | out of memory |" in said(
        {**start("monday", "luthier"), "failed": "out of memory"}
    )
    wrong = said(start("monday", "luthier", parity=False), trl)
    assert "Start to" not in wrong
    assert "12.6000 **wrong** |" in wrong


def test_what_was_tried_on_a_cpu_is_not_reported(tmp_path: Path) -> None:
    rows = [{**row("monday", "trl", 1), "benchmark": "gpu_step", "dry": dry} for dry in (True, False)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert report.read(tmp_path / "rows.jsonl", None) == rows[1:]


def test_pauses_are_where_no_kernel_runs() -> None:
    """Kernels of two streams overlap, and a short one within a long one ends no pause."""
    spans = [("a", 0, 10), ("long", 20, 60), ("short", 30, 40), ("b", 63, 70), ("a", 80, 81), ("long", 90, 95)]
    events = [SimpleNamespace(name=name, time_range=SimpleNamespace(start=s, end=e)) for name, s, e in spans]
    told = [("pause: a -> long", 0.019, 2), ("pause: b -> a", 0.01, 1), ("pause: long -> b", 0.003, 1)]
    assert clock.pauses(events[::-1]) == [(between, pytest.approx(ms), count) for between, ms, count in told]


@pytest.mark.parametrize("ahead", [0, 1])
def test_steps_are_counted_where_they_are_worked_on(ahead: int) -> None:
    """A step that was begun before the window is no part of it, and the one that is begun at its end is. After the last
    step comes the first again."""
    workload = workloads.Workload("", workloads.CHAT, 1, warm=2, timed=3, profiled=0)
    steps = [((workloads.Sample([0] * length, length),),) for length in (16, 1, 2, 4, 8)]
    watch = clock.Clock(time.time(), workload, None)
    watch.ahead = ahead
    watch.begin()
    for _ in range(watch.total):
        watch.tick()
    assert 3 * watch.row(steps)["step_tokens"] == (4 + 8 + 16 if ahead else 2 + 4 + 8)
