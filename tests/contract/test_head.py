"""What the config says of a family's head is what the module computes: so it need not be run to be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block import module

from luthier.model import families, head

IDS = torch.arange(3, 11)[None]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_head_of_a_family_is_what_its_config_says(family: str) -> None:
    made = module(family)
    assert head.find(made, IDS) == head.observed(made, IDS) is not None


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": 5.0}, {"tie_word_embeddings": True}])
def test_so_is_that_of_variants(changes: dict[str, Any]) -> None:
    made = module("gemma2", **changes)
    assert head.find(made, IDS) == head.observed(made, IDS) is not None


def test_a_module_of_our_families_is_not_run() -> None:
    made = module("llama")
    made.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    assert head.find(made, IDS) is not None


def test_what_a_config_says_and_the_module_does_not_do_is_left_out() -> None:
    made = module("llama", logit_scale=0.5)
    assert head.find(made, IDS) == head.Output(made)


def test_code_that_only_says_that_it_is_such_a_family_is_run() -> None:
    class Custom(type(module("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            answer = super().forward(input_ids, use_cache=use_cache)
            answer.logits = answer.logits * 2
            return answer

    made = module("llama")
    made.__class__ = Custom
    assert head.find(made, IDS) is None
