"""Advantages: how much better a completion, or a token, was than what had to be expected.

The group functions compare the completions of one prompt with each other; `gae` compares tokens with a critic.

Shapes: B completions of the global batch, P prompts, G completions of one prompt (B = P * G, those of a prompt side by
side), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from lightrft.algorithms.groups import centre_groups, split_into_groups
from lightrft.algorithms.shapes import require_ndim, require_same_shape
from lightrft.errors import ConfigError

__all__ = ["ADVANTAGES", "GroupAdvantage", "dr_grpo", "gae", "grpo", "reinforce_plus_plus_baseline", "rloo"]

# Added to a standard deviation before dividing by it: a millionth of a reward of 1, so that it changes no advantage
# that anybody would look at, yet bounds what a group with one rounding error in its rewards can become.
EPSILON: Final = 1e-6


class GroupAdvantage(Protocol):
    """A rule that turns the rewards of the completions of each prompt into one advantage per completion.

    Laws: a group whose rewards are all equal gets advantages of exactly 0; adding one number to all rewards of a group
    changes nothing; the order of the completions inside a group and of the groups in the batch does not matter.
    """

    def __call__(self, rewards_B: Tensor, *, group_size: int) -> Tensor:
        """Return one advantage per completion.

        Args:
            rewards_B: (B,) float32 or float64, finite, the completions of one prompt adjacent.
            group_size: completions per prompt, at least 2; divides B.

        Returns:
            (B,) advantages in the dtype of the rewards.

        Raises:
            ConfigError: if the rewards have another shape or dtype, or `group_size` is below 2 or does not divide B.
            RewardError: if a reward is not finite.
        """
        ...


def grpo(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return `(r - mean(group)) / (std(group) + 1e-6)`, with the standard deviation of a sample (divisor G - 1).

    Reference:
        Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.2.

    Example:
        >>> grpo(torch.tensor([0.0, 2.0, 1.0, 1.0]), group_size=2)
        tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    centred_PG = centre_groups(split_into_groups(rewards_B, group_size=group_size))
    return (centred_PG / (centred_PG.std(dim=-1, keepdim=True) + EPSILON)).flatten()


def dr_grpo(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return `r - mean(group)`: without the division that favours prompts which are very easy or very hard.

    Reference:
        Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2.

    Example:
        >>> dr_grpo(torch.tensor([0.0, 2.0, 1.0, 1.0]), group_size=2)
        tensor([-1.,  1.,  0.,  0.])
    """
    return centre_groups(split_into_groups(rewards_B, group_size=group_size)).flatten()


def rloo(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return the reward minus the mean reward of the other completions of the prompt (leave one out).

    Reference:
        Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740 (RLOO).

    Example:
        >>> rloo(torch.tensor([0.0, 2.0, 1.0, 1.0]), group_size=2)
        tensor([-2.,  2.,  0.,  0.])
    """
    # r - (sum - r) / (G - 1) = (r - mean) * G / (G - 1), and the right side is exactly 0 for a constant group.
    return dr_grpo(rewards_B, group_size=group_size) * (group_size / (group_size - 1))


def reinforce_plus_plus_baseline(rewards_B: Tensor, *, group_size: int) -> Tensor:
    """Return `r - mean(group)`, divided by the standard deviation of that over the global batch (divisor B - 1).

    One scale for all prompts keeps the weight of a prompt independent of how much its own completions vary. The batch
    mean of the differences is 0 already, so whitening has nothing left to subtract. The rewards must be those of the
    global batch, not of one rank.

    Reference:
        Hu et al. 2025, "REINFORCE++", arXiv:2501.03262, the variant with a group baseline.

    Example:
        >>> reinforce_plus_plus_baseline(torch.tensor([0.0, 2.0, 1.0, 1.0]), group_size=2)
        tensor([-1.2247,  1.2247,  0.0000,  0.0000])
    """
    centred_B = dr_grpo(rewards_B, group_size=group_size)
    return centred_B / (centred_B.std() + EPSILON)


ADVANTAGES: Final[Mapping[str, GroupAdvantage]] = MappingProxyType(
    {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce++": reinforce_plus_plus_baseline}
)
"""The group rules by the names that a config uses."""


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the returns that a critic shall learn.

    The last token that counts in a row is terminal: nothing is expected after it. Tokens that do not count (padding, or
    the words of a tool between two turns) are stepped over, as if the row held only the others, and get zeros.

    Args:
        rewards_BT: (B, T) reward given at each token; 0 where the mask is.
        values_BT: (B, T) what the critic expected before each token.
        mask_BT: (B, T) nonzero at the tokens that the policy generated.
        gamma: discount per token, from 0 to 1.
        lam: weight of later errors of the critic, from 0 (one step) to 1 (the whole sum).

    Returns:
        The advantages and the returns (advantage plus value), both (B, T), in the dtype of the values, without
        gradient.

    Raises:
        ConfigError: if shapes differ, `gamma` or `lam` is out of range, or a reward stands where the mask is 0.

    Reference:
        Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        arXiv:1506.02438, equation 16.

    Example:
        >>> rewards, values, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 1]])
        >>> gae(rewards, values, mask, gamma=1.0, lam=1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    require_ndim(2, rewards_BT=rewards_BT)
    require_same_shape(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    _require_fraction(gamma=gamma, lam=lam)
    counts_BT, values_BT = mask_BT.bool(), values_BT.detach()
    _require_no_lost_reward(rewards_BT, counts_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(values_BT.shape[0])
    for t in reversed(range(values_BT.shape[1])):
        counts_B, value_B = counts_BT[:, t], values_BT[:, t]
        error_B = rewards_BT[:, t].detach() + gamma * next_value_B - value_B
        next_advantage_B = torch.where(counts_B, error_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(counts_B, value_B, next_value_B)
        advantages_BT[:, t] = next_advantage_B
    returns_BT = advantages_BT + values_BT
    return advantages_BT.masked_fill(~counts_BT, 0.0), returns_BT.masked_fill(~counts_BT, 0.0)


def _require_fraction(**settings: float) -> None:
    for name, value in settings.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name}={value!r} is not between 0 and 1; use a value such as 0.95 or 1.0.")


def _require_no_lost_reward(rewards_BT: Tensor, counts_BT: Tensor) -> None:
    num_lost = int(torch.count_nonzero(rewards_BT.masked_fill(counts_BT, 0.0)))
    if num_lost:
        raise ConfigError(
            f"rewards_BT has {num_lost} nonzero reward(s) where mask_BT is 0, which no advantage would see; "
            "give a reward at the last token that counts, or set it to 0."
        )
