"""A tiny Llama and rows for it, made in code: what the tests of training share."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.adapters.method import attach
from luthier.data.conversation import Example, Origin
from luthier.data.store import TokenStore
from luthier.data.stream import Micro, Stream
from luthier.model.causal import CausalModel, Kernels
from luthier.model.graphs import backward
from luthier.model.quantize import quantize_module
from luthier.recipe import Lora, Recipe
from luthier.runs import Run
from luthier.train.engines import Engine
from luthier.train.engines.local import Local
from luthier.train.loop import Trainer

VOCAB = 64
WORDS = [*map(str, range(11)), "what", "is", "plus", "more"]


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


def model(
    recipe: Recipe, *, kernels: Kernels = "reference", recompute: bool = False, dtype: torch.dtype = torch.float32
) -> CausalModel:
    """A tiny Llama of random weights, the same each time, with the recipe's adapter."""
    from transformers import LlamaForCausalLM

    from luthier.model import attention

    torch.manual_seed(0)
    module = LlamaForCausalLM._from_config(config(), attn_implementation=attention.NAME).eval().to(dtype)
    return CausalModel(module, attach(module, recipe.adapter, recipe.train.seed), kernels=kernels, recompute=recompute)


def packed(settings: Any) -> CausalModel:
    """A tiny Llama whose linear layers were packed before its adapter came."""
    from transformers import LlamaForCausalLM

    from luthier.model import attention

    torch.manual_seed(0)
    module = LlamaForCausalLM._from_config(config(), attn_implementation=attention.NAME).eval()
    quantize_module(module, settings, torch.float32)
    return CausalModel(module, attach(module, Lora(rank=4, alpha=8), seed=3))


def speaking(made: CausalModel) -> CausalModel:
    """Its adapter changes what it says."""
    generator = torch.Generator().manual_seed(1)
    for layer in made.adapter.layers.values():  # type: ignore[union-attr]
        layer.B.data.normal_(0, 0.5, generator=generator)
    return made


class Around:
    """What a test puts in the place of a model whose loss it changes."""

    loss: Any

    def ready(self, micro: Micro) -> Micro:
        return micro

    def accumulate(self, micro: Micro, scale: float) -> Tensor:
        return backward(self.loss(micro), scale)

    def expect(self, coming: Any) -> None: ...

    def keep_less(self, free: Any) -> bool:
        return False


def base(folder: Path) -> Path:
    """The tiny Llama as a model folder, with a tokenizer of whole words and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<|start|>", "<|end|>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|start|>", eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def sums(path: Path, count: int = 24) -> Path:
    """A file of questions and answers in the words that the tokenizer of `base` knows."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        a, b = rng.randint(0, 5), rng.randint(0, 5)
        question = " ".join(["what is", WORDS[a], "plus", WORDS[b], *["more"] * rng.randint(0, 9)])
        lines.append(json.dumps({"prompt": question, "completion": WORDS[a + b]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder: Path, *overrides: str) -> Run:
    """A run of the tiny Llama on the sums, both on disk in `folder`."""
    if not (folder / "base").exists():
        sums(folder / "sums.jsonl")
        base(folder / "base")
    tree = f"""
        model: {{base: {folder / "base"}, compute: float32}}
        data: {{train: [{{path: sums.jsonl}}], heldout: {{rows: 4}}, clean: {{duplicates: keep}}, length: 64}}
        adapter: {{rank: 4, dropout: 0.1}}
        train: {{lr: 0.01, samples_per_step: 4, epochs: 2}}
        evaluate: {{samples: 1, forgetting: false, generate: {{max_new_tokens: 4}}}}
        run: {{dir: {folder / "run"}, memory: 4GiB, kernels: reference, engine: local, threads: 1}}
    """
    return Run.create(Recipe.parse(tree, *overrides), root=folder)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Inside, no file can be written beyond `size` bytes: what a full disk does, and needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def deadly(folder: Path, module: str, cage: Path | None = None) -> Path:
    """A folder that, on PYTHONPATH, has each `python -m MODULE` killed as it starts, after a line in its `starts`: by
    itself, or in a `cage` by the kernel, for want of memory."""
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    if cage is not None:
        kill = f"open({str(cage / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); b'x' * (64 << 20)"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"""
import os, signal, sys
if {module!r} in sys.orig_argv:
    with open({str(folder / "starts")!r}, "a") as starts:
        starts.write("started\\n")
    {kill}
""")
    return folder


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
