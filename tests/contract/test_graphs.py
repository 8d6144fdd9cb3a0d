"""Recorded steps: padding changes neither loss nor gradients, and a replay is the pass it was recorded from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product, repeat
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from test_block import error, gradients, kernels, micro, model
from torch import Tensor

import tiny
from luthier import plan, recipe
from luthier.data.conversation import Example, Origin
from luthier.data.packing import share
from luthier.data.store import TokenStore
from luthier.data.stream import Micro, Stream
from luthier.kernels import varlen_backward
from luthier.kernels.loss import IGNORED
from luthier.model import graphs
from luthier.model.causal import CausalModel
from luthier.model.generate import Sampling, generate
from luthier.model.graphs import Graphs
from luthier.model.pack import Coming, Placed, Shape, choose, fits, numbers, padded, placed, shape, size, trim
from luthier.train.batch import batch as rows_of
from luthier.train.batch import coming
from luthier.train.engines.local import Local
from luthier.train.optim import flat_gradient
from scarce import Scarce

__all__ = ["kernels"]


def many() -> list[Micro]:
    """Trimmed micro-batches of several shapes: more than the least tokens, none to add, most of them supervised."""
    exact = micro(lengths=(256, 200, 56), supervised=(*range(1, 256), *range(300, 456), *range(460, 512)))
    return [trim(batch) for batch in (micro(), micro((300, 250, 40)), exact, micro((9,)), micro((2,) * 40))]


@pytest.mark.parametrize("number", range(5))
def test_a_padded_micro_batch_has_the_shape_asked_for(number: int) -> None:
    batch = many()[number]
    wanted = shape(batch)
    made = padded(batch, wanted)
    bounds = torch.tensor(made.bounds)
    assert Shape(len(made.ids), len(made.rows), len(made.samples), wanted.longest) == wanted
    assert len(made.bounds) == wanted.segments + 1
    assert made.bounds[-1] == wanted.tokens
    assert bool((bounds.diff() >= 0).all())
    assert int(bounds.diff().max()) <= wanted.longest
    starts = bounds[:-1].repeat_interleave(bounds.diff())
    assert torch.equal(made.positions, torch.arange(wanted.tokens) - starts)
    assert bool((made.rows.diff() > 0).all()), "a row is there twice, or out of order"
    learned = made.targets != IGNORED
    assert torch.equal(made.rows[learned], batch.rows)
    assert torch.equal(made.targets[learned], batch.targets)
    assert torch.equal(made.ids[: len(batch.ids)], batch.ids)
    more = made.ids[len(batch.ids) :]
    assert torch.equal(more, batch.ids.repeat(1 + len(more) // len(batch.ids))[: len(more)])


def test_few_shapes_hold_all_and_none_looks_like_a_batch() -> None:
    shapes = {shape(trim(micro((length, 40, 90, tokens)))) for tokens in range(600, 3000, 97) for length in (30, 200)}
    assert len(shapes) <= 12
    assert all(found.segments * found.longest > found.tokens for found in shapes)
    rows_of_a_length = shape(micro((128,) * 7))
    assert rows_of_a_length.tokens == 8 * rows_of_a_length.longest
    assert rows_of_a_length.segments > 8


@pytest.mark.parametrize("tokens", [8192, 8193, 12000, 16385])
def test_large_micro_batches_are_padded_by_little(tokens: int) -> None:
    found = shape(micro((tokens,)))
    assert tokens <= found.tokens <= tokens * 1.13


# Shapes that are chosen ahead of time.


def spread(tokens: Sequence[int]) -> list[Shape]:
    return [Shape(count, count // 5, 8, 700) for count in tokens]


def seconds(sizes: list[Shape], shapes: list[Shape], price: float, row: float) -> float:
    """What all take, in tokens: each goes to the first shape that holds as many."""
    taken = [next(s for s in shapes if s.tokens >= one.tokens and s.rows >= one.rows) for one in sizes]
    return sum(shape.tokens + row * shape.rows for shape in taken) + price * len(shapes)


@pytest.mark.parametrize("price", [1.0, 700.0, 5_000.0, 1e6])
@pytest.mark.parametrize("row", [0.0, 0.3])
def test_the_shapes_chosen_take_least_of_all_choices(price: float, row: float) -> None:
    sizes = [*spread((1000, 1100, 1210, 1300, 1900, 2000, 2050, 3333)), Shape(1950, 1800, 8, 700)]
    found = choose(sizes, price, row, 24)
    each = choose(sizes, 0.0, 0.0, 24)  # one for each number of tokens, rounded
    rows = [max(s.rows for s in sizes if s.tokens <= e.tokens and s.tokens > e.tokens - 128) for e in each]
    assert [e.rows >= r for e, r in zip(each, rows, strict=True)] == [True] * len(each)
    least = min(
        seconds(sizes, _merged(each, cuts), price, row)
        for count in range(len(each))
        for cuts in combinations(range(1, len(each)), count)
    )
    assert seconds(sizes, found, price, row) == pytest.approx(least)


def _merged(each: list[Shape], cuts: tuple[int, ...]) -> list[Shape]:
    """Neighbours between cuts as one shape."""
    groups = [each[a:b] for a, b in pairwise((0, *cuts, len(each)))]
    return [group[-1]._replace(rows=max(shape.rows for shape in group)) for group in groups]


def test_the_longer_a_run_the_more_shapes_pay_and_packed_rows_need_one() -> None:
    sizes = spread(range(1900, 4400, 25))
    counts = [len(choose(sizes, 100_000 / times, 0.2, 24)) for times in (1, 10, 100, 10_000)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 21)
    assert len(choose(sizes, 0.0, 0.2, 7)) <= 7
    assert len(choose(spread([8100, 8190, 8180, 8150] * 9), 500.0, 0.2, 24)) == 1
    assert choose([], 500.0, 0.2, 24) == []


def test_micro_batches_can_be_padded_to_the_shapes_chosen_for_them() -> None:
    as_many_as_a_power_of_2 = [trim(micro((40,) * 8))]
    for batches, price in product((as_many_as_a_power_of_2, many()), (0.0, 500.0, 1e9)):
        shapes = choose([size(batch) for batch in batches], price, 0.2, 24)
        for batch in batches:
            wanted = next(shape for shape in shapes if fits(batch, shape))
            made = padded(batch, wanted)
            assert Shape(len(made.ids), len(made.rows), len(made.samples), wanted.longest) == wanted
            assert max(b - a for a, b in pairwise(made.bounds)) <= wanted.longest
            assert wanted.segments * wanted.longest > wanted.tokens, "it looks like a batch of equal rows"
    whole = Shape(256, 256, 8, 256)
    assert fits(batches[0], whole)
    assert not fits(batches[0], whole._replace(tokens=128))
    assert not fits(batches[0], whole._replace(rows=16))
    assert not fits(batches[0], whole._replace(longest=64))
    assert not fits(batches[0], whole._replace(segments=size(batches[0]).segments))


class Second(Local):
    """The second of two processes."""

    def share(self, lengths: Sequence[int]) -> list[int]:
        return share(lengths, 2)[1]


@pytest.mark.parametrize("engine", [Local(), Second()], ids=["one process", "the second of two"])
def test_what_is_to_come_is_what_comes(tmp_path: Path, engine: Local) -> None:
    chosen = tiny.recipe("train.epochs=3")
    made, store = tiny.model(chosen, kernels="eager"), tiny.rows(tmp_path / "rows")
    stream = Stream(store, None, 1, 8, epochs=2.5)
    found = coming(stream, engine, 64)
    came = [m for n in range(stream.steps) for m in rows_of(stream, engine, made, n, 64).micros]
    assert found == Coming([size(micro) for micro in came], 1.0)


def test_of_a_long_run_the_beginning_is_looked_at_and_rows_without_a_target_are_left_out(tmp_path: Path) -> None:
    origin = Origin("rows.jsonl", 1)
    rows = [Example([1, 2, 3, 4], learned, 1, origin) for learned in ([0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0])]
    stream = Stream(TokenStore.write(tmp_path / "rows", rows * 100), None, 1, 2, max_steps=10_000)
    found = coming(stream, Local(), 4)
    assert found.times == pytest.approx(10_000 / 1024)
    assert len(found.sizes) == pytest.approx(2048 / 3, rel=0.1)
    assert set(found.sizes) == {Shape(2, 2, 1, 2)}


DROPPING = recipe.Lora(rank=4, alpha=8, dropout=0.2)


@pytest.mark.parametrize("adapter", [recipe.Lora(rank=4, alpha=8), DROPPING], ids=["plain", "dropping"])
@pytest.mark.parametrize("recompute", [False, True])
def test_padding_changes_neither_the_loss_nor_the_gradients(adapter: Any, recompute: bool, kernels: Any) -> None:
    made = model("llama", kernels, adapter, recompute=recompute)
    for batch in many():
        loss, gradient = gradients(made, batch)
        for wanted in (shape(batch), *choose([size(other) for other in many()], 1e9, 0.2, 24)):
            padded_loss, padded_gradient = padded_gradients(made, padded(batch, wanted))
            assert abs(padded_loss - loss) <= 1e-6 * loss
            assert error(padded_gradient, gradient) <= 2e-6


def padded_gradients(made: CausalModel, batch: Micro) -> tuple[Tensor, Tensor]:
    """As `gradients`, of all that is there: nothing is trimmed."""
    assert made.adapter is not None
    gradient = flat_gradient(made.adapter.named_parameters())
    loss = made._placed_loss(placed(numbers(batch, 0), batch, longest=0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert gradient.any() or not loss
    return loss.detach(), torch.cat([p.grad.flatten() for p in made.adapter.parameters() if p.grad is not None])


def test_rows_that_padding_adds_lead_to_no_gradient() -> None:
    batch = padded(many()[0], shape(many()[0]))
    none = replace(batch, targets=torch.full_like(batch.targets, IGNORED))
    loss, gradient = padded_gradients(model("llama", "eager"), none)
    assert loss == 0
    assert not gradient.any()


def test_all_that_a_gpu_is_told_comes_in_one_tensor() -> None:
    batch = padded(many()[1], shape(many()[1]))
    told = placed(numbers(batch, 77), batch, 512)
    for name in ("ids", "positions", "rows", "targets"):
        assert torch.equal(getattr(told, name), getattr(batch, name))
    assert torch.equal(told.owners, batch.samples.repeat_interleave(torch.tensor(batch.bounds).diff()))
    assert (told.edges.tolist(), told.edges.dtype) == (list(batch.bounds), torch.int32)
    assert (told.key.tolist(), told.longest) == ([77], 512)


# Graphs without a GPU: a replay runs the step again, on the tensors that it was recorded on.


class Again:
    """A recorder that counts. `fails`: what recordings raise, one after the other; None, or no more: they do not."""

    def __init__(self, fails: Iterable[Exception | None] = ()) -> None:
        self.fails = iter(fails)
        self.ran = self.recorded = self.replayed = self.forgotten = 0
        self.spoilt = False  # as a pool is for torch, in which a recording failed
        self.graphs: Graphs | None = None
        self.beside: list[int] = []  # graphs that there were at each pass

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        assert self.graphs is not None
        self.ran += 1
        self.beside.append(len(self.graphs.recorded))
        return step()

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        assert not self.spoilt
        if fault := next(self.fails, None):
            self.spoilt = True
            raise fault
        self.recorded += 1
        out = torch.empty(())  # where all replays write

        def replay() -> Tensor:
            self.replayed += 1
            return out.copy_(step())

        return replay

    def forget(self) -> None:
        self.forgotten += 1
        self.spoilt = False


def recording(made: CausalModel, fails: Iterable[Exception | None] = (), price: float = 0.0) -> Again:
    """Makes `made` record. On a CPU attention and dropout read the bounds and the step on the host: those of now."""
    recorder = Again(fails)
    steps = {made._key(replace(micro(), step=step)): step for step in range(20)}

    def loss(told: Placed) -> Tensor:
        now = replace(told, bounds=tuple(told.edges.tolist()), step=steps[int(told.key)])
        return made._placed_loss(now)

    assert made.decoder is not None
    told: Any = {"reads": made.decoder.updates.launches, "programs": made.decoder.programs}
    made.graphs = recorder.graphs = Graphs(loss, made.device, recorder, **told, price=price)
    return recorder


def train(made: CausalModel, batches: list[Micro], scale: float = 1.0) -> list[Tensor]:
    """The loss and the gradient of each batch. Between them the adapter changes, as by an optimizer."""
    assert made.adapter is not None
    flat, found = flat_gradient(made.adapter.named_parameters()), []
    for number, batch in enumerate(batches):
        loss = made.accumulate(replace(batch, step=number), scale)
        assert not loss.requires_grad
        found += [loss, flat.clone()]
        for parameter in made.adapter.parameters():
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad, alpha=1e-3 / scale)
        flat.zero_()
    return found


@pytest.mark.parametrize("adapter", [recipe.Lora(rank=4, alpha=8), DROPPING], ids=["plain", "dropping"])
def test_replays_train_as_passes_do(adapter: Any) -> None:
    one, two, three = micro((300, 250, 40)), micro((9, 200)), micro((100, 31, 400, 2))
    batches = [one, two, one, three, two, one, three, three]
    made = model("llama", "eager", adapter)
    recorder = recording(made)
    for mine, wanted in zip(train(made, batches), train(model("llama", "eager", adapter), batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert (recorder.ran, recorder.recorded, recorder.replayed) == (2, 2, 6)


@pytest.mark.parametrize("price", [0.0, 300.0], ids=["by a rule", "chosen ahead"])
def test_a_run_that_records_learns_what_another_one_learns(tmp_path: Path, price: float) -> None:
    chosen = tiny.recipe("train.epochs=3")
    recorded, plain = (tiny.model(chosen, kernels="eager") for _ in range(2))
    recorder = recording(recorded, price=price)
    found, wanted = (
        list(tiny.trainer(tmp_path / name, chosen, causal=m)) for name, m in (("a", recorded), ("b", plain))
    )
    assert [step.loss for step in found] == pytest.approx([step.loss for step in wanted], rel=1e-5)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in wanted], rel=1e-4)
    assert recorder.replayed > recorder.ran > 0
    assert recorded.graphs is not None
    assert bool(recorded.graphs.shapes) == bool(price)


def test_a_shape_is_recorded_when_it_comes_first_if_it_was_expected_and_else_when_it_comes_again() -> None:
    made, expected, other = model("llama", "eager"), micro((300, 250, 40)), micro((900, 800))
    recorder = recording(made, price=1.0)
    made.expect(lambda: Coming([size(trim(expected))], 1.0))
    assert made.adapter is not None
    flat_gradient(made.adapter.named_parameters())
    counts = []
    for batch in (expected, expected, other, other, other):
        made.accumulate(batch, 1.0)
        counts.append((recorder.ran, recorder.recorded, recorder.replayed))
    assert counts == [(1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2), (2, 2, 3)]


@pytest.mark.parametrize("fails", [(), (None, RuntimeError("not while one is under way"))], ids=["", "fails"])
def test_a_shape_like_one_that_was_launched_is_recorded_at_once_or_else_launched_as_well(fails: Any) -> None:
    batches = [micro((300, 250, 40)), micro((900, 800)), micro((100, 2)), micro((900, 800))]
    made, plain = model("llama", "eager"), model("llama", "eager")
    recorder = recording(made, fails, price=1.0)
    made.expect(lambda: Coming([size(trim(batch)) for batch in batches], 1.0))
    assert made.graphs is not None
    assert len(made.graphs.shapes) == 3
    for mine, wanted in zip(train(made, batches), train(plain, batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert (recorder.ran, recorder.recorded, recorder.replayed) == ((3, 4, 1) if fails else (1, 3, 3))


def test_a_shape_of_other_programs_is_launched_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording cannot load them. Of fewer than 960 tokens here, each query head has programs of its own. While a
    pass is launched no graph keeps memory; those that went are recorded again, without another launched pass."""
    monkeypatch.setattr(varlen_backward, "FEW_64", 30)
    batches, counts = [micro((300, 250, 40)), micro((100, 2)), micro((900, 800)), micro((600, 900))], []
    made = model("llama", "eager")
    recorder = recording(made, price=1.0)
    made.expect(lambda: Coming([size(trim(batch)) for batch in batches], 1.0))
    assert made.adapter is not None
    flat_gradient(made.adapter.named_parameters())
    assert made.graphs is not None
    for batch in (*batches, *batches):
        made.accumulate(batch)
        counts.append((recorder.ran, recorder.recorded, len(made.graphs.recorded)))
    assert counts[:4] == [(1, 1, 1), (1, 2, 2), (2, 3, 1), (2, 4, 2)]
    assert counts[4:] == [(2, 5, 3), (2, 6, 4), (2, 6, 4), (2, 6, 4)]


