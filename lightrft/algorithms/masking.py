"""Sums, means and whitening over the entries that a mask selects.

What stands where the mask is 0 never matters, not even NaN or infinity, neither for the value nor for the gradient.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightrft.algorithms.shapes import require_same_shape

__all__ = ["masked_mean", "masked_sum", "masked_whiten"]


def masked_sum(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Return the sum of the selected values.

    Args:
        values: numbers of any shape.
        mask: of the same shape, nonzero where a value counts.
        dim: the dimension to sum over; all of them if None.

    Returns:
        The sums; 0 where nothing is selected.

    Raises:
        ConfigError: if the shapes differ.

    Example:
        >>> import torch
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1, 1, 0]))
        tensor(3.)
    """
    require_same_shape(values=values, mask=mask)
    kept = values.masked_fill(~mask.bool(), 0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Return the mean of the selected values.

    Args:
        values: floating-point numbers of any shape.
        mask: of the same shape, nonzero where a value counts.
        dim: the dimension to average over; all of them if None.

    Returns:
        The means; 0 where nothing is selected, so that a row of padding adds nothing.

    Raises:
        ConfigError: if the shapes differ.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([[1, 1], [1, 0]]), dim=1)
        tensor([1.5000, 5.0000])
    """
    selected = mask.bool()
    num_selected = selected.sum() if dim is None else selected.sum(dim=dim)
    return masked_sum(values, mask, dim=dim) / num_selected.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, subtract_mean: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Return the selected values shifted to mean 0 and scaled to standard deviation 1, and 0 elsewhere.

    The standard deviation is that of a sample (divisor n - 1). Values that are all equal become exactly 0 (or stay what
    they are, divided by `epsilon`, if the mean is kept).

    Args:
        values: floating-point numbers of any shape.
        mask: of the same shape, nonzero where a value counts.
        subtract_mean: False keeps the mean (scaled) and only rescales.
        epsilon: added to the standard deviation.

    Raises:
        ConfigError: if the shapes differ.

    Example:
        >>> import torch
        >>> masked_whiten(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    require_same_shape(values=values, mask=mask)
    ignored = ~mask.bool()
    # Measured from the smallest value, so that equal values give deviations of exactly 0; the shift has no derivative.
    smallest = values.detach().masked_fill(ignored, math.inf).amin()
    shifted = values.masked_fill(ignored, 0) - smallest
    deviations = (shifted - masked_mean(shifted, mask)).masked_fill(ignored, 0)
    variance = deviations.square().sum() / ((~ignored).sum() - 1).clamp(min=1)
    numerator = deviations if subtract_mean else values.masked_fill(ignored, 0)
    return numerator / (variance.sqrt() + epsilon)
