"""Aggregation: one loss, however the batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms.aggregation import AGGREGATION_MODES, AggregationMode, normaliser_share, token_weights
from lightrft.errors import ConfigError

MAX_TOKENS = 9


def reference_loss(loss_BT: np.ndarray, mask_BT: np.ndarray, mode: AggregationMode) -> float:
    """The loss of the whole batch in the words of the papers."""
    rows = [loss[mask] for loss, mask in zip(loss_BT, mask_BT, strict=True) if mask.any()]
    if mode == "token":
        return float(np.concatenate(rows).mean())
    if mode == "sequence":
        return float(np.mean([row.mean() for row in rows]))
    return float(np.mean([row.sum() / MAX_TOKENS for row in rows]))


def aggregate(parts: list[tuple[Tensor, Tensor]], mode: AggregationMode) -> float:
    """What the ranks and micro-batches of a run do: add up the normaliser, then the weighted losses."""
    normaliser = sum(normaliser_share(mask, mode=mode, max_completion_tokens=MAX_TOKENS) for _, mask in parts)
    return sum(
        float((loss * token_weights(mask, mode=mode, normaliser=normaliser, dtype=torch.float64)).sum())
        for loss, mask in parts
    )


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_partition_gives_the_loss_of_the_batch(
    mode: AggregationMode, seed: int, num_rows: int, data: st.DataObject
) -> None:
    """Over any assignment of the samples to parts, some of them empty, the weighted sums add up to the batch's loss."""
    generator = torch.Generator().manual_seed(seed)
    loss_BT = torch.randn(num_rows, MAX_TOKENS, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(num_rows, MAX_TOKENS, generator=generator) < 0.5
    mask_BT[0, 0] = True
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows)))
    parts = [(loss_BT[owner == part], mask_BT[owner == part]) for part in range(4)]
    assert aggregate(parts, mode) == pytest.approx(reference_loss(loss_BT.numpy(), mask_BT.numpy(), mode), abs=1e-12)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_fillers_and_padding_change_nothing(mode: AggregationMode) -> None:
    """Rows without a token that counts, and columns of padding, leave the loss as it is."""
    loss_BT, mask_BT = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 0, 0]])
    wide = (torch.nn.functional.pad(loss_BT, (0, 2, 0, 3), value=7.0), torch.nn.functional.pad(mask_BT, (0, 2, 0, 3)))
    assert aggregate([wide], mode) == pytest.approx(aggregate([(loss_BT, mask_BT)], mode), abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token", [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]),
        ("sequence", [[1 / 12, 1 / 12, 1 / 12], [0.25, 0.0, 0.0]]),
        ("constant", [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]),
    ],
)
def test_weights(mode: AggregationMode, expected: list[list[float]], dtype: torch.dtype) -> None:
    """The weights are those of the definition, in the dtype asked for; any nonzero entry of the mask counts once."""
    mask_BT = torch.tensor([[1, 2, 1], [1, 0, 0]])
    weights_BT = token_weights(mask_BT, mode=mode, normaliser=4, dtype=dtype)
    assert weights_BT.dtype == dtype
    torch.testing.assert_close(weights_BT, torch.tensor(expected, dtype=dtype))


def test_shares() -> None:
    """It is the number of tokens, of sequences with tokens, or of those times the longest completion (1 or more)."""
    mask_BT = torch.tensor([[1, 2, 1], [1, 0, 0], [0, 0, 0]])
    shares = [normaliser_share(mask_BT, mode=mode, max_completion_tokens=10) for mode in AGGREGATION_MODES]
    assert shares == [4.0, 2.0, 20.0]
    assert normaliser_share(mask_BT, mode="constant", max_completion_tokens=1) == 2.0


@pytest.mark.parametrize("normaliser", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_normaliser(normaliser: float) -> None:
    """A normaliser that would give infinite, negative or vanishing weights is refused."""
    with pytest.raises(ConfigError, match=r"normaliser=.* is not a positive number; add up normaliser_share"):
        token_weights(torch.ones(1, 1), mode="token", normaliser=normaliser)


def test_bad_mode_shape_and_length() -> None:
    """An unknown mode names the nearest one; a mask that is not 2-D and a limit below 1 are refused."""
    with pytest.raises(ConfigError, match="mode='tokens' is not known; did you mean 'token'"):
        token_weights(torch.ones(1, 1), mode="tokens", normaliser=1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mode='mean' is not known"):
        normaliser_share(torch.ones(1, 1), mode="mean", max_completion_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mask_BT.shape=\(3,\) has not 2"):
        token_weights(torch.ones(3), mode="token", normaliser=1.0)
    with pytest.raises(ConfigError, match=r"mask_BT.shape=\(3,\) has not 2"):
        normaliser_share(torch.ones(3), mode="token", max_completion_tokens=1)
    with pytest.raises(ConfigError, match="max_completion_tokens=0 is below 1"):
        normaliser_share(torch.ones(1, 1), mode="constant", max_completion_tokens=0)