def test_shapes_follow_from_the_run_and_how_it_is_cut_alone(tmp_path: Path) -> None:
    """A resumed run pads as the run that was stopped, so that its sums have the same bits."""
    chosen = tiny.recipe("train.epochs=3", "run.save.every=4")

    def begun(folder: str, tokens: int) -> tuple[Any, Graphs]:
        made = tiny.model(chosen, kernels="eager")
        recording(made, price=1.0)
        assert made.graphs is not None
        return tiny.trainer(tmp_path / folder, chosen, causal=made, micro_tokens=tokens), made.graphs

    whole, graphs = begun("a", 300)
    steps = iter(whole)
    for _ in range(5):
        next(steps)
    resumed, again = begun("a", 300)
    next(iter(resumed))
    assert resumed.resumed_from == 4
    assert again.shapes == graphs.shapes
    whole.progress.micro_tokens = 64  # as after a lack of memory
    halved, cut = begun("b", 64)
    next(steps), next(iter(halved))
    assert graphs.shapes == cut.shapes != again.shapes


def test_another_gradient_is_recorded_anew() -> None:
    made, plain = model("llama", "eager"), model("llama", "eager")
    recorder = recording(made)
    for count in (1, 2):
        for mine, wanted in zip(train(made, [micro()] * 3), train(plain, [micro()] * 3), strict=True):
            assert error(mine, wanted) <= 1e-5
        assert recorder.recorded == count


