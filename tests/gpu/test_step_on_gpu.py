"""A step on a GPU: the host waits once, and its end is a few launches, however many parameters there are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tiny
from luthier.adapters.lora import attach
from luthier.model import attention
from luthier.model.causal import CausalModel
from luthier.model.memory import release
from luthier.recipe import Train
from luthier.train import optim
from luthier.train.rehearse import rehearse
from luthier.train.reproducible import reproducible

pytestmark = pytest.mark.gpu


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Raises where torch would wait for the GPU by itself; waiting for an event is not told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is a prototype, torch says
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Side:
    """Parameters of one device with their gradient and optimizer, the same on each."""

    def __init__(self, device: str, pairs: int = 20) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [((4, 64), (96, 4))[i % 2] for i in range(2 * pairs)]
        starts = [torch.randn(shape, generator=generator) for shape in shapes]
        self.named = [
            (f"{i // 2}.lora_{'AB'[i % 2]}.weight", nn.Parameter(start.to(device))) for i, start in enumerate(starts)
        ]
        self.gradient = optim.flat_gradient(self.named)
        self.optimizer = optim.optimizer(self.named, self.gradient, Train(weight_decay=0.1))

    def finish(self, slopes: torch.Tensor, loss: float = 1.5) -> list[float]:
        self.gradient.copy_(slopes)
        told = torch.full((), loss, dtype=torch.float64, device=self.gradient.device)
        return optim.finish(self.optimizer, self.gradient, told, lr=0.01, max_norm=1.0)()

    def state(self) -> list[torch.Tensor]:
        parts = [*(p.detach() for _, p in self.named), *optim.moments(self.optimizer).values()]
        return [part.to("cpu", copy=True) for part in parts]


def test_updates_are_those_of_a_cpu() -> None:
    sides = [Side("cuda"), Side("cpu")]
    for _ in range(3):
        slopes = torch.randn(sides[1].gradient.shape)
        norms = [side.finish(slopes)[1] for side in sides]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for mine, wanted in zip(*(side.state() for side in sides), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "slope"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_no_bit_changes_where_loss_or_norm_is_not_finite(loss: float, slope: float) -> None:
    side = Side("cuda")
    slopes = torch.randn(side.gradient.shape)
    side.finish(slopes)
    before = side.state()
    slopes[5] = slope
    assert not all(math.isfinite(value) for value in side.finish(slopes, loss))
    assert all(torch.equal(a, b) for a, b in zip(before, side.state(), strict=True))


def test_the_end_of_a_step_waits_for_nothing_but_its_figures() -> None:
    side = Side("cuda")
    loss = torch.full((), 2.5, dtype=torch.float64, device="cuda")
    side.gradient.fill_(1e-3)
    norm = float(torch.linalg.vector_norm(side.gradient))
    with nobody_waits():
        told = optim.finish(side.optimizer, side.gradient, loss, lr=0.01, max_norm=1.0)
    assert told() == [2.5, norm]


def launches(pairs: int) -> int:
    side = Side("cuda", pairs)
    slopes = torch.randn(side.gradient.shape, device="cuda")
    side.finish(slopes)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:  # without, some versions warn
        side.finish(slopes)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or [])


def test_the_end_of_a_step_is_as_many_launches_for_any_number_of_parameters() -> None:
    some = launches(pairs=300)  # of very few values a norm takes one launch less
    assert 0 < some <= 40
    assert launches(pairs=600) == some


def model() -> CausalModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    module = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).bfloat16().eval().cuda()
    return CausalModel(module, attach(module, tiny.recipe().adapter, 0), kernels="compiled")


def test_a_rehearsal_tells_what_it_takes_and_not_what_was_there_before(tmp_path: Path) -> None:
    release()  # of other tests
    before = torch.cuda.memory_reserved()
    trainer, loaded = tiny.trainer(tmp_path, tiny.recipe(), causal=model()), torch.empty(1 << 30, device="cuda")
    assert torch.cuda.memory_reserved() > before + (4 << 30) - 1
    del loaded
    assert before <= rehearse(trainer) < before + (1 << 30)


@pytest.mark.parametrize("micro_tokens", [1000, 60])
def test_a_whole_step_waits_for_nothing_but_its_figures(tmp_path: Path, micro_tokens: int) -> None:
    trainer = tiny.trainer(tmp_path, tiny.recipe("train.max_steps=9"), causal=model(), micro_tokens=micro_tokens)
    losses = [trainer.step().loss for _ in range(3)]  # which compile, and choose
    with nobody_waits():
        losses += [trainer.step().loss for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert trainer.progress.step == 6


def test_a_step_that_is_begun_ahead_learns_the_same_bits(tmp_path: Path) -> None:
    found = []
    for ahead in (True, False):
        trainer = tiny.trainer(tmp_path / str(ahead), tiny.recipe("train.max_steps=9"), causal=model(), micro_tokens=60)
        assert trainer.ahead
        trainer.ahead = ahead
        with reproducible("cuda"):
            figures = [(step.loss, step.grad_norm) for step in trainer]
        found.append((figures, [tensor.cpu() for tensor in trainer.adapter.state_dict().values()]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
