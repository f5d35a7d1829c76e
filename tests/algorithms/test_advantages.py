"""Advantages against transcriptions of the papers' formulas in numpy, and the laws that they state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.advantages import ADVANTAGES, dr_grpo, gae, grpo, reinforce_plus_plus_baseline, rloo
from lightrft.errors import ConfigError, RewardError

NAMES = sorted(ADVANTAGES)


@st.composite
def reward_batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Rewards of 1 to 4 prompts with 2 to 6 completions, float64, with many equal ones."""
    group_size = draw(st.integers(2, 6))
    num_prompts = draw(st.integers(1, 4))
    reward = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(-10, 10, width=32))
    size = group_size * num_prompts
    rewards = draw(st.lists(reward, min_size=size, max_size=size))
    return torch.tensor(rewards, dtype=torch.float64), group_size


def reference(name: str, rewards: np.ndarray, group_size: int) -> np.ndarray:
    """The formulas, one completion at a time."""
    groups = rewards.reshape(-1, group_size)
    out = np.zeros_like(groups)
    for p, group in enumerate(groups):
        for g, reward in enumerate(group):
            if name == "rloo":
                out[p, g] = reward - np.delete(group, g).mean()
            else:
                out[p, g] = reward - group.mean()
                if name == "grpo":
                    out[p, g] /= group.std(ddof=1) + 1e-6
    if name == "reinforce++":
        out = (out - out.mean()) / (out.std(ddof=1) + 1e-6)
    return out.reshape(-1)


