"""The random-weight models that all peers load, in the formats that are usual on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from random_model import SHAPES, write_model

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 640,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_BEGIN, _END, _PAD = "<|begin|>", "<|end|>", "<|pad|>"


def prepare(folder: Path, shape: str, *, nf4: bool, dry: bool, layers: int | None = None) -> Path:
    """The folder of a model, written unless it is there. `layers`: fewer than the published model has."""
    tokenizer = folder / "tokenizer.json"  # written last
    if not tokenizer.exists():
        published = SHAPES[shape]
        small = {key: value for key, value in TINY.items() if key in published} if dry else {}
        vocabulary = (published | small)["vocab_size"]
        ids = {"bos_token_id": vocabulary - 3, "eos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1}
        write_model(folder, shape, layers=layers, nf4=nf4, changes={**small, **ids})
        (folder / "generation_config.json").write_text(json.dumps(ids))
        write_tokenizer(folder, vocabulary)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Byte-level, as large as the model's vocabulary, the special tokens last: so no peer adds any, or another pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = (f"filler{i}" for i in range(vocabulary - len(letters) - 3))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, *fillers])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_BEGIN, _END, _PAD])
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=_BEGIN, eos_token=_END, pad_token=_PAD, model_max_length=131072
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    fast.save_pretrained(folder)


def config(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return tree
