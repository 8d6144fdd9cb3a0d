"""A trained run as something that answers: one load of the base, the adapter on or off, the template of training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import RunError
from luthier.evaluate.suite import digest
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
        encoder: that of training, template included.
        facts: what decides its answers besides the prompt: base, revision or weights, adapter, and the precision that
            training decided on.
    """

    run: Run
    encoder: Encoder
    facts: dict[str, Any]

    @classmethod
    def open(cls, run: Run) -> Subject:
        """Raises RunError if `run` is not trained, ModelError if its base cannot be had."""
        if not run.finished:
            raise RunError("has no adapter yet", where=str(run.folder), fix=f"finish it: luthier train {run.folder}")
        from luthier.adapters.files import WEIGHTS
        from luthier.model.load import dtype_name, load_tokenizer, loaded_revision, model_folder

        model = run.recipe.model
        folder = model_folder(model)
        facts = {
            "base": model.base,
            "revision": loaded_revision(folder),
            "weights": _weights(folder),
            "adapter": _sha256(run.adapter / WEIGHTS),
            "dtype": _decided(run, "dtype") or dtype_name(model, "cpu", machine())[0],
            "quantize": model.quantize and model.quantize.model_dump(mode="json"),
            "norms": model.norms,
        }
        return cls(run, _encoder(run, load_tokenizer(folder, run.recipe.adapter)), facts)

    @cached_property
    def model(self) -> CausalModel:
        """The base with the adapter. Raises ModelError or AdapterError if a file of either is malformed."""
        import torch

        from luthier.adapters import files
        from luthier.model.causal import build
        from luthier.model.load import model_folder

        recipe = self.run.recipe
        if isinstance(recipe.run.threads, int):
            torch.set_num_threads(recipe.run.threads)
        adapter, tensors = files.load(self.run.adapter)
        with files.fitting(self.run.adapter, recipe.model.base, self.facts["revision"]):
            model = build(
                recipe.model,
                adapter,
                folder=model_folder(recipe.model),
                kernels=_kernels(self.run),
                recompute=False,
                seed=0,
                device=torch.device(self.place),
                dtype=getattr(torch, self.facts["dtype"]),
            )
            assert model.adapter is not None
            model.adapter.load_state_dict(tensors)
        return model

    @cached_property
    def place(self) -> str:
        """Where training ran, if this machine has it, else the CPU."""
        import torch

        here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        place: str = _decided(self.run, "place") or "cpu"
        return place if here[place] else "cpu"

    @contextmanager
    def side(self, side: Side) -> Iterator[None]:
        """Inside, `model` is that side."""
        import torch

        assert self.model.adapter is not None
        with torch.inference_mode(), self.model.adapter.disabled() if side == "base" else nullcontext():
            yield

    def identity(self, side: Side) -> dict[str, Any]:
        """The facts that decide that side's answers: the base does not depend on the adapter."""
        return {name: fact for name, fact in self.facts.items() if side == "tuned" or name != "adapter"}


def _kernels(run: Run) -> Literal["reference", "eager"]:
    """Our block where training ran on it; nothing is compiled for an evaluation."""
    return "eager" if _decided(run, "kernels") in ("eager", "compiled") else "reference"


def _decided(run: Run, what: str) -> Any:
    """What training decided, so that evaluation need not decide again, perhaps on another machine."""
    return run.manifest.get("decisions", {}).get(what)


def _encoder(run: Run, tokenizer: Tokenizer) -> Encoder:
    """The encoder of training. Its template travels with the adapter; the run's data folder has the same."""
    from luthier.adapters.files import load_extra
    from luthier.data.templates import Template
    from luthier.data.tokens import Encoder

    made = load_extra(run.adapter).get("template") or read_json(run.data / "template.json")
    return Encoder(tokenizer, Template.from_spec(made["template"], tokenizer), made["supervise"], made["system"])


def _weights(folder: Path) -> str:
    """Tells one set of weights from another without reading gigabytes: names, sizes and times of their files."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
