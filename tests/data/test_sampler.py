from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightrft.data.sampler import ResumableSampler
from lightrft.errors import CheckpointError, ConfigError

SIZES = st.integers(1, 12)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, int]:
    size = draw(SIZES)
    return size, draw(st.integers(1, size))


@settings(deadline=None, max_examples=60)
@given(world=worlds(), seed=st.integers(0, 3), shuffle=st.booleans())
def test_every_epoch_is_a_permutation_that_the_ranks_share(world: tuple[int, int], seed: int, shuffle: bool) -> None:
    """Over three epochs the ranks' shares are disjoint, cover all samples, and have the lengths that len() says."""
    size, world_size = world
    ranks = [
        ResumableSampler(size=size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        shares = [list(rank) for rank in ranks]
        assert [len(share) for share in shares] == [len(rank) for rank in ranks]
        assert sorted(index for share in shares for index in share) == list(range(size))
        assert {rank.epoch for rank in ranks} == {epoch + 1}


@settings(deadline=None, max_examples=60)
@given(world=worlds(), counts=st.lists(st.integers(0, 9), max_size=5))
def test_what_the_ranks_take_in_turn_is_a_row_of_permutations(world: tuple[int, int], counts: list[int]) -> None:
    """`take` deals one endless row of epochs round the ranks, however it is cut into calls."""
    size, world_size = world
    ranks = [ResumableSampler(size=size, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    taken = [[index for count in counts for index in rank.take(count)] for rank in ranks]
    row = [index for turn in zip(*taken, strict=True) for index in turn]
    alone = ResumableSampler(size=size, seed=1)
    assert row == [index for _ in range(len(row) // size + 1) for index in alone][: len(row)]
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@settings(deadline=None, max_examples=80)
@given(world=worlds(), first=st.integers(0, 30), then=st.integers(0, 30), iterate=st.booleans())
def test_a_restored_sampler_goes_on_as_if_it_had_not_stopped(
    world: tuple[int, int], first: int, then: int, iterate: bool
) -> None:
    """Draw, save through JSON, load into a new sampler, draw on: the same as one sampler that was never stopped."""
    size, world_size = world

    def build() -> ResumableSampler:
        return ResumableSampler(size=size, seed=5, rank=world_size - 1, world_size=world_size)

    def draw(sampler: ResumableSampler, count: int) -> list[int]:
        if not iterate:
            return sampler.take(count)
        drawn: list[int] = []
        while len(drawn) < count:
            for index in sampler:
                drawn.append(index)
                if len(drawn) == count:
                    break
        return drawn

    stopped, resumed, whole = build(), build(), build()
    before = draw(stopped, first)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert before + draw(resumed, then) == draw(whole, first + then)


def test_a_position_goes_on_at_another_world_size() -> None:
    """Four ranks that took two each leave the rest of the row to two ranks."""
    four = [ResumableSampler(size=20, rank=rank, world_size=4) for rank in range(4)]
    seen = [index for rank in four for index in rank.take(2)]
    two = [ResumableSampler(size=20, rank=rank, world_size=2) for rank in range(2)]
    for rank in two:
        rank.load_state_dict(four[0].state_dict())
        seen += list(rank)
    assert sorted(seen) == list(range(20))


def test_orders_differ_between_epochs_and_seeds() -> None:
    """Epochs and seeds have orders of their own; seed 0 epoch 1 is not seed 1 epoch 0."""
    orders = set()
    for seed in range(3):
        sampler = ResumableSampler(size=50, seed=seed)
        orders |= {tuple(sampler.take(50)) for _ in range(3)}
    assert len(orders) == 9


def test_the_order_stays_what_it_was() -> None:
    """The order of an epoch is the same on every machine and in every version: a resumed run depends on it."""
    assert ResumableSampler(size=8, seed=0).take(8) == [7, 5, 3, 6, 4, 2, 0, 1]


def test_a_data_loader_resumes_in_the_middle_of_an_epoch() -> None:
    """A new loader whose sampler has the saved position gives the batches that the first one had left."""
    data = list(range(100, 111))

    def loader(sampler: ResumableSampler) -> DataLoader[int]:
        return DataLoader(data, batch_size=3, sampler=sampler, drop_last=True)  # type: ignore[arg-type]

    uninterrupted = ResumableSampler(size=11)
    whole = [batch.tolist() for _ in range(2) for batch in loader(uninterrupted)]
    assert len(loader(ResumableSampler(size=11))) == 3
    sampler = ResumableSampler(size=11)
    batches = iter(loader(sampler))
    assert [next(batches).tolist(), next(batches).tolist()] == whole[:2]
    resumed = ResumableSampler(size=11)
    resumed.load_state_dict(sampler.state_dict())
    assert [batch.tolist() for _ in range(2) for batch in loader(resumed)] == whole[2:]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "is no position of a sampler"),
        ({"epoch": 0}, "is no position"),
        ({"epoch": 0, "position": 0, "more": 1}, "is no position"),
        ({"epoch": -1, "position": 0}, "is no position"),
        ({"epoch": True, "position": 0}, "is no position"),
        ({"epoch": 0, "position": 1.0}, "is no position"),
        ({"epoch": 0, "position": 6}, r"position=6 lies beyond this sampler's size=5; resume with the same data"),
    ],
)
def test_a_state_that_is_no_position_is_refused(state: dict[str, object], said: str) -> None:
    """What was not saved by a sampler of this size is an error, and the sampler stays where it was."""
    sampler = ResumableSampler(size=5)
    sampler.take(2)
    with pytest.raises(CheckpointError, match=said):
        sampler.load_state_dict(state)  # type: ignore[arg-type]
    assert sampler.state_dict() == {"epoch": 0, "position": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 0}, "size=0 is less than world_size"),
        ({"size": 2, "world_size": 3}, "size=2 is less"),
        ({"size": 2, "rank": 1}, "rank=1 is not in"),
        ({"size": 2, "rank": -1}, "rank=-1 is not in"),
    ],
)
def test_sizes_and_ranks_out_of_range_are_config_errors(settings: dict[str, int], said: str) -> None:
    """A sampler without samples for every rank could never draw."""
    with pytest.raises(ConfigError, match=said):
        ResumableSampler(**settings)


def test_a_negative_count_is_refused() -> None:
    """Less than nothing cannot be taken."""
    with pytest.raises(ConfigError, match="count=-1 is negative"):
        ResumableSampler(size=2).take(-1)
