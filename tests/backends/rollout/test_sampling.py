"""Tests of drawing tokens from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightrft.backends.rollout.random_streams import stream_keys, uniforms
from lightrft.backends.rollout.sampling import keep_candidates, sample_tokens
from lightrft.strategy.protocols import SamplingParams

Floats = npt.NDArray[np.float64]


def _logits(seed: int, rows: int, vocabulary_size: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary_size, generator=torch.Generator().manual_seed(seed))


def _softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _surviving(probs: Floats, top_k: int, top_p: float) -> Floats:
    """Top-k and then top-p by a plain loop over tokens in descending order; what is dropped becomes 0."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or len(probs)]
    left = probs[order].sum()
    kept = np.zeros_like(probs)
    mass = 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * left:
            break
        kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


def _counts(logits_V: torch.Tensor, params: SamplingParams, num_draws: int) -> Floats:
    """How often each token is drawn over an even grid of uniform numbers."""
    grid_B = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    tokens_B, _ = sample_tokens(logits_V.expand(num_draws, -1).clone(), uniforms_B=grid_B, params=params, banned_C=None)
    return np.bincount(tokens_B.numpy(), minlength=len(logits_V)).astype(np.float64)


@pytest.mark.parametrize("vocabulary_size", [17, 4096, 4133])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_even_uniforms_give_each_token_its_share(vocabulary_size: int, temperature: float) -> None:
    """Over an even grid of M uniforms each token is drawn M * p times to within one: the inversion is exact.

    The sizes cover the direct search, whole blocks of columns, and a last block that is not full.
    """
    logits_BV = _logits(0, 1, vocabulary_size)
    counts = _counts(logits_BV[0], SamplingParams(temperature=temperature), 5000)
    expected = 5000 * _softmax(logits_BV[0].double().numpy() / temperature)
    assert np.abs(counts - expected).max() < 1.01


def test_drawn_frequencies_pass_a_chi_square_test() -> None:
    """40000 draws with a fixed seed fit softmax(logits / T): chi-square is below its 1 - 1e-6 quantile."""
    num_draws, temperature = 40000, 0.8
    logits_V = _logits(1, 1, 16, spread=1.0)[0]
    uniforms_B = uniforms(stream_keys(11, list(range(num_draws)), [0] * num_draws), 1)[0]
    tokens_B, _ = sample_tokens(
        logits_V.expand(num_draws, -1).clone(),
        uniforms_B=uniforms_B,
        params=SamplingParams(temperature=temperature),
        banned_C=None,
    )
    expected = num_draws * _softmax(logits_V.double().numpy() / temperature)
    counts = np.bincount(tokens_B.numpy(), minlength=16)
    # Wilson-Hilferty at 15 degrees of freedom and z = 4.753: 15 * (1 - 2 / 135 + 4.753 * sqrt(2 / 135)) ** 3 = 57.4.
    assert ((counts - expected) ** 2 / expected).sum() < 57.4


