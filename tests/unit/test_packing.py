import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.packing import micro_batches, share

lengths = st.lists(st.integers(1, 300), max_size=60)
budgets = st.integers(1, 400)


@given(lengths, budgets)
def test_every_row_is_packed_once(lengths, budget):
    assert sorted(i for pack in micro_batches(lengths, budget) for i in pack) == list(range(len(lengths)))


@given(lengths, budgets)
def test_no_pack_is_over_budget_unless_one_row_alone_is(lengths, budget):
    for pack in micro_batches(lengths, budget):
        assert sum(lengths[i] for i in pack) <= budget or len(pack) == 1


@given(lengths, budgets)
def test_no_two_packs_would_fit_into_one(lengths, budget):
    sums = sorted(sum(lengths[i] for i in pack) for pack in micro_batches(lengths, budget))
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@given(lengths, st.integers(1, 9))
def test_every_row_goes_to_one_rank_in_ascending_order(lengths, ranks):
    shares = share(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(i for rows in shares for i in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in shares)


@given(lengths, st.integers(1, 9))
def test_ranks_differ_by_no_more_than_the_longest_row(lengths, ranks):
    loads = [sum(lengths[i] for i in rows) for rows in share(lengths, ranks)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_long_rows_are_placed_first_so_that_short_ones_fill_the_gaps():
    assert len(micro_batches([3, 3, 3, 7, 7, 7], 10)) == 3
    assert share([1, 1, 1, 1, 4], 2) == [[4], [0, 1, 2, 3]]


def test_packs_and_shares_are_the_same_every_time():
    lengths = random.Random(0).choices(range(1, 99), k=500)
    assert micro_batches(lengths, 128) == micro_batches(tuple(lengths), 128)
    assert share(lengths, 3) == share(tuple(lengths), 3)


@pytest.mark.parametrize("budget", [1, 600, 10**9])
def test_many_rows_are_packed_in_near_linear_time(budget):
    lengths = random.Random(0).choices(range(1, 600), k=30_000)
    start = time.process_time()
    micro_batches(lengths, budget)
    assert time.process_time() - start < 5  # a quadratic search needs minutes
