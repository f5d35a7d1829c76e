"""Random streams as a function of (seed, rank), set once.

"Once" needs a memory, and a strategy has none: two strategies of equal configs must be interchangeable between any
two calls. The memory is the stream itself. Torch's generator keeps the number that it was seeded with, and carries it
along when its state is saved and restored, so a process whose stream descends from (seed, rank) shows it, also after a
resume.
"""

from __future__ import annotations

import hashlib
import random
import sys

import torch

__all__ = ["forget_seed", "seed_everything", "stream_seed"]


def stream_seed(seed: int, rank: int) -> int:
    """Return the number that seeds the streams of a rank; other seeds and ranks give unrelated ones.

    Args:
        seed: the config's seed.
        rank: number of the process.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> stream_seed(42, 0) == stream_seed(42, 0), stream_seed(42, 0) == stream_seed(42, 1)
        (True, False)
    """
    digest = hashlib.sha256(f"lightrft stream {seed} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int, rank: int) -> None:
    """Seed the streams of Python, numpy (if loaded) and torch (all devices), unless they descend from (seed, rank).

    Args:
        seed: the config's seed.
        rank: number of this process.
    """
    number = stream_seed(seed, rank)
    if torch.initial_seed() == number:
        return
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % 2**32)  # numpy's global stream takes 32 bits
    torch.manual_seed(number)


def forget_seed(seed: int, rank: int) -> None:
    """Let the next `seed_everything` seed again; streams that do not descend from (seed, rank) stay as they are.

    Torch's stream moves on to another number, itself a function of (seed, rank), because the number is the memory.

    Args:
        seed: the config's seed.
        rank: number of this process.
    """
    number = stream_seed(seed, rank)
    if torch.initial_seed() == number:
        torch.manual_seed(number ^ 1)
