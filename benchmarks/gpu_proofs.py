"""What the fast step owes besides speed, shown on a GPU: that it computes what transformers and PEFT compute, and that
a run lives through a lack of memory.

    python benchmarks/gpu_proofs.py --models /dev/shm/models --out benchmarks/results/h200.jsonl
    python benchmarks/gpu_proofs.py --models /dev/shm/models --only memory,budgets
    python benchmarks/gpu_proofs.py --models /dev/shm/models --full      # those of the whole 8B model
    python benchmarks/gpu_proofs.py --dry        # every line, tiny, on a CPU; its figures mean nothing

Models have the shape of Llama-3.1-8B and random weights, and four blocks unless `--full`. They are written once.

gradients   LoRA gradients and token losses of a W1 step: ours, and those of transformers + PEFT in bfloat16, each
            beside transformers + PEFT in fp32. Our relative L2 error is at most 1.1 times theirs, and at most 1.5 times
            in the A or the B of each kind of layer.
curves      The loss over 200 steps from 3 seeds, the same three ways, as running means of 10 steps. The furthest that
            ours gets from fp32 is at most 1.5 times the furthest that theirs gets, which is little beside what is
            learned. Seeds that `--out` has of this commit, with no changes beside it, are not made again, so that
            sittings add up.
            --full: 50 steps of the NF4 model from one seed, ours beside transformers + PEFT + bitsandbytes.
memory      60 steps, in 20 of which memory is cut, before one of the passes or on its way back, to less than this
            needs, beside the same run left alone. It runs out in each of these and in no other, on both ways through
            the model; nothing crashes; and the change of the adapter, and the norms of the steps' gradients, are off by
            at most 1.5 times what those of a run are off which is left alone and has smaller passes.
            --full: 10 steps of the NF4 model, 3 of them squeezed.
budgets     LoRA gradients with no, half and all blocks recomputed, all of them or gate|up alone, are the same bits.

The factors are room for chance: two roundings of the same sums differ so much among themselves. The command ends with 1
where a proof fails, or is left for the next sitting by `--deadline`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu_step import commit, device, tells, versions
from peers.bounds import RANK
from peers.models import config, prepare
from peers.ours import decided, store_of, trainer_of
from peers.trainers import TARGETS
from peers.workloads import CHAT, WORKLOADS, Sample, Step, Workload, dry, steps
from torch import Tensor

from luthier.data import stream
from luthier.kernels.loss import token_losses
from luthier.machine import machine
from luthier.model.causal import CausalModel
from luthier.model.graphs import backward
from luthier.recipe import Recipe
from luthier.train import optim
from luthier.train.decide import Decisions
from luthier.train.reproducible import reproducible
from luthier.train.worker import model_of

SHAPE, BLOCKS = "llama-3.1-8b", 4
LEARNING_RATE, LARGEST_NORM = 2e-4, 1.0  # as `peers.ours` has them
NEAR, CHANCE = 1.1, 1.5  # of an error that rounding makes: of many values together, and of the furthest of a few
WRONG_MASK = 4e-3  # what a wrong mask does to the loss of a first step, relatively; bfloat16 does 3e-4
ROUNDING = 1e-6  # of long sums in fp32
SMOOTH = 10  # steps of a running mean
GIB = 2**30
# What a run of luthier sets; here others use the GPU before it, and torch reads these but once.
SET = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

Tensors = Mapping[str, Tensor]
# Step, number in the step, and whether it is the way back; of a step made again, the passes of all tries are counted.
Pass = tuple[int, int, bool]


class Found(NamedTuple):
    """What a proof found. `said` is for people."""

    passed: bool
    said: str
    figures: dict[str, Any]


class Later(Exception):
    """What is left of a proof belongs to another sitting."""


@dataclass(frozen=True)
class Bench:
    """Where models lie, and whether all is tiny. Parts of proofs are kept in `out`; after `deadline`, on the monotonic
    clock, none is begun."""

    models: Path
    dry: bool
    out: Path | None = None
    deadline: float = float("inf")
    commit: str = ""

    @property
    def place(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def folder(self, nf4: bool, full: bool = False) -> Path:
        """Of the model, written unless it is there."""
        name = SHAPE if full else f"{SHAPE}-{BLOCKS}-{'nf4' if nf4 else 'bfloat16'}"
        folder = prepare(self.models / name, SHAPE, nf4=nf4, dry=self.dry, layers=None if full else BLOCKS)
        empty()
        return folder

    def workload(self, name: str, count: int, *, samples: int = 0, nf4: bool) -> Workload:
        """`count` steps of it, of so many samples; 0: of its own packed rows."""
        mix = replace(CHAT, count=(samples or 40) * count)
        found = WORKLOADS[name]
        found = replace(found, mix=mix, nf4=nf4, micro=samples or found.micro)
        return replace(dry(found) if self.dry else found, warm=0, timed=count, profiled=0)

    def count(self, wanted: int) -> int:
        """Steps of a run."""
        return min(wanted, 10) if self.dry else wanted

    @property
    def least_fall(self) -> float:
        """Of a loss, in bands: what learns nothing stays within any. Few short steps teach nothing."""
        return float("-inf") if self.dry else 10.0

    def row(self, proof: str, **figures: Any) -> dict[str, Any]:
        """One of `out`."""
        row = {"benchmark": "gpu_proofs", "proof": proof, **device(), "versions": versions()}
        return row | {"commit": self.commit, "dry": self.dry} | figures

    def keep(self, row: dict[str, Any]) -> None:
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def part(self, proof: str, part: str, make: Callable[[], Any]) -> Any:
        """What `out` has of an earlier sitting with the same commit on the same kind of device, else what `make` gives.
        Raises Later when there is no time left."""
        wanted, rows = self.row(proof, part=part), self.out.read_text() if self.out and self.out.exists() else ""
        same = ("benchmark", "proof", "part", "device", "versions", "commit", "dry")
        for row in map(json.loads, rows.splitlines()):
            if tells(self.commit) and all(row.get(key) == wanted[key] for key in same):
                return row["found"]
        if time.monotonic() > self.deadline:
            raise Later(f"{part} is left for another sitting")
        found = make()
        self.keep(wanted | {"found": found})
        return found


def empty() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ ours and theirs
class Ours(NamedTuple):
    """luthier, as `luthier train` would run it on these steps."""

    recipe: Recipe
    decisions: Decisions
    model: CausalModel
    steps: list[Step]


def ours(bench: Bench, folder: Path, workload: Workload, **other: Any) -> Ours:
    """`other` than decided. Raises RuntimeError where a GPU would not run our block."""
    chosen = steps(workload, config(folder)["vocab_size"])
    # What is tried on a CPU takes few short steps, too few for the chances of bfloat16 to even out.
    overrides = ["model.compute=float32"] if bench.dry else []
    recipe, decisions = decided(folder, workload, chosen, machine(), memory="free", overrides=overrides)
    if decisions.place == "cuda" and decisions.kernels != "compiled":
        raise RuntimeError(f"the fast path is not run: {decisions.why['kernels']}")
    decisions = replace(decisions, **other)
    torch.set_num_threads(decisions.threads)
    return Ours(recipe, decisions, model_of(recipe, decisions, folder), chosen)


def theirs(folder: Path, dtype: torch.dtype, place: str) -> Any:
    """transformers with PEFT: a base in `dtype` or the folder's few bits, adapters in fp32, as PEFT makes them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", device_map={"": place}
    )
    for module in base.modules():
        if hasattr(module, "compute_dtype"):  # of a product with few bits, where the folder names another one
            module.compute_dtype = dtype
    targets = TARGETS[config(folder)["model_type"]]
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM"))


