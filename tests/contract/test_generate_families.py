"""Answers of every kind of module that transformers has are those of the texts read whole, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from luthier.adapters.method import attach
from luthier.model.causal import CausalModel
from luthier.model.decode import ReferenceDecoder, WholeDecoder, batches
from luthier.model.generate import Sampling, _answer, generate

PROMPTS = [[5, 9, 3], [7, 11, 2, 13, 17, 6, 4, 8, 9, 10, 22, 33], [1], [40, 41, 42, 43], [50] * 9, [13, 60, 2, 9]]
STOPS = frozenset({3, 4, 5, 6, 7})
GREEDY = Sampling(max_new_tokens=10)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PADDED: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi
    "falcon": {"num_kv_heads": 1},
    "falcon-alibi": {"alibi": True},
    "gemma2": {"head_dim": 8, "sliding_window": 8},  # a window, and soft caps
    "glm": {"head_dim": 8},
    "gpt2": OLD,  # learned positions, Conv1D
    "gpt_neox": {},
    "lfm2": {},  # convolutions beside attention
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "mamba": {"state_size": 4},
    "openai-gpt": OLD,  # keeps nothing
    "rwkv": {"attention_hidden_size": 32},
}
FAMILIES = {**PADDED, **OTHERS}


def causal(name: str, dtype: torch.dtype = torch.float32) -> CausalModel:
    """A tiny module of that family, with random weights large enough to make its answers differ."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = name.removesuffix("-alibi")
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **FAMILIES[name]})).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return CausalModel(module.to(dtype), None)


@torch.inference_mode()
def plainly(model: CausalModel, prompt: list[int]) -> list[int]:
    """The greedy answer, each token by a forward pass over all before it."""
    text = list(prompt)
    while len(text) < len(prompt) + GREEDY.max_new_tokens:
        token = int(model.module(input_ids=torch.tensor([text])).logits[0, -1].argmax())
        if token in STOPS:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_prompts_is_answered_as_each_is_alone(name: str) -> None:
    model = causal(name)
    expected = [plainly(model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 2
    assert [one.ids for one in generate(model, PROMPTS, GREEDY, STOPS)] == expected


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_likelihood_of_what_may_follow_is_that_of_the_whole_text(name: str) -> None:
    model, rests = causal(name), [[4], [5, 6, 8], [5, 6, 9]]
    made = generate(model, PROMPTS, GREEDY, STOPS, continuations=[rests] * len(PROMPTS))
    for prompt, one in zip(PROMPTS, made, strict=True):
        for rest, loss in zip(rests, one.losses, strict=True):
            logits = model.module(input_ids=torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(rest), reduction="sum")
            assert loss == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PADDED)
def test_families_with_attention_are_padded_in_every_precision(name: str, dtype: torch.dtype) -> None:
    assert batches(causal(name, dtype)) == "padded"


@torch.inference_mode()
def test_a_module_that_padding_changes_is_found_out() -> None:
    model = causal("bart")  # its positions count pads
    assert batches(model) == "equal"
    engines = ReferenceDecoder(model), WholeDecoder(model)
    padded, whole = (
        [one.ids for _, one in sorted(_answer(engine, PROMPTS, [()] * len(PROMPTS), GREEDY, STOPS))]
        for engine in engines
    )
    assert padded != whole


def test_a_module_that_keeps_nothing_is_found_out() -> None:
    assert batches(causal("openai-gpt")) == "whole"


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "IA3"])
def test_adapters_of_another_library_answer_alone_as_together_and_come_off(method: str) -> None:
    pytest.importorskip("peft")
    options = "{}" if method == "IA3" else "{num_virtual_tokens: 4}"
    chosen = tiny.recipe(f"adapter={{kind: peft, method: {method}, options: {options}}}")
    bare, module = causal("gemma2"), causal("gemma2").module
    model = CausalModel(module, attach(module, chosen.adapter, 0))
    assert model.adapter is not None
    torch.manual_seed(1)
    for parameter in model.adapter.parameters():
        parameter.data.normal_(0, 0.5)
    tuned = [one.ids for one in generate(model, PROMPTS, GREEDY, STOPS)]
    assert tuned == [plainly(model, prompt) for prompt in PROMPTS]
    with model.adapter.disabled():
        base = [one.ids for one in generate(model, PROMPTS, GREEDY, STOPS)]
    assert base == [one.ids for one in generate(bare, PROMPTS, GREEDY, STOPS)] != tuned
