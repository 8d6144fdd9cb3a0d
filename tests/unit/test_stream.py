"""The order of rows, and rows as tensors."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from luthier.data.conversation import Example, Origin
from luthier.data.packing import share
from luthier.data.store import TokenStore
from luthier.data.stream import Sample, Stream, collate
from luthier.errors import DataError
from luthier.plan import Setting
from luthier.recipe import Train
from luthier.train.decide import steps_of
from luthier.train.launch import largest_step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny.rows(tmp_path_factory.mktemp("rows") / "store", count=10)


def all_rows(stream: Stream, steps: range) -> list[Sample]:
    return [sample for step in steps for sample in stream.step(step)]


def test_a_step_depends_on_the_seed_and_its_number_alone(store: TokenStore) -> None:
    walked, asked = Stream(store, None, 3, 4, epochs=5), Stream(store, None, 3, 4, epochs=5)
    expected = [walked.step(n) for n in range(walked.steps)]
    assert [asked.step(n) for n in reversed(range(asked.steps))] == expected[::-1]


@pytest.mark.parametrize("samples_per_step", [1, 3, 4, 10, 40])
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("max_steps", [None, 7])
def test_a_run_has_as_many_steps_as_were_counted_before_its_rows_were_read(
    store: TokenStore, samples_per_step: int, epochs: float, max_steps: int | None
) -> None:
    train = Train(samples_per_step=samples_per_step, epochs=epochs, max_steps=max_steps)
    stream = Stream(store, None, train.seed, samples_per_step, epochs=epochs, max_steps=max_steps, rows=9)
    assert steps_of(train, 9) == stream.steps


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(store: TokenStore) -> None:
    samples = all_rows(Stream(store, None, 3, 5, epochs=3), range(6))
    epochs = [[s.row for s in samples if s.epoch == epoch] for epoch in range(3)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_another_order(store: TokenStore) -> None:
    assert Stream(store, None, 3, 10).step(0) != Stream(store, None, 4, 10).step(0)


def test_the_order_is_the_same_on_every_machine_and_version(store: TokenStore) -> None:
    """Written down: a change here would silently change every resumed run."""
    assert [s.row for s in Stream(store, None, 17, 10).step(0)] == [9, 5, 8, 2, 4, 1, 6, 0, 7, 3]


def test_steps_flow_over_the_end_of_an_epoch_and_only_the_last_is_short(store: TokenStore) -> None:
    stream = Stream(store, None, 0, 4, epochs=2.5)
    sizes = [len(stream.step(n)) for n in range(stream.steps)]
    assert sizes == [4, 4, 4, 4, 4, 4, 1]
    assert {s.epoch for s in stream.step(2)} == {0, 1}


def test_a_number_of_steps_overrides_epochs_both_ways(store: TokenStore) -> None:
    for steps in (1, 30):
        stream = Stream(store, None, 0, 4, epochs=1, max_steps=steps)
        assert stream.steps == steps
        assert len(stream.step(steps - 1)) == 4


def test_every_sample_of_a_run_has_an_identity_of_its_own(store: TokenStore) -> None:
    samples = all_rows(Stream(store, np.full(10, 2.0), 0, 8, epochs=2), range(5))
    assert [s.index for s in samples] == list(range(40))


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 3.0), st.integers(0, 5))
def test_a_weight_is_how_often_a_row_is_seen(store: TokenStore, weight: float, seed: int) -> None:
    weights = np.array([1.0] * 4 + [weight] * 6)
    stream = Stream(store, weights, seed, 7, epochs=20)
    seen = Counter(s.row for s in all_rows(stream, range(stream.steps)))
    part = round((weight % 1) * 6) / 6  # six rows: the fraction is met to the nearest sixth
    assert all(seen[row] == 20 for row in range(4))
    assert all(abs(seen[row] - 20 * (weight // 1 + part)) <= 1 for row in range(4, 10))


def test_no_rows_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows are left"):
        Stream(tiny.rows(tmp_path / "empty", count=0), None, 0, 4)


def test_collate_packs_rows_without_padding(tmp_path: Path) -> None:
    here = Origin("f", 1)
    examples = [Example([5, 6, 7], [0, 1, 1], 1, here), Example([8, 9], [1, 1], 0, here)]
    micro = collate(TokenStore.write(tmp_path / "s", examples), [Sample(40, 1, 4), Sample(41, 0, 4)], step=9)
    assert micro.ids.tolist() == [8, 9, 5, 6, 7]
    assert micro.positions.tolist() == [0, 1, 0, 1, 2]
    assert micro.bounds == (0, 2, 5)
    assert micro.samples.tolist() == [40, 41]
    assert micro.step == 9
    assert {t.dtype for t in (micro.ids, micro.positions, micro.rows, micro.targets, micro.samples)} == {torch.int64}


def test_collate_learns_only_supervised_tokens_that_follow_one_of_their_row(tmp_path: Path) -> None:
    here = Origin("f", 1)
    examples = [Example([5, 6, 7], [0, 1, 1], 1, here), Example([8, 9], [1, 1], 0, here)]
    store = TokenStore.write(tmp_path / "s", examples)
    micro = collate(store, [Sample(0, 1, 0), Sample(1, 0, 0)], step=0)
    assert micro.targets.tolist() == [9, 6, 7]  # 8 is supervised too, but nothing comes before it
    assert (micro.ids[micro.rows + 1] == micro.targets).all()
    assert len(micro.targets) == store.targets(0) + store.targets(1)


# --- a part of the rows


def seen(stream: Stream) -> set[int]:
    return {sample.row for sample in all_rows(stream, range(stream.steps))}


def test_a_smaller_number_of_rows_is_part_of_a_larger_one(store: TokenStore) -> None:
    parts = [seen(Stream(store, None, 3, 4, rows=rows)) for rows in (1, 4, 7, 10)]
    assert [len(part) for part in parts] == [1, 4, 7, 10]
    assert all(smaller < larger for smaller, larger in pairwise(parts))


def test_another_seed_takes_other_rows(store: TokenStore) -> None:
    assert seen(Stream(store, None, 3, 4, rows=4)) != seen(Stream(store, None, 4, 4, rows=4))


def test_the_rows_of_a_part_are_the_same_on_every_machine_and_version(store: TokenStore) -> None:
    """Written down: a change here would silently change every study."""
    assert seen(Stream(store, None, 17, 10, rows=4)) == {0, 3, 5, 8}


def test_all_rows_as_a_number_are_all_rows(store: TokenStore) -> None:
    whole, counted = Stream(store, None, 3, 4, epochs=2), Stream(store, None, 3, 4, epochs=2, rows=10)
    assert [whole.step(n) for n in range(whole.steps)] == [counted.step(n) for n in range(counted.steps)]


def test_a_part_keeps_the_weights_of_its_rows(store: TokenStore) -> None:
    weights = np.array([2.0] * 5 + [1.0] * 5)
    stream = Stream(store, weights, 3, 4, rows=6)
    times = Counter(sample.row for sample in all_rows(stream, range(stream.steps)))
    assert len(times) == 6
    assert all(times[row] == weights[row] for row in times)


def test_more_rows_than_there_are_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="11 rows are asked for and 10 are left to learn from"):
        Stream(store, None, 3, 4, rows=11)


@given(
    seed=st.integers(0, 1000),
    samples=st.integers(1, 24),
    epochs=st.floats(0.2, 3.0),
    weight=st.sampled_from([0.4, 1.0, 1.5, 3.0]),
    processes=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_no_step_of_any_seed_and_no_share_of_it_has_more_tokens_than_are_planned(
    store: TokenStore, seed: int, samples: int, epochs: float, weight: float, processes: int
) -> None:
    weights = np.where(np.arange(len(store)) % 3 == 0, weight, 1.0)
    largest = largest_step(store.lengths, weights, samples)
    planned = Setting("cpu", "float32", processes=processes, step_tokens=largest)
    stream = Stream(store, weights, seed, samples, epochs=epochs)
    for number in range(stream.steps):
        lengths = [int(store.lengths[sample.row]) for sample in stream.step(number)]
        assert largest is None or sum(lengths) <= largest
        loads = [sum(lengths[i] for i in part) for part in share(lengths, processes)]
        assert max(loads) <= planned.most(samples, int(store.lengths.max()))


def test_the_largest_step_is_that_of_the_longest_rows_twice() -> None:
    lengths = np.array([5, 90, 10, 40])
    assert largest_step(lengths, None, 3) == 90 + 90 + 40
    assert largest_step(lengths, np.array([1.0, 0.5, 1.0, 0.0]), 2) == 90 + 90
    assert largest_step(lengths, None, 5) is None