def test_parameters_that_lie_elsewhere_are_recorded_anew() -> None:
    """Another trainer's gradient may begin where the last one's did."""
    made = model("llama", "eager")
    recorder = recording(made)
    assert made.adapter is not None
    flat_gradient(made.adapter.named_parameters())
    for count in (1, 2):
        for _ in range(3):
            made.accumulate(micro(), 1.0)
        assert recorder.recorded == count
        elsewhere = [(parameter, parameter.data.clone()) for parameter in made.adapter.parameters()]
        for parameter, values in elsewhere:
            parameter.data = values


def test_what_a_replay_reads_stays_though_the_adapter_was_disabled_meanwhile() -> None:
    """A base side makes other tables of where values and gradients lie: a graph goes on with its own."""
    made = model("llama", "eager")
    recorder = recording(made)
    assert made.adapter is not None
    assert made.decoder is not None
    assert made.graphs is not None
    flat_gradient(made.adapter.named_parameters())
    for _ in range(2):
        made.accumulate(micro(), 1.0)
    tables = [ref(table) for table in made.decoder.updates.launches()]
    assert recorder.recorded == 1
    assert len(tables) > made.module.config.num_hidden_layers
    with torch.inference_mode(), made.adapter.disabled():
        made.loss(micro())
    assert all(table() is not None for table in tables)
    made.graphs.forget()
    assert any(table() is None for table in tables)


