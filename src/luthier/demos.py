"""The four systems at toy size: each shipped recipe as it is, but for base, data and the size of the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier.errors import UsageError
from luthier.model import embedded
from luthier.registry import nearest


@dataclass(frozen=True)
class Demo:
    """One system's demonstration.

    Attributes:
        recipe: the name of the shipped recipe.
        rows: the files of toy rows, as FORMAT of their part (`train` or `test`).
        toy: the architecture of `model/toy.py` that takes the base's place; None: the embedded model does.
        sizes: further overrides, of how much is done and never of what.
        study: numbers of rows that its study of the data's size trains on; none: it has no such study.
    """

    recipe: str
    rows: str
    toy: str | None
    sizes: tuple[str, ...]
    study: tuple[int, ...] = ()

    def overrides(self, name: str, progress: Callable[[str], None]) -> list[str]:
        """What differs from the full size, as `section.key=value`. Makes the toy model if it is not there yet."""
        from luthier.model.toy import toy_folder

        base = toy_folder(self.toy, progress) if self.toy else embedded.NAME
        data = [f"data.{part}=[{{path: {self.rows.format(part)}}}]" for part in ("train", "test")]
        return [f'model.base="{base}"', *data, *self.sizes, f"run.dir=runs/demo-{name}"]

    @property
    def meaning(self) -> str:
        """What its verdict is worth."""
        if self.toy:
            return (
                f"This exercise checks the path, line by line, on a {self.toy} model of random weights: its answers "
                "are noise and its verdict means nothing. `luthier demo llama` and `luthier demo` use a real model."
            )
        return (
            "This exercise checks the path on a small real model and a few rows, far too few for a verdict to mean "
            "much. `luthier demo` learns a task that can be measured."
        )


_SMALL = (
    "run.engine=local",
    "run.log_every=1",
    "run.save.every=3",
    "evaluate.forgetting=false",
)  # processes would take longer to start than to work

DEMOS = {
    "falcon": Demo(
        "falcon-7b-mental-health",
        "toy-conversations-{}.jsonl",
        "falcon",
        (
            "data.heldout.rows=3",
            "train.samples_per_step=8",
            "train.max_steps=6",
            "evaluate.every=3",
            "evaluate.generate.max_new_tokens=24",
            *_SMALL,
        ),
    ),
    "phi": Demo(
        "phi-2-dialogsum",
        "toy-dialogues-{}.jsonl",
        "phi",
        (
            "data.heldout.rows=3",
            "train.max_steps=6",
            "evaluate.every=3",
            "evaluate.generate.max_new_tokens=24",
            *_SMALL,
        ),
    ),
    "llama": Demo(
        "llama-3.1-8b-science-exam",
        "toy-science-{}.csv",
        None,
        (
            "data.heldout.rows=2",
            "train.samples_per_step=2",
            "train.max_steps=4",
            "train.warmup=1",
            "evaluate.every=4",
            "evaluate.samples=0",
            "evaluate.rows=4",
            *_SMALL,
        ),
        study=(2, 4, 8),
    ),
    "chatglm": Demo(
        "chatglm-6b-alpaca",
        "toy-instructions-{}.jsonl",
        "glm",
        (
            "data.heldout.rows=3",
            "train.samples_per_step=8",
            "train.max_steps=6",
            "train.warmup=1",
            "evaluate.every=3",
            "evaluate.generate.max_new_tokens=24",
            *_SMALL,
        ),
    ),
}


def find(name: str) -> Demo:
    """The demonstration called `name`. Raises UsageError with the nearest names."""
    if name not in DEMOS:
        raise UsageError(f"unknown demonstration '{name}'", fix=nearest(name, list(DEMOS)))
    return DEMOS[name]
