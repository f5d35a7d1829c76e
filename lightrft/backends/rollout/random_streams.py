"""Random numbers that depend on (seed, prompt, sample, position) and on nothing else.

One generator per sequence would cost a call per sequence and step, and one per batch would tie the draws to the
batch's composition. A counter-based generator does neither: the number is a hash of its coordinates, taken for a whole
batch at once. So a request that is split over batches, ranks or machines draws the same numbers.

Shapes: B sequences, T positions.

Reference:
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["stream_keys", "uniforms", "uniforms_at"]

_GOLDEN = -0x61C8864680B583EB  # 2**64 divided by the golden ratio, made odd, as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47  # the two multipliers of SplitMix64's finaliser, as signed 64-bit numbers
_MIX_2 = -0x6B2FB644ECCEEE15
_BITS = 52  # with 52 bits u * total < total holds after rounding too, which 53 do not guarantee


def stream_keys(seed: int, prompt_indices: Sequence[int], sample_indices: Sequence[int]) -> torch.Tensor:
    """Return one key per sequence, which names its random stream.

    Args:
        seed: any integer; its low 64 bits count.
        prompt_indices: number of each sequence's prompt in the whole request.
        sample_indices: number of each sequence among the samples of its prompt.

    Returns:
        int64 tensor (B,) on the CPU.
    """
    keys_B = torch.full((len(prompt_indices),), _signed(seed), dtype=torch.int64)
    for coordinates in (prompt_indices, sample_indices):
        offsets_B = torch.tensor([_signed(index + 1) for index in coordinates], dtype=torch.int64)
        keys_B = _mix(keys_B + offsets_B * _GOLDEN)
    return keys_B


def uniforms(keys_B: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Return a uniform number in [0, 1) for each sequence and position, with 52 random bits.

    Args:
        keys_B: keys from `stream_keys`.
        num_positions: T, how many positions from the first on.

    Returns:
        float64 tensor (T, B).

    Example:
        >>> keys = stream_keys(0, [0, 1], [0, 0])
        >>> bool((uniforms(keys, 8)[:, 1] == uniforms(keys[1:], 8)[:, 0]).all())
        True
    """
    return uniforms_at(keys_B, torch.arange(num_positions, device=keys_B.device).unsqueeze(1))


def uniforms_at(keys_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """Return the uniform number of each sequence at a position of its own, with 52 random bits.

    Args:
        keys_B: keys from `stream_keys`.
        positions_B: a position for each sequence, int64; of any shape that goes with the keys'.

    Returns:
        float64 tensor (B,), or of the shape of both.

    Example:
        >>> keys = stream_keys(0, [0, 1], [0, 0])
        >>> bool(uniforms_at(keys, torch.tensor([2, 5]))[1] == uniforms(keys, 6)[5, 1])
        True
    """
    bits_B = _mix(keys_B + (positions_B + 1) * _GOLDEN)
    return _shift_right(bits_B, 64 - _BITS).double().mul_(2.0**-_BITS)


def _signed(number: int) -> int:
    """Return the low 64 bits of a number, read as a signed one."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Return a logical shift; torch's own `>>` on int64 repeats the sign."""
    shifted: torch.Tensor = (bits >> count) & (2 ** (64 - count) - 1)
    return shifted


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's finaliser of each 64-bit number; int64 products wrap, as they must here."""
    mixed: torch.Tensor = (bits ^ _shift_right(bits, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    return mixed ^ _shift_right(mixed, 31)
