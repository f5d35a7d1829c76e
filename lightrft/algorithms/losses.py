"""Policy and value losses per token, without any reduction: `aggregation.token_weights` says how they are added up.

`ppo_clip` and `cispo` look at one token at a time, so any part of a batch, flat or not, gives that part of the result.
`gspo` looks at whole sequences.

Shapes: B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from lightrft.algorithms.clipping import clipped_loss, require_clip_range
from lightrft.algorithms.masking import masked_mean
from lightrft.algorithms.shapes import require_ndim, require_same_shape
from lightrft.errors import ConfigError

__all__ = ["LOSSES", "TOKENWISE_LOSSES", "PolicyLoss", "cispo", "gspo", "ppo_clip", "value_loss"]


class PolicyLoss(Protocol):
    """A policy loss per token, to be minimised.

    Laws: the loss is 0, and passes no gradient, where the mask is 0, whatever stands there. Where `old_logprobs` equal
    `logprobs`, the gradient of a sequence's masked mean is that of minus advantage times log-probability.
    """

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
    ) -> Tensor:
        """Return the loss at each token.

        Args:
            logprobs: log-probabilities of the sampled tokens under the policy, (B, T); any shape for a token-wise loss.
            old_logprobs: those under the policy that sampled, same shape, taken as constants.
            advantages: same shape, taken as constants.
            mask: same shape, nonzero at the tokens that the policy generated.
            clip_low: how far below 1 the ratio of the two may fall, from 0 to 1; 1 is no bound.
            clip_high: how far above 1 it may rise, 0 or more.
            dual_clip: bound of the ratio where the advantage is negative, above 1; only for `ppo_clip`. None for none.

        Returns:
            Losses of the same shape.

        Raises:
            ConfigError: if the shapes differ, a setting is out of range, or the loss cannot use the `dual_clip` given.
        """
        ...


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Return `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`, at most `-dual_clip * A` where A < 0.

    Only an unclipped ratio can overflow: where the minimum is the clipped branch, loss and gradient are finite.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape.
        old_logprobs: those under the policy that sampled, same shape, taken as constants.
        advantages: same shape, taken as constants.
        clip_low: how far below 1 the ratio may fall, from 0 to 1; 1 is no bound.
        clip_high: how far above 1 it may rise, 0 or more.
        dual_clip: bound of the ratio where the advantage is negative, above 1; None for none.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.

    Reference:
        Schulman et al. 2017, "Proximal Policy Optimization", arXiv:1707.06347, equation 7; two clip bounds: Yu et al.
        2025, "DAPO", arXiv:2503.14476, section 3.1; dual clip: Ye et al. 2020, arXiv:1912.09729.

    Example:
        >>> ppo_clip(torch.log(torch.tensor([1.5, 1.1])), torch.zeros(2), torch.ones(2))
        tensor([-1.2000, -1.1000])
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_clip_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ConfigError(f"dual_clip={dual_clip!r} is not above 1; use e.g. 3.0, or None for no second bound.")
    log_ratio = logprobs - old_logprobs.detach()
    return clipped_loss(log_ratio, advantages.detach(), clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """Return `-w * A * logprobs` with `w` the ratio clipped to [1 - clip_low, 1 + clip_high], taken as a constant.

    Unlike `ppo_clip`, a token whose ratio is clipped keeps a gradient, of bounded weight.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape.
        old_logprobs: those under the policy that sampled, same shape, taken as constants.
        advantages: same shape, taken as constants.
        clip_low: how far below 1 the weight may fall, from 0 to 1; 1 is no bound.
        clip_high: how far above 1 it may rise, 0 or more.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.

    Reference:
        MiniMax 2025, "MiniMax-M1", arXiv:2506.13585, section 3.1.

    Example:
        >>> cispo(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([1.0]))
        tensor([1.2000])
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_clip_range(clip_low, clip_high)
    weight = (logprobs.detach() - old_logprobs.detach()).exp().clamp(min=1.0 - clip_low, max=1.0 + clip_high)
    return -weight * advantages.detach() * logprobs


