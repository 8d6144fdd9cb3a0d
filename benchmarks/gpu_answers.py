"""Answers per minute of a Llama-3.1-8B in 4 bits with a LoRA beside it: luthier, the transformers module, and
transformers' own `generate`.

    python benchmarks/gpu_answers.py --out benchmarks/results/h200.jsonl
    python benchmarks/gpu_answers.py --shape smollm2-135m --layers 1 --prompts 6 --length 20 --new 3     # on a CPU

Weights are random and made in place. Prompts are of ~`--length` tokens, of which all begin with the same `--shared`;
nothing stops an answer before `--new` tokens. `fast` is what `luthier compare` does; `packed` the same with no weights
unpacked beforehand; `reference` the transformers module step by step, as families without a block of ours are answered;
`transformers` is `module.generate` on left-padded batches of `--batch` sorted prompts, with attention by torch and the
weights unpacked beforehand as for `fast`. Each is run `--rounds` times after a warm-up on a part of the prompts, in
the order A B, B A. `differs` is how far the first logits are from those of `reference`, as a share of their norm.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.model import attention
from luthier.model.causal import CausalModel
from luthier.model.decode import Decoder, ReferenceDecoder
from luthier.model.fast import FastDecoder
from luthier.model.generate import Sampling, _answer, _planned
from luthier.model.place import free_memory
from luthier.model.quantize import quantize_module, unpacked

NF4 = recipe.FourBit(kind="nf4")
Prompts = Sequence[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["llama-3.1-8b", "smollm2-135m"], default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--length", type=int, default=250, help="mean tokens of a prompt")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all prompts begin")
    parser.add_argument("--new", type=lambda text: [int(n) for n in text.split(",")], default=[5, 64])
    parser.add_argument("--only", default="fast,packed,reference,transformers")
    parser.add_argument("--batch", type=int, default=128, help="rows of `transformers`")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="rows are appended here")
    arguments = parser.parse_args()
    model = build(arguments.shape, arguments.layers)
    prompts = made_prompts(arguments.prompts, arguments.length, arguments.shared)
    for new in arguments.new:
        for row in measured(model, prompts, new, arguments):
            text = json.dumps(row)
            print(text, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text + "\n")


def build(shape: str, layers: int | None) -> CausalModel:
    """The model, packed layer by layer, so that no more than one is ever dense."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config: Any = AutoConfig.for_model(**tree)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.NAME
        ).eval()
    base = module.base_model
    base.rotary_emb = type(base.rotary_emb)(config).to(place)
    torch.manual_seed(0)
    for part in (base.embed_tokens, base.norm, module.get_output_embeddings()):
        fill(part, place)
    module.tie_weights()
    for block in base.layers:
        fill(block, place)
        quantize_module(block, NF4, torch.bfloat16)
    lora = attach(module, recipe.Lora(rank=16, alpha=16), seed=3)
    for layer in lora.layers.values():
        layer.B.data.normal_(0, 0.01)
    return CausalModel(module, lora)


def fill(part: nn.Module, place: torch.device) -> None:
    part.to_empty(device=place)
    for parameter in part.parameters():
        parameter.data.fill_(1) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02)


def made_prompts(count: int, length: int, shared: int) -> Prompts:
    rng = random.Random(0)
    beginning = [rng.randrange(1000, 30000) for _ in range(shared)]
    lengths = [max(2, round(rng.lognormvariate(-0.08, 0.4) * (length - shared))) for _ in range(count)]
    return [beginning + [rng.randrange(1000, 30000) for _ in range(n)] for n in lengths]


def measured(model: CausalModel, prompts: Prompts, new: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way of answering."""
    names = arguments.only.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for turn in range(arguments.rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            room = 0 if name in ("packed", "reference") else free_memory(model.device) // 2
            with unpacked(model.module, room) if room else nullcontext(), torch.inference_mode():
                run(name, model, prompts[: len(prompts) // 4], min(new, 8), arguments.batch)
                work = partial(run, name, model, prompts, new, arguments.batch)
                seconds[name].append(timed(work, model.device))
                print(f"{name}, {new} new tokens: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else 0.0
    return [
        {
            "benchmark": "gpu_answers",
            "peer": name,
            "shape": arguments.shape,
            "layers": arguments.layers,
            "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "shared_tokens": arguments.shared,
            "new_tokens": new,
            "batch": arguments.batch if name == "transformers" else None,
            "answers_per_minute": round(60 * len(prompts) / statistics.median(took)),
            "seconds": [round(one, 2) for one in took],
            "peak_gib": round(peaks[name], 2),
            "differs": differs(model, prompts) if name in ("fast", "packed") else None,
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        for name, took in seconds.items()
    ]


def run(name: str, model: CausalModel, prompts: Prompts, new: int, batch: int) -> None:
    if name == "transformers":
        by_transformers(model, prompts, new, batch)
        return
    fast = name in ("fast", "packed")
    engine: Decoder = FastDecoder(model, merge=False, bucketed=True) if fast else ReferenceDecoder(model)
    for rows in _planned(engine, model, [len(prompt) for prompt in prompts], new, None):
        chosen = [prompts[row] for row in rows]
        done = list(_answer(engine, chosen, [()] * len(rows), Sampling(max_new_tokens=new), frozenset()))
        assert all(len(one.ids) == new for _, one in done)


def by_transformers(model: CausalModel, prompts: Prompts, new: int, batch: int) -> None:
    module = model.module
    module.set_attn_implementation("sdpa")
    ordered = sorted(prompts, key=len, reverse=True)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    try:
        for start in range(0, len(ordered), batch):
            chosen = ordered[start : start + batch]
            ids, mask = padded(chosen, model.device)
            out = module.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **options)
            assert out[:, ids.shape[1] :].tolist()
    finally:
        module.set_attn_implementation(attention.NAME)


def padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()  # ends with tokens on the host
    return time.perf_counter() - started


@torch.inference_mode()
def differs(model: CausalModel, prompts: Prompts) -> float:
    chosen = prompts[:8]
    one, other = FastDecoder(model, merge=False, bucketed=True), ReferenceDecoder(model)
    mine, wanted = one.prefill(chosen, 0), other.prefill(chosen, 0)
    return round(float((mine - wanted).norm() / wanted.norm()), 5)


if __name__ == "__main__":
    main()
