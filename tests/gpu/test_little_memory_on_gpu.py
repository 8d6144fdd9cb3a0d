"""Memory that torch may not take ends neither a held-out loss nor an answer: both are made in smaller passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from luthier import recipe
from luthier.adapters.lora import attach
from luthier.data.stream import Stream
from luthier.errors import MemoryPlanError
from luthier.model import attention, fast
from luthier.model.causal import CausalModel
from luthier.model.fast import RECORD_AFTER, _Recorder
from luthier.model.generate import Generation, Sampling, generate
from luthier.model.memory import release
from luthier.train.engines.local import Local
from luthier.train.loop import Trainer
from luthier.train.memory import at_most

pytestmark = pytest.mark.gpu
MIB = 1 << 20
VOCAB = 1000
PROMPTS = [[(17 * i + n * n) % VOCAB for i in range(120 + 5 * n)] for n in range(64)]
CONTINUATIONS = [[[(3 * i + n) % VOCAB for i in range(4)], [n]] for n in range(64)]
WARM = Sampling(max_new_tokens=12, temperature=0.8)
STOPS = frozenset(range(40))


def model() -> CausalModel:
    """A small Llama in float32, in which fewer rows at a time say the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    module = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).to("cuda").eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.05)
    return CausalModel(module, attach(module, recipe.Lora(rank=8, alpha=16), seed=3))


class Peak:
    """What some work takes of the GPU, what torch keeps for later apart."""

    def __init__(self) -> None:
        release()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    @property
    def taken(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


@contextmanager
def squeezed(taken: int) -> Iterator[None]:
    """Inside, torch may take so many bytes more than it has, and is refused some."""
    release()
    refused = torch.cuda.memory_stats()["num_ooms"]
    with at_most(torch.cuda.memory_reserved() + taken):
        yield
    assert torch.cuda.memory_stats()["num_ooms"] > refused


def trainer(folder: Path, causal: CausalModel, notes: list[Any]) -> Trainer:
    """With 64 held-out rows of up to 500 tokens, which it takes 8,192 of at a time."""
    store, heldout = tiny.rows(folder / "train", 8), tiny.rows(folder / "heldout", 64, seed=1, longest=500)
    options: Any = {"engine": Local(), "folder": folder, "micro_tokens": 8192, "emit": notes.append}
    stream = Stream(store, None, 0, 16, epochs=1, max_steps=None)
    return Trainer(tiny.recipe("train.samples_per_step=16"), causal, stream, heldout, **options)


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_a_held_out_loss_is_the_same_in_less_memory(tmp_path: Path, share: float) -> None:
    causal, notes = model(), list[Any]()
    whole, small = (trainer(tmp_path / name, causal, notes) for name in ("whole", "small"))
    whole.evaluate()  # loads what is loaded once
    peak = Peak()
    whole.evaluate()
    with squeezed(int(share * peak.taken)):
        small.evaluate()
    assert small.progress.micro_tokens < whole.progress.micro_tokens == 8192
    assert small.progress.best_loss == pytest.approx(whole.progress.best_loss, rel=1e-5)
    assert any("out of memory; from here on" in note.get("text", "") for note in notes)


def check(found: list[Generation], wanted: list[Generation]) -> None:
    assert [(one.ids, one.stopped) for one in found] == [(one.ids, one.stopped) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


@pytest.mark.parametrize("share", [0.8, 0.4, 0.15])
def test_answers_are_the_same_in_less_memory(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "RECORD_AFTER", 1)
    made = model()
    generate(made, PROMPTS[:2], WARM, STOPS, continuations=CONTINUATIONS[:2])  # what is loaded once
    peak = Peak()
    wanted = generate(made, PROMPTS, WARM, STOPS, continuations=CONTINUATIONS)
    assert len({len(one.ids) for one in wanted}) > 2
    with squeezed(int(share * peak.taken)):
        found = generate(made, PROMPTS, WARM, STOPS, continuations=CONTINUATIONS)
    check(found, wanted)


def test_a_prompt_that_does_not_fit_is_told_and_the_next_is_answered() -> None:
    made = model()
    wanted = generate(made, PROMPTS[:4], WARM, STOPS, continuations=CONTINUATIONS[:4])
    with squeezed(8 * MIB), pytest.raises(MemoryPlanError, match="memory"):
        generate(made, [PROMPTS[0] * 10], WARM, STOPS)
    check(generate(made, PROMPTS[:4], WARM, STOPS, continuations=CONTINUATIONS[:4]), wanted)


@torch.inference_mode()
def test_a_recording_that_finds_no_memory_leaves_steps_that_are_launched_and_a_gpu_that_records() -> None:
    def step() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")
        return torch.ones(4, device="cuda") * 2

    recorder, after = _Recorder(on=True), _Recorder(on=True)
    with squeezed(256 * MIB):
        found = [recorder(step, (4, 128)) for _ in range(RECORD_AFTER + 3)]
    assert not recorder.on
    assert torch.stack(found).tolist() == [[2.0] * 4] * len(found)
    found = [after(lambda: torch.ones(4, device="cuda") * 3, (4, 128)) for _ in range(RECORD_AFTER + 3)]
    assert after.recorded
    assert torch.stack(found).tolist() == [[3.0] * 4] * len(found)
