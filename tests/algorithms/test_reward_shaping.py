"""Reward shaping: clipping, running statistics and the penalty for length."""

from __future__ import annotations

import json
import math

import attrs
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightrft.algorithms.reward_shaping import (
    RunningStatistics,
    clip_rewards,
    merge_statistics,
    normalise,
    overlong_penalty,
    update_statistics,
)
from lightrft.errors import ConfigError, RewardError

REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


@given(rewards=REWARDS, bound=st.floats(0.1, 50))
@settings(deadline=None, max_examples=40)
def test_clipping(rewards: list[float], bound: float) -> None:
    """Clipped rewards equal numpy's clip; a bound of 0 returns them unchanged."""
    tensor = torch.tensor(rewards, dtype=torch.float64)
    np.testing.assert_array_equal(clip_rewards(tensor, bound=bound), np.clip(rewards, -bound, bound))
    assert torch.equal(clip_rewards(tensor, bound=0.0), tensor)


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_bad_bound(bound: float) -> None:
    """A bound that is negative or NaN is refused."""
    with pytest.raises(ConfigError, match=r"bound=.* is not 0 or more; use 0 for no clipping"):
        clip_rewards(torch.zeros(1), bound=bound)


@given(rewards=REWARDS, offset=st.sampled_from([0.0, 1e6]), cuts=st.lists(st.integers(0, 20), max_size=4))
@settings(deadline=None, max_examples=80)
def test_statistics_do_not_depend_on_the_partition(rewards: list[float], offset: float, cuts: list[int]) -> None:
    """However the rewards are cut into updates, in either order, the statistics are those of all of them."""
    array = np.array(rewards) + offset
    parts = np.split(array, sorted(min(cut, len(array)) for cut in cuts))
    for order in (parts, parts[::-1]):
        stats = RunningStatistics()
        for part in order:
            stats = update_statistics(stats, torch.tensor(part))
        assert stats.count == len(array)
        assert stats.mean == pytest.approx(array.mean(), rel=1e-12, abs=1e-12)
        assert stats.m2 == pytest.approx(((array - array.mean()) ** 2).sum(), rel=1e-6, abs=1e-6)


@given(first=REWARDS, second=REWARDS)
@settings(deadline=None, max_examples=40)
def test_merging_is_symmetric_and_equals_updating(first: list[float], second: list[float]) -> None:
    """Merging two statistics in either order is updating the first with the rewards of the second."""
    a = update_statistics(RunningStatistics(), torch.tensor(first))
    b = update_statistics(RunningStatistics(), torch.tensor(second))
    expected = update_statistics(a, torch.tensor(second))
    for merged in (merge_statistics(a, b), merge_statistics(b, a)):
        assert merged.count == expected.count
        assert merged.mean == pytest.approx(expected.mean, rel=1e-9, abs=1e-9)
        assert merged.m2 == pytest.approx(expected.m2, rel=1e-9, abs=1e-9)


def test_statistics_survive_json_exactly() -> None:
    """Statistics hold plain numbers: through JSON and back they are equal."""
    stats = update_statistics(RunningStatistics(), torch.tensor([0.1, 0.2, 0.7]))
    assert RunningStatistics(**json.loads(json.dumps(attrs.asdict(stats)))) == stats
    assert type(stats.count) is int
    assert type(stats.mean) is float
    assert type(stats.m2) is float


def test_no_rewards_change_nothing() -> None:
    """An update without rewards, and merging with empty statistics, return the same statistics."""
    stats = RunningStatistics(count=3, mean=1.0, m2=2.0)
    assert update_statistics(stats, torch.zeros(0)) == stats
    for seen in (stats, RunningStatistics(count=1, mean=1e200)):  # of which the squared distance from 0 overflows
        assert merge_statistics(seen, RunningStatistics()) == seen
        assert merge_statistics(RunningStatistics(), seen) == seen


