"""Promise 2 for what is not a training step: answers and likelihoods that find no memory are made again, fewer at a
time, and are the same; a run whose sampled answers find none goes on without them."""

from __future__ import annotations

import json
import re
import warnings
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from luthier import recipe
from luthier.data.conversation import Origin
from luthier.errors import MemoryPlanError
from luthier.evaluate.asking.answers import Memo, Task, Text, _weigh
from luthier.model.causal import CausalModel
from luthier.model.decode import batches
from luthier.model.fast import RECORD_AFTER, FastDecoder, _Recorder
from luthier.model.generate import Generation, Sampling, generate, stream
from luthier.model.load import model_folder
from luthier.model.quantize import forget_unpacked, unpacked
from luthier.train.engines.local import Local
from luthier.train.launch import decisions_of, prepare_data
from luthier.train.worker import model_of, work
from scarce import Scarce, Small

BEGINNING = [5, 9, 3, 7, 11, 2, 13, 17, 6, 4]
PROMPTS = [BEGINNING + [(n * i + 1) % 64 for i in range(1 + 3 * n)] for n in range(4)] + [[1, 2], [60, 7, 8]]
CONTINUATIONS = [[], [[3], [8, 1, 44]], [[60] * 7], [], [[5, 6]], [[4, 4], [4]]]
WARM = Sampling(max_new_tokens=5, temperature=0.9, top_p=0.9, repetition_penalty=1.2)
STOPS = frozenset(range(40, 56))


def llama(settings: Any = None) -> CausalModel:
    """Our own decoder answers for it. `settings`: how its weights are packed."""
    return tiny.speaking(tiny.model(tiny.recipe()) if settings is None else tiny.packed(settings))


