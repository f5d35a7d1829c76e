"""Dynamic sampling: which groups can teach the policy anything.

Shapes: B completions, P prompts, G completions of one prompt (B = P * G).
"""

from __future__ import annotations

from torch import Tensor

from lightrft.algorithms.groups import split_into_groups

__all__ = ["informative_groups"]


def informative_groups(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return which completions belong to a group whose rewards are not all equal.

    In a group of equal rewards every group advantage is 0, so its completions cost a forward and a backward and give no
    gradient. Equal means equal to the last bit, as in the advantages.

    Args:
        rewards_B: (B,) float32 or float64, finite, the completions of one prompt adjacent.
        group_size: completions per prompt, at least 2; divides B.

    Returns:
        (B,) bool, the same for all completions of a group.

    Raises:
        ConfigError: if the rewards have another shape or dtype, or `group_size` is below 2 or does not divide B.
        RewardError: if a reward is not finite.

    Reference:
        Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.2.

    Example:
        >>> import torch
        >>> informative_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), group_size=2)
        tensor([False, False,  True,  True])
    """
    rewards_PG = split_into_groups(rewards_B, group_size=group_size)
    varies_P = rewards_PG.amax(dim=-1) > rewards_PG.amin(dim=-1)
    return varies_P.repeat_interleave(group_size)
