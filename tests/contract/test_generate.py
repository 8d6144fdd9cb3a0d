"""Both decoders mean the same, and both mean what transformers' own `generate` means."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from luthier import recipe
from luthier.data.stream import Stream, collate
from luthier.errors import ModelError
from luthier.kernels.place import planned_for
from luthier.model import decode, fast
from luthier.model.causal import CausalModel
from luthier.model.decode import Decoder, ReferenceDecoder, WholeDecoder
from luthier.model.fast import FastDecoder, Projection
from luthier.model.generate import Generation, Sampling, _answer, _batches, _Picker, _without_holes, generate, stream
from luthier.model.quantize import PackedLinear

BEGINNING = [5, 9, 3, 7, 11, 2, 13, 17, 6, 4]
PROMPTS = [BEGINNING + rest for rest in ([1], [8, 15, 21, 30], [8, 16], [40, 41, 42, 43, 44, 45, 46], [63] * 12)]
STRANGERS = [[1], [2, 3, 4, 5], [60, 7, 8]]
GREEDY = Sampling(max_new_tokens=20)
NO_STOPS: frozenset[int] = frozenset()
PACKED: dict[str, Any] = {
    "nf4": recipe.FourBit(kind="nf4"),
    "int8": recipe.EightBit(kind="int8", threshold=0),  # columns apart from the others depend on what is beside
    "fp8": recipe.Float8(kind="fp8"),
}


@pytest.fixture(scope="module")
def model() -> CausalModel:
    """A tiny Llama whose adapter changes what it says."""
    return tiny.speaking(tiny.model(tiny.recipe()))


def decoders(model: CausalModel) -> dict[str, Decoder]:
    return {
        "reference": ReferenceDecoder(model),
        "whole": WholeDecoder(model),
        "merged": FastDecoder(model, merge=True),
        "as it is": FastDecoder(model, merge=False),
        "bucketed": FastDecoder(model, merge=False, bucketed=True),
    }


@torch.inference_mode()
def answers(decoder: Decoder, prompts: list[list[int]], sampling: Sampling, stops: frozenset[int]) -> list[Generation]:
    made = _answer(decoder, prompts, [()] * len(prompts), sampling, stops)
    return [answer for _, answer in sorted(made, key=lambda pair: pair[0])]


CONTINUATIONS = [[3], [8, 1, 44, 2], [60] * 7, [5, 6], [9, 9, 9]]


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [PROMPTS, STRANGERS, PROMPTS[:1]], ids=["shared", "strangers", "one"])
@pytest.mark.parametrize("kind", ["reference", "whole", "merged", "as it is", "bucketed"])
def test_a_continuation_weighs_what_it_weighs_in_the_whole_text(
    model: CausalModel, prompts: list[list[int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "PREFILL_TOKENS", 8)  # several passes
    engine, count = decoders(model)[kind], len(prompts)
    rows, continuations = [*range(count), count - 1, 0, 0], [*CONTINUATIONS[:count], [8, 1, 50], [4], [4, 4]]
    losses = engine.weigh(engine.prefill(prompts, 4), rows, continuations)
    for row, continuation, loss in zip(rows, continuations, losses, strict=True):
        logits = model.module(input_ids=torch.tensor([prompts[row] + continuation])).logits[
            0, len(prompts[row]) - 1 : -1
        ]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(continuation), reduction="sum")
        assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_answers_are_the_same_beside_continuations_of_some(model: CausalModel) -> None:
    beside = [[], [[8, 1, 44, 2], [8]], [], [[5, 6]], [[3], [4], [5]]]
    alone = generate(model, PROMPTS, GREEDY, NO_STOPS)
    both = generate(model, PROMPTS, GREEDY, NO_STOPS, continuations=beside)
    only = generate(model, PROMPTS, Sampling(max_new_tokens=0), NO_STOPS, continuations=beside)
    assert [one.ids for one in both] == [one.ids for one in alone]
    assert [len(one.losses) for one in both] == [len(several) for several in beside]
    assert [one.losses for one in only] == [one.losses for one in both]
    assert all(one.ids == [] for one in only)


def by_transformers(model: CausalModel, prompt: list[int], **options: Any) -> list[int]:
    """What transformers' generate adds to one prompt of its own."""
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, **options}
    ids = torch.tensor([prompt])
    out = model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompts", [PROMPTS, STRANGERS, PROMPTS[:1]], ids=["shared", "strangers", "one"])
