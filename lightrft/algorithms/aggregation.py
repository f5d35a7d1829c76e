"""From a loss per token to one number, the same however the batch is cut into micro-batches and ranks.

`(loss_BT * token_weights(mask_BT, ...)).sum()` over the parts of the global batch adds up to the loss of the whole,
because the normaliser is that of the global batch. Get it by adding `normaliser_share` over all parts and ranks
before the first backward.

Shapes: B completions, T tokens.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from lightrft.algorithms.shapes import require_ndim
from lightrft.errors import ConfigError, nearest

__all__ = ["AGGREGATION_MODES", "AggregationMode", "normaliser_share", "token_weights"]

AggregationMode = Literal["token", "sequence", "constant"]
"""What has the same weight: every token, every sequence, or every token in terms of the longest completion allowed."""

AGGREGATION_MODES: Final[tuple[AggregationMode, ...]] = get_args(AggregationMode)
"""The modes by the names that a config uses."""


def token_weights(
    mask_BT: Tensor, *, mode: AggregationMode, normaliser: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight of each token in the loss of the global batch.

    The weights of all tokens of the global batch add up to 1 in the modes "token" and "sequence", and to the mean
    length in units of the longest allowed one in mode "constant".

    Args:
        mask_BT: (B, T) nonzero at the tokens that the policy generated; whole sequences, any part of the batch.
        mode: "token" gives each token 1 / normaliser; "sequence" shares 1 / normaliser among the tokens of a sequence;
            "constant" gives each token 1 / normaliser, without looking at any length.
        normaliser: the sum of `normaliser_share` over the global batch, positive.
        dtype: that of the weights.

    Returns:
        (B, T) weights, 0 where the mask is.

    Raises:
        ConfigError: if the mask is not 2-D, the mode unknown, or the normaliser not a positive finite number.

    Reference:
        "sequence": Shao et al. 2024, arXiv:2402.03300, equation 3. "token": Yu et al. 2025 (DAPO), arXiv:2503.14476,
        equation 12. "constant": Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, section 3.2.

    Example:
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> token_weights(mask, mode="sequence", normaliser=2)
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    _require_mode(mode)
    require_ndim(2, mask_BT=mask_BT)
    if not 0.0 < normaliser < math.inf:
        raise ConfigError(
            f"normaliser={normaliser!r} is not a positive number; "
            "add up normaliser_share over a batch that has tokens in it."
        )
    weights_BT = mask_BT.bool().to(dtype)
    if mode == "sequence":
        weights_BT = weights_BT / weights_BT.sum(dim=-1, keepdim=True).clamp(min=1)
    return weights_BT / normaliser


def normaliser_share(mask_BT: Tensor, *, mode: AggregationMode, max_completion_tokens: int) -> float:
    """Return what these sequences contribute to the normaliser of the global batch.

    Shares add up: the sum over the parts of a batch is the share of the whole. Sequences without any token that counts
    (fillers, or completions that a filter took out) contribute nothing in any mode.

    Args:
        mask_BT: (B, T) nonzero at the tokens that the policy generated.
        mode: as in `token_weights`.
        max_completion_tokens: the longest completion that the engine may give, in tokens; only "constant" looks at it.

    Returns:
        The number of tokens ("token"), of sequences ("sequence"), or of sequences times `max_completion_tokens`.

    Raises:
        ConfigError: if the mask is not 2-D, the mode unknown, or `max_completion_tokens` below 1.

    Example:
        >>> normaliser_share(torch.tensor([[1, 1], [1, 0]]), mode="constant", max_completion_tokens=8)
        16.0
    """
    _require_mode(mode)
    require_ndim(2, mask_BT=mask_BT)
    if max_completion_tokens < 1:
        raise ConfigError(f"max_completion_tokens={max_completion_tokens!r} is below 1; use the engine's limit.")
    if mode == "token":
        return float(torch.count_nonzero(mask_BT))
    num_sequences = float(torch.count_nonzero(mask_BT.bool().any(dim=-1)))
    return num_sequences if mode == "sequence" else num_sequences * max_completion_tokens


def _require_mode(mode: str) -> None:
    if mode not in AGGREGATION_MODES:
        raise ConfigError(f"mode={mode!r} is not known; {nearest(mode, AGGREGATION_MODES)}.")
