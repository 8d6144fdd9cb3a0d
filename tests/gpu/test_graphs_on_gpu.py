"""Recorded steps on a GPU: a replay is the pass that it was recorded from, and trains as passes do."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_block_on_gpu import ADAPTER, NF4, base, micro, model
from torch import Tensor

from luthier import recipe
from luthier.data.stream import Micro
from luthier.model import attention, graphs
from luthier.model.causal import CausalModel
from luthier.model.pack import Coming, Placed, size, trim
from luthier.model.quantize import quantize_module
from luthier.train.optim import flat_gradient
from luthier.train.reproducible import reproducible

pytestmark = pytest.mark.gpu
DROPPING = recipe.Lora(rank=8, alpha=16, dropout=0.2)
LENGTHS = [(70, 2, 515, 33), (1500, 900, 700), (40, 30), (300, 400, 2, 9)]


@pytest.fixture(autouse=True)
def _same_bits() -> Iterator[None]:
    with reproducible("cuda"):
        yield


def made(recorded: bool, adapter: recipe.Lora = ADAPTER, packed: bool = False, **options: Any) -> CausalModel:
    module = base(torch.bfloat16)
    if packed:
        quantize_module(module, NF4, torch.bfloat16)
    built = model(module.cuda(), "compiled", adapter, **options)
    if recorded:
        built.record()
    return built


def gradient_of(made: CausalModel) -> Tensor:
    assert made.adapter is not None
    return flat_gradient(made.adapter.named_parameters())


def train(made: CausalModel, batches: list[Micro], flat: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """The loss and the gradient of each batch, with an update between them. `flat`: the gradients' memory."""
    assert made.adapter is not None
    flat, found = gradient_of(made) if flat is None else flat, []
    optimizer = torch.optim.AdamW(made.adapter.parameters(), lr=1e-3, fused=True)
    for number, batch in enumerate(batches):
        loss = made.accumulate(replace(batch, step=number))
        found.append((loss.cpu(), flat.cpu()))
        optimizer.step()
        flat.zero_()
    return found


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"packed": True}, {"adapter": DROPPING}], ids=str)
def test_replays_train_as_passes_do(options: dict[str, Any]) -> None:
    batches = [micro(lengths) for lengths in (LENGTHS + LENGTHS[::-1]) * 2]
    recording = made(True, **options)
    found, expected = train(recording, batches), train(made(False, **options), batches)
    assert recording.graphs is not None
    assert len(recording.graphs.recorded) == 3  # of four batches two have one shape
    for (loss, gradient), (wanted_loss, wanted) in zip(found, expected, strict=True):
        assert error(loss, wanted_loss) < 2e-3
        assert error(gradient, wanted) < 0.02


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"packed": True}, {"adapter": DROPPING}], ids=str)
def test_a_replay_has_the_bits_of_the_pass(options: dict[str, Any]) -> None:
    """The first of each is a pass. Others come between, in the same memory."""
    recording = made(True, **options)
    flat, found = gradient_of(recording), []
    for lengths in (LENGTHS[1], LENGTHS[0]) * 4:
        flat.zero_()
        found.append((recording.accumulate(micro(lengths)), flat.clone()))
    assert recording.graphs is not None
    assert len(recording.graphs.recorded) == 2
    for place, (loss, gradient) in enumerate(found):
        assert torch.equal(loss, found[place % 2][0])
        assert torch.equal(gradient, found[place % 2][1])


def test_what_the_model_does_between_two_replays_leaves_them_right() -> None:
    """Evaluation, and a base side that has no adapter: it makes other places for the adapters' values."""
    recording, plain = made(True), made(False)
    batches, found = [micro((300, 400, 2, 9))] * 3, []
    for side in (recording, plain):
        flat = gradient_of(side)
        train(side, batches, flat)
        assert side.adapter is not None
        with torch.inference_mode(), side.adapter.disabled():
            side.loss(batches[0])
        with torch.no_grad():
            side.loss(micro((900, 20)))
        found.append(train(side, batches, flat))
    for (loss, gradient), (wanted_loss, wanted) in zip(*found, strict=True):
        assert error(loss, wanted_loss) < 2e-3
        assert error(gradient, wanted) < 0.03


def test_graphs_are_recorded_again_after_all_are_gone() -> None:
    """As when the scale of float16 falls. What the model keeps lies in the memory of the graphs that are gone."""
    recording, batch = made(True, packed=True), micro(LENGTHS[0])
    flat, found = gradient_of(recording), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 0.5, 0.25):
            for _ in range(3):
                flat.zero_()
                recording.accumulate(batch, scale)
                found.append(flat / scale)
            assert recording.graphs is not None
            assert len(recording.graphs.recorded) == 1
    assert all(torch.equal(one, found[0]) for one in found)