def test_every_decoder_gives_the_logits_of_the_whole_text_at_once(model: CausalModel, prompts: list[list[int]]) -> None:
    ahead = [33, 12, 50]
    for name, decoder in decoders(model).items():
        with torch.inference_mode():
            logits = [decoder.prefill(prompts, len(ahead))]
            logits += [decoder.step(torch.full((len(prompts),), token)) for token in ahead]
            for row, prompt in enumerate(prompts):
                whole = model.module(torch.tensor([prompt + ahead])).logits[0, len(prompt) - 1 :]
                torch.testing.assert_close(torch.stack(logits)[:, row], whole, atol=2e-5, rtol=1e-5, msg=name)


def test_greedy_answers_equal_transformers_one_prompt_at_a_time(model: CausalModel) -> None:
    expected = [by_transformers(model, prompt) for prompt in PROMPTS]
    for name, decoder in decoders(model).items():
        assert [a.ids for a in answers(decoder, PROMPTS, GREEDY, NO_STOPS)] == expected, name


def test_the_repetition_penalty_is_the_one_of_transformers(model: CausalModel) -> None:
    sampling = Sampling(max_new_tokens=20, repetition_penalty=1.7)
    expected = [by_transformers(model, prompt, repetition_penalty=1.7) for prompt in PROMPTS]
    assert expected != [by_transformers(model, prompt) for prompt in PROMPTS]
    assert [a.ids for a in generate(model, PROMPTS, sampling, NO_STOPS)] == expected


def test_a_penalised_token_of_a_logit_below_zero_is_less_likely_too() -> None:
    pick = _Picker([[0]], Sampling(repetition_penalty=2.0))
    assert pick(torch.tensor([[-1.0, -1.5, -3.0]])).tolist() == [1]


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(model: CausalModel) -> None:
    free = generate(model, PROMPTS, GREEDY, NO_STOPS)
    stop = free[0].ids[5]
    for answer, whole in zip(generate(model, PROMPTS, GREEDY, frozenset({stop})), free, strict=True):
        assert answer.stopped == (stop in whole.ids)
        assert answer.ids == (whole.ids[: whole.ids.index(stop)] if answer.stopped else whole.ids)


@pytest.mark.parametrize("seed", [0, 3])
def test_rows_that_finish_early_leave_the_others_as_they_are(model: CausalModel, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, tiny.VOCAB, (n,), generator=random).tolist() for n in range(3, 20)]
    stops = frozenset(torch.randint(0, tiny.VOCAB, (6,), generator=random).tolist())
    alone = [answers(ReferenceDecoder(model), [prompt], GREEDY, stops)[0] for prompt in prompts]
    assert len({len(a.ids) for a in alone}) > 3
    for name, decoder in decoders(model).items():
        assert answers(decoder, prompts, GREEDY, stops) == alone, name


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_does_not_depend_on_its_batch_or_place(model: CausalModel, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_p=0.9)
    together = generate(model, PROMPTS, sampling, NO_STOPS)
    apart = generate(model, PROMPTS[::-1], sampling, NO_STOPS, max_tokens_in_flight=1)[::-1]
    assert together == apart


def test_the_seed_decides_what_is_sampled(model: CausalModel) -> None:
    one, again, other = (
        generate(model, PROMPTS, Sampling(max_new_tokens=12, temperature=1.0, seed=seed), NO_STOPS)
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize("top_p", [1.0, 0.6, 0.05])
def test_samples_come_from_the_distribution_of_transformers(top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    from luthier.model.generate import _sample

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.8)(None, logits))
    count = 20_000
    noise = (torch.arange(count).double() + 0.5) / count
    drawn = _sample((logits / 0.8).expand(count, -1), top_p, noise)
    shares = torch.bincount(drawn, minlength=12) / count
    torch.testing.assert_close(shares, warped[0].softmax(-1), atol=2e-4, rtol=0)