def test_another_scale_is_recorded_anew() -> None:
    made, found = model("llama", "eager"), []
    recorder = recording(made)
    assert made.adapter is not None
    flat = flat_gradient(made.adapter.named_parameters())
    for scale in (1.0, 1.0, 0.25, 0.25):
        flat.zero_()
        made.accumulate(micro(), scale)
        found.append(flat / scale)
    assert recorder.forgotten == 2  # what was there before each of the scales
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    assert recorder.recorded == 2


@pytest.mark.parametrize("price", [0.0, 300.0], ids=["by a rule", "chosen ahead"])
def test_no_pass_is_launched_beside_graphs_and_those_that_went_are_recorded_again_without_one(price: float) -> None:
    """As the plan counts. Two shapes of the four are expected at most."""
    one, two, three, four = (micro((200,) * count) for count in (2, 6, 11, 16))
    batches = [one, one, three, four, two, one, three, four, two]
    made, plain = model("llama", "eager"), model("llama", "eager")
    recorder = recording(made, price=price)
    made.expect(lambda: Coming([size(trim(batch)) for batch in (one, two)], 1e4))
    for mine, wanted in zip(train(made, batches), train(plain, batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert set(recorder.beside) == {0}
    assert recorder.ran == (3 if price else 4), "a shape is launched again"
    assert made.graphs is not None
    assert len(made.graphs.recorded) == 4


def test_places_are_left_for_shapes_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 10)
    made = model("llama", "eager")
    recording(made, price=1.0)
    made.expect(lambda: Coming(spread(range(1024, 12_800, 128)), 1e9))
    assert made.graphs is not None
    assert len(made.graphs.shapes) == 10 - graphs.UNFORESEEN


def test_no_more_shapes_are_recorded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    made, batches = model("llama", "eager"), [micro((200,) * count) for count in (6, 2, 11)] * 3
    recorder = recording(made)
    for mine, wanted in zip(train(made, batches), train(model("llama", "eager"), batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert made.graphs is not None
    assert 1 <= len(made.graphs.recorded) <= 2
    assert set(recorder.beside) == {0}


def test_what_cannot_be_recorded_is_run_as_it_is_and_said_once() -> None:
    made, batches = model("llama", "eager"), [micro()] * 6
    recorder = recording(made, repeat(RuntimeError("it waits")))
    with pytest.warns(UserWarning, match="one by one from here on, which only takes longer: it waits") as said:
        found = train(made, batches)
    for mine, wanted in zip(found, train(model("llama", "eager"), batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert (recorder.ran, len(said)) == (1, 1), "a recorder that failed is used again"


LACK, DRIVERS = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")
SPOILT = RuntimeError("operation failed due to a previous error during capture")
SPOILT.__context__ = LACK
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "lack", [LACK, DRIVERS, CUBLAS, SPOILT], ids=["torch's", "the driver's", "cuBLAS's", "as the recording ends"]
)
@pytest.mark.parametrize("price", [0.0, 300.0], ids=["by a rule", "chosen ahead"])
def test_after_a_lack_of_memory_steps_are_launched_and_then_recorded_again(lack: Exception, price: float) -> None:
    made, batches = model("llama", "eager"), [micro(), micro((900, 300))] * 6
    recorder = recording(made, [lack, None, lack], price)
    made.expect(lambda: Coming([size(trim(batch)) for batch in batches[:2]], 1e4))
    with pytest.warns(UserWarning, match="until they are recorded again, .*(out of memory|ALLOC_FAILED)") as said:
        found = train(made, batches)
    for mine, wanted in zip(found, train(model("llama", "eager"), batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert len(said) == 2
    assert made.graphs is not None
    assert len(made.graphs.recorded) == 2
    assert recorder.replayed >= 4


def test_where_memory_keeps_lacking_nothing_is_recorded_any_more_and_that_is_said() -> None:
    made, batches = model("llama", "eager"), [micro()] * (graphs.LACKS + 4)
    recorder = recording(made, repeat(LACK, graphs.LACKS))
    with pytest.warns(UserWarning, match="launched one by one") as said:
        found = train(made, batches)
    for mine, wanted in zip(found, train(model("llama", "eager"), batches), strict=True):
        assert error(mine, wanted) <= 1e-5
    assert recorder.recorded == 0, "it is tried again"
    assert ["from here on" in str(warning.message) for warning in said] == [False] * (graphs.LACKS - 1) + [True]


def test_a_pass_that_runs_out_of_memory_has_the_graphs_gone_and_they_are_recorded_again() -> None:
    made, batches = model("llama", "eager"), [micro()] * 2
    recorder = recording(made)
    train(made, batches)
    assert made.graphs is not None
    assert made.graphs.recorded
    of_a_pass, made.graphs.loss = made.graphs.loss, out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        made.accumulate(micro((600,)))
    assert not made.graphs.recorded
    made.graphs.loss = of_a_pass
    train(made, batches)
    assert (recorder.recorded, len(made.graphs.recorded)) == (2, 1)


def test_a_held_out_loss_that_finds_no_memory_has_the_graphs_gone_first(tmp_path: Path) -> None:
    chosen, notes = tiny.recipe("train.epochs=3", "evaluate.every=100"), list[Any]()
    made, plain = (tiny.model(chosen, kernels="eager") for _ in range(2))
    recorder = recording(made)
    trainers = [
        tiny.trainer(tmp_path / name, chosen, causal=causal, held=9, emit=notes.append)
        for name, causal in (("recorded", made), ("plain", plain))
    ]
    for trainer in trainers:
        for _ in range(4):
            trainer.step()
    assert made.graphs is not None
    assert made.graphs.recorded
    with Scarce(at=-1) as whole:
        trainers[1].evaluate()
    with Scarce(at=2 * whole.count // 3), pytest.warns(UserWarning, match="until they are recorded again"):
        trainers[0].evaluate()
    assert not made.graphs.recorded
    assert trainers[0].progress.best_loss == pytest.approx(trainers[1].progress.best_loss, rel=1e-5)
    assert trainers[0].progress.micro_tokens == trainers[1].progress.micro_tokens
    assert not any("out of memory" in note.get("text", "") for note in notes)
    before = recorder.recorded
    for _ in range(4):
        assert trainers[0].step().loss == pytest.approx(trainers[1].step().loss, rel=1e-5)
    assert recorder.recorded > before


def test_a_step_whose_replays_find_no_memory_is_made_without_recording_in_the_end(tmp_path: Path) -> None:
    chosen = tiny.recipe("train.epochs=3", "evaluate.every=100")
    made, plain = (tiny.model(chosen, kernels="eager") for _ in range(2))
    recorder = recording(made)

    def record(step: Any) -> Any:
        recorder.recorded += 1
        return lambda: out_of_memory(step)

    recorder.record = record  # type: ignore[method-assign]
    trainers = [
        tiny.trainer(tmp_path / name, chosen, causal=causal) for name, causal in (("recorded", made), ("plain", plain))
    ]
    with pytest.warns(UserWarning, match="launched one by one") as said:
        losses = [trainers[0].step().loss for _ in range(4)]
    assert losses == pytest.approx([trainers[1].step().loss for _ in range(4)], rel=1e-5)
    assert ["from here on" in str(warning.message) for warning in said] == [False] * (graphs.LACKS - 1) + [True]
    assert recorder.recorded >= graphs.LACKS
    assert trainers[0].progress.micro_tokens == trainers[1].progress.micro_tokens


def test_memory_is_given_time_after_it_lacked() -> None:
    """An expected shape like another is recorded without a launch; where that fails it is launched, and recorded when
    it comes again."""
    batches = [micro((300, 250, 40)), micro((900, 800)), micro((100, 2))]
    made = model("llama", "eager")
    recording(made, [None, LACK], price=1.0)
    made.expect(lambda: Coming([size(trim(batch)) for batch in batches], 1.0))
    train(made, batches[:1])
    assert made.graphs is not None
    assert len(made.graphs.recorded) == 1
    with pytest.warns(UserWarning, match="until they are recorded again"):
        made.accumulate(batches[1], 1.0)
    assert not made.graphs.recorded
    made.accumulate(batches[1], 1.0)
    assert len(made.graphs.recorded) == 1


def test_sampled_answers_that_find_no_memory_have_the_graphs_gone_first() -> None:
    made, sampling = model("llama", "eager"), Sampling(max_new_tokens=3)
    recording(made)
    train(made, [micro()] * 2)
    assert made.graphs is not None
    assert made.graphs.recorded
    with Scarce(at=-1) as whole:
        wanted = generate(made, [[5, 6, 7]], sampling, frozenset())
    assert made.graphs.recorded
    with Scarce(at=2 * whole.count // 3):
        assert generate(made, [[5, 6, 7]], sampling, frozenset()) == wanted
    assert not made.graphs.recorded
    assert made.graphs.recorder is not None


def test_the_plan_counts_with_as_many_graphs_as_are_recorded_at_most() -> None:
    assert plan._GRAPHS == graphs.LIMIT


def out_of_memory(_: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")
