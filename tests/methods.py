"""What every adapter method promises, as functions that the tests of each call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.adapters import files
from luthier.adapters.method import Adapter, attach
from luthier.errors import AdapterError

IDS = torch.arange(1, 40)[None] % 90


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = LlamaConfig(**({"num_hidden_layers": 2, "vocab_size": 90, **sizes} | changes))
    return LlamaForCausalLM(config).eval().to(dtype)


def logits(module: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return module(ids).logits  # type: ignore[no-any-return]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def two_steps(module: Any, adapter: Adapter, lr: float = 0.01) -> tuple[float, float]:
    """The loss of one batch before and after two updates of the adapter's parameters by it."""
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=lr)
    losses = []
    for _ in range(3):
        loss = module(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if len(losses) < 3:
            optimizer.step()
    return losses[0], losses[-1]


def check_training(make: Any, settings: Any, *, same_start: bool = True, lr: float = 0.01) -> None:
    """It starts as the base model; two steps move exactly what it says it trains, and lower the loss; disabled, also
    twice over, it is the base model again; everything trained is float32."""
    plain, module = logits(make()), make()
    adapter = attach(module, settings, seed=3)
    if same_start:
        assert torch.equal(logits(module), plain)
    before, trained = weights(module), {id(p) for p in adapter.parameters()}
    inside = {name for name, p in module.named_parameters() if id(p) in trained}
    first, last = two_steps(module, adapter, lr)
    assert last < first
    after = weights(module)
    assert {name for name in after if not torch.equal(after[name], before[name])} == inside
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter.parameters())
    tuned = logits(module)
    assert not torch.equal(tuned, plain)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(module), plain)
        assert torch.equal(logits(module), plain)
    assert torch.equal(logits(module), tuned)


def trained(make: Any, settings: Any, folder: Path, lr: float = 0.01) -> Any:
    """A module with an adapter trained for two steps, which is saved to `folder`."""
    module = make()
    adapter = attach(module, settings, seed=3)
    two_steps(module, adapter, lr)
    files.save(adapter, folder, base="some/base", revision=None, extra={})
    return module


def check_files(make: Any, settings: Any, folder: Path) -> None:
    """The file gives the same module back, bit for bit, settings included; a partial one and one of values that are not
    finite are refused, and change nothing."""
    from safetensors.torch import load_file, save_file

    wanted = logits(trained(make, settings, folder))
    read, tensors = files.load(folder)
    module = make()
    adapter = attach(module, read, seed=9)
    adapter.load_state_dict(tensors)
    assert torch.equal(logits(module), wanted)
    assert adapter.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter.state_dict().items())
    with adapter.disabled():
        assert torch.equal(logits(module), logits(make()))
    assert type(read) is type(settings)

    fresh = make()
    adapter = attach(fresh, read, seed=9)
    start, name = logits(fresh), next(n for n, t in tensors.items() if t.is_floating_point())
    with pytest.raises(AdapterError, match="lacks"):
        adapter.load_state_dict({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(AdapterError, match="has shape"):
        adapter.load_state_dict({**tensors, name: tensors[name][..., :1]})
    assert torch.equal(logits(fresh), start)

    whole = load_file(folder / files.WEIGHTS)
    whole[name].view(-1)[0] = float("nan")
    save_file(whole, folder / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="not finite"):
        files.load(folder)