def test_rewards_must_be_finite() -> None:
    """One NaN would poison the statistics for the rest of the run, so it is refused."""
    with pytest.raises(RewardError, match="are not all finite"):
        update_statistics(RunningStatistics(), torch.tensor([1.0, float("nan")]))


@given(rewards=st.lists(st.integers(-5, 5), min_size=2, max_size=20).filter(lambda rewards: len(set(rewards)) > 1))
@settings(deadline=None, max_examples=40)
def test_normalised_rewards_have_unit_deviation(rewards: list[int]) -> None:
    """With their own statistics, rewards get sample deviation 1 and, if the mean is subtracted, mean 0."""
    tensor = torch.tensor(rewards, dtype=torch.float64)
    stats = update_statistics(RunningStatistics(), tensor)
    centred = normalise(tensor, stats, subtract_mean=True)
    scaled = normalise(tensor, stats, subtract_mean=False)
    assert centred.std().item() == pytest.approx(1.0)
    assert centred.mean().item() == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(scaled, tensor.numpy() / tensor.numpy().std(ddof=1), rtol=1e-12)


@given(reward=st.floats(-10, 10), batches=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@example(reward=0.1, batches=[9, 7, 3])  # leaves a sum of squares of 1e-33 rather than 0
@settings(deadline=None, max_examples=60)
def test_constant_rewards_are_not_divided_by_rounding(reward: float, batches: list[int]) -> None:
    """As long as all rewards are equal they are left as they are, whatever rounding the running sums collected."""
    stats = RunningStatistics()
    for size in batches:
        stats = update_statistics(stats, torch.full((size,), reward, dtype=torch.float64))
    rewards = torch.full((3,), reward, dtype=torch.float64)
    assert torch.equal(normalise(rewards, stats, subtract_mean=False), rewards)
    centred = normalise(rewards, stats, subtract_mean=True)
    torch.testing.assert_close(centred, torch.zeros_like(rewards), atol=1e-12, rtol=0)
    assert torch.equal(normalise(rewards, RunningStatistics(), subtract_mean=False), rewards)


@given(
    max_tokens=st.integers(1, 200),
    share=st.floats(0, 1),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=9),
    factor=st.floats(0, 3),
)
@settings(deadline=None, max_examples=80)
def test_overlong_penalty(max_tokens: int, share: float, lengths: list[int], factor: float) -> None:
    """The penalty is the three cases of the paper's equation: nothing, linear, full."""
    buffer = max(1, int(share * max_tokens))
    expected = []
    for length in lengths:
        if length <= max_tokens - buffer:
            expected.append(0.0)
        elif length <= max_tokens:
            expected.append(factor * (max_tokens - buffer - length) / buffer)
        else:
            expected.append(-factor)
    penalty = overlong_penalty(torch.tensor(lengths), max_tokens=max_tokens, buffer=buffer, factor=factor)
    assert penalty.dtype == torch.float32
    np.testing.assert_allclose(penalty, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("buffer", "factor", "message"),
    [
        (0, 1.0, "buffer=0"),
        (101, 1.0, "buffer=101 is not between 1 and max_tokens=100"),
        (5, -1.0, "factor=-1.0"),
        (5, math.inf, "factor=inf"),
    ],
)
def test_bad_penalty(buffer: int, factor: float, message: str) -> None:
    """A buffer outside the completion, and a penalty that rewards length or is infinite, are refused."""
    with pytest.raises(ConfigError, match=message):
        overlong_penalty(torch.tensor([1]), max_tokens=100, buffer=buffer, factor=factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_of_16_bit_lengths_is_float32(dtype: torch.dtype) -> None:
    """Lengths in 16 bits give the float32 penalty of the same lengths, not one that is rounded to 16 bits."""
    lengths = torch.tensor([60, 71, 83, 99])
    expected = overlong_penalty(lengths, max_tokens=100, buffer=37, factor=1.0)
    actual = overlong_penalty(lengths.to(dtype), max_tokens=100, buffer=37, factor=1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