def gspo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Return the clipped loss with one ratio per sequence, `s = exp(mean over its tokens of the log-ratio)`.

    The masked mean over a sequence is that sequence's loss, and has its gradient. Each token's loss has the value of
    `s` and the gradient of its own log-probability (the paper's GSPO-token), so advantages may differ from token to
    token; where they do not, this is GSPO itself.

    Args:
        logprobs_BT: (B, T) log-probabilities of the sampled tokens under the policy.
        old_logprobs_BT: (B, T) those under the policy that sampled, taken as constants.
        advantages_BT: (B, T) taken as constants.
        mask_BT: (B, T) nonzero at the tokens that the policy generated.
        clip_low: how far below 1 the sequence ratio may fall, from 0 to 1; the paper uses 3e-4.
        clip_high: how far above 1 it may rise, 0 or more; the paper uses 4e-4.

    Returns:
        (B, T) losses, 0 where the mask is.

    Raises:
        ConfigError: if the shapes differ, are not 2-D, or a setting is out of range.

    Reference:
        Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv:2507.18071, sections 4.1 and 4.3.

    Example:
        >>> logprobs = torch.log(torch.tensor([[1.1, 0.9, 7.0]]))
        >>> gspo(logprobs, torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[1, 1, 0]]), clip_low=0.2, clip_high=0.2)
        tensor([[-0.9950, -0.9950,  0.0000]])
    """
    require_ndim(2, logprobs_BT=logprobs_BT)
    require_same_shape(
        logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT, mask_BT=mask_BT
    )
    require_clip_range(clip_low, clip_high)
    ignored_BT = ~mask_BT.bool()
    log_ratio_BT = (logprobs_BT - old_logprobs_BT.detach()).masked_fill(ignored_BT, 0.0)
    constant_BT = log_ratio_BT.detach()
    log_ratio_B1 = masked_mean(constant_BT, mask_BT, dim=-1).unsqueeze(-1)
    # The bracket is 0 in value and carries the gradient of the token.
    sequence_log_ratio_BT = log_ratio_B1 + (log_ratio_BT - constant_BT)
    loss_BT = clipped_loss(
        sequence_log_ratio_BT, advantages_BT.detach(), clip_low=clip_low, clip_high=clip_high, dual_clip=None
    )
    return loss_BT.masked_fill(ignored_BT, 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = None) -> Tensor:
    """Return half the squared error of the critic, the larger of the plain and the clipped one if `clip` is given.

    Args:
        values: what the critic says now, any shape.
        old_values: what it said when the advantages were computed, same shape, taken as constants.
        returns: what it should say, same shape, taken as constants.
        clip: how far from the old value (in units of reward, above 0) moving towards the return still gains anything;
            None for no limit.

    Returns:
        Losses of the same shape.

    Raises:
        ConfigError: if the shapes differ or `clip` is not above 0.

    Reference:
        Schulman et al. 2015, arXiv:1506.02438, section 5; the clipped form is that of the PPO baselines, described in
        Andrychowicz et al. 2020, "What Matters In On-Policy Reinforcement Learning?", arXiv:2006.05990.

    Example:
        >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.5)
        tensor([0.1250])
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0.0:
        raise ConfigError(f"clip={clip!r} is not above 0; use e.g. 0.2, or None for no limit.")
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    if clip is not None:
        near_old = old_values + (values - old_values).clamp(min=-clip, max=clip)
        error = torch.maximum(error, (near_old - returns).square())
    return error / 2


def _ppo_clip_masked(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    ignored, kept = _split_mask(logprobs, mask)
    loss = ppo_clip(kept, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return loss.masked_fill(ignored, 0.0)


def _cispo_masked(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    _refuse_dual_clip(dual_clip)
    ignored, kept = _split_mask(logprobs, mask)
    loss = cispo(kept, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    return loss.masked_fill(ignored, 0.0)


def _gspo_without_dual_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    _refuse_dual_clip(dual_clip)
    return gspo(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)


LOSSES: Final[Mapping[str, PolicyLoss]] = MappingProxyType(
    {"ppo_clip": _ppo_clip_masked, "cispo": _cispo_masked, "gspo": _gspo_without_dual_clip}
)
"""The policy losses by the names that a config uses, all called alike."""

TOKENWISE_LOSSES: Final[frozenset[str]] = frozenset({"ppo_clip", "cispo"})
"""Those that look at one token at a time and may be called on any part of a batch; the others need whole sequences."""


def _split_mask(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the mask is 0, and the logprobs with a gradient only elsewhere: 0 * NaN spreads, a fill not."""
    require_same_shape(logprobs=logprobs, mask=mask)
    ignored = ~mask.bool()
    return ignored, logprobs.masked_fill(ignored, 0.0)


def _refuse_dual_clip(dual_clip: float | None) -> None:
    if dual_clip is not None:
        raise ConfigError(f"dual_clip={dual_clip!r} has no meaning for this loss; use loss ppo_clip, or leave it None.")