@pytest.mark.parametrize("name", NAMES)
@given(batch=reward_batches())
@settings(deadline=None, max_examples=60)
def test_equals_the_formula(name: str, batch: tuple[Tensor, int]) -> None:
    """Each rule equals its formula computed one completion at a time in numpy."""
    rewards_B, group_size = batch
    expected = reference(name, rewards_B.numpy(), group_size)
    # Deviations of 1e-9 and less are rounding in numpy (a constant group), which the division by 1e-6 magnifies.
    np.testing.assert_allclose(
        ADVANTAGES[name](rewards_B, group_size=group_size).numpy(), expected, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(reward=st.floats(-100, 100, width=32), group_size=st.integers(2, 9))
@settings(deadline=None, max_examples=40)
def test_constant_groups_are_exactly_zero(name: str, dtype: torch.dtype, reward: float, group_size: int) -> None:
    """A group of equal rewards has advantages of exactly 0, whatever the reward, also beside a group that varies."""
    constant_B = torch.full((group_size,), reward, dtype=dtype)
    varied_B = torch.arange(group_size, dtype=dtype)
    alone_B = ADVANTAGES[name](constant_B, group_size=group_size)
    beside_B = ADVANTAGES[name](torch.cat([constant_B, varied_B]), group_size=group_size)
    assert torch.equal(alone_B, torch.zeros(group_size, dtype=dtype))
    assert torch.equal(beside_B[:group_size], torch.zeros(group_size, dtype=dtype))
    assert beside_B[group_size:].abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
@given(batch=reward_batches(), shift=st.floats(-5, 5))
@settings(deadline=None, max_examples=40)
def test_a_constant_per_batch_changes_nothing(name: str, batch: tuple[Tensor, int], shift: float) -> None:
    """Adding one number to all rewards leaves the advantages as they are, up to rounding."""
    rewards_B = batch[0].round(decimals=1)  # so that the shift cannot swallow a difference between two rewards
    before_B = ADVANTAGES[name](rewards_B, group_size=batch[1])
    after_B = ADVANTAGES[name](rewards_B + shift, group_size=batch[1])
    torch.testing.assert_close(after_B, before_B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(batch=reward_batches(), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_order_does_not_matter(name: str, batch: tuple[Tensor, int], seed: int) -> None:
    """Permuting prompts, and completions inside each prompt, permutes the advantages in the same way."""
    rewards_B, group_size = batch
    generator = torch.Generator().manual_seed(seed)
    indices_PG = torch.arange(rewards_B.numel()).reshape(-1, group_size)
    indices_PG = indices_PG[torch.randperm(indices_PG.shape[0], generator=generator)]
    order_B = torch.stack([row[torch.randperm(group_size, generator=generator)] for row in indices_PG]).flatten()
    permuted_B = ADVANTAGES[name](rewards_B[order_B], group_size=group_size)
    torch.testing.assert_close(permuted_B, ADVANTAGES[name](rewards_B, group_size=group_size)[order_B])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_groups_sum_to_zero(name: str, dtype: torch.dtype) -> None:
    """The advantages have the dtype of the rewards, and those of a group sum to 0."""
    rewards_B = torch.tensor([0.0, 1.0, 0.5, 2.0, 2.0, -1.0], dtype=dtype)
    advantages_B = ADVANTAGES[name](rewards_B, group_size=3)
    assert advantages_B.dtype == dtype
    assert advantages_B.shape == rewards_B.shape
    torch.testing.assert_close(advantages_B.reshape(2, 3).sum(-1), torch.zeros(2, dtype=dtype), atol=1e-6, rtol=0)


@given(batch=reward_batches())
@settings(deadline=None, max_examples=40)
def test_scale_of_the_normalised_rules(batch: tuple[Tensor, int]) -> None:
    """GRPO has standard deviation 1 in each group that varies, REINFORCE++ over the batch if any group varies."""
    rewards_B, group_size = batch[0].round(decimals=1), batch[1]
    varies_P = rewards_B.reshape(-1, group_size).std(-1) > 1e-3
    deviations_P = grpo(rewards_B, group_size=group_size).reshape(-1, group_size).std(-1)[varies_P]
    torch.testing.assert_close(deviations_P, torch.ones_like(deviations_P), rtol=1e-3, atol=0)
    whitened_B = reinforce_plus_plus_baseline(rewards_B, group_size=group_size)
    expected = 1.0 if bool(varies_P.any()) else 0.0
    assert whitened_B.std().item() == pytest.approx(expected, rel=1e-3)


def test_rloo_is_dr_grpo_scaled() -> None:
    """RLOO is Dr. GRPO times G / (G - 1)."""
    rewards_B = torch.tensor([0.0, 1.0, 1.0, 4.0])
    torch.testing.assert_close(rloo(rewards_B, group_size=4), dr_grpo(rewards_B, group_size=4) * 4 / 3)


def test_mapping_is_read_only() -> None:
    """Nobody can register a rule by writing into the mapping."""
    assert NAMES == ["dr_grpo", "grpo", "reinforce++", "rloo"]
    with pytest.raises(TypeError):
        ADVANTAGES["mine"] = grpo  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rewards_B", "group_size", "error", "message"),
    [
        (torch.zeros(8), 3, ConfigError, "group_size=3 does not divide the 8 rewards"),
        (torch.zeros(0), 2, ConfigError, "group_size=2 does not divide the 0 rewards"),
        (torch.zeros(4), 1, ConfigError, "group_size=1 leaves nothing to compare"),
        (torch.zeros(2, 2), 2, ConfigError, r"rewards_B.shape=\(2, 2\)"),
        (torch.zeros(4, dtype=torch.int64), 2, ConfigError, "rewards_B.dtype=torch.int64"),
        (torch.tensor([0.0, float("nan")]), 2, RewardError, "rewards_B=nan at index 1 is not finite"),
        (torch.tensor([float("inf"), float("inf")]), 2, RewardError, r"rewards_B=inf at index 0 .* \(2 such\)"),
    ],
)
def test_bad_rewards(name: str, rewards_B: Tensor, group_size: int, error: type[Exception], message: str) -> None:
    """What cannot be compared in groups is refused by every rule, with the value in the message."""
    with pytest.raises(error, match=message):
        ADVANTAGES[name](rewards_B, group_size=group_size)


def gae_reference(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Equation 16 of the paper as the double sum, for one row without holes."""
    num_tokens = len(rewards)
    after = np.append(values[1:], 0.0)
    errors = rewards + gamma * after - values
    advantages = np.array(
        [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, num_tokens)) for t in range(num_tokens)]
    )
    return advantages, advantages + values


@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(0, 3),
    num_tokens=st.integers(0, 8),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
@settings(deadline=None, max_examples=80)
def test_gae_equals_the_double_sum_over_the_tokens_that_count(
    seed: int, num_rows: int, num_tokens: int, gamma: float, lam: float
) -> None:
    """GAE of a row with holes is equation 16 on the row without them, and 0 in the holes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_tokens)
    mask_BT = torch.rand(shape, generator=generator) < 0.7
    rewards_BT = torch.randn(shape, generator=generator, dtype=torch.float64) * mask_BT
    values_BT = torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for rewards, values, mask, advantages, returns in zip(
        rewards_BT.numpy(), values_BT.numpy(), mask_BT.numpy(), advantages_BT.numpy(), returns_BT.numpy(), strict=True
    ):
        expected_advantages, expected_returns = gae_reference(rewards[mask], values[mask], gamma, lam)
        np.testing.assert_allclose(advantages[mask], expected_advantages, atol=1e-12)
        np.testing.assert_allclose(returns[mask], expected_returns, atol=1e-12)
        assert not advantages[~mask].any()
        assert not returns[~mask].any()


def test_gae_limits() -> None:
    """With lam 1 the returns are the discounted sums of rewards; with lam 0 the advantages are the one-step errors."""
    rewards_BT = torch.tensor([[1.0, 0.0, 2.0]])
    values_BT = torch.tensor([[0.3, -0.2, 0.7]])
    mask_BT = torch.ones(1, 3)
    _, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns_BT, torch.tensor([[1.5, 1.0, 2.0]]))
    advantages_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages_BT, torch.tensor([[0.6, 0.55, 1.3]]))


