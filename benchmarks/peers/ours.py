"""luthier's side: the Trainer that `luthier train` uses, as it plans and proves its run, on the benchmark's steps."""

from __future__ import annotations

import json
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from peers.bounds import RANK
from peers.clock import Clock
from peers.models import config
from peers.workloads import Step, Workload, counts

from luthier.data.conversation import Example, Origin
from luthier.data.store import TokenStore
from luthier.data.stream import Sample, Stream
from luthier.machine import Machine
from luthier.recipe import Recipe
from luthier.train.decide import Decisions, Rows, decide
from luthier.train.engines.local import Local
from luthier.train.loop import Trainer
from luthier.train.rehearse import rehearse
from luthier.train.reproducible import reproducible
from luthier.train.worker import model_of

EPOCHS = 100  # over the steps, of the run that is planned: of a run as short as what is timed, recording would not pay
CONTEXT = 0.75  # GiB of CUDA's own: a recipe's memory is all that the GPU holds, a cap is what torch reserves
LEARNED: dict[str, Any] = {
    "adapter": {"rank": RANK, "alpha": RANK, "dropout": 0.0},
    "train": {"lr": 2e-4, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "max_norm": 1.0, "seed": 3407},
}


def train(
    folder: Path,
    workload: Workload,
    steps: list[Step],
    clock: Clock,
    facts: Machine,
    *,
    memory: str,
    overrides: list[str],
) -> dict[str, Any]:
    """Runs the steps; returns the first loss and what was decided. `overrides` as on luthier's command line."""
    clock.phase("imports of luthier")
    recipe, decisions = decided(folder, workload, steps, facts, memory=memory, overrides=overrides)
    clock.phase("plan")
    with tempfile.TemporaryDirectory() as place, reproducible(decisions.place):
        model = model_of(recipe, decisions, folder)
        clock.phase("model")
        trainer = trainer_of(recipe, decisions, model, steps, Path(place))
        whole = all(counts([step]).tokens <= decisions.micro_tokens for step in steps)
        clock.ahead = int(trainer.ahead and whole)
        clock.begin()
        rehearse(trainer)
        clock.phase("rehearsal")
        losses = list[float]()
        for _ in range(clock.total):
            losses.append(trainer.step().loss)
            clock.tick()
    chosen = {key: value for key, value in decisions.as_dict().items() if key != "why"}
    used = {"micro_tokens": trainer.progress.micro_tokens, "predicted_gib": decisions.predicted_peak_bytes / 2**30}
    return {"losses": [losses[0], losses[-1]], "decisions": chosen | used}


def decided(
    folder: Path, workload: Workload, steps: list[Step], facts: Machine, *, memory: str, overrides: list[str]
) -> tuple[Recipe, Decisions]:
    """What `luthier train` would decide of a run that goes over the steps again and again."""
    recipe = recipe_of(folder, workload, memory, overrides)
    tokens = sum(len(sample.ids) for step in steps for row in step for sample in row)
    mean = tokens / (len(steps) * recipe.train.samples_per_step)  # of what the plan counts as samples
    return recipe, decide(recipe, config(folder), facts, Rows(workload.mix.longest, mean, EPOCHS * len(steps)))


def recipe_of(folder: Path, workload: Workload, memory: str, overrides: list[str]) -> Recipe:
    # Packed rows are so many tokens, not samples: to the plan they are as many samples of the greatest length.
    samples = workload.micro * workload.accumulate * max(1, workload.packed // workload.mix.longest)
    tree = {
        "model": {"base": str(folder), "quantize": {"kind": "nf4"} if workload.nf4 else None},
        "adapter": LEARNED["adapter"],
        "data": {"train": [{"path": "made up"}], "length": workload.mix.longest},
        "train": LEARNED["train"] | {"samples_per_step": samples},
        "run": {"memory": "auto" if memory == "free" else f"{float(memory.removesuffix('GiB')) + CONTEXT}GiB"},
    }
    return Recipe.parse(json.dumps(tree), *overrides)


def trainer_of(
    recipe: Recipe,
    decisions: Decisions,
    model: Any,
    steps: list[Step],
    folder: Path,
) -> Trainer:
    """Ready for the first of the steps. What it writes goes to `folder`."""
    store = store_of(steps, folder / "rows")
    return Trainer(
        recipe,
        model,
        InOrder(store, steps),
        TokenStore.write(folder / "none", []),
        engine=Local(),
        folder=folder,
        micro_tokens=decisions.micro_tokens,
    )


def store_of(steps: list[Step], folder: Path) -> TokenStore:
    """The samples of the steps, one after the other."""
    return TokenStore.write(folder, (_example(*sample) for step in steps for row in step for sample in row))


def _example(ids: list[int], learned: int) -> Example:
    return Example(ids, [0] * (len(ids) - learned) + [1] * learned, 1, Origin("made up", 1))


class InOrder(Stream):
    """The benchmark's steps as they are, again and again; the rows of `store` are their samples, one after the
    other."""

    def __init__(self, store: TokenStore, steps: list[Step]) -> None:
        counts = [sum(len(row) for row in step) for step in steps]
        super().__init__(store, None, 0, max(counts), max_steps=EPOCHS * len(steps))
        self.ends = list(accumulate(counts))

    def step(self, number: int) -> list[Sample]:
        number %= len(self.ends)
        return [Sample(row, row, 0) for row in range(self.ends[number - 1] if number else 0, self.ends[number])]
