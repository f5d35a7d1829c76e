"""KL estimators: expectations over small vocabularies are enumerated exactly, so nothing here is sampled."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.kl import KL_ESTIMATORS, k1, k2, k3
from lightrft.errors import ConfigError

NAMES = sorted(KL_ESTIMATORS)
CASES = {"seed": st.integers(0, 2**31), "vocabulary": st.integers(2, 7), "scale": st.floats(0.01, 3)}


def draw_policies(seed: int, vocabulary: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's logits (a leaf), its log-probabilities and those of a reference, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_V, reference_V = scale * torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    logits_V.requires_grad_()
    return logits_V, logits_V.log_softmax(-1), reference_V.log_softmax(-1)


def divergence(first_V: Tensor, second_V: Tensor) -> Tensor:
    """KL(first || second) of two rows of log-probabilities."""
    return (first_V.exp() * (first_V - second_V)).sum()


def expectation(estimates_V: Tensor, logprobs_V: Tensor) -> Tensor:
    """The mean of the estimates over tokens sampled from the policy; the probabilities carry no gradient."""
    return (logprobs_V.detach().exp() * estimates_V).sum()


@pytest.mark.parametrize("name", ["k1", "k3"])
@given(**CASES)
@settings(deadline=None, max_examples=60)
def test_k1_and_k3_are_unbiased(name: str, seed: int, vocabulary: int, scale: float) -> None:
    """The expectation of k1 and of k3 under the policy is KL(policy || reference)."""
    _, logprobs_V, reference_V = draw_policies(seed, vocabulary, scale)
    estimate = expectation(KL_ESTIMATORS[name](logprobs_V, reference_V), logprobs_V)
    torch.testing.assert_close(estimate, divergence(logprobs_V, reference_V), atol=1e-12, rtol=1e-9)


@given(**CASES)
@settings(deadline=None, max_examples=60)
def test_the_bias_of_k2_is_of_third_order(seed: int, vocabulary: int, scale: float) -> None:
    """The bias of k2 is below the remainder of the Taylor series of exp(-d): the expectation of |d|^3 exp(|d|) / 6."""
    _, logprobs_V, reference_V = draw_policies(seed, vocabulary, scale)
    bias = expectation(k2(logprobs_V, reference_V), logprobs_V) - divergence(logprobs_V, reference_V)
    distance_V = (logprobs_V - reference_V).abs()
    bound = expectation(distance_V**3 * distance_V.exp() / 6, logprobs_V)
    assert bool(bias.abs() <= bound + 1e-15)  # the second term is rounding


@given(**CASES)
@settings(deadline=None, max_examples=60)
def test_expected_gradients(seed: int, vocabulary: int, scale: float) -> None:
    """As losses: k1 has expected gradient 0, k2 that of KL(policy || reference), k3 that of KL(reference || policy)."""
    logits_V, logprobs_V, reference_V = draw_policies(seed, vocabulary, scale)
    reverse = divergence(logprobs_V, reference_V)
    forward = divergence(reference_V, logprobs_V)
    zero = 0.0 * logits_V.sum()
    for estimator, target in ((k1, zero), (k2, reverse), (k3, forward)):
        loss = expectation(estimator(logprobs_V, reference_V), logprobs_V)
        (actual,) = torch.autograd.grad(loss, logits_V, retain_graph=True)
        (expected,) = torch.autograd.grad(target, logits_V, retain_graph=True)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-9)


@given(difference=st.floats(-20, 20, width=32))
@settings(deadline=None, max_examples=100)
def test_values(difference: float) -> None:
    """The three are d, d^2 / 2 and exp(-d) - 1 + d; the last two are never negative, up to the last bit."""
    logprobs, reference = torch.tensor([difference]), torch.zeros(1)
    assert k1(logprobs, reference).item() == difference
    assert k2(logprobs, reference).item() == pytest.approx(difference**2 / 2, rel=1e-6)
    exact = math.expm1(-difference) + difference
    assert k3(logprobs, reference).item() == pytest.approx(exact, rel=1e-6, abs=2e-7 * abs(difference))
    assert k2(logprobs, reference).item() >= 0
    assert k3(logprobs, reference).item() >= -2e-7 * abs(difference)


@given(**CASES)
@settings(deadline=None, max_examples=40)
def test_k3_varies_less_than_k1_near_the_reference(seed: int, vocabulary: int, scale: float) -> None:
    """Close to the reference, the variance of k3 under the policy is below that of k1."""
    _, logprobs_V, reference_V = draw_policies(seed, vocabulary, scale / 30)
    variances = []
    for estimator in (k1, k3):
        estimates_V = estimator(logprobs_V, reference_V)
        centred_V = estimates_V - expectation(estimates_V, logprobs_V)
        variances.append(expectation(centred_V.square(), logprobs_V).item())
    assert variances[1] < variances[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_agreement(name: str) -> None:
    """Each estimator's gradient agrees with finite differences, and it is exactly 0 where the two policies agree."""
    logprobs = torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, -0.4, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(KL_ESTIMATORS[name], (logprobs, reference))
    assert torch.equal(KL_ESTIMATORS[name](logprobs, logprobs), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_must_agree(name: str) -> None:
    """Shapes that would broadcast are refused."""
    with pytest.raises(ConfigError, match=r"reference_logprobs.shape=\(1,\) differs from logprobs.shape=\(2,\)"):
        KL_ESTIMATORS[name](torch.zeros(2), torch.zeros(1))