@given(
    seed=st.integers(0, 10**6),
    vocabulary_size=st.integers(1, 80),
    top_k=st.integers(0, 90),
    top_p=st.floats(0.01, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
@example(seed=0, vocabulary_size=9, top_k=1, top_p=1.0, temperature=1.0)
@settings(deadline=None, max_examples=60)
def test_top_k_and_top_p_equal_a_plain_loop(
    seed: int, vocabulary_size: int, top_k: int, top_p: float, temperature: float
) -> None:
    """What survives top-k and top-p, and with which share, equals a loop over sorted tokens in numpy."""
    logits_V = _logits(seed, 1, vocabulary_size)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    # The survivors are compared on the same float32 probabilities, so that no border case is a matter of rounding.
    probs_V = (logits_V / temperature).softmax(-1)
    kept_BC, ids_BC = keep_candidates(probs_V[None], top_k=top_k, top_p=top_p)
    expected = _surviving(probs_V.double().numpy(), min(top_k, vocabulary_size), top_p)
    assert set(ids_BC[kept_BC > 0].tolist()) == set(np.nonzero(expected)[0].tolist())
    assert np.abs(_counts(logits_V, params, 500) - 500 * expected).max() < 1.01


@pytest.mark.parametrize(("spread", "top_p"), [(3.0, 0.7), (0.1, 0.7), (3.0, 1.0)])
def test_top_p_over_a_large_vocabulary(spread: float, top_p: float) -> None:
    """Over 5000 tokens the survivors are right whether a thousand suffice (a peaked row) or not (a flat one)."""
    logits_V = _logits(2, 1, 5000, spread=spread)[0]
    probs_V = logits_V.softmax(-1)
    kept_BC, ids_BC = keep_candidates(probs_V[None], top_k=0, top_p=top_p)
    expected = _surviving(probs_V.double().numpy(), 0, top_p)
    assert set(ids_BC[kept_BC > 0].tolist()) == set(np.nonzero(expected)[0].tolist())
    assert kept_BC.shape == ids_BC.shape == (1, 1024 if spread == 3.0 and top_p < 1 else 5000)


def test_top_p_tries_a_thousand_tokens_for_all_rows_together() -> None:
    """Rows of different peaks need no sort of the whole vocabulary; one flat row among them makes it one for all."""
    peaked_BV = torch.cat([_logits(2, 1, 5000, spread=3.0), _logits(6, 2, 5000, spread=4.0)]).softmax(-1)
    flat_BV = torch.cat([peaked_BV, _logits(2, 1, 5000, spread=0.1).softmax(-1)])
    for probs_BV, num_columns in ((peaked_BV, 1024), (flat_BV, 5000)):
        kept_BC, ids_BC = keep_candidates(probs_BV, top_k=0, top_p=0.7)
        assert kept_BC.shape == (len(probs_BV), num_columns)
        for row, probs_V in enumerate(probs_BV.double().numpy()):
            expected = set(np.nonzero(_surviving(probs_V, 0, 0.7))[0].tolist())
            assert set(ids_BC[row][kept_BC[row] > 0].tolist()) == expected


def test_top_p_stops_where_the_share_is_reached() -> None:
    """The token that makes the share reach top_p is the last one that is kept."""
    kept_BC, _ = keep_candidates(torch.tensor([[0.25, 0.5, 0.125, 0.125]]), top_k=0, top_p=0.75)
    assert kept_BC.tolist() == [[0.5, 0.25, 0.0, 0.0]]


def test_without_top_p_nothing_is_dropped_beside_top_k() -> None:
    """At top_p 1 a token that is too unlikely to change the sum of the others is kept."""
    kept_BC, ids_BC = keep_candidates(torch.tensor([[1e-30, 1.0, 1e-32]]), top_k=2, top_p=1.0)
    assert ids_BC.tolist() == [[1, 0]]
    assert (kept_BC > 0).all()


@pytest.mark.parametrize("vocabulary_size", [6, 4096, 4133])
@pytest.mark.parametrize("place", [0, -1])
def test_the_first_and_the_last_token_can_be_drawn(vocabulary_size: int, place: int) -> None:
    """A row that allows one token gives it for every uniform number, also at either end of the vocabulary."""
    logits_BV = torch.full((3, vocabulary_size), float("-inf"))
    logits_BV[:, place] = 0.0
    uniforms_B = torch.tensor([0.0, 0.5, 1 - 2.0**-52], dtype=torch.float64)
    with torch.device("meta"):  # results stay with the logits, whatever torch's default device is
        tokens_B, logprobs_B = sample_tokens(logits_BV, uniforms_B=uniforms_B, params=SamplingParams(), banned_C=None)
    assert tokens_B.tolist() == [range(vocabulary_size)[place]] * 3
    assert logprobs_B.tolist() == [0.0] * 3


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5)])
def test_other_rows_change_nothing(params: SamplingParams) -> None:
    """A row's token and logprob are the same alone and in a batch, also when another row makes top-p sort all."""
    logits_BV = torch.cat([_logits(3, 3, 5000, spread=4.0), _logits(4, 1, 5000, spread=0.01)])
    uniforms_B = uniforms(stream_keys(0, [0, 1, 2, 3], [0] * 4), 1)[0]
    together = sample_tokens(logits_BV.clone(), uniforms_B=uniforms_B, params=params, banned_C=None)
    for row in range(4):
        alone = sample_tokens(
            logits_BV[row : row + 1].clone(), uniforms_B=uniforms_B[row : row + 1], params=params, banned_C=None
        )
        assert together[0][row] == alone[0]
        assert together[1][row] == pytest.approx(alone[1].item(), abs=1e-6)


