"""A finished run made again from its folder alone, and what came out the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from luthier.data.prepare import Prepared, prepare, sha256_of
from luthier.errors import DataError, RunError
from luthier.machine import Machine, machine
from luthier.runs import Run, read_json, write_json
from luthier.strict import finite

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

Reproduced = Literal["equal", "within noise", "different"]
Change = tuple[Any, Any]
"""What the run has, and what its repetition has."""

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""By number format, the largest relative error of rounding one number (IEEE 754: half a unit in the last place)."""


@dataclass(frozen=True)
class Curves:
    """Two loss curves, step by step.

    Attributes:
        identical: whether all losses are equal, bit for bit.
        largest: the largest difference of a step's losses, as a share of the first curve's mean loss.
        step: where that is.
        tolerance: how large it may be; see `tolerance`.
        steps: step, loss of the run (None where it has no such step), loss of its repetition.
    """

    identical: bool
    largest: float
    step: int
    tolerance: float
    steps: list[tuple[int, float | None, float | None]]

    @property
    def close(self) -> bool:
        return self.largest <= self.tolerance


@dataclass(frozen=True)
class Weights:
    """Two adapters: `largest` is the largest difference of a tensor, ‖a − b‖ / ‖a‖, and `tensor` where that is."""

    identical: bool
    largest: float
    tensor: str


@dataclass(frozen=True)
class Gain:
    """What a metric gained over the base, in the run (with its 95 % interval) and in its repetition."""

    run: float
    repro: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.repro <= self.high


@dataclass(frozen=True)
class Repro:
    """What a repetition of a run gave. `as_dict()` is what `runs repro --json` prints and results/repro.json holds.

    Attributes:
        changes: what was not the same before the first step: versions, the machine, decisions, the base, the tokens.
        metrics: empty where the run was not compared, or on other questions.
        answers: rows whose answers are the same, and rows; None without metrics.
    """

    run: str
    repro: str
    changes: dict[str, Change]
    adapter: Weights
    loss: Curves
    metrics: dict[str, Gain]
    answers: tuple[int, int] | None

    @property
    def verdict(self) -> Reproduced:
        """`equal`: adapter and answers are bit-identical. `within noise`: no step's loss is further off than rounding
        explains, and no metric's gain lies outside the run's own interval."""
        same, count = self.answers or (0, 0)
        if self.adapter.identical and same == count:
            return "equal"
        return "within noise" if self.loss.close and not self.outside else "different"

    @property
    def outside(self) -> dict[str, Gain]:
        return {name: gain for name, gain in self.metrics.items() if not gain.inside}

    @property
    def sentence(self) -> str:
        return f"{self.verdict}: {_SENTENCES[self.verdict](self)}"

    def as_dict(self) -> dict[str, Any]:
        answers = {"answers": dict(zip(("same", "rows"), self.answers, strict=True))} if self.answers else {}
        found = {"verdict": self.verdict, "sentence": self.sentence, **asdict(self), **answers}
        return dict(finite(found))


def repro(run: Run, out: Path | None = None, *, console: Console | None = None) -> Repro:
    """Makes `run` again in `out` (RUN-repro by default) from its recipe and data, and says whether the same came out.

    The repetition is a run like any other: stopped anywhere, the same call goes on with it. It takes the template of
    the run with its day, and the run's decisions where this machine can follow them. Trackers are left out.

    Raises RunError for a run that is not finished or an `out` that is something else, DataError where a data file is
    missing or holds something else than what the run learned; nothing is trained then.
    """
    from luthier.evaluate.compare import compare
    from luthier.train.launch import train

    if not run.finished:
        raise RunError("is not finished", where=str(run.folder), fix=f"finish it: luthier train {run.folder}")
    check_data(run)
    again = _again(run, out or run.folder.with_name(run.folder.name + "-repro"))
    _prepare(run, again)
    train(again, console=console)
    if _comparison(run):
        compare(again, console=console)
    found = judge(run, again)
    again.results.mkdir(exist_ok=True)
    write_json(again.results / "repro.json", found.as_dict())
    return found


def check_data(run: Run) -> None:
    """Raises DataError naming each data file of `run` that is missing or changed. A hub data set is not looked at here:
    its rows are when they are read."""
    faults = []
    for file in read_json(run.data / "report.json")["files"]:
        path = run.root / file["path"]
        if file["path"].startswith("hub:"):
            continue
        if file["path"] == "-":
            faults.append("the run learned from standard input, which is not kept")
        elif not path.is_file():
            faults.append(f"{path}: is missing")
        elif sha256_of(path) != file["sha256"]:
            faults.append(f"{path}: has changed since the run learned from it")
    if faults:
        raise DataError("\n".join(faults), fix="put back what the run had; nothing was trained")


