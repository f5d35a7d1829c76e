"""What happens to rewards before advantages are computed: clipping, running normalisation, a penalty for length.

Shapes: B completions; every function works on any shape.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from lightrft.errors import ConfigError, RewardError

__all__ = [
    "RunningStatistics",
    "clip_rewards",
    "merge_statistics",
    "normalise",
    "overlong_penalty",
    "update_statistics",
]

# Rewards that differ by less than this part of their mean differ by the rounding of float64 sums, not by merit.
CONSTANT_TOLERANCE = 1e-9


@attrs.frozen(kw_only=True)
class RunningStatistics:
    """Count, mean and spread of all rewards seen so far, as plain numbers that JSON can hold.

    Attributes:
        count: rewards seen.
        mean: their mean.
        m2: the sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0


def clip_rewards(rewards: Tensor, *, bound: float) -> Tensor:
    """Return the rewards, limited to [-bound, bound].

    Args:
        rewards: any shape.
        bound: the largest absolute value, 0 or more; 0 means no clipping.

    Raises:
        ConfigError: if `bound` is negative or NaN.

    Example:
        >>> clip_rewards(torch.tensor([-7.0, 0.5]), bound=1.0)
        tensor([-1.0000,  0.5000])
    """
    if not bound >= 0.0:
        raise ConfigError(f"bound={bound!r} is not 0 or more; use 0 for no clipping.")
    return rewards.clamp(min=-bound, max=bound) if bound else rewards


def merge_statistics(first: RunningStatistics, second: RunningStatistics) -> RunningStatistics:
    """Return the statistics of everything that went into either; the order does not matter (up to rounding).

    Reference:
        Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", The American Statistician 37(3).

    Example:
        >>> merge_statistics(RunningStatistics(count=1, mean=1.0), RunningStatistics(count=1, mean=3.0))
        RunningStatistics(count=2, mean=2.0, m2=2.0)
    """
    if not first.count or not second.count:
        return first if first.count else second
    count = first.count + second.count
    distance = second.mean - first.mean
    return RunningStatistics(
        count=count,
        mean=first.mean + distance * second.count / count,
        m2=first.m2 + second.m2 + distance * distance * first.count * second.count / count,
    )


def update_statistics(stats: RunningStatistics, rewards: Tensor) -> RunningStatistics:
    """Return the statistics with these rewards added, computed in float64.

    Args:
        stats: what was seen before.
        rewards: new rewards, any shape, finite; none leaves the statistics as they are.

    Raises:
        RewardError: if a reward is not finite.

    Reference:
        As in `merge_statistics`.

    Example:
        >>> update_statistics(RunningStatistics(), torch.tensor([1.0, 3.0]))
        RunningStatistics(count=2, mean=2.0, m2=2.0)
    """
    if rewards.numel() == 0:
        return stats
    exact = rewards.detach().double()
    if not torch.isfinite(exact).all():
        raise RewardError(
            f"rewards={exact.tolist()!r} are not all finite; make the reward function return finite numbers."
        )
    mean = exact.mean()
    new = RunningStatistics(count=exact.numel(), mean=mean.item(), m2=(exact - mean).square().sum().item())
    return merge_statistics(stats, new)


def normalise(rewards: Tensor, stats: RunningStatistics, *, subtract_mean: bool) -> Tensor:
    """Return the rewards divided by the standard deviation of the statistics (divisor count - 1).

    As long as there is no spread to divide by (fewer than two rewards, or all equal), nothing is divided.

    Args:
        rewards: any shape.
        stats: those of the rewards seen, usually these included.
        subtract_mean: whether the mean is subtracted first. Group advantages do that themselves.

    Returns:
        Rewards of the same shape and dtype.

    Example:
        >>> normalise(torch.tensor([1.0, 3.0]), RunningStatistics(count=5, mean=2.0, m2=16.0), subtract_mean=True)
        tensor([-0.5000,  0.5000])
    """
    shifted = rewards - stats.mean if subtract_mean else rewards
    deviation = math.sqrt(stats.m2 / (stats.count - 1)) if stats.count > 1 else 0.0
    return shifted / deviation if deviation > CONSTANT_TOLERANCE * abs(stats.mean) else shifted


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer: int, factor: float) -> Tensor:
    """Return what is added to the reward of each completion for its length: 0, then falling linearly to -factor.

    The fall begins at `max_tokens - buffer` tokens and ends at `max_tokens`, so that a completion that comes near the
    limit is told so before it is cut off.

    Args:
        lengths: completion lengths in tokens, any shape, integer or float.
        max_tokens: the longest completion, in tokens.
        buffer: over how many tokens the penalty grows, from 1 to `max_tokens`.
        factor: the full penalty, 0 or more.

    Returns:
        Penalties from -factor to 0, of the same shape, float32 (float64 for float64 lengths).

    Raises:
        ConfigError: if `buffer` or `factor` is out of range.

    Reference:
        Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 13.

    Example:
        >>> overlong_penalty(torch.tensor([80, 95, 100]), max_tokens=100, buffer=10, factor=1.0)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 1 <= buffer <= max_tokens:
        raise ConfigError(
            f"buffer={buffer!r} is not between 1 and max_tokens={max_tokens!r}; use e.g. max_tokens // 5."
        )
    if not 0.0 <= factor < math.inf:
        raise ConfigError(f"factor={factor!r} is not 0 or more; use 1.0 for the penalty of the paper.")
    excess = lengths.to(torch.promote_types(lengths.dtype, torch.float32)) - (max_tokens - buffer)
    return factor * (-excess / buffer).clamp(min=-1.0, max=0.0)
