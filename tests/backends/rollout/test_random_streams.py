"""Tests of the counter-based random numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.backends.rollout import random_streams
from lightrft.backends.rollout.random_streams import stream_keys, uniforms, uniforms_at

_WORD = 2**64


def _reference_mix(word: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % _WORD
    return word ^ (word >> 31)


def _reference_uniform(seed: int, prompt: int, sample: int, position: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = _reference_mix((seed + (prompt + 1) * golden) % _WORD)
    key = _reference_mix((key + (sample + 1) * golden) % _WORD)
    return (_reference_mix((key + (position + 1) * golden) % _WORD) >> 12) / 2**52


@given(
    seed=st.integers(-(2**70), 2**70),
    prompts=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    sample=st.integers(0, 2**40),
    num_positions=st.integers(0, 6),
)
@settings(deadline=None, max_examples=60)
def test_equals_python_integers(seed: int, prompts: list[int], sample: int, num_positions: int) -> None:
    """Every number equals SplitMix64 done in unbounded Python integers, whatever the batch and the signs."""
    made_TB = uniforms(stream_keys(seed, prompts, [sample] * len(prompts)), num_positions)
    expected = [[_reference_uniform(seed, prompt, sample, t) for prompt in prompts] for t in range(num_positions)]
    assert made_TB.shape == (num_positions, len(prompts))
    assert made_TB.tolist() == expected


def test_known_stream() -> None:
    """The finaliser is the published one: SplitMix64 seeded with 0 begins with 0xE220A8397B1DCDAF."""
    made_TB = uniforms(torch.zeros(1, dtype=torch.int64), 1)
    assert made_TB.item() == (0xE220A8397B1DCDAF >> 12) / 2**52


def test_streams_look_uniform_and_independent() -> None:
    """Mean, variance, lag-1 and cross-stream correlations of a million numbers are those of independent uniforms."""
    made_TB = uniforms(stream_keys(3, [p for p in range(100) for _ in range(10)], list(range(10)) * 100), 1000)
    assert made_TB.min() >= 0
    assert made_TB.max() < 1
    # Five standard deviations of each estimate over n = 10**6 numbers: 5 * sd / sqrt(n).
    assert abs(made_TB.mean().item() - 0.5) < 5 * 0.2887 / 1000
    assert abs(made_TB.var().item() - 1 / 12) < 5 * 0.0745 / 1000
    centred_TB = (made_TB - 0.5) * 12**0.5
    for shifted, other in ((centred_TB[1:], centred_TB[:-1]), (centred_TB[:, 1:], centred_TB[:, :-1])):
        assert abs((shifted * other).mean().item()) < 5 / 999


def test_every_coordinate_matters() -> None:
    """Other seeds, prompts, samples or positions give other numbers, also when prompt and sample are swapped."""
    keys_B = torch.cat([stream_keys(seed, [0, 0, 1, 1, 2], [0, 1, 0, 1, 0]) for seed in (0, 1)])
    made_TB = uniforms(keys_B, 50)
    assert made_TB.unique().numel() == made_TB.numel()


def test_numbers_are_read_as_64_signed_bits() -> None:
    """The low 64 bits of any integer are read in two's complement, as int64 holds them."""
    for number, signed in (
        (0, 0),
        (-1, -1),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (2**64 + 5, 5),
    ):
        assert random_streams._signed(number) == signed


def test_each_sequence_may_be_at_a_position_of_its_own() -> None:
    """A number asked for by its position is that of the whole stream."""
    keys_B = stream_keys(7, [0, 0, 3, 5], [0, 1, 0, 2])
    positions_B = torch.tensor([0, 9, 4, 2])
    wanted_TB = uniforms(keys_B, 10)
    made_B = uniforms_at(keys_B, positions_B)
    assert made_B.tolist() == [wanted_TB[position, place].item() for place, position in enumerate(positions_B)]
