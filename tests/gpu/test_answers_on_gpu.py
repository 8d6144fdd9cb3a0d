"""Answers on a GPU: our decoder against the transformers module, recorded steps against launched ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.model import attention, decode, fast
from luthier.model.causal import CausalModel
from luthier.model.decode import ReferenceDecoder
from luthier.model.fast import FastDecoder
from luthier.model.generate import Generation, Sampling, _answer, generate
from luthier.model.quantize import quantize_module, unpacked

pytestmark = pytest.mark.gpu
VOCAB = 1000
BEGINNING = [(37 * i) % VOCAB for i in range(150)]
PROMPTS = [BEGINNING + [(11 * i + n) % VOCAB for i in range(n)] for n in (1, 7, 90, 33, 260, 12, 12, 64, 3)]
STRANGERS = [prompt[100 + 5 * i :] for i, prompt in enumerate(PROMPTS)]
PACKED: dict[str, Any] = {
    "nf4": recipe.FourBit(kind="nf4"),
    "int8": recipe.EightBit(kind="int8", threshold=0),
    "fp8": recipe.Float8(kind="fp8"),
}


def model(dtype: torch.dtype, packed: str | None = None, layers: int = 3) -> CausalModel:
    """A small Llama with an adapter that changes what it says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    module = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).to("cuda", dtype).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.05)
    if packed:
        quantize_module(module, PACKED[packed], dtype)
    lora = attach(module, recipe.Lora(rank=8, alpha=16), seed=3)
    for layer in lora.layers.values():
        layer.B.data.normal_(0, 0.05)
    return CausalModel(module, lora)


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def logits(decoder: Any, prompts: list[list[int]], steps: int = 12) -> Iterator[Tensor]:
    """After the prompts and after each step, rows being given up on the way."""
    yield decoder.prefill(prompts, steps)
    rows = len(prompts)
    for step in range(steps):
        if step in (4, 8):
            rows = rows * 2 // 3
            decoder.keep(torch.tensor([*range(rows - 1), len(prompts) - 1 if step == 4 else rows], device="cuda"))
        yield decoder.step((torch.arange(rows, device="cuda") * 13 + step) % VOCAB)


@torch.inference_mode()
@pytest.mark.parametrize("packed", [None, *PACKED])
@pytest.mark.parametrize("prompts", [PROMPTS, STRANGERS], ids=["shared", "strangers"])
def test_logits_are_those_of_the_module_with_the_adapter_on_and_off(
    packed: str | None, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "RECORD_AFTER", 1)
    made = model(torch.bfloat16, packed)
    assert decode.is_fast(made)
    assert made.adapter is not None
    for side in (nullcontext(), made.adapter.disabled()):
        with side:
            decoder = FastDecoder(made, merge=False, bucketed=True)
            pairs = zip(logits(decoder, prompts), logits(ReferenceDecoder(made), prompts), strict=True)
            errors = [error(one, other) for one, other in pairs]
            assert max(errors) < (0.1 if packed == "int8" else 0.03)  # roundings of roundings to 8 bits
            assert bool(decoder.recorder.recorded) == (packed != "int8")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_give_what_launched_ones_give(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = model(dtype, "nf4" if dtype == torch.bfloat16 else None), []
    for after in (1, 10**9):
        monkeypatch.setattr(fast, "RECORD_AFTER", after)
        decoder = FastDecoder(made, merge=False, bucketed=True)
        found.append(list(logits(decoder, PROMPTS)))
        assert bool(decoder.recorder.recorded) == (after == 1)
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert max(error(one, other) for one, other in zip(*found, strict=True)) < bound


@torch.inference_mode()
def test_continuations_weigh_what_the_module_says() -> None:
    made = model(torch.bfloat16, "nf4")
    rows, rests = [0, 4, 4, 8], [[3, 8, 5], [8, 1, 50], [4], [7] * 20]
    one, other = FastDecoder(made, merge=False, bucketed=True), ReferenceDecoder(made)
    found = one.weigh(one.prefill(PROMPTS, 0), rows, rests)
    assert found == pytest.approx(other.weigh(other.prefill(PROMPTS, 0), rows, rests), rel=0.02)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_float32_answers_are_those_of_the_module(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "RECORD_AFTER", 1)
    made, sampling = model(torch.float32), Sampling(max_new_tokens=30, temperature=temperature)
    stops = frozenset(range(40))
    with torch.inference_mode():
        wanted = _all(_answer(ReferenceDecoder(made), PROMPTS, [()] * len(PROMPTS), sampling, stops))
    assert len({len(one.ids) for one in wanted}) > 2
    assert generate(made, PROMPTS, sampling, stops) == wanted
    assert generate(made, PROMPTS, sampling, stops, max_tokens_in_flight=1500) == wanted


def _all(pairs: Iterator[tuple[int, Generation]]) -> list[Generation]:
    return [one for _, one in sorted(pairs, key=lambda pair: pair[0])]


@torch.inference_mode()
def test_the_adapter_goes_off_without_a_second_copy_of_the_weights() -> None:
    made = model(torch.bfloat16, "nf4")
    assert made.adapter is not None
    with unpacked(made.module, 1 << 40):
        before = torch.cuda.memory_allocated()
        tuned = FastDecoder(made, merge=False, bucketed=True)
        with made.adapter.disabled():
            base = FastDecoder(made, merge=False, bucketed=True)
        adapters = sum(p.nbytes for p in made.adapter.parameters())
        assert torch.cuda.memory_allocated() - before <= adapters + (1 << 20)
        one, other = tuned.prefill(PROMPTS, 0), base.prefill(PROMPTS, 0)
    assert error(one, other) > 0.1


def test_answers_per_minute_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    made, sampling = model(torch.bfloat16, "nf4", layers=12), Sampling(max_new_tokens=32)
    prompts = [[(i * j) % VOCAB for i in range(1, 201)] for j in range(1, 257)]
    with unpacked(made.module, 1 << 40), torch.inference_mode(), capsys.disabled():
        for name in ("module", "fast"):
            for _ in range(2):  # the first is for warming up
                engine = ReferenceDecoder(made) if name == "module" else decode.decoder(made, merge=False)
                torch.cuda.synchronize()
                started = time.perf_counter()
                answers = _all(_answer(engine, prompts, [()] * len(prompts), sampling, frozenset()))
                took = time.perf_counter() - started
            assert len(answers) == len(prompts)
            print(f"\n{name}: {len(prompts) / took * 60:,.0f} answers of 32 tokens a minute", end="")
