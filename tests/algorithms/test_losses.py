"""Policy and value losses against numpy transcriptions of the papers, finite differences, and the stated laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.clipping import clip_fraction
from lightrft.algorithms.losses import LOSSES, TOKENWISE_LOSSES, cispo, gspo, ppo_clip, value_loss
from lightrft.algorithms.masking import masked_mean
from lightrft.errors import ConfigError

NAMES = sorted(LOSSES)
SEEDS = st.integers(0, 2**31)


def draw_batch(seed: int, num_rows: int = 3, num_tokens: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs (a leaf), old logprobs, an advantage per row repeated over its tokens, and a mask; float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_tokens)
    logprobs_BT = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    old_BT = logprobs_BT.detach() + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages_BT = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64).expand(shape).contiguous()
    mask_BT = torch.rand(shape, generator=generator) < 0.7
    mask_BT[:, 0] = True
    return logprobs_BT, old_BT, advantages_BT, mask_BT


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, logprobs)
    return grad


@given(
    seed=SEEDS,
    clip_low=st.floats(0, 1),
    clip_high=st.floats(0, 1),
    dual_clip=st.one_of(st.none(), st.floats(1.01, 5)),
)
@settings(deadline=None, max_examples=80)
def test_ppo_equals_the_papers(seed: int, clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """PPO's loss is -min(r A, clip(r) A), and where A < 0 its objective is at least dual_clip * A."""
    logprobs, old, advantages, _ = draw_batch(seed)
    ratio = np.exp(logprobs.detach().numpy() - old.numpy())
    a = advantages.numpy()
    objective = np.minimum(ratio * a, np.clip(ratio, 1 - clip_low, 1 + clip_high) * a)
    if dual_clip is not None:
        objective = np.where(a < 0, np.maximum(objective, dual_clip * a), objective)
    loss = ppo_clip(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    np.testing.assert_allclose(loss.detach(), -objective, rtol=1e-12)


@given(seed=SEEDS, dual_clip=st.sampled_from([None, 1.5]))
@settings(deadline=None, max_examples=40)
def test_ppo_gradient_is_that_of_the_min_form(seed: int, dual_clip: float | None) -> None:
    """The gradient equals autograd's through the textbook form with min and clamp of the ratio."""
    logprobs, old, advantages, _ = draw_batch(seed)
    ratio = (logprobs - old).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    loss = ppo_clip(logprobs, old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)
    torch.testing.assert_close(gradient(loss.sum(), logprobs), gradient(-objective.sum(), logprobs))


def test_ppo_gradcheck() -> None:
    """PPO's gradient agrees with finite differences inside the band, outside it on both sides, and beyond dual_clip."""
    logprobs = torch.log(torch.tensor([1.05, 1.5, 0.5, 1.5, 0.5, 9.0], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)

    def loss(tensor: Tensor) -> Tensor:
        return ppo_clip(tensor, torch.zeros(6, dtype=torch.float64), advantages, dual_clip=3.0)

    assert torch.autograd.gradcheck(loss, (logprobs,))
    grad = gradient(loss(logprobs).sum(), logprobs)
    assert torch.equal(grad == 0, torch.tensor([False, True, False, False, True, True]))


@pytest.mark.parametrize(("advantage", "dual_clip"), [(0.0, None), (0.0, 3.0), (1.0, None), (1.0, 3.0), (-1.0, 3.0)])
def test_a_ratio_that_is_clipped_away_cannot_overflow(advantage: float, dual_clip: float | None) -> None:
    """Log-ratios of plus and minus 1000 give finite losses and gradients wherever the clipped branch is the minimum."""
    logprobs = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = ppo_clip(logprobs, torch.zeros(2), torch.full((2,), advantage), dual_clip=dual_clip)
    grad = gradient(loss.sum(), logprobs)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()


@given(seed=SEEDS, clip_low=st.floats(0, 1), clip_high=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_cispo_equals_the_paper(seed: int, clip_low: float, clip_high: float) -> None:
    """CISPO's loss is -w A log p and its gradient -w A, with w the clipped ratio, also where it is clipped."""
    logprobs, old, advantages, _ = draw_batch(seed)
    weight = np.clip(np.exp(logprobs.detach().numpy() - old.numpy()), 1 - clip_low, 1 + clip_high)
    loss = cispo(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high)
    np.testing.assert_allclose(loss.detach(), -weight * advantages.numpy() * logprobs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient(loss.sum(), logprobs), -weight * advantages.numpy(), rtol=1e-12)


def gspo_sequence_losses(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """The paper's objective, one sequence at a time, without any stop-gradient."""
    losses = []
    for logprobs_T, old_T, advantages_T, mask_T in zip(logprobs_BT, old_BT, advantages_BT, mask_BT, strict=True):
        ratio = (logprobs_T - old_T)[mask_T].mean().exp()
        advantage = advantages_T[0]
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage))
    return torch.stack(losses)


@given(seed=SEEDS, num_tokens=st.integers(1, 6), clip=st.sampled_from([3e-4, 0.1, 0.9]))
@settings(deadline=None, max_examples=80)
def test_gspo_masked_mean_is_the_sequence_loss(seed: int, num_tokens: int, clip: float) -> None:
    """The masked mean over each sequence has the value and the gradient of the paper's sequence loss."""
    logprobs_BT, old_BT, advantages_BT, mask_BT = draw_batch(seed, num_tokens=num_tokens)
    expected_B = gspo_sequence_losses(logprobs_BT, old_BT, advantages_BT, mask_BT, clip, clip)
    loss_BT = gspo(logprobs_BT, old_BT, advantages_BT, mask_BT, clip_low=clip, clip_high=clip)
    actual_B = masked_mean(loss_BT, mask_BT, dim=-1)
    torch.testing.assert_close(actual_B, expected_B)
    row_weights_B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        gradient((actual_B * row_weights_B).sum(), logprobs_BT),
        gradient((expected_B * row_weights_B).sum(), logprobs_BT),
    )


def test_gspo_gradcheck() -> None:
    """The gradient of GSPO's sequence losses agrees with finite differences."""
    logprobs_BT, old_BT, advantages_BT, mask_BT = draw_batch(7)

    def sequence_losses(tensor: Tensor) -> Tensor:
        return masked_mean(gspo(tensor, old_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.2), mask_BT, dim=-1)

    assert torch.autograd.gradcheck(sequence_losses, (logprobs_BT,))


def test_gspo_of_single_tokens_is_ppo() -> None:
    """With one token per sequence the sequence ratio is the token ratio, so GSPO is PPO."""
    logprobs, old, advantages, mask = draw_batch(3, num_rows=8, num_tokens=1)
    torch.testing.assert_close(
        gspo(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3),
        ppo_clip(logprobs, old, advantages, clip_low=0.2, clip_high=0.3),
    )


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_on_policy_gradient_is_reinforce(name: str, seed: int) -> None:
    """With old logprobs equal to the new ones, the gradient of each loss is that of -A log p, per sequence."""
    logprobs, _, advantages, mask = draw_batch(seed)
    loss = LOSSES[name](logprobs, logprobs, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None)
    expected = -masked_mean(advantages * logprobs, mask, dim=-1)
    actual = masked_mean(loss, mask, dim=-1)
    torch.testing.assert_close(gradient(actual.sum(), logprobs), gradient(expected.sum(), logprobs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [float("nan"), math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_garbage_outside_the_mask_reaches_nothing(name: str, garbage: float, position: int) -> None:
    """Whatever stands where the mask is 0, in any input, loss and gradient there are 0 and elsewhere unchanged."""
    logprobs, old, advantages, mask = draw_batch(11)
    mask[:, 2] = False
    clean = [logprobs.detach(), old, advantages]
    dirty = [tensor.clone() for tensor in clean]
    dirty[position][:, 2] = garbage
    results = []
    for tensors in (clean, dirty):
        leaf = tensors[0].clone().requires_grad_()
        loss = LOSSES[name](leaf, tensors[1], tensors[2], mask, clip_low=0.2, clip_high=0.2, dual_clip=None)
        results.append((loss.detach(), gradient(loss.sum(), leaf)))
    for kind in range(2):
        assert torch.equal(results[0][kind], results[1][kind])
        assert not results[1][kind][~mask].any()
        assert results[1][kind][mask].any()


@pytest.mark.parametrize("name", sorted(TOKENWISE_LOSSES))
@given(seed=SEEDS, chunk=st.integers(1, 15))
@settings(deadline=None, max_examples=30)
def test_tokenwise_losses_may_be_cut_anywhere(name: str, seed: int, chunk: int) -> None:
    """A token-wise loss of flat chunks, put together, is the loss of the batch to the last bit or two."""
    logprobs, old, advantages, mask = draw_batch(seed)
    flat = [tensor.detach().flatten().split(chunk) for tensor in (logprobs, old, advantages, mask)]
    parts = [LOSSES[name](*part, clip_low=0.2, clip_high=0.3, dual_clip=None) for part in zip(*flat, strict=True)]
    whole = LOSSES[name](logprobs.detach(), old, advantages, mask, clip_low=0.2, clip_high=0.3, dual_clip=None)
    # A chunk may be rounded by the vectorised or by the scalar exponential, which differ in the last bit.
    torch.testing.assert_close(torch.cat(parts), whole.flatten(), rtol=1e-14, atol=0)


def test_the_other_losses_are_not_tokenwise() -> None:
    """Every loss outside TOKENWISE_LOSSES changes at one token when the logprob of another one of the row changes."""
    assert set(LOSSES) > TOKENWISE_LOSSES
    logprobs, old, advantages, _ = draw_batch(5)
    changed = logprobs.detach().clone()
    changed[:, 1] -= 0.1
    for name in NAMES:
        first, second = (
            LOSSES[name](
                tensor, old, advantages, torch.ones_like(old), clip_low=1.0, clip_high=math.inf, dual_clip=None
            )
            for tensor in (logprobs.detach(), changed)
        )
        assert torch.equal(first[:, 0], second[:, 0]) == (name in TOKENWISE_LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_old_logprobs_and_advantages_are_constants(name: str) -> None:
    """No gradient reaches the old logprobs or the advantages, even if they carry one."""
    logprobs, old, advantages, mask = draw_batch(2)
    constants = (old.requires_grad_(), advantages.requires_grad_())
    loss = LOSSES[name](logprobs, *constants, mask, clip_low=0.2, clip_high=0.2, dual_clip=None)
    assert torch.autograd.grad(loss.sum(), constants, allow_unused=True) == (None, None)


def test_the_mapping_passes_dual_clip_on() -> None:
    """`LOSSES["ppo_clip"]` is `ppo_clip` with all its settings, masked."""
    logprobs, old, advantages, mask = draw_batch(9)
    expected = ppo_clip(logprobs, old - 2.0, advantages, clip_low=0.1, clip_high=0.4, dual_clip=1.5)
    actual = LOSSES["ppo_clip"](logprobs, old - 2.0, advantages, mask, clip_low=0.1, clip_high=0.4, dual_clip=1.5)
    assert torch.equal(actual, torch.where(mask, expected, 0.0))


@given(seed=SEEDS, clip_low=st.floats(0, 1), clip_high=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_clip_fraction_is_where_the_gradient_is_cut(seed: int, clip_low: float, clip_high: float) -> None:
    """`clip_fraction` is 1 at exactly the tokens where PPO's gradient is 0 (no advantage here is 0)."""
    logprobs, old, advantages, _ = draw_batch(seed)
    loss = ppo_clip(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high)
    fraction = clip_fraction(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high)
    assert not fraction.requires_grad
    assert fraction.dtype == logprobs.dtype
    assert torch.equal(fraction == 1, gradient(loss.sum(), logprobs) == 0)


@given(seed=SEEDS, clip=st.one_of(st.none(), st.floats(0.01, 2)))
@settings(deadline=None, max_examples=60)
def test_value_loss_equals_the_formula(seed: int, clip: float | None) -> None:
    """The value loss is half the larger of the plain and the clipped squared error."""
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    error = (values.numpy() - returns.numpy()) ** 2
    if clip is not None:
        near = np.clip(values.numpy(), old.numpy() - clip, old.numpy() + clip)
        error = np.maximum(error, (near - returns.numpy()) ** 2)
    np.testing.assert_allclose(value_loss(values, old, returns, clip=clip), error / 2, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss_gradcheck(clip: float | None) -> None:
    """The value loss's gradient agrees with finite differences, and its targets are constants."""
    values = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.1, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 3.0, -1.0, -0.2], dtype=torch.float64, requires_grad=True)

    def loss(tensor: Tensor) -> Tensor:
        return value_loss(tensor, old, returns, clip=clip)

    assert torch.autograd.gradcheck(loss, (values,))
    assert torch.autograd.grad(loss(values).sum(), (old, returns), allow_unused=True) == (None, None)


def call(name: str, **changes: object) -> Callable[[], Tensor]:
    """A call of a loss with good arguments, except for the changes."""
    logprobs, old, advantages, mask = draw_batch(1)
    arguments: dict[str, object] = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": advantages,
        "mask": mask,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
    }

    def run() -> Tensor:
        return LOSSES[name](**{**arguments, **changes})  # type: ignore[arg-type]  # wrong on purpose

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_low": 1.5}, "clip_low=1.5 is not between 0 and 1"),
        ({"clip_low": float("nan")}, "clip_low=nan"),
        ({"clip_high": -0.1}, "clip_high=-0.1 is not 0 or more"),
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
        ({"mask": torch.ones(3, 4)}, r"shape=\(3, 4\)"),
        ({"old_logprobs": torch.ones(3, 1)}, r"shape=\(3, 1\)"),
        ({"advantages": torch.ones(3)}, r"shape=\(3,\)"),
    ],
)
def test_bad_arguments(name: str, changes: dict[str, object], message: str) -> None:
    """Every loss refuses settings out of range and shapes that would broadcast, with the value in the message."""
    with pytest.raises(ConfigError, match=message):
        call(name, **changes)()


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_dual_clip_is_refused_where_it_has_no_meaning(name: str) -> None:
    """A dual_clip that the loss would ignore is an error."""
    with pytest.raises(ConfigError, match=r"dual_clip=3\.0 has no meaning for this loss"):
        call(name, dual_clip=3.0)()


def test_gspo_refuses_flat_tokens() -> None:
    """Tokens without row boundaries hold no sequences; GSPO refuses them rather than take them for one."""
    flat = torch.zeros(6)
    with pytest.raises(ConfigError, match=r"logprobs_BT.shape=\(6,\) has not 2 dimension"):
        gspo(flat, flat, flat, flat, clip_low=0.1, clip_high=0.1)


def test_value_loss_and_clip_fraction_refuse() -> None:
    """A clip range that is not positive and shapes that differ are errors."""
    with pytest.raises(ConfigError, match=r"clip=0\.0 is not above 0"):
        value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=0.0)
    with pytest.raises(ConfigError, match=r"returns.shape=\(3,\)"):
        value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ConfigError, match=r"advantages.shape=\(3,\)"):
        clip_fraction(torch.zeros(2), torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("loss", [ppo_clip, cispo, clip_fraction, value_loss])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_tensor_that_would_broadcast_is_refused(loss: Callable[..., Tensor], odd: int) -> None:
    """Whichever of the three tensors has another shape than the other two, nothing is broadcast."""
    tensors = [torch.zeros(3), torch.zeros(3), torch.zeros(3)]
    tensors[odd] = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"shape=\(1,\)"):
        loss(*tensors)


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_gspo_refuses_one_tensor_that_would_broadcast(odd: int) -> None:
    """Whichever of GSPO's tensors has another shape than the others, nothing is broadcast."""
    tensors = [torch.ones(2, 3) for _ in range(4)]
    tensors[odd] = torch.ones(2, 1)
    with pytest.raises(ConfigError, match=r"shape=\(2, 1\)"):
        gspo(*tensors, clip_low=0.1, clip_high=0.1)