def test_no_more_shapes_are_recorded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 1)
    recording, batches = made(True), [micro(LENGTHS[0]), micro(LENGTHS[1])] * 3
    for (loss, gradient), (wanted_loss, wanted) in zip(
        train(recording, batches), train(made(False), batches), strict=True
    ):
        assert error(loss, wanted_loss) < 2e-3
        assert error(gradient, wanted) < 0.02
    assert recording.graphs is not None
    assert len(recording.graphs.recorded) == 1


def test_shapes_that_are_chosen_ahead_train_as_passes_do() -> None:
    batches = [micro(lengths) for lengths in (LENGTHS + LENGTHS[::-1]) * 2]
    recording = made(True)
    assert recording.graphs is not None
    recording.graphs.price = 500.0
    recording.expect(lambda: Coming([size(trim(batch)) for batch in batches], 1.0))
    for (loss, gradient), (wanted_loss, wanted) in zip(
        train(recording, batches), train(made(False), batches), strict=True
    ):
        assert error(loss, wanted_loss) < 2e-3
        assert error(gradient, wanted) < 0.02
    assert set(recording.graphs.recorded) == set(recording.graphs.shapes)
    assert len(recording.graphs.shapes) > 1


def test_a_recording_that_fails_leaves_a_process_that_goes_on() -> None:
    """What waits for the GPU ends a recording, and torch ends it only in part."""
    recording, batches = made(True), [micro(lengths) for lengths in (LENGTHS[0], LENGTHS[1])] * 3
    assert recording.graphs is not None
    of_a_pass = recording.graphs.loss
    recording.graphs.loss = lambda told: of_a_pass(told) * float(told.ids[0] >= 0)
    with pytest.warns(UserWarning, match="launched one by one"):
        found = train(recording, batches)
    for (loss, gradient), (wanted_loss, wanted) in zip(found, train(made(False), batches), strict=True):
        assert error(loss, wanted_loss) < 2e-3
        assert error(gradient, wanted) < 0.02
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(8, device="cuda").unique().numel() > 1
    some = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del some
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - (1 << 30), "memory is not given back any more"
    another = made(True)
    train(another, batches)
    assert another.graphs is not None
    assert len(another.graphs.recorded) == 2


def waits(loss: Tensor) -> None:
    float(loss)


def fails(loss: Tensor) -> None:
    raise RuntimeError("it fails")


def lacks_memory(loss: Tensor) -> None:
    torch.empty(1 << 50, device="cuda")


@pytest.mark.parametrize("fault", [None, waits, fails, lacks_memory])
def test_nothing_stays_reserved_of_recordings_whose_model_is_gone(fault: Callable[[Tensor], None] | None) -> None:
    """Whether they succeeded, or torch or we ended them midway."""
    before, reserved = private(), [reserved_after_recordings(fault) for _ in range(3)]
    assert private() <= before, "a pool is kept"
    assert reserved[2] - reserved[0] < 32 << 20, "each model leaves cuBLAS's workspaces of a stream, 64 MiB"


def private() -> set[tuple[int, int]]:
    """Pools beside that of all passes in which memory lies."""
    return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()} - {(0, 0)}  # type: ignore[no-untyped-call]


def reserved_after_recordings(fault: Callable[[Tensor], None] | None) -> int:
    recorded(fault)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def recorded(fault: Callable[[Tensor], None] | None) -> None:
    recording = made(True)
    assert recording.graphs is not None
    of_a_pass = recording.graphs.loss

    def loss(told: Placed) -> Tensor:
        found = of_a_pass(told)
        if fault and torch.cuda.is_current_stream_capturing():
            fault(found)
        return found

    recording.graphs.loss = loss
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(recording, [micro(LENGTHS[0])] * 5)
    assert len(recording.graphs.recorded) == (0 if fault else 1)
    assert (recording.graphs.recorder is None) == (fault is not None)
    told = [str(warning.message) for warning in said if "one by one" in str(warning.message)]
    assert len(told) == {None: 0, lacks_memory: graphs.LACKS}.get(fault, 1), told


def test_after_a_recording_failed_the_next_one_is_made() -> None:
    x, recorder = torch.zeros(8, device="cuda"), graphs.CudaRecorder()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.add_(float(x[0])))
    recorder.forget()
    replay = recorder.record(lambda: x.add_(1))
    assert float(replay()[0]) == 1


