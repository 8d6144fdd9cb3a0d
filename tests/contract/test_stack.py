"""Several adapters on one base: each answers as it does alone, and combinations are PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from luthier import recipe
from luthier.adapters import files
from luthier.adapters.lora import attach
from luthier.adapters.stack import Stack
from luthier.errors import AdapterError
from methods import llama, logits

# PEFT asks transformers a question by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def saved(folder: Path, seed: int, **options: Any) -> Path:
    module = llama()
    lora = attach(module, recipe.Lora(**({"rank": 4, "alpha": 6.0} | options)), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    files.save(lora, folder, base="b", revision=None, extra={})
    return folder


def alone(folder: Path) -> Tensor:
    module = llama()
    settings, tensors = files.load(folder)
    attach(module, settings, seed=0).load_state_dict(tensors)
    return logits(module)


def stack(**folders: Path) -> Stack:
    made = Stack(llama())
    for name, folder in folders.items():
        made.add(name, *files.load(folder))
    return made


def test_each_answers_as_it_does_alone(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2, dora=True, targets=["q_proj"])
    both = stack(one=one, two=two)
    for name, wanted in (("two", alone(two)), ("one", alone(one)), ("two", alone(two)), (None, logits(llama()))):
        both.use(name)
        assert torch.equal(logits(both.module), wanted)


def test_removed_it_is_gone(tmp_path: Path) -> None:
    one = stack(one=saved(tmp_path, 1))
    one.use("one")
    one.remove("one")
    assert torch.equal(logits(one.module), logits(llama()))
    with pytest.raises(AdapterError, match="there is no adapter 'one'"):
        one.use("one")


def test_one_that_does_not_fit_leaves_the_others_in_place(tmp_path: Path) -> None:
    one = stack(one=saved(tmp_path / "one", 1))
    one.use("one")
    settings, tensors = files.load(saved(tmp_path / "two", 2))
    with pytest.raises(AdapterError, match="lacks"):
        one.add("two", settings, dict(list(tensors.items())[1:]))
    with pytest.raises(AdapterError, match="'x'"):
        one.add("two", settings.model_copy(update={"targets": ["x"]}), tensors)
    with pytest.raises(AdapterError, match="there is an adapter 'one'"):
        one.add("one", settings, tensors)
    with pytest.raises(AdapterError, match="weights of the base"):
        one.add("two", settings.model_copy(update={"bias": "all"}), tensors)
    with pytest.raises(AdapterError, match="bottlenecks of width 64, which cannot be switched"):
        one.add("two", recipe.Bottleneck(kind="bottleneck"), tensors)
    assert list(one.adapters) == ["one"]
    assert torch.equal(logits(one.module), alone(tmp_path / "one"))


@pytest.mark.parametrize(("how", "rank"), [("cat", 3), ("cat", 4), ("linear", 4)])
def test_combinations_are_pefts(tmp_path: Path, how: Literal["cat", "linear"], rank: int) -> None:
    from peft import PeftModel

    one = saved(tmp_path / "one", 1)
    two = saved(tmp_path / "two", 2, rank=rank, alpha=9.0, targets=["q_proj", "up_proj"])
    theirs = PeftModel.from_pretrained(llama(), one, adapter_name="one")
    theirs.load_adapter(two, "two")
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=how)
    theirs.set_adapter("sum")
    ours = stack(one=one, two=two)
    ours.combine("sum", {"one": 0.7, "two": -0.4}, how)
    ours.use("sum")
    torch.testing.assert_close(logits(ours.module), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(ours.module) - alone(one)).abs().max() > 1e-2


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    parts = stack(
        one=saved(tmp_path / "one", 1),
        wide=saved(tmp_path / "wide", 2, rank=5),
        dora=saved(tmp_path / "dora", 3, dora=True),
    )
    with pytest.raises(AdapterError, match="different ranks at model"):
        parts.combine("sum", {"one": 1.0, "wide": 1.0}, "linear")
    with pytest.raises(AdapterError, match="DoRA"):
        parts.combine("sum", {"one": 1.0, "dora": 1.0})
