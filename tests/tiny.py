"""A tiny Llama and rows for it, made in code: what the tests of training share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from luthier.adapters.lora import attach
from luthier.data.conversation import Example, Origin
from luthier.data.store import TokenStore
from luthier.data.stream import Stream
from luthier.model.causal import CausalModel
from luthier.recipe import Recipe
from luthier.train.engines import Engine
from luthier.train.engines.local import Local
from luthier.train.loop import Trainer

VOCAB = 64


def rows(folder: Path, count: int = 24, seed: int = 0, longest: int = 24) -> TokenStore:
    """Rows that can be learned: each token is the one before plus a number that the row begins with."""
    rng = random.Random(seed)
    return TokenStore.write(folder, [_row(rng, longest, number) for number in range(count)])


def _row(rng: random.Random, longest: int, number: int) -> Example:
    length, prompt, stride = rng.randint(6, longest), rng.randint(2, 4), rng.randint(1, 3)
    ids = [stride, *((7 + stride * i) % VOCAB for i in range(length - 1))]
    return Example(ids, [0] * prompt + [1] * (length - prompt), prompt, Origin("rows.jsonl", number + 1))


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


def model(recipe: Recipe, *, recompute: bool = False) -> CausalModel:
    """A tiny Llama of random weights, the same each time, with the recipe's adapter."""
    from transformers import LlamaForCausalLM

    from luthier.model import attention

    torch.manual_seed(0)
    module = LlamaForCausalLM._from_config(config(), attn_implementation=attention.NAME).eval()
    return CausalModel(module, attach(module, recipe.adapter, recipe.train.seed), recompute=recompute)


def recipe(*overrides: str) -> Recipe:
    base = "model: {base: tiny}\ndata: {train: [{path: rows.jsonl}]}\nadapter: {rank: 4, dropout: 0.1}\n"
    return Recipe.parse(base + "train: {lr: 0.01, samples_per_step: 8}", *overrides)


def trainer(
    folder: Path,
    chosen: Recipe,
    *,
    engine: Engine | None = None,
    micro_tokens: int = 64,
    causal: Any = None,
    held: int = 0,
    **options: Any,
) -> Trainer:
    """A trainer over `rows`, whose run folder is `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train = chosen.train
    store, heldout = rows(folder / "train"), rows(folder / "heldout", held, seed=1)
    stream = Stream(store, None, train.seed, train.samples_per_step, epochs=train.epochs, max_steps=train.max_steps)
    return Trainer(
        chosen,
        causal or model(chosen),
        stream,
        heldout,
        engine=engine or Local(),
        folder=folder,
        micro_tokens=micro_tokens,
        **options,
    )