@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]), top_k=st.sampled_from([0, 2]))
@settings(deadline=None, max_examples=40)
def test_logprobs_are_the_policys_own(seed: int, temperature: float, top_k: int) -> None:
    """Logprobs are log_softmax(logits / T) (log_softmax(logits) when greedy), whatever top-k and banned tokens did."""
    logits_BV = _logits(seed, 5, 40, spread=6.0)
    banned_C = logits_BV[0].argmax().unsqueeze(0)
    uniforms_B = uniforms(stream_keys(seed, [0] * 5, list(range(5))), 1)[0]
    tokens_B, logprobs_B = sample_tokens(
        logits_BV.clone(),
        uniforms_B=uniforms_B,
        params=SamplingParams(temperature=temperature, top_k=top_k),
        banned_C=banned_C,
    )
    expected_BV = (logits_BV.double() / (temperature or 1.0)).log_softmax(-1)
    assert banned_C.item() not in tokens_B.tolist()
    torch.testing.assert_close(
        logprobs_B.double(), expected_BV.gather(1, tokens_B[:, None])[:, 0], atol=5e-6, rtol=1e-6
    )


def test_greedy_is_the_argmax_of_what_is_allowed() -> None:
    """At temperature 0 the token is the argmax over tokens that are not banned, and the uniforms are not looked at."""
    logits_BV = torch.tensor([[0.0, 3.0, 2.0], [5.0, 4.0, 1.0]])
    tokens_B, _ = sample_tokens(
        logits_BV,
        uniforms_B=torch.full((2,), float("nan"), dtype=torch.float64),
        params=SamplingParams(temperature=0.0),
        banned_C=torch.tensor([1]),
    )
    assert tokens_B.tolist() == [2, 0]


@pytest.mark.parametrize("vocabulary_size", [6, 4200])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_tokens_of_probability_zero_are_never_drawn(vocabulary_size: int, uniform: float) -> None:
    """The extreme uniforms give the first and the last token that have any probability."""
    logits_BV = torch.full((1, vocabulary_size), float("-inf"))
    logits_BV[0, 2:5] = torch.tensor([1.0, 0.5, 0.3])
    tokens_B, logprobs_B = sample_tokens(
        logits_BV,
        uniforms_B=torch.tensor([uniform], dtype=torch.float64),
        params=SamplingParams(),
        banned_C=None,
    )
    assert tokens_B.item() == (2 if uniform == 0 else 4)
    assert logprobs_B.isfinite().all()


@pytest.mark.parametrize("vocabulary_size", [6, 4200])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9)])
def test_a_row_of_nan_gives_a_token_and_a_nan_logprob(vocabulary_size: int, params: SamplingParams) -> None:
    """A nan does not crash the batch: the row's logprob says it, and the caller reports it."""
    logits_BV = torch.full((1, vocabulary_size), float("nan"))
    tokens_B, logprobs_B = sample_tokens(
        logits_BV, uniforms_B=torch.tensor([0.5], dtype=torch.float64), params=params, banned_C=None
    )
    assert 0 <= tokens_B.item() < vocabulary_size
    assert logprobs_B.isnan().all()


def test_half_precision_logits_are_scaled_in_float32() -> None:
    """bfloat16 logits give the float32 logprobs of the same numbers."""
    logits_BV = _logits(5, 4, 30).bfloat16()
    tokens_B, logprobs_B = sample_tokens(
        logits_BV.clone(),
        uniforms_B=torch.full((4,), 0.4, dtype=torch.float64),
        params=SamplingParams(temperature=0.7),
        banned_C=None,
    )
    expected_B = (logits_BV.float() / 0.7).log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]
    torch.testing.assert_close(logprobs_B, expected_B, atol=1e-6, rtol=1e-6)
