"""Masked reductions against the same reduction over the selected values alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.masking import masked_mean, masked_sum, masked_whiten
from lightrft.errors import ConfigError


def draw_case(seed: int, num_rows: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_rows, num_tokens, generator=generator) < 0.6
    return values, mask


SHAPES = {"seed": st.integers(0, 2**31), "num_rows": st.integers(1, 4), "num_tokens": st.integers(1, 6)}


@given(**SHAPES)
@settings(deadline=None, max_examples=60)
def test_sum_and_mean_equal_numpy_on_the_selected(seed: int, num_rows: int, num_tokens: int) -> None:
    """Sum and mean, over all or over a dimension, equal numpy's over the selected values; 0 where there are none."""
    values, mask = draw_case(seed, num_rows, num_tokens)
    selected = values.numpy()[mask.numpy()]
    assert masked_sum(values, mask).item() == pytest.approx(selected.sum(), abs=1e-12)
    assert masked_mean(values, mask).item() == pytest.approx(selected.mean() if selected.size else 0.0, abs=1e-12)
    rows = [row[keep] for row, keep in zip(values.numpy(), mask.numpy(), strict=True)]
    np.testing.assert_allclose(masked_sum(values, mask, dim=1), [row.sum() for row in rows], atol=1e-12)
    means = [row.mean() if row.size else 0.0 for row in rows]
    np.testing.assert_allclose(masked_mean(values, mask, dim=1), means, atol=1e-12)


@given(**SHAPES)
@settings(deadline=None, max_examples=60)
def test_whiten_equals_numpy_on_the_selected(seed: int, num_rows: int, num_tokens: int) -> None:
    """Whitening equals subtracting numpy's mean and dividing by its sample deviation, and is 0 outside the mask."""
    values, mask = draw_case(seed, num_rows, num_tokens)
    selected = values.numpy()[mask.numpy()]
    deviation = selected.std(ddof=1) if selected.size > 1 else 0.0
    mean = selected.mean() if selected.size else 0.0
    whitened = masked_whiten(values, mask)
    np.testing.assert_allclose(whitened[mask], (selected - mean) / (deviation + 1e-6), atol=1e-9)
    assert not whitened[~mask].any()
    rescaled = masked_whiten(values, mask, subtract_mean=False)
    np.testing.assert_allclose(rescaled[mask], selected / (deviation + 1e-6), rtol=1e-9)
    assert not rescaled[~mask].any()


@given(value=st.floats(-1000, 1000, width=32), size=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_whitened_constant_is_exactly_zero(value: float, size: int) -> None:
    """Equal values become exactly 0, not the rounding error of their mean divided by epsilon."""
    assert not masked_whiten(torch.full((size,), value), torch.ones(size)).any()


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_whiten])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_garbage_outside_the_mask_reaches_nothing(reduce: Callable[[Tensor, Tensor], Tensor], garbage: float) -> None:
    """NaN and infinity outside the mask change neither the result nor the gradient."""
    clean = torch.tensor([1.0, 2.0, 0.0, 4.0], requires_grad=True)
    dirty = torch.tensor([1.0, 2.0, garbage, 4.0], requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1])
    weights = torch.tensor([1.0, 2.0, 3.0, 5.0])
    results = [reduce(clean, mask), reduce(dirty, mask)]
    for result in results:
        (result * weights).sum().backward()
    assert torch.equal(results[0], results[1])
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.isfinite(dirty.grad).all()
    assert dirty.grad[2] == 0


def test_gradients_are_right() -> None:
    """The gradients of mean and whitening agree with finite differences."""
    values = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1])

    def mean(tensor: Tensor) -> Tensor:
        return masked_mean(tensor, mask)

    def whiten(tensor: Tensor) -> Tensor:
        return masked_whiten(tensor, mask)

    assert torch.autograd.gradcheck(mean, (values,))
    assert torch.autograd.gradcheck(whiten, (values,))


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_whiten])
def test_shapes_must_agree(reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A mask that would broadcast, or to which the values would, is refused."""
    with pytest.raises(ConfigError, match=r"mask.shape=\(3,\) differs from values.shape=\(2, 3\)"):
        reduce(torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ConfigError, match=r"mask.shape=\(2, 3\) differs from values.shape=\(3,\)"):
        reduce(torch.zeros(3), torch.ones(2, 3))
