"""The clipped objective that several policy losses share, and how often it clips.

All of it works on logarithms of ratios: the bounds apply before the exponential, so a ratio that is clipped away
cannot overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrft.algorithms.shapes import require_same_shape
from lightrft.errors import ConfigError

__all__ = ["clip_fraction", "clipped_loss", "require_clip_range"]


def require_clip_range(clip_low: float, clip_high: float) -> None:
    """Refuse bounds of a ratio that are not `[1 - clip_low, 1 + clip_high]` with 1 inside and 0 outside or at the edge.

    Raises:
        ConfigError: if `clip_low` is not from 0 to 1 or `clip_high` is not 0 or more.
    """
    if not 0.0 <= clip_low <= 1.0:
        raise ConfigError(f"clip_low={clip_low!r} is not between 0 and 1; use e.g. 0.2, or 1.0 for no lower bound.")
    if not clip_high >= 0.0:
        raise ConfigError(f"clip_high={clip_high!r} is not 0 or more; use e.g. 0.2, or math.inf for no upper bound.")


def clipped_loss(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Return `-min(ratio * A, clip(ratio) * A)`, with the ratio at most `dual_clip` where A < 0.

    The minimum takes the upper bound only where A > 0 and the lower one only where A < 0, so it is one clamp by the
    sign of A.

    Args:
        log_ratio: logarithm of the ratio, any shape.
        advantages: same shape.
        clip_low: the lower bound is 1 - clip_low.
        clip_high: the upper bound is 1 + clip_high.
        dual_clip: bound of the ratio where A < 0; None for none.

    Returns:
        Losses of the same shape, with a gradient for `log_ratio`.

    Reference:
        Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    if_good = log_ratio.clamp(max=math.log1p(clip_high))
    if_bad = log_ratio.clamp(min=_log_lower(clip_low), max=math.inf if dual_clip is None else math.log(dual_clip))
    return -torch.where(advantages < 0, if_bad, if_good).exp() * advantages


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Return 1 at each token whose gradient the bounds of `ppo_clip` cut off, else 0; the masked mean is the fraction.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape.
        old_logprobs: those under the policy that sampled, same shape.
        advantages: same shape.
        clip_low: as in `ppo_clip`.
        clip_high: as in `ppo_clip`.

    Returns:
        Zeros and ones of the same shape and dtype as `logprobs`, without gradient.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.

    Reference:
        Schulman et al. 2017, arXiv:1707.06347, figure 1: where the objective is flat.

    Example:
        >>> clip_fraction(torch.log(torch.tensor([1.5, 1.5])), torch.zeros(2), torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_clip_range(clip_low, clip_high)
    log_ratio = logprobs.detach() - old_logprobs.detach()
    too_high = (advantages > 0) & (log_ratio > math.log1p(clip_high))
    too_low = (advantages < 0) & (log_ratio < _log_lower(clip_low))
    return (too_high | too_low).to(logprobs.dtype)


def _log_lower(clip_low: float) -> float:
    return math.log1p(-clip_low) if clip_low < 1.0 else -math.inf