def judge(run: Run, again: Run) -> Repro:
    """Compares two finished runs of one recipe by what their folders hold."""
    metrics = _gains(run, again)
    return Repro(
        run=str(run.folder),
        repro=str(again.folder),
        changes=changes(run, again),
        adapter=weights(_tensors(run), _tensors(again)),
        loss=curves(_losses(run), _losses(again), max(tolerance(run), tolerance(again))),
        metrics=metrics,
        answers=_same_answers(run, again) if metrics else None,
    )


def tolerance(run: Run) -> float:
    """How far a step's loss may be off where the same numbers are added up in another order: √u, u being the roundoff
    of the format that products are made in. Half of the digits.

    One sum of n terms in another order is off by about u·√n (Higham & Mary 2019, doi:10.1137/18M1226312); each update
    carries it into the next step's weights, and the differences grow from there (Summers & Dinneen 2021,
    arXiv:2103.04514). docs/log.md has what other kernels and another number of processes make of a real run.
    """
    return float(ROUNDOFF[run.manifest["decisions"]["dtype"]] ** 0.5)


def curves(mine: dict[int, float], theirs: dict[int, float], tolerance: float) -> Curves:
    """Compares losses by step. A step that only one curve has is infinitely far off."""
    scale = abs(fmean(mine.values())) or 1.0
    steps = [(step, mine.get(step), theirs.get(step)) for step in sorted({*mine, *theirs})]
    far = {step: inf if a is None or b is None else abs(a - b) / scale for step, a, b in steps}
    worst = max(far, key=far.__getitem__)
    return Curves(mine == theirs, far[worst], worst, tolerance, steps)


def weights(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> Weights:
    """Compares adapters tensor by tensor. One that only one of them has is infinitely far off."""
    far = {name: _distance(mine.get(name), theirs.get(name)) for name in sorted({*mine, *theirs})}
    identical = all(name in theirs and name in mine and _bits_equal(mine[name], theirs[name]) for name in far)
    worst = max(far, key=far.__getitem__)
    return Weights(identical, far[worst], worst)


def changes(run: Run, again: Run) -> dict[str, Change]:
    """What was not the same before the first step, by name."""
    old, new = _circumstances(run), _circumstances(again)
    return {name: (old.get(name), new.get(name)) for name in [*old, *new] if old.get(name) != new.get(name)}


def _again(run: Run, out: Path) -> Run:
    """The run folder of the repetition, made if new."""
    recipe = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"dir": str(out), "track": []})})
    again = Run.create(recipe, root=run.root)
    origin = again.manifest.get("repro_of", str(run.folder.resolve()) if not again.steps() else None)
    if origin != str(run.folder.resolve()):
        raise RunError("is not a repetition of this run", where=str(out), fix="give another --out")
    again.update_manifest(repro_of=origin)
    decided = run.manifest
    if "asked" not in again.manifest and follows(decided["decisions"], machine()):
        again.update_manifest(asked=decided["asked"], decisions=decided["decisions"], machine=machine().as_dict())
    return again


def follows(decisions: dict[str, Any], facts: Machine) -> bool:
    """Whether a machine can do what was decided on another."""
    placed = decisions["place"] == "cpu" or bool(facts.gpus)
    compiles = decisions["kernels"] != "compiled" or decisions["place"] != "cpu" or facts.compiler is not None
    free = facts.available if decisions["place"] == "cpu" else max((gpu.free for gpu in facts.gpus), default=0)
    return placed and compiles and decisions["processes"] <= facts.cores and decisions["predicted_peak_bytes"] <= free


def _prepare(run: Run, again: Run) -> Prepared | None:
    """The run's data made again with its template, unless that is done."""
    from luthier.model.load import load_tokenizer, model_folder

    if (again.data / "report.json").exists():
        return None
    recipe, spec = again.recipe, read_json(run.data / "template.json")["template"]
    tokenizer = load_tokenizer(model_folder(recipe.model), recipe.adapter)
    made = prepare(recipe.data, tokenizer, seed=recipe.split_seed, folder=again.data, root=again.root, template=spec)
    before = {file["path"]: file["sha256"] for file in read_json(run.data / "report.json")["files"]}
    if other := [file["path"] for file in made.report["files"] if file["sha256"] != before[file["path"]]]:
        raise DataError(f"{', '.join(other)} changed since the run learned from it", fix="set data.revision")
    return made


