"""Importance correction of engine logprobs: values, bounds, and what the truncation guarantees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.importance import IMPORTANCE_CORRECTIONS, masked_importance, truncated_importance
from lightrft.errors import ConfigError

NAMES = sorted(IMPORTANCE_CORRECTIONS)
CASES = {"seed": st.integers(0, 2**31), "scale": st.floats(0, 3), "cap": st.floats(1, 10)}


def draw_logprobs(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trainer = -3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    engine = trainer + scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return trainer.requires_grad_(), engine.requires_grad_()


@given(**CASES)
@settings(deadline=None, max_examples=80)
def test_values(seed: int, scale: float, cap: float) -> None:
    """The weights are min(ratio, cap), the ratio inside [1 / cap, cap] and 0 outside it, or 1."""
    trainer, engine = draw_logprobs(seed, scale)
    ratio = np.exp(trainer.detach().numpy() - engine.detach().numpy())
    # At an end of the band the last bit of two exponentials decides; the ends have a test of their own.
    assume(bool((np.abs(np.abs(np.log(ratio)) - np.log(cap)) > 1e-9).all()))
    expected = {
        "none": np.ones_like(ratio),
        "truncate": np.minimum(ratio, cap),
        "mask": np.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0),
    }
    assert sorted(expected) == NAMES
    for name, weights in expected.items():
        np.testing.assert_allclose(IMPORTANCE_CORRECTIONS[name](trainer, engine, cap=cap), weights, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(**CASES)
@settings(deadline=None, max_examples=40)
def test_laws(name: str, seed: int, scale: float, cap: float) -> None:
    """Weights lie in [0, cap], carry no gradient, keep shape and dtype, and are exactly 1 where the two sides agree."""
    trainer, engine = draw_logprobs(seed, scale)
    weights = IMPORTANCE_CORRECTIONS[name](trainer, engine, cap=cap)
    assert not weights.requires_grad
    assert weights.shape == trainer.shape
    assert weights.dtype == trainer.dtype
    assert bool(((weights >= 0) & (weights <= cap)).all())
    assert torch.equal(IMPORTANCE_CORRECTIONS[name](trainer, trainer, cap=cap), torch.ones_like(trainer))


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_without_a_bound_the_correction_is_exact(seed: int) -> None:
    """The engine's expectation of weight times value is the trainer's of the value; a cap lowers it."""
    generator = torch.Generator().manual_seed(seed)
    trainer_V, engine_V = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    values_V = torch.rand(6, generator=generator, dtype=torch.float64)
    exact = (trainer_V.exp() * values_V).sum()
    for unbounded in (
        truncated_importance(trainer_V, engine_V, cap=float("inf")),
        masked_importance(trainer_V, engine_V, low=0.0, high=float("inf")),
    ):
        torch.testing.assert_close((engine_V.exp() * unbounded * values_V).sum(), exact)
    capped = truncated_importance(trainer_V, engine_V, cap=1.0)
    assert (engine_V.exp() * capped * values_V).sum() < exact


def test_a_truncated_weight_is_the_cap_to_the_last_bit() -> None:
    """In float32, too, a truncated weight is the cap itself, not a rounded exponential of its logarithm."""
    for cap in [1.0 + i / 7 for i in range(60)]:
        weight = truncated_importance(torch.tensor([5.0]), torch.tensor([0.0]), cap=cap)
        assert torch.equal(weight, torch.tensor([cap]))


def test_band_may_be_asymmetric_and_includes_its_ends() -> None:
    """`masked_importance` keeps what lies in [low, high], the ends included, and nothing else."""
    ratios = torch.tensor([0.25, 0.5, 1.0, 4.0, 5.0], dtype=torch.float64)
    weights = masked_importance(ratios.log(), torch.zeros_like(ratios), low=0.3, high=4.5)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 1.0, 4.0, 0.0], dtype=torch.float64))
    assert masked_importance(torch.zeros(1), torch.zeros(1), low=1.0, high=1.0).item() == 1.0


def test_extremes_stay_bounded_and_nan_stays_visible() -> None:
    """A log-ratio of 1000 overflows nothing, and NaN is passed on rather than masked away."""
    trainer, engine = torch.tensor([0.0, -1000.0, float("nan")]), torch.tensor([-1000.0, 0.0, 0.0])
    assert truncated_importance(trainer, engine, cap=2.0).tolist()[:2] == [2.0, 0.0]
    assert masked_importance(trainer, engine, low=0.5, high=2.0).tolist()[:2] == [0.0, 0.0]
    assert truncated_importance(trainer, engine, cap=2.0)[2].isnan()
    assert masked_importance(trainer, engine, low=0.5, high=2.0)[2].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name: str) -> None:
    """A cap below 1 (or NaN) and shapes that differ are refused by every correction."""
    for cap in (0.5, float("nan")):
        with pytest.raises(ConfigError, match=f"cap={cap!r} is below 1"):
            IMPORTANCE_CORRECTIONS[name](torch.zeros(2), torch.zeros(2), cap=cap)
    with pytest.raises(ConfigError, match=r"engine_logprobs.shape=\(3,\) differs from trainer_logprobs.shape=\(2,\)"):
        IMPORTANCE_CORRECTIONS[name](torch.zeros(2), torch.zeros(3), cap=2.0)


@pytest.mark.parametrize(
    ("low", "high", "message"), [(1.5, 2.0, "low=1.5"), (-0.1, 2.0, "low=-0.1"), (0.5, 0.9, "high=0.9")]
)
def test_bad_band(low: float, high: float, message: str) -> None:
    """A band that does not contain 1 is refused: it would drop tokens on which both sides agree."""
    with pytest.raises(ConfigError, match=message):
        masked_importance(torch.zeros(2), torch.zeros(2), low=low, high=high)
