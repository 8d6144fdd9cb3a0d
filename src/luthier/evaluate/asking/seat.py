"""The one model in memory, for all who answer: a base with the adapter of whoever's turn it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier import recipe
from luthier.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.evaluate.asking.subject import Subject
    from luthier.model.causal import CausalModel


class Loaded(NamedTuple):
    """What to attach, the tensors to load into it, and the seed of the start values that some of them are differences
    from."""

    settings: recipe.Adapter
    tensors: dict[str, Tensor]
    seed: int


@dataclass(frozen=True)
class Stored:
    """Trained tensors on disk: an adapter's folder in PEFT's format, or a checkpoint of `run`."""

    run: Run
    folder: Path
    checkpoint: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the file that holds the tensors. Raises CheckpointError for a damaged checkpoint."""
        if self.checkpoint:
            from luthier.train.checkpoint import adapter_digest

            return adapter_digest(self.folder)
        from luthier.adapters.files import WEIGHTS
        from luthier.data.prepare import sha256_of

        return sha256_of(self.folder / WEIGHTS)

    def load(self) -> Loaded:
        """Raises AdapterError or CheckpointError if a file is missing or malformed."""
        if self.checkpoint:
            from luthier.train.checkpoint import read_adapter

            return Loaded(self.run.recipe.adapter, read_adapter(self.folder), self.run.recipe.train.seed)
        from luthier.adapters import files

        return Loaded(*files.load(self.folder), seed=0)


class Seat:
    """Holds at most one model. Subjects that share a seat and a base take turns on the same weights; for another base
    the one that sits there goes first."""

    def __init__(self) -> None:
        self._model: CausalModel | None = None
        self._of: Subject | None = None
        self.reads = 0
        """How often the weights of a base were read."""

    def model(self, subject: Subject) -> CausalModel:
        """The model with the adapter of `subject`. What was given to another subject must not be used any more.

        Raises ModelError or AdapterError if a file of base or adapter is malformed.
        """
        if self._model is not None and self._of is subject:
            return self._model
        from luthier.adapters import files

        loaded, before, self._of = subject.stored.load(), self._of, None
        with files.fitting(subject.stored.folder, subject.facts["base"], subject.facts["revision"]):
            if before is None or before.base != subject.base or not self._switch(subject, loaded):
                self._let_go()
                self.reads += 1
                self._model = _built(subject, loaded)
            assert self._model is not None
            assert self._model.adapter is not None
            self._model.adapter.load_state_dict(loaded.tensors)
        self._of = subject
        return self._model

    def holds(self, subject: Subject) -> bool:
        """Whether the model sits there as `subject` wants it."""
        return self._model is not None and self._of is subject

    def _let_go(self) -> None:
        """Frees the model: two of them may be more than the memory."""
        import gc

        import torch

        self._model = None
        gc.collect()  # a model holds itself in cycles
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def _switch(self, subject: Subject, loaded: Loaded) -> bool:
        """Makes room for another adapter on the weights that are there, if that can be done."""
        from luthier.adapters.lora import Lora, take
        from luthier.adapters.method import attach
        from luthier.model.causal import CausalModel

        model = self._model
        assert model is not None
        assert model.adapter is not None
        if model.adapter.settings == loaded.settings and model.kernels == subject.kernels:
            return True
        if not (isinstance(model.adapter, Lora) and _leaves_the_base(model.adapter.settings, loaded.settings)):
            return False
        if model.streamed is not None and _reads_weights(loaded.settings):
            return False
        take(model.module, model.adapter)
        self._model = None
        adapter, weights = attach(model.module, loaded.settings, loaded.seed), model.streamed
        self._model = CausalModel(model.module, adapter, kernels=subject.kernels, streamed=weights, memory=model.memory)
        return True


def _leaves_the_base(*adapters: Any) -> bool:
    """Whether they can be taken off a model without a trace, and need nothing but it to be put on."""
    return all(
        isinstance(one, recipe.Lora)
        and one.bias == "none"
        and not one.modules_to_save
        and not one.new_tokens
        and one.init != "loftq"
        for one in adapters
    )


def _reads_weights(adapter: Any) -> bool:
    """Whether a LoRA starts from weights, which are not there while they wait in host memory."""
    return bool(adapter.dora) or adapter.init in ("pissa", "olora")


def _built(subject: Subject, loaded: Loaded) -> CausalModel:
    import torch

    from luthier.model.causal import build
    from luthier.model.load import model_folder

    chosen = subject.run.recipe
    if isinstance(chosen.run.threads, int):
        torch.set_num_threads(chosen.run.threads)
    return build(
        chosen.model,
        loaded.settings,
        folder=model_folder(chosen.model),
        kernels=subject.kernels,
        recompute=subject.fit.offload > 0,  # as the module has to while gradients are made: here there are none
        seed=loaded.seed,
        device=torch.device(subject.place),
        dtype=getattr(torch, subject.facts["dtype"]),
        offload=subject.fit.offload,
        offload_embedding=subject.fit.offload_embedding,
        memory=subject.fit.memory,
    )