def trained(module: Any) -> Tensors:
    """PEFT's parameters under the names that PEFT writes, which ours have too."""
    named = module.named_parameters()
    return {name.replace(".default.", "."): parameter for name, parameter in named if parameter.requires_grad}


def start_of(model: CausalModel, seed: int, *, spread: float = 0.0) -> Tensors:
    """An adapter's values: A as LoRA begins with it, B normal with deviation `spread`: without, A has no gradient."""
    assert model.adapter is not None
    generator, made = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, parameter in model.adapter.named_parameters():
        is_A, value = name.endswith("lora_A.weight"), torch.empty(parameter.shape)
        edge = parameter.shape[1] ** -0.5
        value = (
            value.uniform_(-edge, edge, generator=generator) if is_A else value.normal_(generator=generator) * spread
        )
        made[name] = value.to(parameter.device)
    return made


@torch.no_grad()
def begin(parameters: Tensors, start: Tensors) -> None:
    """Gives both sides the same values. Raises KeyError where they do not train the same layers."""
    if parameters.keys() != start.keys():
        raise KeyError(f"trained by one alone: {sorted(parameters.keys() ^ start.keys())[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(start[name])


def losses_of(module: Any, sample: Sample, dtype: torch.dtype) -> Tensor:
    """fp32 [targets]: theirs, with products in `dtype` as transformers' Trainer has them."""
    ids = torch.tensor([sample.ids], device=module.device)
    rows = torch.arange(len(sample.ids) - sample.targets - 1, len(sample.ids) - 1, device=module.device)
    with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
    return F.cross_entropy(logits.float(), ids[0, -sample.targets :], reduction="none")


def samples_of(step: Step) -> list[Sample]:
    return [sample for row in step for sample in row]


# ------------------------------------------------------------------------------------------------ gradients, budgets
class Learned(NamedTuple):
    """Of one step: the losses of its supervised tokens, fp32 [targets], and the gradient of their sum."""

    losses: Tensor
    gradient: Tensor  # [all of the adapter's values], by name
    kinds: Tensors  # the same by kind of layer, such as q_proj.lora_A: [its values in all blocks]


def learned_by_ours(side: Ours, start: Tensors) -> Learned:
    """Of the first step, in one pass."""
    assert side.model.adapter is not None
    parameters = dict(side.model.adapter.named_parameters())
    begin(parameters, start)
    optim.flat_gradient(parameters.items())
    with tempfile.TemporaryDirectory() as place, reproducible(side.decisions.place):
        store = store_of(side.steps[:1], Path(place) / "rows")
        micro = stream.collate(store, [stream.Sample(row, row, 0) for row in range(len(store))], 0)
        with torch.no_grad():
            losses = token_losses(side.model.hidden(micro), side.model.head, micro.targets.to(side.model.device))
        side.model.accumulate(micro)
    return Learned(losses, flat(parameters), by_kind(parameters))


def learned_by_theirs(module: Any, step: Step, start: Tensors, dtype: torch.dtype) -> Learned:
    """Of one step, a sample at a time: nothing is packed or padded."""
    parameters, found = trained(module), list[Tensor]()
    begin(parameters, start)
    for sample in samples_of(step):
        losses = losses_of(module, sample, dtype)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        found.append(losses.detach())
    return Learned(torch.cat(found), flat(parameters), by_kind(parameters))


def by_kind(parameters: Tensors) -> Tensors:
    kinds: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters.items():
        kinds[".".join(name.split(".")[-3:-1])][name] = parameter
    return {kind: flat(found) for kind, found in kinds.items()}


def flat(parameters: Tensors) -> Tensor:
    """The gradients as one, fp32."""
    gradients = {name: parameter.grad for name, parameter in sorted(parameters.items())}
    return torch.cat([g.detach().float().flatten() for g in gradients.values() if g is not None])


def error(found: Tensor, true: Tensor) -> float:
    """Relative L2."""
    return float((found - true).double().norm() / true.double().norm())


def gradients(bench: Bench) -> Found:
    folder, workload = bench.folder(nf4=False), bench.workload("W1", 1, nf4=False)
    side = ours(bench, folder, workload)
    start = start_of(side.model, 0, spread=0.01)
    mine, step = learned_by_ours(side, start), side.steps[0]
    del side
    true, other = (
        learned_by_theirs(theirs(folder, dtype, bench.place), step, start, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return near(mine, other, true)


def near(mine: Learned, other: Learned, true: Learned) -> Found:
    """Whether ours is as near to what is true as the other is."""
    figures: dict[str, Any] = {
        name: {
            "gradient": error(found.gradient, true.gradient),
            "token_losses": error(found.losses, true.losses),
            "loss": error(found.losses.sum(), true.losses.sum()),
        }
        for name, found in (("luthier", mine), ("peft_bfloat16", other))
    }
    kinds = {kind: error(mine.kinds[kind], x) / error(other.kinds[kind], x) for kind, x in true.kinds.items()}
    worst = max(kinds, key=lambda kind: kinds[kind])
    ratios = {key: figures["luthier"][key] / figures["peft_bfloat16"][key] for key in ("gradient", "token_losses")}
    said = "; ".join(
        f"{key} off by {figures['luthier'][key]:.2e}, PEFT in bfloat16 by {figures['peft_bfloat16'][key]:.2e}, "
        f"{ratio:.2f} times"
        for key, ratio in ratios.items()
    )
    said += f"; at most {kinds[worst]:.2f} times, in {worst}"
    passed = max(ratios.values()) <= NEAR and kinds[worst] <= CHANCE and figures["luthier"]["loss"] < WRONG_MASK
    figures |= {"ratios": ratios, "bound": NEAR, "kinds": kinds, "bound_of_kinds": CHANCE, "targets": len(true.losses)}
    return Found(passed, said, figures)


def budgets(bench: Bench) -> Found:
    folder, workload = bench.folder(nf4=True), bench.workload("W1", 1, nf4=True)
    found, unlike = list[Learned](), list[str]()
    for whole, gate_up in recomputed(config(folder)["num_hidden_layers"]):
        side = ours(bench, folder, workload, recompute=whole, recompute_gate_up=gate_up)
        found.append(learned_by_ours(side, start_of(side.model, 0, spread=0.01)))
        del side
        if not (torch.equal(found[-1].gradient, found[0].gradient) and bool(found[0].gradient.any())):
            unlike.append(f"{whole} whole, gate|up of {gate_up}")
    count = found[0].gradient.numel()
    said = f"{count} values of the gradient at {len(found)} budgets: " + (
        f"others with blocks recomputed: {'; '.join(unlike)}" if unlike else "the same bits"
    )
    return Found(not unlike, said, {"values": count, "budgets": len(found), "unlike": unlike})


def recomputed(blocks: int) -> list[tuple[int, int]]:
    """Of how many blocks all is made again, and of how many gate|up alone: none, half and all of them."""
    half = blocks // 2
    return [(0, 0), (half, 0), (blocks, 0), (0, blocks), (half, blocks - half)]


# ------------------------------------------------------------------------------------------------ curves
def curves(bench: Bench) -> Found:
    count, kinds = bench.count(200), {"fp32": torch.float32, "peft_bfloat16": torch.bfloat16}

    @cache
    def sides() -> tuple[Ours, dict[str, Any]]:
        folder = bench.folder(nf4=False)
        mine = ours(bench, folder, bench.workload("W1-8", count, samples=2, nf4=False))
        return mine, {name: theirs(folder, dtype, bench.place) for name, dtype in kinds.items()}

    def drawn_from(seed: int) -> dict[str, list[float]]:
        mine, modules = sides()
        start, order = start_of(mine.model, seed), shuffled(mine.steps, seed)
        found = {name: curve_of_theirs(module, order, start, kinds[name]) for name, module in modules.items()}
        return found | {"luthier": curve_of_ours(mine._replace(steps=order), start)}

    drawn = [bench.part("curves", f"seed {seed}", partial(drawn_from, seed)) for seed in range(3)]
    return judged(drawn, bench.least_fall)


def judged(drawn: list[dict[str, list[float]]], least_fall: float) -> Found:
    """Whether our curves of all seeds keep near those in fp32, as those in bfloat16 do, and all fall by so many times
    as much as these are off."""
    away = {name: [furthest(seed[name], seed["fp32"]) for seed in drawn] for name in ("luthier", "peft_bfloat16")}
    mine, band = max(away["luthier"]), max(away["peft_bfloat16"])
    fallen = min(fall(seed["fp32"]) for seed in drawn)
    said = (
        f"{len(drawn[0]['fp32'])} steps, {len(drawn)} seeds: ours at most {mine:.2e} from fp32, PEFT in bfloat16 "
        f"{band:.2e}, {mine / band:.2f} times; fp32 falls by {fallen:.2f} at least"
    )
    figures = {"furthest": away, "ratio": mine / band, "bound": CHANCE, "fallen": fallen, "curves": drawn}
    return Found(mine <= CHANCE * band and fallen >= least_fall * band, said, figures)


def curves_full(bench: Bench) -> Found:
    count, kinds = bench.count(50), {"fp32": torch.float32, "peft_bfloat16": torch.bfloat16}

    @cache
    def sides() -> tuple[Path, Ours, Tensors]:
        folder = bench.folder(nf4=True, full=True)
        mine = ours(bench, folder, bench.workload("W1-8", count, samples=4, nf4=True))
        return folder, mine, start_of(mine.model, 0)

    def by_ours() -> list[float]:
        _, mine, start = sides()
        return curve_of_ours(mine, start)

    def by_theirs(dtype: torch.dtype) -> list[float]:
        folder, mine, start = sides()
        return curve_of_theirs(theirs(folder, dtype, bench.place), mine.steps, start, dtype)

    makers = {"luthier": by_ours} | {name: partial(by_theirs, dtype) for name, dtype in kinds.items()}
    return judged([{name: bench.part("curves-8b", name, make) for name, make in makers.items()}], bench.least_fall)


def shuffled(chosen: list[Step], seed: int) -> list[Step]:
    """The same samples in other steps."""
    rows = [row for step in chosen for row in step]
    order, size = np.random.default_rng(seed).permutation(len(rows)), len(chosen[0])
    return [tuple(rows[i] for i in order[at : at + size]) for at in range(0, len(rows), size)]


def fall(curve: list[float]) -> float:
    """From the mean of the first steps to that of the last."""
    return float(np.mean(curve[:SMOOTH]) - np.mean(curve[-SMOOTH:]))


def furthest(curve: list[float], true: list[float]) -> float:
    """The greatest distance of the curves' running means."""
    window = np.ones(SMOOTH) / SMOOTH
    return float(np.abs(np.convolve(np.subtract(curve, true), window, mode="valid")).max())


def curve_of_ours(side: Ours, start: Tensors) -> list[float]:
    with training(side, start) as trainer:
        return [trainer.step().loss for _ in side.steps]


@contextmanager
def training(side: Ours, start: Tensors, model: Any = None) -> Iterator[Any]:
    """A trainer on the steps of `side`, at their beginning. `model`: in the place of its own."""
    assert side.model.adapter is not None
    begin(dict(side.model.adapter.named_parameters()), start)
    with tempfile.TemporaryDirectory() as place, reproducible(side.decisions.place):
        yield trainer_of(side.recipe, side.decisions, model or side.model, side.steps, Path(place))


def curve_of_theirs(module: Any, chosen: list[Step], start: Tensors, dtype: torch.dtype) -> list[float]:
    """What transformers' Trainer does, in a few lines: the sum over the step's tokens, clipped, AdamW."""
    parameters, losses = trained(module), list[float]()
    begin(parameters, start)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in chosen:
        optimizer.zero_grad()
        targets, total = sum(sample.targets for sample in samples_of(step)), torch.zeros((), device=module.device)
        for sample in samples_of(step):
            loss = losses_of(module, sample, dtype).sum() / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters.values(), LARGEST_NORM)
        optimizer.step()
        losses.append(float(total))
    return losses


# ------------------------------------------------------------------------------------------------ memory
class GpuMemory:
    """The memory that torch may take of the GPU. `spent` says for each time it ran out which way it was."""

    def __init__(self) -> None:
        self.spent: list[str] = []
        self.total = torch.cuda.mem_get_info()[1]
        torch._C._cuda_attach_out_of_memory_observer(self._ran_out)  # type: ignore[attr-defined]

    def limit(self, amount: float | None) -> None:
        """From here on at most so many bytes, those that tensors have now included. None: all there is."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0 if amount is None else amount / self.total)

    def needed(self) -> tuple[int, int]:
        """Since `limit`: what tensors had at most, and what torch took for them."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _ran_out(self, *_: Any) -> None:
        # Autograd goes back through the model in a thread of its own.
        main = threading.current_thread() is threading.main_thread()
        self.spent.append("forward" if main else "backward")


class HeldMemory:
    """Its twin on a CPU, where torch cannot be told how much to take: bytes that are kept for the backward pass."""

    def __init__(self) -> None:
        self.spent: list[str] = []
        self.most: float | None = None
        self.held = self.peak = 0

    def limit(self, amount: float | None) -> None:
        self.most, self.peak = amount, self.held

    def needed(self) -> tuple[int, int]:
        return self.peak, self.peak

    def keep(self, tensor: Tensor) -> Tensor:
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
        self._refuse("forward")
        return tensor

    def take(self, tensor: Tensor) -> Tensor:
        self._refuse("backward")
        self.held -= tensor.nbytes
        return tensor

    def _refuse(self, where: str) -> None:
        if self.most is not None and self.held > self.most:
            self.spent.append(where)
            self.held = 0
            raise torch.OutOfMemoryError("as a test")


class Run(NamedTuple):
    """A run of training."""

    change: Tensor  # of all of the adapter's values
    tensors: dict[Pass, int]  # the most bytes that tensors had
    taken: dict[Pass, int]  # and that were taken for them
    cuts: list[int]  # passes of each step, the last try
    norms: list[float]  # of each step's gradient
    short: list[list[str]]  # where memory ran out in each step, for each time


class Watched:
    """A model whose passes have their memory measured, and limited where `limits` says so: from there on, for as long
    as it takes to get through the step."""

    def __init__(self, model: CausalModel, room: Any, limits: Mapping[Pass, float]) -> None:
        self.model, self.room, self.limits = model, room, dict(limits)
        self.found: dict[Pass, tuple[int, int]] = {}
        self.step = self.passes = 0
        self.squeezed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def begin(self, step: int) -> None:
        self.step, self.passes, self.squeezed = step, 0, False

    def accumulate(self, micro: Any, scale: float) -> Tensor:
        number, self.passes = self.passes, self.passes + 1
        with self._watched((self.step, number, False)):
            loss = self.model.loss(micro)
        with self._watched((self.step, number, True)):
            return backward(loss, scale)

    @contextmanager
    def _watched(self, way: Pass) -> Iterator[None]:
        if not self.squeezed:
            self.squeezed = way in self.limits
            self.room.limit(self.limits.get(way))
        yield
        self.found[way] = self.room.needed()


def memory(bench: Bench, *, full: bool = False) -> Found:
    count, squeezed = (10, 3) if full else (bench.count(60), 4 if bench.dry else 20)
    workload = bench.workload("W1", count, nf4=True)
    # A recorded pass takes its memory when it is recorded, and none when it is replayed. Values that are kept unpacked
    # would go at the first lack of it for good, and leave the others nothing to run short of.
    side = ours(bench, bench.folder(nf4=True, full=full), workload, graphs=False, unpacked=0)
    start, most = start_of(side.model, 0), max(len(s.ids) for step in side.steps for s in samples_of(step))
    room: Any = GpuMemory() if bench.place == "cuda" else HeldMemory()
    run = partial(run_under, room, side, start)
    whole, least = run(workload.packed, {}), run(most, {})
    limits = squeezes(whole.tensors, max(least.taken.values()), squeezed)
    return lived_through(limits, run(workload.packed, limits), whole, least)


def lived_through(limits: Mapping[Pass, float], cut: Run, whole: Run, least: Run) -> Found:
    """Whether a run that was cut to `limits` ran out of memory there and nowhere else, and learned what the whole one
    did, as the one with the smallest passes did."""
    off = {"change": (error(cut.change, whole.change), error(least.change, whole.change))}
    off["norm"] = (apart(cut.norms, whole.norms), apart(least.norms, whole.norms))
    places = [place for step in cut.short for place in step]
    where, later = {place: places.count(place) for place in ("forward", "backward")}, sum(n > 0 for _, n, _ in limits)
    amounts = {f"{step + 1}.{n + 1}{' back' * back}": amount / GIB for (step, n, back), amount in limits.items()}
    said = (
        f"{len(limits)} of {len(cut.cuts)} steps squeezed, {later} of them after their first pass, to "
        f"{min(amounts.values()):.2f} to {max(amounts.values()):.2f} GiB of {max(whole.tensors.values()) / GIB:.2f}: "
        f"out of memory {len(places)} times ({where['backward']} going back), made again in up to {max(cut.cuts)} "
        "passes; "
    )
    said += "; ".join(f"{name} off by {a:.1e}, with smaller passes {b:.1e}" for name, (a, b) in off.items())
    undisturbed = not any(whole.short) and not any(least.short)
    as_squeezed = {step for step, found in enumerate(cut.short) if found} == {step for step, _, _ in limits}
    passed = undisturbed and as_squeezed and min(where.values()) > 0
    passed = passed and all(a <= CHANCE * max(b, ROUNDING) for a, b in off.values())
    figures = {
        "off": off,
        "bound": CHANCE,
        "steps": len(cut.cuts),
        "limits_gib": amounts,
        "ran_out": len(places),
        **where,
    }
    figures |= {"later": later, "cuts": cut.cuts, "as_squeezed": as_squeezed}
    peaks = {"whole_gib": max(whole.tensors.values()) / GIB, "least_gib": max(least.taken.values()) / GIB}
    return Found(passed, said, figures | peaks)


def apart(found: list[float], true: list[float]) -> float:
    """The greatest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, true, strict=True))


def squeezes(needed: Mapping[Pass, int], least: int, count: int) -> dict[Pass, float]:
    """Bytes by pass, for one pass of `count` steps at random: between what the smallest passes take and what it needs.
    Raises RuntimeError where there are too few such steps."""
    rng, large = np.random.default_rng(0), [key for key, amount in needed.items() if amount > 1.1 * least]
    at = {large[place][0]: large[place] for place in rng.permutation(len(large))}
    if len(at) < count:
        raise RuntimeError(f"{len(at)} steps need clearly more than the {least} bytes of their smallest passes")
    chosen = sorted(at[step] for step in rng.choice(list(at), count, replace=False))
    return {key: rng.uniform(1.03 * least, 0.97 * needed[key]) for key in chosen}


def run_under(room: Any, side: Ours, start: Tensors, micro_tokens: int, limits: Mapping[Pass, float]) -> Run:
    """Trains on the steps of `side`, with `limits` of memory. Each begins with `micro_tokens`, to which a run does not
    return by itself."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    watched, found = Watched(side.model, room, limits), list[Any]()
    short = list[list[str]]()
    with training(side, start, watched) as trainer, ExitStack() as stack:
        trainer.ahead = False  # each pass belongs to the step that is watched
        if isinstance(room, HeldMemory):
            stack.enter_context(hooks(room.keep, room.take))
        stack.callback(room.limit, None)
        for number in range(len(side.steps)):
            trainer.progress.micro_tokens = micro_tokens
            watched.begin(number)
            before = len(room.spent)
            found.append(trainer.step())
            short.append(room.spent[before:])
        named = dict(trainer.adapter.named_parameters())
        change = torch.cat([(named[name].detach() - start[name]).flatten() for name in sorted(start)])
    tensors, taken = ({key: pair[i] for key, pair in watched.found.items()} for i in range(2))
    cuts, norms = [step.micro_batches for step in found], [step.grad_norm for step in found]
    return Run(change, tensors, taken, cuts, norms, short)


# ------------------------------------------------------------------------------------------------ the command
PROOFS: dict[str, Callable[[Bench], Found]] = {
    "gradients": gradients,
    "curves": curves,
    "memory": memory,
    "budgets": budgets,
}
FULL: dict[str, Callable[[Bench], Found]] = {
    "curves": curves_full,
    "memory": partial(memory, full=True),
}


def shown(name: str, proof: Callable[[Bench], Found], bench: Bench) -> bool:
    """Whether a proof holds. Its row is kept, unless a part of it is left for later."""
    started = time.perf_counter()
    try:
        found = proof(bench)
    except Later as later:
        print(f"{name:15} {later}", flush=True)
        return False
    except Exception:
        traceback.print_exc()
        found = Found(False, traceback.format_exc().strip().splitlines()[-1], {})
    empty()
    seconds = time.perf_counter() - started
    print(f"{name:15} {'holds ' if found.passed else 'FAILED'} {seconds:6.1f} s  {found.said}", flush=True)
    bench.keep(bench.row(name, passed=found.passed, said=found.said, seconds=seconds, **found.figures))
    return found.passed


def wanted(only: str, full: bool) -> dict[str, Callable[[Bench], Found]]:
    """By name. Raises SystemExit for one that does not exist."""
    offered = {f"{name}-8b": proof for name, proof in FULL.items()} if full else PROOFS
    names = [name for name in only.split(",") if name] or list(offered)
    chosen = {f"{name}-8b" if full and not name.endswith("-8b") else name: name for name in names}
    if unknown := chosen.keys() - offered.keys():
        raise SystemExit(f"no proof is called {', '.join(sorted(unknown))}; there are {', '.join(offered)}")
    return {name: offered[name] for name in chosen}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="models are kept here; else in a temporary folder, until the end")
    parser.add_argument("--out", type=Path, help="rows are appended here")
    parser.add_argument("--only", default="", help="proofs, with commas between")
    parser.add_argument("--full", action="store_true", help="those of the whole 8B model")
    parser.add_argument("--commit", help="of luthier, where there is no git to tell")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options, started = arguments(given), time.monotonic()
    chosen = wanted(options.only, options.full)
    for name, value in SET.items():
        os.environ.setdefault(name, value)
    torch.set_float32_matmul_precision("highest")  # what all is held to
    with ExitStack() as stack:
        models = options.models or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_proofs_")))
        until = started + options.deadline
        bench = Bench(models.absolute(), options.dry, options.out, until, options.commit or commit())
        held = [shown(name, proof, bench) for name, proof in chosen.items() if time.monotonic() <= until]
    return int(len(held) < len(chosen) or not all(held))


if __name__ == "__main__":
    sys.exit(main())