def test_a_recorders_stream_is_lent_again_once_it_is_gone() -> None:
    one, other = graphs.CudaRecorder(), graphs.CudaRecorder()
    stream = one.stream
    assert stream != other.stream
    del one
    assert graphs.CudaRecorder().stream == stream


def test_a_loss_scale_in_float16_is_recorded_with_its_step() -> None:
    module = base(torch.float16).cuda()
    recording = model(module, "compiled")
    recording.record()
    flat, found = gradient_of(recording), []
    for scale in (1024.0, 1024.0, 1024.0, 256.0, 256.0):
        flat.zero_()
        recording.accumulate(micro(), scale)
        found.append(flat / scale)
    assert all(error(gradient, found[0]) < 0.01 for gradient in found)


def test_graphs_share_their_memory() -> None:
    recording, shapes = made(True), [(2000, 1900), (2000, 1000), (1500, 500), (500, 500)]
    gradient_of(recording)
    for lengths in shapes:  # one after the other, since none is launched beside graphs
        recording.accumulate(micro(lengths))
    reserved = []
    for lengths in shapes:
        recording.accumulate(micro(lengths))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert recording.graphs is not None
    assert len(recording.graphs.recorded) == 4
    assert reserved[-1] < 1.2 * reserved[0]


@pytest.mark.parametrize("tokens", [2560, 8192])
def test_how_fast_a_small_model_is_by_replays_is_printed(tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2-135M's shape, rows of 320 tokens. Nothing depends on the times."""
    speeds = {}
    for recorded in (False, True):
        built = smollm2()
        if recorded:
            built.record()
        gradient_of(built)
        batch = micro((320,) * (tokens // 320))
        for _ in range(4):
            built.accumulate(batch)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            built.accumulate(batch)
        torch.cuda.synchronize()
        speeds[recorded] = 20 / (time.perf_counter() - started)
        assert (built.graphs is not None and len(built.graphs.recorded) == 1) == recorded
    with capsys.disabled():
        rates = {recorded: f"{speed:.1f} steps/s, {speed * tokens:,.0f} tok/s" for recorded, speed in speeds.items()}
        print(f"\n{tokens} tokens: launched one by one {rates[False]}; replayed {rates[True]}")


def test_a_recording_in_a_cycle_that_nobody_holds_any_more_does_not_spoil_the_next() -> None:
    def recording() -> Any:
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
        with torch.cuda.graph(graph):
            x.add_(1)
        holder: list[Any] = [graph]
        holder.append(holder)
        return x

    x, recorder, before = recording(), graphs.CudaRecorder(), gc.get_threshold()
    gc.set_threshold(1)  # a collection with every object that is made
    try:
        replay = recorder.record(lambda: [x.add_(1) for _ in range(100)][-1])
    finally:
        gc.set_threshold(*before)
    assert float(replay()[0]) == 100


def test_what_a_recording_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2-135M's shape. Milliseconds of a pass that is launched and recorded, of shapes that are recorded at once,
    and of replays, and memory outside of torch's allocator are printed; the plan has them as constants (`_GPU`)."""
    built, said = smollm2(), []
    built.record(price=1.0)
    gradient_of(built)
    batches = [micro((256,) * (tokens // 256)) for tokens in (8192, 4096, 3072, 2048)]
    built.expect(lambda: Coming([size(trim(batch)) for batch in batches], 1.0))
    assert built.graphs is not None
    for batch in batches:
        seconds, before = [], _outside()
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            built.accumulate(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        times = ", ".join(f"{second * 1e3:.0f}" for second in seconds)
        driver, reserved = (_outside() - before) / 2**20, torch.cuda.memory_reserved() / 2**30
        said.append(f"{len(batch.ids)} tokens: ms {times}; {driver:.1f} MiB of the driver; {reserved:.2f} GiB reserved")
    assert built.graphs._at_once
    # Of 5,632 tokens and more, three key heads have programs enough to go through the query heads that share them. For
    # the first pass of other programs the graph of 8,192 tokens went.
    assert [shape.tokens for shape in sorted(built.graphs.recorded)] == [2048, 3072, 4096]
    assert [shape.tokens for shape in sorted(built.graphs._came)] == [4096, 8192]
    with capsys.disabled():
        print("", *said, sep="\n")


def _outside() -> int:
    """Bytes of the GPU that torch's allocator does not know of."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def smollm2() -> CausalModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    module = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).to(torch.bfloat16).eval()
    return model(module.cuda(), "compiled", recipe.Lora(rank=16, alpha=16))
