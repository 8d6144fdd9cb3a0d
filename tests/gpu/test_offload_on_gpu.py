"""Blocks stream to a real GPU: the same gradients, less memory there."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from luthier import recipe
from luthier.adapters.method import attach
from luthier.model import offload, quantize
from luthier.model.recompute import recomputing

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
    assert streamed.most <= 2
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
