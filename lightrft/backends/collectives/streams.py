"""The global random streams of a process: Python's, torch's on the CPU, and numpy's if it is loaded."""

from __future__ import annotations

import random
import sys

import attrs
import torch

__all__ = ["Streams", "capture_streams", "new_streams", "restore_streams"]


@attrs.frozen(kw_only=True, eq=False)
class Streams:
    """Where each stream is.

    Attributes:
        python: of the module `random`.
        torch: of the default generator.
        numpy: of `numpy.random`; None where it is not loaded.
    """

    python: tuple[object, ...]
    torch: torch.Tensor
    numpy: object


def new_streams(seed: int) -> Streams:
    """Return streams that begin at a seed; those of the process stay as they are.

    Args:
        seed: the same for all three.
    """
    numpy = sys.modules.get("numpy")
    return Streams(
        python=random.Random(seed).getstate(),  # noqa: S311 (no secret)
        torch=torch.Generator().manual_seed(seed).get_state(),
        numpy=None if numpy is None else numpy.random.RandomState(seed).get_state(),
    )


def capture_streams() -> Streams:
    """Return where the streams of this process are; none of them moves."""
    numpy = sys.modules.get("numpy")
    return Streams(
        python=random.getstate(),
        torch=torch.get_rng_state(),
        numpy=None if numpy is None else numpy.random.get_state(),
    )


def restore_streams(streams: Streams) -> None:
    """Set the streams of this process.

    Args:
        streams: where they were, or where they begin.
    """
    random.setstate(streams.python)
    torch.set_rng_state(streams.torch)
    numpy = sys.modules.get("numpy")
    if numpy is not None and streams.numpy is not None:
        numpy.random.set_state(streams.numpy)
