"""A trained run as something that answers: one load of the base, the adapter on or off, the template of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier import recipe
from luthier.errors import RunError
from luthier.evaluate.asking.fit import Fit, fit, usable
from luthier.evaluate.asking.neighbours import trainings
from luthier.evaluate.asking.seat import Seat, Stored
from luthier.evaluate.asking.suite import digest
from luthier.machine import machine
from luthier.runs import Run, read_json

if TYPE_CHECKING:
    from luthier.data.tokens import Encoder, Tokenizer
    from luthier.model.causal import CausalModel

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


@dataclass(frozen=True)
class Subject:
    """Opening one reads no weights: `model` is loaded when it is first asked for, and holds both sides.

    Attributes:
        run: gives the recipe's `model`, how a choice is written, and what training decided.
        encoder: that of training, template included.
        facts: what decides its answers besides the prompt: base, revision or weights, adapter, and the precision that
            training decided on.
        stored: where the tuned side's tensors are, and `adapter` what they are.
        seat: where the model sits; subjects that share it share the memory of one model.
    """

    run: Run
    encoder: Encoder
    facts: dict[str, Any]
    stored: Stored
    adapter: recipe.Adapter
    seat: Seat = field(default_factory=Seat)

    @classmethod
    def open(cls, run: Run) -> Subject:
        """Raises RunError if `run` is not trained, ModelError if its base cannot be had."""
        if not run.finished:
            raise RunError("has no adapter yet", where=str(run.folder), fix=_unfinished(run))
        return cls.of(run, Stored(run, run.adapter), run.recipe.adapter, Seat())

    @classmethod
    def of(cls, run: Run, stored: Stored, adapter: recipe.Adapter, seat: Seat) -> Subject:
        """A subject with the tensors of `stored`, for an adapter as `adapter` says, on the base and under the decisions
        of `run`. Raises ModelError if the base cannot be had."""
        from luthier.model.load import load_tokenizer, loaded_revision, model_folder

        model = run.recipe.model
        folder = model_folder(model)
        facts = {
            "base": model.base,
            "revision": loaded_revision(folder),
            "weights": _weights(folder),
            "adapter": stored.digest,
            "dtype": _dtype(run),
            "quantize": model.quantize and model.quantize.model_dump(mode="json"),
            "norms": model.norms,
        }
        return cls(run, _encoder(run, stored.folder, load_tokenizer(folder, adapter)), facts, stored, adapter, seat)

    @property
    def model(self) -> CausalModel:
        """The base with the adapter. Raises ModelError or AdapterError if a file of either is malformed."""
        return self.seat.model(self)

    @property
    def sits(self) -> bool:
        """Whether `model` is there already."""
        return self.seat.holds(self)

    @cached_property
    def base(self) -> dict[str, Any]:
        """What tells the loaded base from another: two spellings of one folder are the same base."""
        from luthier.model.load import model_folder

        facts = {name: fact for name, fact in self.facts.items() if name not in ("base", "adapter")}
        return facts | {"folder": str(model_folder(self.run.recipe.model).resolve()), "place": self.place}

    @cached_property
    def place(self) -> str:
        """Where training ran, if this machine has it, else the CPU."""
        return _place(self.run)

    @cached_property
    def fit(self) -> Fit:
        """What of the base is in host memory while it answers. Nothing but on a GPU."""
        if self.place != "cuda":
            return Fit()
        from luthier.model.load import model_folder

        owed = sum(training.owed for training in trainings([self.run]) if training.place == "cuda")
        recipe = self.run.recipe.model_copy(update={"adapter": self.adapter})
        config, kernels = read_json(model_folder(recipe.model) / "config.json"), _decided(self.run, "kernels")
        return fit(recipe, config, usable(recipe, machine()), dtype=self.facts["dtype"], kernels=kernels, owed=owed)

    @property
    def kernels(self) -> Literal["reference", "eager"]:
        """Our block where training ran on it, unless it cannot stream these weights; nothing is compiled for an
        evaluation."""
        ours = _decided(self.run, "kernels") in ("eager", "compiled")
        return "eager" if ours and (self.facts["quantize"] or not self.fit.offload) else "reference"

    @contextmanager
    def side(self, side: Side) -> Iterator[None]:
        """Inside, `model` is that side."""
        import torch

        adapter = self.model.adapter
        assert adapter is not None
        with torch.inference_mode(), adapter.disabled() if side == "base" else nullcontext():
            yield

    def identity(self, side: Side) -> dict[str, Any]:
        """The facts that decide that side's answers: the base does not depend on the adapter."""
        return {name: fact for name, fact in self.facts.items() if side == "tuned" or name != "adapter"}


def _unfinished(run: Run) -> str:
    newest = max(run.checkpoints.glob("step-" + "[0-9]" * 8), default=None)
    finish = f"finish it: luthier train {run.folder}"
    return f"{finish}; or take a checkpoint: {newest}" if newest else finish


def _place(run: Run) -> str:
    place: str = _decided(run, "place") or "cpu"
    if place == "cpu":
        return place
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return place if here[place] else "cpu"


def _dtype(run: Run) -> str:
    """That of training; elsewhere than training ran, what that place makes of it."""
    from luthier.model.load import dtype_name

    decided: str | None = _decided(run, "dtype")
    place = _place(run)
    if decided and place == _decided(run, "place"):
        return decided
    return dtype_name(decided or run.recipe.model.compute, place, machine())[0]


def _decided(run: Run, what: str) -> Any:
    """What training decided, so that evaluation need not decide again, perhaps on another machine."""
    return run.manifest.get("decisions", {}).get(what)


def _encoder(run: Run, adapter: Path, tokenizer: Tokenizer) -> Encoder:
    """The encoder of training. Its template travels with an adapter; the run's data folder has the same."""
    from luthier.adapters.files import load_extra
    from luthier.data.templates import Template
    from luthier.data.tokens import Encoder

    made = load_extra(adapter).get("template") or read_json(run.data / "template.json")
    return Encoder(tokenizer, Template.from_spec(made["template"], tokenizer), made["supervise"], made["system"])


def _weights(folder: Path) -> str:
    """Tells one set of weights from another without reading gigabytes: names, sizes and times of their files."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])[:16]