def test_a_stream_gives_the_tokens_of_the_batch(model: CausalModel) -> None:
    free = generate(model, PROMPTS, GREEDY, NO_STOPS)
    stop = frozenset({free[1].ids[7]})
    for sampling in (GREEDY, Sampling(max_new_tokens=9, temperature=0.7, repetition_penalty=1.2)):
        expected = generate(model, PROMPTS, sampling, stop)
        assert [list(stream(model, prompt, sampling, stop)) for prompt in PROMPTS] == [a.ids for a in expected]


def test_a_stream_leaves_gradients_on_for_its_caller(model: CausalModel) -> None:
    tokens = stream(model, PROMPTS[0], GREEDY, NO_STOPS)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    tokens.close()


def test_with_the_adapter_off_the_base_answers(model: CausalModel) -> None:
    assert model.adapter is not None
    tuned = generate(model, PROMPTS, GREEDY, NO_STOPS)
    with model.adapter.disabled():
        base = generate(model, PROMPTS, GREEDY, NO_STOPS)
        assert base == answers(ReferenceDecoder(model), PROMPTS, GREEDY, NO_STOPS)
    assert base != tuned


def test_the_dropout_of_a_training_step_is_not_in_the_answers(model: CausalModel, tmp_path: Path) -> None:
    expected = generate(model, PROMPTS, GREEDY, NO_STOPS)
    store = tiny.rows(tmp_path)
    chosen = Stream(store, None, 0, samples_per_step=3).step(0)
    model.loss(collate(store, chosen, 0)).backward()
    for name, decoder in decoders(model).items():
        assert answers(decoder, PROMPTS, GREEDY, NO_STOPS) == expected, name


def test_each_answer_is_given_with_the_place_of_its_prompt(model: CausalModel) -> None:
    given: list[tuple[int, Generation]] = []
    made = generate(model, PROMPTS, GREEDY, NO_STOPS, answered=lambda row, one: given.append((row, one)))
    assert len(given) == len(PROMPTS)
    assert [dict(given)[row] for row in range(len(PROMPTS))] == made


def test_no_prompts_have_no_answers_and_an_empty_prompt_is_refused(model: CausalModel) -> None:
    assert generate(model, [], GREEDY, NO_STOPS) == []
    with pytest.raises(ModelError, match="no tokens"):
        generate(model, [[1], []], GREEDY, NO_STOPS)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 90, 17, 17, 200, 3, 44] * 60
    batches = _batches(lengths, new_tokens=10, budget=400)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) * (max(lengths[i] for i in b) + 10) <= 400 for b in batches)
    assert all(len(b) == 1 for b in _batches(lengths, new_tokens=10, budget=1))
    assert max(map(len, _batches(lengths, new_tokens=10, budget=10**9))) == 256
    assert len(_batches(lengths, new_tokens=10, budget=10**9, most=len(lengths))) == 1


def test_holes_are_filled_from_the_end() -> None:
    assert _without_holes([True, False, True, False, True]) == [0, 4, 2]
    assert _without_holes([True, True]) == [0, 1]
    assert _without_holes([False, True]) == [1]


@torch.no_grad()
def test_a_merged_projection_equals_its_layers_in_bfloat16_too(model: CausalModel) -> None:
    first = model.module.base_model.layers[0].self_attn
    layers = [first.q_proj, first.k_proj, first.v_proj]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(Projection(layers, merge=True)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Projection(layers, merge=False)(x), expected, atol=1e-5, rtol=1e-5)
    half = tiny.model(tiny.recipe())
    half.module.to(torch.bfloat16)
    for layer in half.adapter.layers.values():  # type: ignore[union-attr]
        layer.B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(layer.index))
    first = half.module.base_model.layers[0].self_attn
    layers = [first.q_proj, first.k_proj, first.v_proj]
    expected = torch.cat([layer(x.bfloat16()) for layer in layers], dim=-1)
    assert Projection(layers, merge=True).parts[0].low_rank is not None
    torch.testing.assert_close(Projection(layers, merge=True)(x.bfloat16()), expected, atol=0.05, rtol=0.05)


