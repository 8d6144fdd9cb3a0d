"""How rows are laid side by side for a family: packed, where its code keeps the rows of a pack apart, else padded.

Which of the two is found by trying it on the model itself, on two short rows: packed, each must have the hidden states
that it has alone. The answer depends on the model alone, never on a timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.errors import ModelError
from luthier.model import attention
from luthier.model.head import accepted, difference
from luthier.model.quantize import unrounded

if TYPE_CHECKING:
    from luthier.data.stream import Micro

Layout = Literal["packed", "padded"]
FILLED = 0.75  # the least share of a rectangle's longest row that the others in it fill
# Relative to the norm of a token's hidden states: rounding, twice. A row that sees another one, or has its positions
# counted on, is off by a multiple. The second is for one shape with other tokens beside it, where rounding is alike.
ALONE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
BESIDE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}

Run = Callable[[dict[str, Any]], Tensor]
"""Arguments of a forward pass to what comes out of it, [B, T, H]."""


def packed(module: Any, ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """Arguments of a module's forward for one row of segments, to be run inside `attention.packed`: ids [T]."""
    return accepted(
        module, input_ids=ids[None], position_ids=positions[None], attention_mask=torch.ones_like(ids)[None]
    )


def padded(module: Any, ids: Tensor) -> dict[str, Any]:
    """Arguments of a module's forward for rows [B, L] that are padded on the right, see `side_by_side`.

    There is no mask: nothing that is wanted sees what comes after it, and positions count from the left.
    """
    return accepted(module, input_ids=ids)


@dataclass(frozen=True)
class Rectangle:
    """Some segments of a micro-batch as rows of one length."""

    ids: Tensor  # int64 [B, L]
    samples: Tensor  # int64 [B·L]: the sample of each token
    positions: Tensor  # int64 [B·L]
    places: Tensor  # int64 [S']: where in [B·L] the rectangle's share of the micro-batch's rows lies
    rows: Tensor  # int64 [S']: which of the micro-batch's rows those are


def side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Rows of tokens as [B, L], each padded on the right with its own last token: no token of text means padding to any
    family, as special ones do."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


def rectangles(micro: Micro) -> list[Rectangle]:
    """The segments grouped by length, so that each fills at least `FILLED` of its rectangle."""
    bounds = torch.tensor(micro.bounds)
    lengths = bounds.diff()
    order = lengths.argsort(descending=True, stable=True).tolist()
    groups: list[list[int]] = []
    for segment in order:
        if not groups or lengths[segment] < FILLED * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(segment)
    owners = torch.searchsorted(bounds, micro.rows.cpu(), right=True) - 1
    return [_rectangle(micro, group, owners) for group in groups]


def _rectangle(micro: Micro, group: Sequence[int], owners: Tensor) -> Rectangle:
    device = micro.ids.device
    ids = side_by_side([micro.ids[micro.bounds[s] : micro.bounds[s + 1]] for s in group])
    count, length = ids.shape
    line = torch.full((len(micro.bounds) - 1,), -1)
    line[list(group)] = torch.arange(count)
    rows = (line[owners] >= 0).nonzero()[:, 0]
    starts = torch.tensor(micro.bounds)[owners[rows]]
    return Rectangle(
        ids=ids,
        samples=micro.samples[torch.tensor(group, device=micro.samples.device)].repeat_interleave(length),
        positions=torch.arange(length, device=device).repeat(count),
        places=line[owners[rows]].to(device) * length + micro.rows[rows.to(device)] - starts.to(device),
        rows=rows.to(device),
    )


def find(module: Any, run: Run, vocabulary: int, device: torch.device) -> Layout:
    """The layout of a module, probed with `run`. A module that is padded is left with transformers' own attention, by
    which the truth is found, too: some families ask for it by name.

    Raises ModelError for a module that sees what comes after a token, or whose rows change each other: its loss would
    mean nothing.
    """
    if device.type == "meta":
        return "packed"
    one, other, changed = (_tokens(length, vocabulary, device) for length in (7, 11, 5))
    changed = torch.cat([changed, one[len(changed) :]])
    ours = module.config._attn_implementation == attention.NAME
    _use_theirs(module)
    # LLM.int8() rounds by all rows of a product; forty layers on, that looks like a leak.
    with torch.no_grad(), unrounded(module):
        dtype = module.get_input_embeddings()(one).dtype  # of the products; norms and head may be finer
        alone = [run(padded(module, ids[None]))[0] for ids in (one, other)]
        if not _is_causal(module, run, (one, other), alone, dtype):
            what = "a token of this model sees those that come after it, or those of another row"
            raise ModelError(what, fix="if it is an encoder, set is_decoder: true in its config.json")
        if ours:
            module.set_attn_implementation(attention.NAME)
        if (ours or attention.calls_torch(module)) and _is_isolated(module, run, (one, other, changed), alone, dtype):
            return "packed"
        _use_theirs(module)
    return "padded"


def _use_theirs(module: Any) -> None:
    """Gives a module of our attention the best of transformers' own that its family takes."""
    if module.config._attn_implementation == attention.NAME:
        try:
            module.set_attn_implementation("sdpa")
        except ValueError:
            module.set_attn_implementation("eager")


def _is_causal(module: Any, run: Run, rows: Sequence[Tensor], alone: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether rows that are padded on the right are the rows themselves."""
    made = run(padded(module, side_by_side(rows)))
    return all(_near(out[: len(own)], own, ALONE[dtype]) for out, own in zip(made, alone, strict=True))


def _is_isolated(module: Any, run: Run, rows: Sequence[Tensor], alone: Sequence[Tensor], dtype: torch.dtype) -> bool:
    one, other, changed = rows
    try:
        together, beside = (_run_packed(module, run, (first, other)) for first in (one, changed))
    except Exception:  # each family's code has its own way of refusing what it was not written for
        return False
    own = [together[start:end] for start, end in pairwise((0, len(one), len(one) + len(other)))]
    alike = all(_near(made, wanted, ALONE[dtype]) for made, wanted in zip(own, alone, strict=True))
    return alike and _near(beside[len(one) :], own[1], BESIDE[dtype])


def _run_packed(module: Any, run: Run, rows: Sequence[Tensor]) -> Tensor:
    positions = torch.cat([torch.arange(len(ids), device=ids.device) for ids in rows])
    bounds = (0, *torch.tensor([len(ids) for ids in rows]).cumsum(0).tolist())
    with attention.packed(bounds):
        return run(packed(module, torch.cat(list(rows)), positions))[0]


def _near(one: Tensor, other: Tensor, limit: float) -> bool:
    return one.shape == other.shape and difference(one, other) <= limit


def _tokens(length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Tokens that are all different, from the middle of the vocabulary: special ones lie at its ends."""
    return (torch.arange(length, device=device) * 3 + length + vocabulary // 3) % vocabulary
