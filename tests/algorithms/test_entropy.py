"""Entropy from logits against numpy and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.entropy import entropy_from_logits


@given(seed=st.integers(0, 2**31), vocabulary=st.integers(1, 12), scale=st.floats(0, 300))
@settings(deadline=None, max_examples=60)
def test_equals_the_definition(seed: int, vocabulary: int, scale: float) -> None:
    """The entropy is -sum p log p with 0 log 0 = 0, lies in [0, log V], and ignores a constant added to the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator, dtype=torch.float64) * scale
    weights = np.exp(logits.numpy() - logits.numpy().max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    terms = np.where(probabilities > 0, probabilities * np.log(np.where(probabilities > 0, probabilities, 1)), 0)
    entropy = entropy_from_logits(logits)
    np.testing.assert_allclose(entropy, -terms.sum(-1), atol=1e-10)
    assert bool((entropy >= 0).all())
    assert bool((entropy <= math.log(vocabulary) + 1e-12).all())
    torch.testing.assert_close(entropy_from_logits(logits + 1000.0), entropy, atol=1e-9, rtol=0)


def test_forbidden_tokens_add_nothing() -> None:
    """Logits of -inf give the value and the gradient of the row without those tokens."""
    full = torch.tensor([[0.5, -math.inf, 1.5, -math.inf]], dtype=torch.float64, requires_grad=True)
    short = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    entropies = [entropy_from_logits(full), entropy_from_logits(short)]
    for entropy in entropies:
        entropy.sum().backward()
    torch.testing.assert_close(entropies[0], entropies[1])
    assert full.grad is not None
    assert short.grad is not None
    torch.testing.assert_close(full.grad[:, [0, 2]], short.grad)
    assert torch.equal(full.grad[:, [1, 3]], torch.zeros(1, 2, dtype=torch.float64))


def test_one_possible_token_has_no_entropy_and_none_has_nan() -> None:
    """A certain token has entropy exactly 0; a row that forbids everything is no distribution and gives NaN."""
    logits = torch.tensor([[3.0, -math.inf], [-math.inf, -math.inf]])
    entropy = entropy_from_logits(logits)
    assert entropy[0] == 0
    assert entropy[1].isnan()


def test_gradient() -> None:
    """The gradient agrees with finite differences."""
    logits = torch.tensor([[0.1, -2.0, 3.0], [9.0, 9.0, -9.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy_from_logits, (logits,))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, result: torch.dtype) -> None:
    """The result has at least float32, and for half precision equals that of the same logits in float32."""
    logits = torch.linspace(-4, 4, 50).to(dtype)
    entropy: Tensor = entropy_from_logits(logits)
    assert entropy.dtype == result
    torch.testing.assert_close(entropy, entropy_from_logits(logits.to(result)), rtol=0, atol=0)