@torch.inference_mode()
@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_give_the_logits_of_the_module_with_the_adapter_on_and_off(kind: str, bucketed: bool) -> None:
    model, found = tiny.speaking(tiny.packed(PACKED[kind])), []
    assert model.adapter is not None
    for side in (nullcontext(), model.adapter.disabled()):
        with side:
            one, other = ReferenceDecoder(model), FastDecoder(model, merge=True, bucketed=bucketed)
            expected = one.prefill(PROMPTS, 3)
            logits = other.prefill(PROMPTS, 3)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
            rows, rests = [0, 4, 4], [[3, 8], [8, 1, 50], [4]]
            weighed = other.weigh(logits, rows, rests)
            assert weighed == pytest.approx(one.weigh(expected, rows, rests), rel=1e-5)
            ids = torch.arange(7, 7 + len(PROMPTS))
            torch.testing.assert_close(other.step(ids), one.step(ids), atol=2e-5, rtol=1e-5)
            assert answers(other, PROMPTS, GREEDY, NO_STOPS) == answers(one, PROMPTS, GREEDY, NO_STOPS)
            found.append(expected)
    assert not torch.allclose(*found, atol=0.1)


@torch.inference_mode()
def test_bucketed_steps_work_on_tensors_that_stay_where_they_are(model: CausalModel) -> None:
    decoder = FastDecoder(model, merge=False, bucketed=True)
    decoder.prefill(PROMPTS, 200)

    def places() -> list[int]:
        state = [decoder.ids, decoder.starts, decoder.bias, decoder.column, *decoder.keys, *decoder.values]
        return [tensor.data_ptr() for tensor in state]

    before = places()
    for count in (5, 5, 3, 1):
        decoder.keep(torch.arange(count))
        decoder.step(torch.arange(count))
        assert places() == before
    assert list(decoder.recorder.times) == [(8, 128), (4, 128), (1, 128)]


@torch.inference_mode()
def test_bucketed_steps_go_on_past_the_columns_of_their_first_bucket(model: CausalModel) -> None:
    ahead = [(7 * i) % tiny.VOCAB for i in range(60)]
    one, other = FastDecoder(model, merge=False), FastDecoder(model, merge=False, bucketed=True)
    prompts = [[3] * 100, [5, 8, 1, 60]]
    for decoder in (one, other):
        decoder.prefill(prompts, len(ahead))
    for token in ahead:
        ids = torch.tensor([token, token])
        torch.testing.assert_close(other.step(ids), one.step(ids), atol=2e-5, rtol=1e-5)
    assert list(other.recorder.times) == [(2, 128), (2, 256)]


@torch.inference_mode()
@pytest.mark.parametrize("settings", [PACKED["nf4"], PACKED["fp8"], recipe.EightBit(kind="int8")])
def test_a_bucketed_step_asks_nothing_of_the_host_unless_inputs_are_rounded(settings: Any) -> None:
    model = tiny.speaking(tiny.packed(settings))
    model.module.to("meta")  # tensors without data have no answers
    model.device = torch.device("meta")
    with planned_for((9, 0)):
        decoder = FastDecoder(model, merge=False, bucketed=True)
        decoder._make_room([5, 3, 4], 10)
        ids = torch.empty(3, dtype=torch.int64, device="meta")
        with pytest.raises(NotImplementedError) if settings.kind == "int8" else nullcontext():
            assert decoder.step(ids).shape == (3, tiny.VOCAB)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_layers_take_the_fast_way_where_they_compute_in_the_model_s_dtype(kind: str) -> None:
    model = tiny.speaking(tiny.packed(PACKED[kind]))
    assert decode.is_fast(model)
    next(layer for layer in model.module.modules() if isinstance(layer, PackedLinear)).compute_dtype = torch.bfloat16
    assert not decode.is_fast(model)


def test_only_llama_shaped_models_take_the_fast_way(model: CausalModel) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    assert decode.is_fast(model)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    other = CausalModel(GPTNeoXForCausalLM(config).eval(), None)
    assert not decode.is_fast(other)
    expected = [by_transformers(other, prompt) for prompt in PROMPTS]
    assert [a.ids for a in generate(other, PROMPTS, GREEDY, NO_STOPS)] == expected