def test_the_bounds_are_a_fifth_unless_told_otherwise() -> None:
    """By default the ratio is bounded by 0.8 and 1.2, in the losses and in what counts as clipped."""
    logprobs = torch.log(torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 2.0], dtype=torch.float64))
    old = torch.zeros_like(logprobs)
    good, bad = torch.ones_like(logprobs), -torch.ones_like(logprobs)
    assert ppo_clip(logprobs, old, good).tolist() == pytest.approx([-0.5, -0.79, -0.81, -1.19, -1.2, -1.2])
    assert ppo_clip(logprobs, old, bad).tolist() == pytest.approx([0.8, 0.8, 0.81, 1.19, 1.21, 2.0])
    weights = torch.tensor([0.8, 0.8, 0.81, 1.19, 1.2, 1.2], dtype=torch.float64)
    torch.testing.assert_close(cispo(logprobs, old, good), -weights * logprobs)
    assert clip_fraction(logprobs, old, good).tolist() == [0, 0, 0, 0, 1, 1]
    assert clip_fraction(logprobs, old, bad).tolist() == [1, 1, 0, 0, 0, 0]


def test_at_the_bounds_and_without_an_advantage_nothing_is_clipped() -> None:
    """A ratio at a bound keeps its gradient and doesn't count as clipped; nor does any token whose advantage is 0."""
    edges = torch.tensor([math.log1p(0.3), math.log1p(-0.2)], dtype=torch.float64, requires_grad=True)
    zeros, signs = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert gradient(ppo_clip(edges, zeros, signs, clip_low=0.2, clip_high=0.3).sum(), edges).all()
    assert not clip_fraction(edges, zeros, signs, clip_low=0.2, clip_high=0.3).any()
    assert not clip_fraction(torch.tensor([3.0, -3.0]), torch.zeros(2), torch.zeros(2)).any()