def other(name: str, **sizes: int) -> CausalModel:
    """A module of transformers that answers by itself."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](vocab_size=64, pad_token_id=0, **sizes)
    module = AutoModelForCausalLM.from_config(config).eval()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    return CausalModel(module, None)


GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, Callable[[], CausalModel]] = {
    "ours": llama,
    "ours, packed": lambda: llama(recipe.FourBit(kind="nf4")),
    "gpt2": lambda: other("gpt2", **GPT),
    "openai-gpt": lambda: other("openai-gpt", **GPT),  # keeps no cache
}


def answered(model: CausalModel, memory: Any) -> list[Generation]:
    with memory:
        return generate(model, PROMPTS, WARM, STOPS, continuations=CONTINUATIONS)


def check(found: list[Generation], wanted: list[Generation]) -> None:
    assert [(one.ids, one.stopped) for one in found] == [(one.ids, one.stopped) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_wherever_memory_runs_out_the_answers_are_the_same(kind: str) -> None:
    whole = Scarce(-1)
    wanted, count = answered(MODELS[kind](), whole), whole.count
    assert len({len(one.ids) for one in wanted}) > 2
    for at in sorted({*range(0, count, 1 + count // 7), count - 1}):
        model = MODELS[kind]()
        check(answered(model, Scarce(at)), wanted)
        # What a module's batches may be is tried once, and a lack of memory is no answer to that.
        assert not kind.startswith("g") or batches(model) == "padded"


def test_wherever_memory_runs_out_a_streamed_answer_is_the_same() -> None:
    def streamed(memory: Scarce, sampling: Sampling = WARM) -> list[int]:
        model = llama()
        with memory:
            return list(stream(model, PROMPTS[3], sampling, frozenset()))

    first, whole = Scarce(-1), Scarce(-1)
    streamed(first, replace(WARM, max_new_tokens=1))
    wanted = streamed(whole)
    assert len(wanted) == WARM.max_new_tokens
    # The first token's choice lays out what later ones find.
    for at in sorted({*range(0, whole.count, whole.count // 4), *range(first.count - 40, first.count, 3)}):
        assert streamed(Scarce(at)) == wanted, at


def test_a_streamed_answer_has_the_memory_of_unpacked_weights() -> None:
    model = llama(recipe.FourBit(kind="nf4"))
    wanted = list(stream(model, PROMPTS[3], WARM, frozenset()))
    with unpacked(model.module, 1 << 20):
        layers = [layer for layer in model.module.modules() if getattr(layer, "kept", None) is not None]
        with Beside(layers):
            assert list(stream(model, PROMPTS[3], WARM, frozenset())) == wanted
    assert layers


@pytest.mark.parametrize("times", [2, 10])
def test_a_lack_of_memory_that_lasts_is_outlived_or_told(times: int) -> None:
    whole = Scarce(-1)
    wanted, outlived = answered(llama(), whole), []
    for at in range(0, whole.count, whole.count // 3):
        with suppress(MemoryPlanError):
            check(answered(llama(), Scarce(at, times)), wanted)
            outlived.append(at)
    assert bool(outlived) == (times == 2)


@pytest.mark.parametrize("most", [20_000, 8_000, 7_000])
def test_in_less_memory_fewer_rows_are_answered_at_a_time(most: int) -> None:
    model, prompts = llama(), [[(n * i) % 64 for i in range(100)] for n in range(1, 21)]
    sampling = Sampling(max_new_tokens=3)
    wanted, memory = generate(model, prompts, sampling, STOPS), Small(most)
    with memory:
        found = generate(model, prompts, sampling, STOPS)
    check(found, wanted)
    assert 0 < memory.times < 10  # the rest goes on with the size that fits


def test_many_continuations_of_one_prompt_are_weighed_in_smaller_passes() -> None:
    model, none = llama(), Sampling(max_new_tokens=0)
    rests = [[[(n * i) % 64 for i in range(20)] for n in range(1, 31)]]
    wanted, memory = generate(model, PROMPTS[:1], none, STOPS, continuations=rests), Small(10_000)
    with memory:
        check(generate(model, PROMPTS[:1], none, STOPS, continuations=rests), wanted)
    assert memory.times > 0


def test_a_prompt_that_does_not_fit_alone_is_told_with_its_length() -> None:
    model, nothing = llama(), Small(500)
    with nothing, pytest.raises(MemoryPlanError, match="a prompt of 20 tokens and up to 5 of its answer do not fit"):
        generate(model, [[3] * 20, [4] * 20], WARM, STOPS)
    with Small(0), pytest.raises(MemoryPlanError, match="leaves no memory for answers"):
        generate(model, [[3] * 20], WARM, STOPS)
    with nothing, pytest.raises(MemoryPlanError, match="a prompt of 20 tokens"):
        next(stream(model, [3] * 20, WARM, STOPS))


def test_a_row_that_is_alone_has_the_memory_of_unpacked_weights() -> None:
    model = llama(recipe.FourBit(kind="nf4"))
    wanted = generate(model, PROMPTS, WARM, STOPS)
    with unpacked(model.module, 1 << 20):
        layers = [layer for layer in model.module.modules() if getattr(layer, "kept", None) is not None]
        memory = Beside(layers)
        with memory:
            check(generate(model, PROMPTS, WARM, STOPS), wanted)
        assert layers
        assert not forget_unpacked(model.module)


def test_a_weight_that_cannot_be_kept_unpacked_is_unpacked_as_before() -> None:
    model = llama(recipe.FourBit(kind="nf4"))
    wanted = generate(model, PROMPTS, WARM, STOPS)
    layers = [layer for layer in model.module.modules() if hasattr(layer, "kept")]
    with Scarce(50), unpacked(model.module, 1 << 20):
        assert 0 < sum(layer.kept is None for layer in layers) < len(layers)
        check(generate(model, PROMPTS, WARM, STOPS), wanted)


class Beside(Scarce):
    """Memory that there is none of while any of some packed layers keep their weights unpacked."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(-1)
        self.layers = layers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and any(layer.kept is not None for layer in self.layers):
            raise torch.OutOfMemoryError("as a test")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_steps_that_cannot_be_recorded_for_want_of_memory_are_launched() -> None:
    class Full:
        """A recorder of a GPU that has no memory for a second graph."""

        calls = ""

        def record(self, step: Any) -> Any:
            self.calls += "r"
            if self.calls == "rr":
                raise torch.OutOfMemoryError("as a test")
            return step

        def forget(self) -> None:
            self.calls += "f"

    recorder, full = _Recorder(on=True), Full()
    recorder.recorder = full  # type: ignore[assignment]
    for kind in ((4, 128), (8, 128), (4, 128)):
        assert [int(recorder(lambda: torch.tensor(7), kind)) for _ in range(RECORD_AFTER + 3)] == [7] * 7
    assert full.calls == "rrf"
    assert not recorder.recorded
    recorder.forget()
    assert recorder.on  # there may be memory for the steps of the next batch


