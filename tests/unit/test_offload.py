"""Weights in host memory come to the device when a block needs them, and what is computed stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import tiny
from luthier.adapters.method import attach
from luthier.model import offload
from luthier.model.recompute import recomputing

IDS = torch.arange(1, 21)[None]
BLOCKS = 4


def model(count: int = 0, *, recompute: bool = False) -> tuple[Any, Any, offload.Streamed | None]:
    """A tiny Llama with an adapter, `count` of its blocks streamed on the CPU: the model, the adapter, the stream."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny.config()
    config.num_hidden_layers = BLOCKS
    module = LlamaForCausalLM(config).requires_grad_(False)
    adapter = attach(module, tiny.recipe("adapter.dropout=0").adapter, 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    streamed = offload.stream(module, count, torch.device("cpu")) if count else None
    if recompute:
        recomputing(module, None)
        module.train()
    return module, adapter, streamed


def step(module: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    module.zero_grad()
    module(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("count", [1, 3, BLOCKS])
def test_the_gradients_are_those_of_weights_that_stay(count: int, recompute: bool) -> None:
    expected = step(model(recompute=recompute)[0])
    module, _, streamed = model(count, recompute=recompute)
    for _ in range(2):
        found = step(module)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert streamed is not None
    assert streamed.most <= 2


def test_every_use_of_a_weight_is_of_its_copy_on_the_device() -> None:
    module, _, streamed = model(3, recompute=True)
    assert streamed is not None
    used: list[int] = []

    def look(index: int) -> Any:
        home = streamed.blocks[index].home.untyped_storage().data_ptr()

        def hook(layer: Any, *_: Any) -> None:
            assert layer.weight.untyped_storage().data_ptr() != home
            used.append(index)

        return hook

    for index in range(3):
        module.model.layers[index].mlp.down_proj.base.register_forward_hook(look(index))
    step(module)
    assert used == [0, 1, 2, 2, 1, 0]
    # Forward 0, 1, 2; backward 1, 0: the last block stays for its backward pass.
    assert streamed.fetches == 5
    assert streamed.most == 2


class Recomputed(nn.Module):
    """A block whose hooks run again when it is recomputed, to its end; transformers' versions differ in this."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        with set_checkpoint_early_stop(False):
            return checkpoint(self.block, x, use_reentrant=False, **options)


def test_a_recomputation_that_runs_the_hooks_leaves_the_weights_for_the_backward_pass() -> None:
    expected = step(model()[0])
    module, _, streamed = model(3)
    assert streamed is not None
    module.model.layers = nn.ModuleList(Recomputed(block) for block in module.model.layers)
    found = step(module)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    assert streamed.fetches == 5
    assert streamed.most == 2


def test_no_block_stays_on_the_device_after_a_forward_pass_without_gradients() -> None:
    module, _, streamed = model(BLOCKS)
    expected = model()[0](input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        found = module(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, expected)
    assert streamed is not None
    assert streamed.live == 0
    assert streamed.most == 2


def test_the_blocks_of_a_model_are_found_by_their_size() -> None:
    assert offload.blocks_name(model()[0]) == "model.layers"
