"""Groups: the split into rows and the centring."""

from __future__ import annotations

import torch

from lightrft.algorithms.groups import centre_groups, split_into_groups


def test_adjacent_completions_share_a_row() -> None:
    """Row p holds the completions p * G to p * G + G - 1."""
    rewards_PG = split_into_groups(torch.arange(6.0), group_size=3)
    assert rewards_PG.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_centring_survives_a_large_offset() -> None:
    """Rewards around a million keep their differences exactly: the offset is gone before anything is averaged."""
    rewards_PG = torch.tensor([[1_000_000.0, 1_000_001.0, 1_000_002.0]])
    assert centre_groups(rewards_PG).tolist() == [[-1.0, 0.0, 1.0]]
