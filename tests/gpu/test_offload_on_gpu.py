"""What is in host memory comes to a real GPU in time: the same gradients, less memory there."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from luthier import recipe
from luthier.adapters.method import attach
from luthier.data.stream import Micro
from luthier.machine import GIB
from luthier.model import attention, offload, quantize
from luthier.model.causal import CausalModel
from luthier.model.generate import Sampling, generate
from luthier.model.memory import release
from luthier.model.recompute import recomputing
from luthier.train.optim import flat_gradient
from luthier.train.reproducible import reproducible

pytestmark = pytest.mark.gpu
BLOCKS, WIDTH = 8, 1024


def model(count: int, kind: str | None) -> tuple[Any, offload.Streamed | None]:
    """A Llama of eight blocks with an adapter on the GPU, `count` of its blocks in host memory."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny.config()
    config.update({"num_hidden_layers": BLOCKS, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH})
    module = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if kind is not None:
        quantize.quantize_module(module, recipe.FourBit.model_validate({"kind": kind}), torch.bfloat16)
    device = torch.device("cuda")
    for layer in [*module.model.layers[count:], module.model.embed_tokens, module.model.norm, module.lm_head]:
        layer.to(device)
    module.model.rotary_emb.to(device)
    attach(module, tiny.recipe("adapter.dropout=0").adapter, 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    streamed = offload.stream(module, count, device) if count else None
    recomputing(module, None)
    return module.train(), streamed


def step(module: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(256, device="cuda")[None] % tiny.VOCAB
    module.zero_grad()
    module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.cpu() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("count", [3, BLOCKS])
def test_gradients_are_those_of_weights_that_stay_on_the_gpu(count: int, kind: str | None) -> None:
    # Start values of adapters are drawn on the device they are on; both models draw them all on the CPU.
    whole, _ = model(0, kind)
    split, streamed = model(count, kind)
    state = {name: p.data.cpu() for name, p in whole.named_parameters() if p.requires_grad}
    for name, parameter in split.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(state[name])
    expected = step(whole)
    for _ in range(3):
        found = step(split)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name
    assert streamed is not None
    assert all(block.home.is_pinned() for block in streamed.blocks)


def test_the_gpu_holds_two_blocks_and_not_all() -> None:
    def peak(count: int) -> int:
        gc.collect()  # a model holds itself in cycles
        module, _ = model(count, None)
        step(module)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(module)
        return torch.cuda.max_memory_allocated()

    block = 2 * (4 * WIDTH * WIDTH + 3 * 4 * WIDTH * WIDTH)  # bytes of its large weights, at the least
    assert peak(0) - peak(BLOCKS) > (BLOCKS - 3) * block // 2


# Our own blocks, as wide as Llama-3.1-8B's.

LAYERS, ROWS, LENGTH = 6, 8, 1000
EMBEDDING = 32000 * 4096 * 2


def ours(*, stream: int = 0, embedding: bool = False, **options: Any) -> CausalModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    release()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    config, device = AutoConfig.for_model("llama", **sizes, pad_token_id=0), torch.device("cuda")
    with device:
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    module.requires_grad_(False).eval()
    quantize.quantize_module(module, recipe.FourBit(kind="nf4"), torch.bfloat16)
    adapter = attach(module, recipe.Lora(rank=16), 0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    if embedding:
        offload.embedding_to_host(module, device)
    streamed = offload.stream(module, stream, device) if stream else None
    return CausalModel(module, adapter, kernels="compiled", streamed=streamed, **options)


def micro(seed: int) -> Micro:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32000, (ROWS * LENGTH,), generator=generator)
    positions = torch.arange(LENGTH).repeat(ROWS)
    rows = (positions > 700).nonzero()[:, 0] - 1
    return Micro(ids, positions, tuple(range(0, len(ids) + 1, LENGTH)), rows, ids[rows + 1], torch.arange(ROWS), step=0)


def learned(model: CausalModel) -> tuple[list[torch.Tensor], int]:
    """Losses and gradients of three micro-batches, none of which is waited for, and the peak of torch's memory."""
    assert model.adapter is not None
    gradient = flat_gradient(model.adapter.named_parameters())
    found = []
    with reproducible("cuda"):
        model.accumulate(micro(0), 1.0)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for seed in range(3):
            gradient.zero_()
            found += [model.accumulate(micro(seed), 1.0), gradient.clone()]
    torch.cuda.synchronize()
    return [x.cpu() for x in found], torch.cuda.max_memory_allocated()


WAYS: dict[str, dict[str, Any]] = {
    "streamed": {"stream": LAYERS},
    "some streamed, recomputed": {"stream": 4, "recompute": True},
    "embedding": {"embedding": True},
    "away": {"away": LAYERS - 1},
    "all away": {"away": LAYERS},
    "some away": {"away": 2},
    "away, gate|up made again": {"away": LAYERS - 1, "recompute_gate_up": LAYERS},
    "all of it": {"stream": LAYERS, "embedding": True, "away": LAYERS - 1, "recompute": 2, "recompute_gate_up": 2},
}


def test_host_memory_changes_no_bit_and_takes_less_of_the_gpus() -> None:
    expected, most = learned(ours())
    for name, options in WAYS.items():
        found, peak = learned(ours(**options))
        assert all(map(torch.equal, found, expected)), name
        assert peak < most, name
    assert len({x.sum().item() for x in expected[::2]}) == 3  # they do differ


def test_an_embedding_in_host_memory_leaves_its_room() -> None:
    (_, kept), (_, left) = learned(ours()), learned(ours(embedding=True))
    assert kept - left == pytest.approx(EMBEDDING, rel=0.01)


def test_answers_are_the_same_from_host_memory() -> None:
    prompts, sampling = [[5, 6, 7, 8], list(range(40, 90))], Sampling(max_new_tokens=12)
    after = [[[3, 4], [9, 9, 9]], [[1, 2, 3, 4]]]
    expected = generate(ours(), prompts, sampling, frozenset(), continuations=after)
    for options in WAYS["embedding"], {"stream": 3}, WAYS["streamed"], {"stream": LAYERS, "embedding": True}:
        # Launched and recorded steps are the same kernels, so tokens and likelihoods are the same bits.
        found = generate(ours(**options), prompts, sampling, frozenset(), continuations=after)
        assert found == expected, options
    assert all(one.losses for one in expected)


def answering_peak(memory: int | None) -> int:
    """The most bytes of torch's while 64 prompts of 500 tokens are answered."""
    model, generator = ours(stream=LAYERS, embedding=True, memory=memory), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 32000, (64, 500), generator=generator).tolist()
    torch.cuda.reset_peak_memory_stats()
    generate(model, prompts, Sampling(max_new_tokens=8), frozenset())
    return torch.cuda.max_memory_allocated()


def test_answers_take_no_more_of_a_large_gpu_than_they_may() -> None:
    assert answering_peak(3 * GIB) < 3 * GIB < answering_peak(None)


def test_likelihoods_are_the_same_bits_from_host_memory() -> None:
    rows = micro(0)
    with torch.inference_mode():
        expected = ours().loss(rows)
        for options in WAYS["embedding"], WAYS["streamed"]:
            assert torch.equal(ours(**options).loss(rows), expected), options