def _circumstances(run: Run) -> dict[str, Any]:
    """What decides a run's result besides its recipe and data files, by name."""
    manifest, decided = run.manifest, run.manifest["decisions"]
    how = ("place", "dtype", "engine", "processes", "threads", "kernels", "graphs", "graph_price")
    where = ("offload", "offload_embedding", "offload_activations")
    kept = (*how, *where, "micro_tokens", "recompute", "recompute_gate_up", "unpacked")
    facts = {name: manifest.get("machine", {}).get(name) for name in ("cores", "flags", "compiler")}
    facts["gpus"] = [gpu["name"] for gpu in manifest.get("machine", {}).get("gpus", [])]
    base = {name: _settings(run).get(name) for name in ("revision", "weights")}
    return {
        **{f"version of {name}": number for name, number in manifest.get("versions", {}).items()},
        **{f"machine: {name}": fact for name, fact in facts.items()},
        **{f"decision: {name}": decided.get(name) or None for name in kept},
        **({f"base: {name}": fact for name, fact in base.items()} if _comparison(run) else {}),
        "tokens": _tokens(run),
    }


def _tokens(run: Run) -> str:
    """SHA-256 of the tokens that are learned, and of which of them are."""
    found = hashlib.sha256()
    for name in ("ids", "supervised", "offsets"):
        found.update(bytes.fromhex(sha256_of(run.data / "train" / name)))
    return found.hexdigest()


def _losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in run.steps() if "loss" in record}


def _tensors(run: Run) -> dict[str, Tensor]:
    from luthier.adapters import files

    return files.load(run.adapter)[1]


def _bits_equal(mine: Tensor, theirs: Tensor) -> bool:
    import torch

    same_kind = mine.dtype == theirs.dtype and mine.shape == theirs.shape
    return same_kind and torch.equal(mine.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


def _distance(mine: Tensor | None, theirs: Tensor | None) -> float:
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return inf
    length, far = float(mine.double().norm()), float((mine.double() - theirs.double()).norm())
    return far / length if length else (inf if far else 0.0)


def _comparison(run: Run) -> dict[str, Any]:
    """What `luthier compare` found; empty where the run was not compared."""
    path = run.results / "compare" / "comparison.json"
    return dict(read_json(path)) if path.exists() else {}


def _settings(run: Run) -> dict[str, Any]:
    return dict(_comparison(run).get("settings", {}))


def _gains(run: Run, again: Run) -> dict[str, Gain]:
    """Metrics of both comparisons, if they asked the same questions."""
    if not _settings(run) or _settings(run)["questions"] != _settings(again)["questions"]:
        return {}
    old, new = _comparison(run)["metrics"], _comparison(again)["metrics"]
    return {name: _gain(old[name], new[name]) for name in old if name in new}


def _gain(old: dict[str, Any], new: dict[str, Any]) -> Gain:
    low, high = (-inf if old["low"] is None else old["low"]), (inf if old["high"] is None else old["high"])
    return Gain(old["difference"], new["difference"], low, high)


def _same_answers(run: Run, again: Run) -> tuple[int, int]:
    """Rows of the comparison in which nothing differs, and rows."""
    old, new = _rows(run), _rows(again)
    return sum(a == b for a, b in zip(old, new, strict=False)), max(len(old), len(new))


def _rows(run: Run) -> list[dict[str, Any]]:
    lines = (run.results / "compare" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _equal(found: Repro) -> str:
    compared = f" and the same {found.answers[1]} rows of the comparison" if found.answers else ""
    return f"the same adapter{compared}, bit for bit"


def _within(found: Repro) -> str:
    loss = f"no step's loss is off by more than {found.loss.largest:.2g} (rounding may do {found.loss.tolerance:.2g})"
    inside = ", and every metric's gain lies inside the run's own interval" if found.metrics else ""
    return f"{loss}{inside}"


def _different(found: Repro) -> str:
    from luthier.evaluate.statistics.paired import signed

    said = []
    if not found.loss.close:
        far = "in one of the two curves only" if found.loss.largest == inf else f"off by {found.loss.largest:.2g}"
        said.append(f"the loss of step {found.loss.step} is {far} (rounding may do {found.loss.tolerance:.2g})")
    for name, gain in found.outside.items():
        interval = f"{signed(gain.low)} to {signed(gain.high)}"
        said.append(f"{name} gains {signed(gain.repro)}, outside the run's interval {interval}")
    return "; ".join(said)


_SENTENCES = {"equal": _equal, "within noise": _within, "different": _different}
