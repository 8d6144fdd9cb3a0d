"""The loop: an iterator of steps. `for step in trainer:` trains.

A step is a pure function of (weights, optimizer state, rows). How it is cut into micro-batches and shared among
processes is how it is run, never what it computes: token losses are summed, and divided once by the supervised tokens
of the whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from luthier.data.store import TokenStore
from luthier.data.stream import Sample, Stream
from luthier.model.memory import attempt, release
from luthier.recipe import Recipe
from luthier.train import checkpoint, optim
from luthier.train.batch import Batch, batch, coming, gathered, guilty, halved, judged, not_finite, shorter
from luthier.train.checkpoint import Checkpoint, Progress
from luthier.train.engines import Engine
from luthier.train.interrupt import Interrupt, stopped
from luthier.train.memory import left_open, settled
from luthier.train.step import Event, Model, Step
from luthier.train.trackers import Journal


class Trainer:
    """Trains `model`'s adapter on `stream`. Iterating gives a Step per update, and goes on from the last checkpoint.

    Args:
        heldout: rows for the evaluation loss; may be empty.
        engine: how the processes work as one.
        folder: of the run: checkpoints/ and metrics.jsonl are kept there.
        micro_tokens: token budget of one forward and backward pass; halved when memory runs out.
        emit: told of every step, evaluation and other event, on rank 0.
        answer: gives sample generations to emit at an evaluation, on rank 0.

    Raises (while iterating) NotFiniteError before a non-finite update, MemoryPlanError if one row alone does not fit,
    CheckpointError if the disk refuses a checkpoint, Stopped after SIGTERM or SIGINT.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        stream: Stream,
        heldout: TokenStore,
        *,
        engine: Engine,
        folder: Path,
        micro_tokens: int,
        emit: Callable[[Event], None] = lambda event: None,
        answer: Callable[[], Sequence[Event]] = lambda: (),
    ) -> None:
        assert model.adapter is not None, "training needs an adapter"
        self.recipe, self.model, self.adapter, self.stream, self.heldout = recipe, model, model.adapter, stream, heldout
        self.engine, self.answer, self.interrupt = engine, answer, Interrupt()
        self.emit = emit if engine.rank == 0 else lambda event: None
        self.checkpoints, self.journal = folder / "checkpoints", Journal(folder / "metrics.jsonl")
        self.gradient = optim.flat_gradient(self.adapter.named_parameters())
        self.optimizer = optim.optimizer(self.adapter.named_parameters(), self.gradient, recipe.train, self._say)
        self.steps, self._peak, self.progress = stream.steps, 0, Progress(step=0, micro_tokens=micro_tokens)
        self._batch = lru_cache(maxsize=2)(partial(batch, stream, engine, model))  # of a step, and ahead of it the next
        self._expect = lru_cache(maxsize=1)(lambda tokens: model.expect(partial(coming, stream, engine, tokens)))
        self.resumed_from = self.saved = self._resume()
        self._begun: tuple[Batch, Tensor] | None = None  # a step, and the loss of its first micro-batch
        self._since = 0.0  # when the step before was told
        self.ahead = self.gradient.is_cuda  # a processor has nothing to do beside what it waits for
        self._unjudged = False  # whether rows without a finite held-out loss were named

    def __iter__(self) -> Iterator[Step]:
        with self.interrupt:
            while True:
                if self._evaluates(self.progress.step):
                    self.evaluate()
                signal = self.engine.highest(self.interrupt.signal)
                due = self.finished or self._saves(self.progress.step)
                if self.progress.step > self.saved and (signal or due):
                    self.save()
                if signal:
                    raise stopped(signal, f" after step {self.progress.step} of {self.steps}")
                if self.finished:
                    return
                yield self.step()

    def step(self) -> Step:
        """One update from one set of rows: counted, cut, summed, divided once, checked, clipped, applied. The host
        waits once, when all of that is launched and the next step is begun."""
        started = time.perf_counter() if self._begun is None else self._since
        train, number = self.recipe.train, self.progress.step
        rows, total = self._gradient_of(number)
        cuts, peak = (int(x) for x in self.engine.total(len(rows.micros), self._peak))
        lr = optim.rate(train, number, self.steps)
        told = optim.finish(self.optimizer, self.gradient, total / rows.targets, lr=lr, max_norm=train.max_norm)
        self._begin(number + 1)
        loss, norm = told()
        self._since = time.perf_counter()
        overflown = math.isfinite(loss) and not math.isfinite(norm)
        if overflown and self.model.dtype == torch.float16 and self.progress.rescale():
            return self.step()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise not_finite(self.model, self.stream.store, rows.samples, number, loss, norm)
        self.progress.step = number + 1
        seconds = self._since - started
        epoch, speed = (rows.samples[-1].index + 1) / self.stream.epoch_samples, rows.tokens / seconds
        step = Step(number + 1, epoch, loss, norm, lr, rows.tokens, rows.targets, seconds, speed, peak, cuts)
        self._log("step", asdict(step))
        return step

    def evaluate(self) -> None:
        """The token-weighted loss of the held-out rows; the lowest is remembered. A signal ends it early, and the
        resumed run begins with it again."""
        loss, rows = 0.0, [Sample(row, row, epoch=0) for row in range(len(self.heldout))]
        piece = 4 * self.recipe.train.samples_per_step
        for start in range(0, len(rows), piece):
            loss += self._loss_of(rows[start : start + piece])
            if self.engine.highest(self.interrupt.signal):
                return
        answers = self.answer() if self.engine.rank == 0 else ()
        loss /= max(1, sum(self.heldout.targets(sample.row) for sample in rows))
        # Once a run: while rank 0 looks for them row by row, the others wait.
        if not math.isfinite(loss) and self.engine.rank == 0 and not self._unjudged:
            self._unjudged = True
            named = guilty(self.model, self.heldout, rows, step=0)
            self._say(f"the held-out loss is {loss:.4g}, which judges no weights; look at {named}")
        self.progress.judge(loss)
        self._log("evaluation", {"step": self.progress.step, "eval_loss": loss})
        for answer in answers:
            self.emit({"event": "sample", "step": self.progress.step, **answer})

    def save(self) -> None:
        """Publishes a checkpoint of the state after the last step, and deletes those no longer wanted."""
        if self.engine.rank == 0:
            self.journal.sync()
            moments = optim.moments(self.optimizer) | {"rng": torch.get_rng_state()}
            checkpoint.publish(self.checkpoints, Checkpoint(self.adapter.state_dict(), moments, self.progress))
            checkpoint.prune(self.checkpoints, self.recipe.run.save.keep, self.progress.best_step)
            self.emit({"event": "checkpoint", "step": self.progress.step})
        self.saved = self.progress.step

    def keep_best(self) -> None:
        """Gives the adapter the weights of the lowest evaluation loss. Raises CheckpointError if they are damaged."""
        if self.progress.best_step not in (None, self.progress.step):
            folder = checkpoint.folder_of(self.checkpoints, self.progress.best_step)
            self.adapter.load_state_dict(checkpoint.read(folder).adapter)

    @property
    def finished(self) -> bool:
        """All steps done, or stopped early for want of improvement."""
        patience = self.recipe.train.patience
        return self.progress.step >= self.steps or (patience is not None and self.progress.stale >= patience)

    def _evaluates(self, step: int) -> bool:
        every = self.recipe.evaluate.every or math.ceil(self.steps / 5)
        due = step > self.progress.evaluated and (step % every == 0 or step == self.steps)
        return due and len(self.heldout) > 0

    def _saves(self, step: int) -> bool:
        return step == self.progress.best_step or step % self.recipe.run.save.every == 0

    def _begin(self, number: int) -> None:
        """Packs the rows of step `number` and launches its first micro-batch, so that a GPU works on while the host
        reads and logs the step before. It adds to the gradient what `step` would. Not before an evaluation or a
        checkpoint: the step's seconds would not be all of its own, nor the memory be the evaluation's."""
        if number >= self.steps:
            return
        rows = self._batch(number, self.progress.micro_tokens)
        if not self.ahead or not rows.micros or self._evaluates(number) or self._saves(number):
            return
        self.gradient.zero_()
        # None where memory ran out: then the step begins anew, and knows what to do.
        loss = attempt(partial(self.model.accumulate, rows.micros[0], self.progress.scale))
        self._begun = None if loss is None else (rows, loss)

    def _gradient_of(self, number: int) -> tuple[Batch, Tensor]:
        """Leaves the gradient of step `number` in `self.gradient`; returns its rows and their summed loss, fp64. If
        memory runs out on any process, all drop what they have and redo the same step with half the token budget."""
        while True:
            self._expect(self.progress.micro_tokens)
            rows = self._batch(number, self.progress.micro_tokens)
            loss = attempt(partial(self._accumulate, rows))
            if not self.engine.highest(loss is None):
                assert loss is not None
                self._peak = settled(self._peak)
                self.engine.reduce(self.gradient)
                self.engine.reduce(loss)
                self.gradient.div_(rows.targets * self.progress.scale)
                return rows, loss
            self._take_less(self.stream.store, rows, shorter(self.recipe.run))

    def _loss_of(self, samples: list[Sample]) -> float:
        """The summed loss of held-out rows, of all processes. A lack of memory is met as that of a step is."""
        step, engine = self.progress.step, self.engine
        while True:
            rows = gathered(self.heldout, engine, self.model, samples, step, self.progress.micro_tokens)
            mine = attempt(partial(judged, self.model, rows.micros))
            if not engine.highest(mine is None):
                assert mine is not None
                return engine.total(mine)[0]
            self._take_less(self.heldout, rows, "set data.length lower, or close other programs")

    def _take_less(self, store: TokenStore, rows: Batch, fix: str) -> None:
        """For want of memory for these rows: what a pass takes from here on is less."""
        release()
        # To keep fewer values of packed weights changes no bit. One process may have what another has not.
        if self.engine.highest(not self.model.keep_less(left_open(self.recipe.run) & {"unpacked"})):
            self.progress.micro_tokens = halved(store, self.engine, rows, fix)
            self._say(f"out of memory; from here on {self.progress.micro_tokens} tokens at a time")

    def _accumulate(self, rows: Batch) -> Tensor:
        """The gradient of the micro-batches' summed losses, times the scale; returns that sum, fp64."""
        begun, self._begun = self._begun, None
        losses = [begun[1]] if begun is not None and begun[0] is rows else []
        if not losses:
            self.gradient.zero_()
        losses += [self.model.accumulate(micro, self.progress.scale) for micro in rows.micros[len(losses) :]]
        return optim.precise(torch.stack(losses)).sum() if losses else torch.zeros((), dtype=torch.float64)

    def _resume(self) -> int:
        """Takes up the newest checkpoint that verifies, found by rank 0 and read by all. Returns its step, or 0."""
        found = None
        if self.engine.rank == 0:
            found = checkpoint.newest(self.checkpoints, self._say)
        step = self.engine.highest(found.progress.step if found else 0)
        if step:
            found = found or checkpoint.read(checkpoint.folder_of(self.checkpoints, step))
            self.adapter.load_state_dict(found.adapter)
            torch.set_rng_state(found.optimizer.pop("rng"))
            optim.restore(self.optimizer, found.optimizer)
            self.progress = found.progress.limited(self.progress.micro_tokens)
        if self.engine.rank == 0:
            self.journal.rewind(self.progress.step, self.progress.evaluated)
        return step

    def _say(self, text: str) -> None:
        self.emit({"event": "note", "text": text})

    def _log(self, event: str, record: Event) -> None:
        if self.engine.rank == 0:
            self.journal.log(record)
        self.emit({"event": event, **record})
