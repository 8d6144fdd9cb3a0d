"""One process of a run: builds the model, trains its share, and, as rank 0, leaves the adapter.

`python -m luthier.train.worker RUN` is what `launch.py` starts, one per rank (see `group.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.adapters import files
from luthier.data.conversation import Message
from luthier.data.prepare import Prepared, heldout_conversations
from luthier.data.stream import Stream
from luthier.errors import MemoryPlanError, ModelError
from luthier.model.causal import CausalModel, build
from luthier.model.finite import blaming_weights
from luthier.model.load import load_tokenizer, loaded_revision, model_folder
from luthier.model.place import check_place
from luthier.recipe import Recipe
from luthier.runs import Run, naming, sync_folder
from luthier.strict import finite
from luthier.train.decide import Decisions
from luthier.train.engines import ENGINES, Engine
from luthier.train.group import report
from luthier.train.loop import Trainer
from luthier.train.memory import at_most, host_peak_bytes
from luthier.train.rehearse import rehearse
from luthier.train.reproducible import loosened, reproducible
from luthier.train.step import Event, Step
from luthier.train.trackers import Journal, Trackers

Emit = Callable[[Event], None]


def work(
    run: Run,
    decisions: Decisions,
    engine: Engine,
    emit: Emit,
    *,
    prepared: Prepared | None = None,
    model: CausalModel | None = None,
    proven: bool = False,
) -> dict[str, Any]:
    """Trains to the end, from the last checkpoint if there is one, and saves the adapter. Returns the result's keys.

    `prepared`: the run's data, at hand already.
    `model`: what `model_of` would build, at hand already, with an adapter as new. It is left with the run's adapter.
    `proven`: the worst step was run before, under the same decisions on the same rows.
    """
    torch.set_num_threads(decisions.threads)
    trackers = Trackers(
        run.recipe.run.track if engine.rank == 0 else [],
        run.folder,
        run.recipe.model_dump(mode="json"),
        warn=lambda text: emit({"event": "note", "text": text}),
    )
    folder = model_folder(run.recipe.model)
    prepared = prepared or Prepared.open(run.data, load_tokenizer(folder, run.recipe.adapter))
    model = model or model_of(run.recipe, decisions, folder)
    _check_vocabulary(prepared, len(model.module.get_input_embeddings().weight))
    trainer = Trainer(
        run.recipe,
        model,
        stream(run.recipe, prepared),
        prepared.heldout,
        engine=engine,
        folder=run.folder,
        micro_tokens=decisions.micro_tokens,
        emit=_recording(run, trackers, emit),
        answer=lambda: _answers_if_room(model, prepared, run.recipe, emit),
    )
    if engine.rank == 0:
        Journal(run.samples).rewind(trainer.progress.evaluated, trainer.progress.evaluated)
        emit({"event": "start", "steps": trainer.steps, "resumed_from": trainer.resumed_from})
    try:
        with reproducible(decisions.place), blaming_weights(folder, model.dtype), at_most(decisions.memory_bytes):
            if not trainer.finished and not proven:
                _rehearse(trainer, decisions, emit)
            steps = list(trainer)
    finally:
        trackers.close()
    if run.recipe.train.keep == "best":
        trainer.keep_best()
    if engine.rank == 0:
        if getattr(run.recipe.adapter, "new_tokens", None):
            prepared.encoder.tokenizer.save(run.adapter)  # first: an adapter is there once its config is
        with naming(run.adapter):
            files.save(
                trainer.adapter,
                run.adapter,
                base=run.recipe.model.base,
                revision=loaded_revision(folder) or run.recipe.model.revision,
                extra={"template": json.loads((run.data / "template.json").read_text(encoding="utf-8"))},
            )
        sync_folder(run.adapter)
    return _result(run, decisions, trainer, steps)


def _check_vocabulary(prepared: Prepared, rows: int) -> None:
    """Raises ModelError where the data holds a token that the embedding of `rows` rows does not have."""
    tokens = prepared.encoder.tokenizer.vocab_size
    if tokens > rows and max(int(prepared.train.example(i)[0].max()) for i in range(len(prepared.train))) >= rows:
        what = f"the data has tokens that the model lacks: its tokenizer has {tokens}, its embedding {rows}"
        raise ModelError(what, fix="use the tokenizer that came with the model")


def _rehearse(trainer: Trainer, decisions: Decisions, emit: Emit) -> None:
    """Proves by the worst step that the memory is enough, and tells what it took beside what was planned."""
    try:
        peak = rehearse(trainer)
    except RuntimeError as error:
        if not loosened(error):
            raise
        emit({"event": "note", "text": "this model adds up in no fixed order: a resumed run may differ in last bits"})
        peak = rehearse(trainer)
    predicted = decisions.predicted_peak_bytes
    emit({"event": "rehearsal", "peak_bytes": peak, "predicted_peak_bytes": predicted})


def stream(recipe: Recipe, prepared: Prepared) -> Stream:
    train = recipe.train
    return Stream(
        prepared.train,
        prepared.weights,
        train.seed,
        train.samples_per_step,
        epochs=train.epochs,
        max_steps=train.max_steps,
        rows=recipe.data.rows,
    )


def main(folder: str) -> int:
    """The exit code of one rank."""
    return report(lambda emit: _rank(Run.open(folder), emit))


def _rank(run: Run, emit: Emit) -> Event | None:
    decisions = Decisions(**run.manifest["decisions"])
    engine: Engine = ENGINES.get(decisions.engine)()
    result = work(run, decisions, engine, emit)
    engine.close()
    return result if engine.rank == 0 else None


def model_of(recipe: Recipe, decisions: Decisions, folder: Path, loaded: Any = None) -> CausalModel:
    """The base in `folder` with a new adapter; `loaded` as in `build`."""
    check_place(decisions.place)
    return build(
        recipe.model,
        recipe.adapter,
        folder=folder,
        kernels=decisions.kernels,
        recompute=decisions.recompute,
        seed=recipe.train.seed,
        device=torch.device(decisions.place),
        dtype=getattr(torch, decisions.dtype),
        offload=decisions.offload,
        offload_embedding=decisions.offload_embedding,
        offload_activations=decisions.offload_activations,
        recompute_gate_up=decisions.recompute_gate_up,
        unpacked=decisions.unpacked,
        graphs=decisions.graphs,
        graph_price=decisions.graph_price,
        memory=decisions.memory_bytes,
        loaded=loaded,
    )


def _recording(run: Run, trackers: Trackers, emit: Emit) -> Emit:
    """Passes events on, and figures to the trackers and samples to samples.jsonl on the way. A figure that is not
    finite is None to all of them, as it is null in every file."""
    samples, every = Journal(run.samples), run.recipe.run.log_every

    def record(event: Event) -> None:
        event = finite(event)
        figures = {key: value for key, value in event.items() if key != "event"}
        if event["event"] == "evaluation" or (event["event"] == "step" and event["step"] % every == 0):
            trackers.log(figures)
        if event["event"] == "sample":
            samples.log(figures)
        emit(event)

    return record


def _answers_if_room(model: CausalModel, prepared: Prepared, recipe: Recipe, emit: Emit) -> Sequence[Event]:
    """Nothing that is only looked at ends a run."""
    try:
        return _answers(model, prepared, recipe)
    except MemoryPlanError as error:
        emit({"event": "note", "text": f"no answers are sampled this time: {error}"})
        return ()


def _answers(model: CausalModel, prepared: Prepared, recipe: Recipe) -> Sequence[Event]:
    """Greedy answers to the first held-out prompts, beside what was wanted."""
    from luthier.model.generate import SHORTER_OR_LESS, Sampling, generate

    store, decode, tokenizer = prepared.heldout, prepared.encoder.decode, prepared.encoder.tokenizer
    rows = [row for row in range(len(store)) if store.prompts[row] > 0][: recipe.evaluate.samples]
    parts = [(store.example(row)[0].tolist(), int(store.prompts[row])) for row in rows]
    sampling = Sampling(max_new_tokens=recipe.evaluate.generate.max_new_tokens)
    prompts = [ids[:prompt] for ids, prompt in parts]
    asked = {c.origin: c.messages for c in heldout_conversations(prepared.folder)} if rows else {}
    where, stop_ids = [str(store.origin(row)) for row in rows], prepared.encoder.stop_ids
    generations = generate(model, prompts, sampling, stop_ids, where=where, fix=SHORTER_OR_LESS) if prompts else []
    return [
        {
            "row": str(store.origin(row)),
            # Without a user's words, the marks of the template say who speaks where.
            "prompt": _question(asked[store.origin(row)]) or tokenizer.decode(ids[:prompt], control=True),
            "reference": decode(ids[prompt:]),
            "answer": decode(generation.ids),
        }
        for row, (ids, prompt), generation in zip(rows, parts, generations, strict=True)
    ]


def _question(messages: Sequence[Message]) -> str:
    """What the user last said, without the template around it; empty where no user is told apart."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def _result(run: Run, decisions: Decisions, trainer: Trainer, steps: list[Step]) -> dict[str, Any]:
    seconds = sum(step.seconds for step in steps)
    records = [record for record in run.steps() if "loss" in record]
    return {
        "run": str(run.folder),
        "steps": trainer.progress.step,
        "resumed_from": trainer.resumed_from,
        "loss": records[-1]["loss"] if records else None,
        "eval_loss": trainer.progress.best_loss,
        "tokens_per_second": sum(step.tokens for step in steps) / seconds if seconds else 0.0,
        "peak_bytes": max((step.peak_bytes for step in steps), default=0),
        "predicted_peak_bytes": decisions.predicted_peak_bytes,
        "host_peak_bytes": host_peak_bytes(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
