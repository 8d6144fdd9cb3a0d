"""Model folders of true shapes with random weights, for measurements where the real weights cannot be had.

    python benchmarks/random_model.py llama-3.1-8b FOLDER

Writes config.json, sharded safetensors in bfloat16 and a small tokenizer; memory stays near one shard.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

SHARD = 4 << 30  # bytes
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The published config.json of each, as far as it decides shapes and arithmetic.
SHAPES: dict[str, dict[str, Any]] = {
    "falcon-7b": {
        "model_type": "falcon",
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "tie_word_embeddings": True,
    },
    "phi-2": {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA_ROPE,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "glm-4-9b": {
        "model_type": "glm",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}
BITSANDBYTES = {  # of `four_bits`, as published checkpoints say it
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words() -> list[str]:
    """The same 20,000 made-up words each time."""
    rng = random.Random(0)
    return ["".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 7))) for _ in range(20_000)]


def write_model(
    folder: Path,
    shape: str,
    *,
    layers: int | None = None,
    shard: int = SHARD,
    nf4: bool = False,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A folder that loads like a published one: weights normal with deviation 0.02, norms one. `nf4`: linear layers in
    4 bits with double quantisation, as bitsandbytes stores them. `changes` to the config come last."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from luthier.model.quantize import packable_names

    folder.mkdir(parents=True, exist_ok=True)
    tree = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}) | (changes or {})
    config = AutoConfig.for_model(**tree)
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    config.architectures, config.dtype = [type(module).__name__], torch.bfloat16
    if nf4:
        config.quantization_config = BITSANDBYTES
    config.save_pretrained(folder)
    packed = {f"{name}.weight" for name in packable_names(module)} if nf4 else set()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(place).manual_seed(0)
    pending: dict[str, Any] = {}
    index, count = {}, 0

    def flush() -> None:
        nonlocal pending, count
        name = f"model-{count:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(pending, name))
        pending, count = {}, count + 1

    for name, parameter in module.named_parameters():  # tied ones come once
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=place)
            tensor = made.normal_(std=0.02, generator=generator)
        elif name.endswith("bias"):
            tensor.zero_()
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard:
            flush()
        parts = four_bits(name, tensor) if name in packed else {name: tensor}
        pending.update({part: value.cpu() for part, value in parts.items()})
    flush()
    total = sum(p.numel() * 2 for p in module.parameters())
    tree = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    write_tokenizer(folder)
    return folder


def four_bits(name: str, weight: Any) -> dict[str, Any]:
    """The tensors that bitsandbytes stores of `weight` as NF4 with double quantisation, by our quantiser, which is
    bitsandbytes' to the bit."""
    import torch

    from luthier.kernels import quantize

    packed, absmax = quantize.quantize_4bit(weight, "nf4")
    scales = quantize.quantize_scales(absmax)
    state = {"quant_type": "nf4", "blocksize": quantize.BLOCK, "dtype": "bfloat16", "shape": list(weight.shape)}
    state |= {"nested_blocksize": quantize.NESTED, "nested_dtype": "float32", "nested_offset": scales.offset.item()}
    return {
        name: packed,
        f"{name}.absmax": scales.absmax,
        f"{name}.quant_map": quantize.levels("nf4").clone(),
        f"{name}.nested_absmax": scales.nested,
        f"{name}.nested_quant_map": scales.code.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _own_words() -> set[str]:
    import luthier

    package = Path(luthier.__file__).parent
    files = [*(package / "recipes").glob("*.yaml"), package / "data" / "templates.py"]
    return {word for file in files for word in re.findall(r"[A-Za-z]{2,}", file.read_text(encoding="utf-8"))}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows each of `words`, and of the words of our recipes and templates, as one token and all else
    byte by byte, with a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(sorted({*words(), *_own_words()}))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--layers", type=int, help="fewer than the published model has")
    chosen = arguments.parse_args()
    write_model(chosen.folder, chosen.shape, layers=chosen.layers)
