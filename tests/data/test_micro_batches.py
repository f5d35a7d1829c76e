"""Micro-batches by tokens: what must hold of any of them, and how far they may be from the best, by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.data.micro_batches import balance_by_tokens, pack_by_tokens
from lightrft.errors import ConfigError, DataError

LAWS = settings(deadline=None, max_examples=150)
BUDGET = 12
SMALL = st.lists(st.integers(0, BUDGET), min_size=1, max_size=7)
ANY = st.lists(st.integers(0, 100), min_size=1, max_size=60)


def partitions(samples: int) -> Iterator[list[list[int]]]:
    """Every way to put samples into nonempty sets."""
    if not samples:
        yield []
        return
    for rest in partitions(samples - 1):
        for place in range(len(rest)):
            yield [*rest[:place], [*rest[place], samples - 1], *rest[place + 1 :]]
        yield [*rest, [samples - 1]]


def loads_of(lengths: list[int], packs: list[list[int]]) -> list[int]:
    return [sum(lengths[sample] for sample in pack) for pack in packs]


@LAWS
@given(lengths=ANY, spare=st.integers(0, 150))
def test_packs_hold_every_sample_once_within_the_budget(lengths: list[int], spare: int) -> None:
    """Each sample is in exactly one pack, no pack is empty or over the budget, and the order is that of samples."""
    budget = max(1, *lengths, spare)
    packs = pack_by_tokens(lengths, budget)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(pack for pack in packs)
    assert max(loads_of(lengths, packs)) <= budget
    assert packs == sorted(sorted(pack) for pack in packs)
    assert pack_by_tokens(tuple(lengths), budget) == packs


@LAWS
@given(lengths=SMALL)
def test_packs_are_nearly_as_few_as_can_be(lengths: list[int]) -> None:
    """Their number is at most 11/9 of the least one plus 6/9, which is found by trying every partition."""
    fitting = [packs for packs in partitions(len(lengths)) if max(loads_of(lengths, packs)) <= BUDGET]
    least = min(len(packs) for packs in fitting)
    assert least <= len(pack_by_tokens(lengths, BUDGET)) <= Fraction(11, 9) * least + Fraction(6, 9)


def test_long_samples_do_not_come_last() -> None:
    """Taken in the order given, these would need three packs; the longest first, they need two."""
    assert pack_by_tokens([3, 3, 7, 7], 10) == [[0, 2], [1, 3]]


def test_there_is_nothing_in_no_samples() -> None:
    """No sample makes no pack."""
    assert pack_by_tokens([], 4) == []


@LAWS
@given(lengths=ANY, spare=st.integers(0, 150), world_size=st.integers(1, 6))
def test_ranks_hold_every_sample_once_within_the_budget(lengths: list[int], spare: int, world_size: int) -> None:
    """Each sample is on one rank, no micro-batch is empty or over the budget, and ranks have equally many."""
    budget = max(1, *lengths, spare)
    if len(lengths) < world_size:
        with pytest.raises(DataError, match="fewer samples than world_size"):
            balance_by_tokens(lengths, budget, world_size=world_size)
        return
    ranks = balance_by_tokens(lengths, budget, world_size=world_size)
    packs = [pack for rank in ranks for pack in rank]
    assert len(ranks) == world_size
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(pack and pack == sorted(pack) for pack in packs)
    assert max(loads_of(lengths, packs)) <= budget
    numbers = {len(rank) for rank in ranks}
    if all(len(pack) == 1 for pack in packs):
        assert max(numbers) - min(numbers) <= 1
    else:
        assert len(numbers) == 1
    assert balance_by_tokens(tuple(lengths), budget, world_size=world_size) == ranks


@LAWS
@given(lengths=ANY, spare=st.integers(0, 150), world_size=st.integers(1, 6))
def test_totals_of_ranks_differ_no_more_than_micro_batches_do(lengths: list[int], spare: int, world_size: int) -> None:
    """The largest total is at most the smallest plus the difference of the largest and smallest micro-batch."""
    budget = max(1, *lengths, spare)
    lengths += [1] * world_size
    ranks = balance_by_tokens(lengths, budget, world_size=world_size)
    totals = [sum(loads_of(lengths, rank)) for rank in ranks]
    loads = [load for rank in ranks for load in loads_of(lengths, rank)]
    is_even = len({len(rank) for rank in ranks}) == 1
    assert max(totals) - min(totals) <= max(loads) - (min(loads) if is_even else 0)


@LAWS
@given(lengths=SMALL, world_size=st.integers(1, 3))
def test_micro_batches_are_nearly_as_equal_as_can_be(lengths: list[int], world_size: int) -> None:
    """The largest of k is at most 4/3 - 1/(3k) of the least that it can be, found by trying every partition into k."""
    lengths += [1] * (world_size - len(lengths))
    packs = [pack for rank in balance_by_tokens(lengths, BUDGET, world_size=world_size) for pack in rank]
    number = len(packs)
    best = min(max(loads_of(lengths, other)) for other in partitions(len(lengths)) if len(other) == number)
    assert best <= max(loads_of(lengths, packs)) <= (Fraction(4, 3) - Fraction(1, 3 * number)) * best


@LAWS
@given(lengths=SMALL, world_size=st.integers(1, 3))
def test_micro_batches_are_nearly_as_few_as_ranks_allow(lengths: list[int], world_size: int) -> None:
    """There is at most one round more than the fewest packs need, over all partitions."""
    lengths += [1] * (world_size - len(lengths))
    fitting = [packs for packs in partitions(len(lengths)) if max(loads_of(lengths, packs)) <= BUDGET]
    least = -(-min(len(packs) for packs in fitting) // world_size)
    rounds = max(len(rank) for rank in balance_by_tokens(lengths, BUDGET, world_size=world_size))
    assert least <= rounds <= least + 1


def test_a_balance_that_breaks_the_budget_takes_another_round() -> None:
    """Two packs hold these, but only as 3 + 3 and 2 + 2 + 2; the longest first, they are 3 + 2 + 2 and 3 + 2."""
    lengths = [3, 3, 2, 2, 2]
    assert pack_by_tokens(lengths, 6) == [[0, 1], [2, 3, 4]]
    assert balance_by_tokens(lengths, 6, world_size=1) == [[[0, 4], [2, 3], [1]]]


def test_the_rank_with_the_fewest_tokens_gets_the_largest_micro_batch() -> None:
    """8 and 6 in the first round, then 5 for the second rank and 1 for the first."""
    assert balance_by_tokens([8, 6, 5, 1], 8, world_size=2) == [[[0], [3]], [[1], [2]]]


def test_samples_without_tokens_are_spread_too() -> None:
    """They weigh nothing, and still no micro-batch is left empty."""
    assert balance_by_tokens([0, 0, 0], 5, world_size=3) == [[[0]], [[1]], [[2]]]


def test_one_sample_too_many_leaves_one_rank_with_one_fewer() -> None:
    """Three samples that fill the budget are three micro-batches, which two ranks cannot have equally many of."""
    assert balance_by_tokens([4, 4, 4], 4, world_size=2) == [[[0], [2]], [[1]]]


@pytest.mark.parametrize("pack", ["pack", "balance"])
@pytest.mark.parametrize(
    ("lengths", "budget", "message", "error"),
    [
        ([3, 9], 8, r"lengths\[1\]=9 is more than max_tokens=8; shorten the sample", DataError),
        ([3, -1], 8, r"lengths\[1\]=-1 is negative", DataError),
        ([3], 0, "max_tokens=0 is not positive", ConfigError),
    ],
)
def test_what_cannot_be_packed_is_named(
    pack: str, lengths: list[int], budget: int, message: str, error: type[Exception]
) -> None:
    """The error names the sample and its length, or the budget."""
    with pytest.raises(error, match=message):
        pack_by_tokens(lengths, budget) if pack == "pack" else balance_by_tokens(lengths, budget, world_size=1)


def test_there_is_at_least_one_rank() -> None:
    """A world of no ranks is refused."""
    with pytest.raises(ConfigError, match="world_size=0 is not positive"):
        balance_by_tokens([1], 1, world_size=0)
