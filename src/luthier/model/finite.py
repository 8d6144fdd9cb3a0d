"""Whether a result that is not a finite number comes from the base's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from luthier.errors import ModelError, NotFiniteError
from luthier.model.folder import shards


@contextmanager
def blaming_weights(folder: Path, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the base in `folder` is used in `dtype`. What numbers that are not finite bring about (a loss, a start
    from the weights, a token that seems to see later ones) is then said of the weight that holds some, if one does.

    A base is read through only when something went wrong: some have such values in rows that no token reaches.
    """
    try:
        yield
    except (NotFiniteError, ModelError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        if (found := _not_finite(folder, dtype)) is not None:
            raise found from error
        raise


def _not_finite(folder: Path, dtype: torch.dtype) -> ModelError | None:
    for path in shards(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if error := _problem(file.get_tensor(name), name, path, dtype):
                    return error
    return None


def _problem(weight: torch.Tensor, name: str, path: Path, dtype: torch.dtype) -> ModelError | None:
    if not weight.is_floating_point() or bool(weight.to(dtype).isfinite().all()):
        return None
    odd = int((~weight.float().isfinite()).sum())
    if not odd:
        what, name_of = f"the base's {name} has values that are too large for", str(dtype).removeprefix("torch.")
        return ModelError(f"{what} {name_of}", where=str(path), fix="set model.compute=bfloat16 or float32")
    what = f"the base itself holds values that are not finite: {odd:,} of {weight.numel():,} in {name}"
    return ModelError(what, where=str(path), fix="fetch the model again, or take another base")
