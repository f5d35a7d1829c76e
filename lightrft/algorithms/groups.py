"""Groups: the completions of one prompt, which stand side by side in a batch.

Shapes: B completions, P prompts, G completions of one prompt (B = P * G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.algorithms.shapes import require_ndim
from lightrft.errors import ConfigError, RewardError

__all__ = ["centre_groups", "split_into_groups"]


def split_into_groups(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return the rewards with one row per prompt.

    Args:
        rewards_B: (B,) float32 or float64, finite, the completions of one prompt adjacent.
        group_size: completions per prompt, at least 2; divides B.

    Returns:
        (P, G) rewards, a view of the input.

    Raises:
        ConfigError: if the rewards have another shape or dtype, or `group_size` is below 2 or does not divide B.
        RewardError: if a reward is not finite.

    Example:
        >>> split_into_groups(torch.tensor([0.0, 1.0, 2.0, 3.0]), group_size=2)
        tensor([[0., 1.],
                [2., 3.]])
    """
    require_ndim(1, rewards_B=rewards_B)
    batch_size = rewards_B.shape[0]
    if rewards_B.dtype not in {torch.float32, torch.float64}:
        raise ConfigError(
            f"rewards_B.dtype={rewards_B.dtype} cannot hold means and deviations; use float32 or float64."
        )
    if group_size < 2:
        raise ConfigError(f"group_size={group_size!r} leaves nothing to compare a completion with; use 2 or more.")
    if batch_size == 0 or batch_size % group_size:
        raise ConfigError(
            f"group_size={group_size!r} does not divide the {batch_size} rewards of the batch into groups; "
            "pass all completions of every prompt."
        )
    if not torch.isfinite(rewards_B).all():
        where = torch.nonzero(~torch.isfinite(rewards_B)).flatten().tolist()
        raise RewardError(
            f"rewards_B={rewards_B[where[0]].item()!r} at index {where[0]} is not finite ({len(where)} such); "
            "make the reward function return finite numbers."
        )
    return rewards_B.reshape(-1, group_size)


def centre_groups(rewards_PG: Tensor) -> Tensor:
    """Return each reward minus the mean of its row; a row of equal rewards becomes exactly 0.

    Args:
        rewards_PG: (P, G) rewards, one row per prompt.

    Example:
        >>> centre_groups(torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 3.0]]))
        tensor([[ 0.,  0.,  0.],
                [-1., -1.,  2.]])
    """
    # The mean of equal numbers can differ from them by a rounding error; the mean of zeros is zero.
    above_minimum_PG = rewards_PG - rewards_PG.amin(dim=-1, keepdim=True)
    return above_minimum_PG - above_minimum_PG.mean(dim=-1, keepdim=True)
