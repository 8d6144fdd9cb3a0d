"""Toy models: the architectures that the shipped recipes name, a few layers deep and with random weights.

With one in the place of its big sister, every line that a full run needs is run in seconds on a CPU. What it answers is
noise. The settings that decide which code runs are those of the published config.json; only sizes are smaller.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.machine import cache_folder
from luthier.model.embedded import embedded_folder

# Part of the cached folder's name: raise it when something else is written.
_VERSION = 1
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Blocks of 64 weights are what 4-bit formats pack, so nothing is narrower. The vocabulary is the embedded model's.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Falcon-7B, not the 40B's later decoder: attention and MLP side by side under one norm, one head of keys and values
    "falcon": {
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
    # Phi-2: attention and MLP side by side, a bias in every linear layer, two fifths of each head rotated
    "phi": {
        "intermediate_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    # GLM-4-9B: biases in q, k and v, half of each head rotated, gate and up in one layer
    "glm": {
        "intermediate_size": 192,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
}


def toy_folder(architecture: str, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of the toy of an architecture (a key of ARCHITECTURES), made on first use; the same weights each time.

    Raises ModelError where the embedded model, whose tokenizer it has, cannot be had.
    """
    folder = cache_folder() / f"toy-{architecture}-{_VERSION}"
    if folder.is_dir():
        return folder
    tokenizer = embedded_folder(progress)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        aside = Path(scratch) / "model"
        _write(architecture, aside)
        for name in _TOKENIZER:
            shutil.copyfile(tokenizer / name, aside / name)
        if not folder.is_dir():  # another process may have made it meanwhile
            os.rename(aside, folder)
    return folder


def _write(architecture: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(architecture, **_SIZES, **ARCHITECTURES[architecture])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config
        make(config, dtype=torch.bfloat16).save_pretrained(folder)
