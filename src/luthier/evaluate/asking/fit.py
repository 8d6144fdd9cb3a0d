"""How a base fits a GPU while it answers: what of its weights stays in host memory where the GPU has no room for them.

Training decides the same for its steps (`plan.py`), but keeps other things beside the weights. Weights that stream come
once a step, however many rows it answers: so either none of the blocks stream, or all, which leaves room for most rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, product
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.kernels.sizes import power_of_2
from luthier.plan import budget, context_bytes
from luthier.recipe import Recipe

if TYPE_CHECKING:
    from luthier.machine import Gpu, Machine
    from luthier.model.causal import CausalModel, Kernels

ROWS = 16
"""Longest rows that there should be room for: answering fewer takes a GPU about as long."""
LOGIT_ROWS = 512
"""Rows of logits that are held together."""


@dataclass(frozen=True)
class Fit:
    """What a base takes of a GPU, in bytes, and what of it is in host memory.

    Attributes:
        offload: blocks whose weights come as they are needed.
        fixed: all but keys and values, the driver's context included.
        token: keys and values of a token.
        memory: what torch may take; None: all that is free.
    """

    offload: int = 0
    offload_embedding: bool = False
    fixed: int = 0
    token: int = 0
    memory: int | None = None


def usable(recipe: Recipe, facts: Machine) -> Machine:
    """`facts` with that of the first GPU's memory as free which answering may take: what is free by `run.memory`, or
    all but a small share. What this process holds counts as free, since that is let go, or is what is asked about."""
    if not facts.gpus:
        return facts
    gpu, *others = facts.gpus
    mine = replace(facts, gpus=(replace(gpu, free=min(gpu.total, gpu.free + _held_here(gpu))),))
    free = min(budget(recipe.run.memory, mine, "cuda"), mine.gpus[0].free)
    return replace(facts, gpus=(replace(gpu, free=free), *others))


def _held_here(gpu: Gpu) -> int:
    """Bytes of the GPU that this process holds."""
    import torch

    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return context_bytes(gpu) + torch.cuda.memory_reserved() if begun else 0


def fit(recipe: Recipe, config: dict[str, Any], facts: Machine, *, dtype: str, kernels: Kernels, owed: int = 0) -> Fit:
    """How the recipe's base and adapter fit the first GPU of `facts`.

    What `run.offload` and `run.offload_embedding` say is done. Where they say `auto`, the weights stay where they are
    if what is usable holds them beside `ROWS` rows as long as training's; else what can goes to host memory, first the
    embedding, then the blocks.

    Args:
        config: the model's `config.json`.
        facts: of the machine, as `usable` gives them.
        dtype: of the products, as in torch.
        kernels: those of training; with `compiled` ones a kernel can read the embedding in host memory.
        owed: bytes of the GPU that a training run may still take.

    Raises ModelError or AdapterError where `trace.outline` does.
    """
    of = _bytes(*_texts(recipe, config), dtype, kernels, facts.gpus[0].capability)
    context, allowed = context_bytes(facts.gpus[0]), facts.gpus[0].free - owed
    rows = ROWS * (recipe.data.length + recipe.evaluate.generate.max_new_tokens) * of.token
    memory = None if recipe.run.memory == "auto" else allowed - context

    def made(offload: int, embedding: bool) -> Fit:
        return Fit(offload, embedding, context + of.on_gpu(offload, embedding), of.token, memory)

    found = [made(*choice) for choice in _choices(recipe, of, host=budget("auto", facts))]
    return next((one for one in found if one.fixed + rows <= allowed), min(found, key=lambda one: one.fixed))


class _Bytes(NamedTuple):
    """Of a base with its adapter."""

    weights: int
    blocks: int  # their number
    block: int  # what of a block can stream; 0: none can
    embedding: int  # 0: it is needed whole on the GPU
    passing: int  # what a pass takes besides keys and values
    token: int

    def on_gpu(self, offload: int, embedding: bool) -> int:
        from luthier.model.offload import PLACES

        elsewhere = max(0, offload - PLACES) * self.block + (self.embedding if embedding else 0)
        return self.weights - elsewhere + self.passing

    def pinned(self, offload: int, embedding: bool) -> int:
        """In host memory, of which torch pins large pieces as powers of two."""
        return offload * power_of_2(self.block) + (power_of_2(self.embedding) if embedding else 0)


def _choices(recipe: Recipe, of: _Bytes, host: int) -> Iterator[tuple[int, bool]]:
    """Numbers of blocks that stream, and whether the embedding stays in host memory: the fastest first."""
    offload, embedding = recipe.run.offload, recipe.run.offload_embedding
    blocks = [0, of.blocks] if of.block else [0]
    streams = [min(offload, blocks[-1])] if offload != "auto" else blocks
    leaves = [embedding and of.embedding > 0] if embedding != "auto" else [False, True] if of.embedding else [False]
    for number, choice in enumerate(product(streams, leaves)):
        if number == 0 or of.pinned(*choice) <= host:
            yield choice


def _texts(recipe: Recipe, config: dict[str, Any]) -> tuple[str, str]:
    return recipe.model_dump_json(include={"model", "adapter", "data", "train"}), json.dumps(config)


@lru_cache(maxsize=8)
def _bytes(settings: str, config: str, dtype: str, kernels: Kernels, capability: tuple[int, int]) -> _Bytes:
    """Found on a model without data. The decoder has a copy of the adapter in the dtype of the products."""
    import torch

    from luthier.model.generate import bytes_per_token
    from luthier.model.offload import blocks_name, embedding_bytes, streamed_bytes
    from luthier.model.trace import outline

    recipe, products = Recipe.model_validate_json(settings), getattr(torch, dtype)
    options: Any = {"kernels": kernels, "recompute": False, "capability": capability}
    model = outline(json.loads(config), recipe.model, recipe.adapter, dtype=products, **options)
    blocks: Any = model.module.get_submodule(blocks_name(model.module))
    assert model.adapter is not None
    copies = sum(parameter.numel() for parameter in model.adapter.parameters()) * products.itemsize
    embedding = embedding_bytes(model.module) if kernels == "compiled" else 0
    weights, passing = _held(model) + copies, _passing(model, packed=recipe.model.quantize is not None)
    return _Bytes(weights, len(blocks), streamed_bytes(blocks[0]), embedding, passing, bytes_per_token(model))


def _held(model: CausalModel) -> int:
    """Bytes of all tensors of a model, those that share memory once."""
    storages = (x.untyped_storage() for x in chain(model.module.parameters(), model.module.buffers()))
    held: dict[int, int] = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(held.values())


def _passing(model: CausalModel, *, packed: bool) -> int:
    """Of the shortest pass in which prompts are read, and of the logits after them; of packed weights also the two
    largest that a block unpacks for one product, and one that is unpacked by itself."""
    from luthier.model.fast import PREFILL_TOKENS, token_bytes

    config, size = model.module.config.get_text_config(), model.dtype.itemsize
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    unpacked = 3 * hidden * inner * size if packed else 0
    logits: int = LOGIT_ROWS * config.vocab_size * (4 + size)
    return PREFILL_TOKENS * token_bytes(hidden, inner, size) + logits + unpacked
