"""Correction of the difference between the engine that sampled the tokens and the trainer that learns from them.

Both hold the same weights, yet other kernels, precisions and batch shapes give other log-probabilities, so the
samples are not quite the trainer's own. Each token's loss is multiplied by a weight that corrects this in
expectation, bounded so that a few tokens cannot dominate a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from lightrft.algorithms.shapes import require_same_shape
from lightrft.errors import ConfigError

__all__ = ["IMPORTANCE_CORRECTIONS", "ImportanceCorrection", "masked_importance", "truncated_importance"]


class ImportanceCorrection(Protocol):
    """A weight per token for the policy loss.

    Laws: weights are from 0 to `cap`; they carry no gradient; they are 1 (up to rounding) where the two sides agree.
    """

    def __call__(self, trainer_logprobs: Tensor, engine_logprobs: Tensor, *, cap: float) -> Tensor:
        """Return the weight of each token.

        Args:
            trainer_logprobs: log-probabilities of the sampled tokens as the trainer computes them with the weights that
                sampled (the `old_logprobs` of the loss), any shape.
            engine_logprobs: those that the engine reported, of the same shape.
            cap: bound of the weights, at least 1; without effect for "none".

        Returns:
            Weights of the same shape, without gradient.

        Raises:
            ConfigError: if the shapes differ or `cap` is below 1.
        """
        ...


def truncated_importance(trainer_logprobs: Tensor, engine_logprobs: Tensor, *, cap: float) -> Tensor:
    """Return `min(trainer / engine, cap)` in probabilities, without gradient.

    Args:
        trainer_logprobs: log-probabilities of the sampled tokens under the trainer, any shape.
        engine_logprobs: those that the engine reported, of the same shape.
        cap: the largest weight, at least 1.

    Raises:
        ConfigError: if the shapes differ or `cap` is below 1.

    Reference:
        Ionides 2008, "Truncated Importance Sampling", Journal of Computational and Graphical Statistics 17(2);
        for engine and trainer: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
        Training".

    Example:
        >>> truncated_importance(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -9.0]), cap=2.0)
        tensor([1., 2.])
    """
    _require_cap(cap)
    # An overflow of exp is infinity, which the cap takes care of; there is no gradient that it could spoil.
    return _log_ratio(trainer_logprobs, engine_logprobs).exp().clamp(max=cap)


def masked_importance(trainer_logprobs: Tensor, engine_logprobs: Tensor, *, low: float, high: float) -> Tensor:
    """Return `trainer / engine` in probabilities where it lies in [low, high] and 0 elsewhere, without gradient.

    Args:
        trainer_logprobs: log-probabilities of the sampled tokens under the trainer, any shape.
        engine_logprobs: those that the engine reported, of the same shape.
        low: smallest ratio that is kept, from 0 to 1.
        high: largest ratio that is kept, at least 1.

    Raises:
        ConfigError: if the shapes differ, or the band does not contain 1.

    Reference:
        Ling Team 2025, "Every Step Evolves", arXiv:2510.18855 (IcePop).

    Example:
        >>> masked_importance(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -9.0]), low=0.5, high=2.0)
        tensor([1., 0.])
    """
    if not 0.0 <= low <= 1.0:
        raise ConfigError(f"low={low!r} is not between 0 and 1, so equal logprobs would be dropped; use e.g. 0.5.")
    if not high >= 1.0:
        raise ConfigError(f"high={high!r} is below 1, so equal logprobs would be dropped; use e.g. 2.0.")
    ratio = _log_ratio(trainer_logprobs, engine_logprobs).exp()
    # Written as "outside" so that NaN is not quietly dropped with it.
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def _mask_outside_band(trainer_logprobs: Tensor, engine_logprobs: Tensor, *, cap: float) -> Tensor:
    """`masked_importance` with the band [1 / cap, cap]."""
    _require_cap(cap)
    return masked_importance(trainer_logprobs, engine_logprobs, low=1.0 / cap, high=cap)


def _no_correction(trainer_logprobs: Tensor, engine_logprobs: Tensor, *, cap: float) -> Tensor:
    """Weights of 1."""
    _require_cap(cap)
    require_same_shape(trainer_logprobs=trainer_logprobs, engine_logprobs=engine_logprobs)
    return torch.ones_like(trainer_logprobs, requires_grad=False)


IMPORTANCE_CORRECTIONS: Final[Mapping[str, ImportanceCorrection]] = MappingProxyType(
    {"none": _no_correction, "truncate": truncated_importance, "mask": _mask_outside_band}
)
"""The corrections by the names that a config uses; "mask" keeps the ratios in [1 / cap, cap]."""


def _log_ratio(trainer_logprobs: Tensor, engine_logprobs: Tensor) -> Tensor:
    require_same_shape(trainer_logprobs=trainer_logprobs, engine_logprobs=engine_logprobs)
    return trainer_logprobs.detach() - engine_logprobs.detach()


def _require_cap(cap: float) -> None:
    if not cap >= 1.0:
        raise ConfigError(f"cap={cap!r} is below 1, so equal logprobs would be changed; use e.g. 2.0.")
