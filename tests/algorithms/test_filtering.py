"""The dynamic sampling filter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.algorithms.advantages import dr_grpo
from lightrft.algorithms.filtering import informative_groups
from lightrft.errors import ConfigError


@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=3, max_size=3), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=60)
def test_a_group_is_informative_if_two_rewards_differ(rewards: list[list[float]]) -> None:
    """The mask is true for exactly the completions of groups with at least two different rewards."""
    mask_B = informative_groups(torch.tensor(rewards).flatten(), group_size=3)
    assert mask_B.dtype == torch.bool
    assert mask_B.tolist() == [len(set(group)) > 1 for group in rewards for _ in group]


@given(rewards=st.lists(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_what_is_dropped_has_no_advantage(rewards: list[list[float]]) -> None:
    """Every completion that is dropped has an advantage of exactly 0, and every group that is kept has another."""
    rewards_B = torch.tensor(rewards).flatten()
    mask_B = informative_groups(rewards_B, group_size=2)
    advantages_B = dr_grpo(rewards_B, group_size=2)
    assert not advantages_B[~mask_B].any()
    assert bool((advantages_B.reshape(-1, 2).abs().amax(-1) > 0).eq(mask_B.reshape(-1, 2)[:, 0]).all())


def test_bad_group_size() -> None:
    """A group size that does not divide the batch is refused."""
    with pytest.raises(ConfigError, match="group_size=2 does not divide the 3 rewards"):
        informative_groups(torch.zeros(3), group_size=2)