def test_steps_that_cannot_be_recorded_are_said_to_be_launched_and_are_for_good() -> None:
    class Refusing:
        calls = ""

        def record(self, step: Any) -> Any:
            self.calls += "r"
            raise RuntimeError("operation not permitted when stream is capturing\nas a test")

        def forget(self) -> None:
            self.calls += "f"

    model, refusing = llama(), Refusing()
    decoder = FastDecoder(model, merge=False, bucketed=True)
    decoder.recorder = recorder = _Recorder(on=True)  # as on a GPU
    with torch.inference_mode(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):  # batches
            decoder.prefill(PROMPTS, 64)
            recorder.recorder = refusing  # type: ignore[assignment]
            for _ in range(RECORD_AFTER + 2):
                decoder.step(torch.ones(len(PROMPTS), dtype=torch.int64))
    said = "steps are launched one by one from here on, which only takes longer: operation not permitted"
    assert [str(warning.message).startswith(said) for warning in told] == [True]
    assert "as a test" not in str(told[0].message)
    assert refusing.calls == "rf"


def weighed(folder: Path, model: CausalModel, memory: Any) -> tuple[list[float], int]:
    """What eight rows weigh, and how many were told to be done."""
    texts = [Text(array("i", [(n * i + 2) % 64 for i in range(40)]), bytes([0] * 30 + [1] * 10)) for n in range(1, 9)]
    tasks = [Task("tuned", i, f"row {i}", text=text, origin=Origin("t.jsonl", 9)) for i, text in enumerate(texts)]
    memo, done = Memo(folder / "answers.jsonl"), list[int]()
    with memory, torch.inference_mode():
        _weigh(SimpleNamespace(model=model), tasks, memo, lambda label, count: done.append(count))  # type: ignore[arg-type]
    return [memo[task.key]["nll"] for task in tasks], sum(done)


def test_likelihoods_are_the_same_in_less_memory(tmp_path: Path) -> None:
    wanted, _ = weighed(tmp_path / "whole", llama(), Scarce(-1))
    for name, memory in {"once": Scarce(100), "from now on": Small(8_000)}.items():
        found, done = weighed(tmp_path / name, llama(), memory)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert done == 8
    with pytest.raises(MemoryPlanError, match=r"^t\.jsonl:9: a row of 40 tokens does not fit"):
        weighed(tmp_path / "never", llama(), Small(1_000))


def test_a_run_goes_on_without_its_samples_where_there_is_no_memory_for_one(tmp_path: Path) -> None:
    run = tiny.run(tmp_path, "evaluate.samples=2", "evaluate.every=3", "train.epochs=1")
    decisions, events = decisions_of(run, prepare_data(run)), list[Any]()
    model, evaluations = model_of(run.recipe, decisions, model_folder(run.recipe.model)), list[Any]()

    def full(module: Any, args: Any) -> None:
        if torch.is_inference_mode_enabled() and not evaluations:  # answers are being made, for the first time
            raise torch.OutOfMemoryError("as a test")

    def emit(event: Any) -> None:
        events.append(event)
        evaluations.extend([event] if event["event"] == "evaluation" else [])

    model.module.get_input_embeddings().register_forward_pre_hook(full)
    result = work(run, decisions, Local(), emit, model=model)
    assert result["steps"] == 5
    assert len(evaluations) == 2
    said = [event["text"] for event in events if event["event"] == "note"]
    for text in said:
        assert re.match(r"no answers are sampled this time: sums\.jsonl:\d+: a prompt of", text), text
    assert len(said) == 1
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [evaluations[1]["step"]] * 2