def test_gae_leaves_its_inputs_and_carries_no_gradient() -> None:
    """GAE changes no input, ignores NaN values of the critic at padding, and gives targets without gradient."""
    values_BT = torch.tensor([[0.5, float("nan")]], requires_grad=True)
    rewards_BT = torch.tensor([[1.0, 0.0]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, torch.tensor([[1, 0]]), gamma=1.0, lam=0.95)
    assert not advantages_BT.requires_grad
    assert not returns_BT.requires_grad
    assert torch.equal(advantages_BT, torch.tensor([[0.5, 0.0]]))
    assert torch.equal(returns_BT, torch.tensor([[1.0, 0.0]]))
    assert torch.equal(rewards_BT, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("arguments", "gamma", "lam", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3)), 1.0, 1.0, r"values_BT.shape=\(2, 4\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)), 1.0, 1.0, r"mask_BT.shape=\(2,\)"),
        ((torch.zeros(2, 1), torch.zeros(2, 4), torch.ones(2, 4)), 1.0, 1.0, r"rewards_BT.shape=\(2, 1\)"),
        ((torch.zeros(3), torch.zeros(3), torch.ones(3)), 1.0, 1.0, r"rewards_BT.shape=\(3,\)"),
        ((torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)), 1.5, 1.0, "gamma=1.5"),
        ((torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)), 1.0, -0.1, "lam=-0.1"),
        ((torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[1, 0]])), 1.0, 1.0, r"1 nonzero reward\(s\) where mask"),
    ],
)
def test_gae_refuses(arguments: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float, message: str) -> None:
    """GAE refuses shapes that differ, factors outside [0, 1], and rewards that the mask would swallow."""
    with pytest.raises(ConfigError, match=message):
        gae(*arguments, gamma=gamma, lam=lam)
