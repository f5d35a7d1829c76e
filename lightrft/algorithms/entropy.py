"""Entropy of the next-token distribution.

Shapes: V vocabulary; any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["entropy_from_logits"]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy of `softmax(logits)` in nats.

    Logits of -inf (tokens that top-k, top-p or a grammar forbids) add nothing, to the value or to the gradient. A row
    of which every logit is -inf is no distribution and gives NaN.

    Args:
        logits: (..., V) logits before the softmax; half precision is computed in float32.

    Returns:
        (...) entropies from 0 to log V, in float32, or float64 for float64 logits.

    Reference:
        Shannon 1948, "A Mathematical Theory of Communication", section 6.

    Example:
        >>> entropy_from_logits(torch.tensor([0.0, 0.0, float("-inf")]))
        tensor(0.6931)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    # 0 * log 0 is 0 here, but 0 * -inf is NaN: the logarithm is replaced before it is multiplied.
    surprise = -logprobs.masked_fill(logits == -math.inf, 0.0)
    return (logprobs.exp() * surprise).sum(dim=-1)
