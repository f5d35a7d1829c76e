"""Estimators of the KL divergence KL(policy || reference) from the log-probabilities of sampled tokens.

With d = log policy - log reference at a token that the policy sampled:

| name | value            | bias of the value  | expected gradient, if differentiated as a loss |
|------|------------------|--------------------|------------------------------------------------|
| k1   | d                | none               | 0: it penalises nothing                        |
| k2   | d^2 / 2          | small where d is   | that of KL(policy, reference)                  |
| k3   | exp(-d) - 1 + d  | none               | that of KL(reference, policy)                  |

So k1 belongs into a reward (where nothing is differentiated), k2 or k3 into a loss; k3 has the lowest variance of the
unbiased two and is never negative. All of this holds for tokens sampled from the policy that is differentiated;
samples of an older policy need an importance weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from lightrft.algorithms.shapes import require_same_shape

__all__ = ["KL_ESTIMATORS", "KLEstimator", "k1", "k2", "k3"]


class KLEstimator(Protocol):
    """An estimate per token of KL(policy || reference).

    Laws: 0 where the two agree; elementwise, so that any part of a batch gives that part of the result.
    """

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """Return the estimate at each token, in nats.

        Args:
            logprobs: log-probabilities of the sampled tokens under the policy, any shape.
            reference_logprobs: those under the reference, of the same shape.

        Returns:
            Estimates of the same shape; they carry the gradient of both inputs.

        Raises:
            ConfigError: if the shapes differ.
        """
        ...


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return `d`: unbiased, of either sign, with high variance; for rewards, not for losses.

    Reference:
        Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Example:
        >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])
    """
    require_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return `d^2 / 2`: never negative, biased by the third order in d, and its gradient is unbiased.

    Reference:
        Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Example:
        >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1250])
    """
    return k1(logprobs, reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return `exp(-d) - 1 + d`: unbiased and never negative; the term in the GRPO loss.

    It grows exponentially where the reference finds a token far likelier than the policy, and is infinite in float32
    beyond d = -88.

    Reference:
        Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html; Shao et al. 2024,
        "DeepSeekMath", arXiv:2402.03300, equation 4.

    Example:
        >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1065])
    """
    difference = k1(logprobs, reference_logprobs)
    return torch.expm1(-difference) + difference  # expm1 keeps the digits that exp(-d) - 1 loses for small d


KL_ESTIMATORS: Final[Mapping[str, KLEstimator]] = MappingProxyType({"k1": k1, "k2": k2, "k3": k3})
"""The estimators by the names that a config uses."""
