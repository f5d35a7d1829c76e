"""The global random streams of a process: Python's, torch's on the CPU, numpy's if it is loaded, the CUDA device's."""

from __future__ import annotations

import random
import sys

import attrs
import torch
from torch import Tensor

__all__ = ["Streams", "capture_streams", "new_streams", "restore_streams"]


@attrs.frozen(kw_only=True, eq=False)
class Streams:
    """Where each stream is.

    Attributes:
        python: of the module `random`.
        torch: of the default generator.
        numpy: of `numpy.random`; None where it is not loaded.
        cuda: of this process's CUDA device; None where nothing uses one yet.
    """

    python: tuple[object, ...]
    torch: Tensor
    numpy: object
    cuda: Tensor | None


def new_streams(seed: int) -> Streams:
    """Return streams that begin at a seed; those of the process stay as they are.

    Args:
        seed: the same for all of them.
    """
    numpy = sys.modules.get("numpy")
    return Streams(
        python=random.Random(seed).getstate(),  # noqa: S311 (no secret)
        torch=torch.Generator().manual_seed(seed).get_state(),
        numpy=None if numpy is None else numpy.random.RandomState(seed).get_state(),
        cuda=torch.Generator("cuda").manual_seed(seed).get_state() if _uses_cuda() else None,
    )


def capture_streams() -> Streams:
    """Return where the streams of this process are; none of them moves."""
    numpy = sys.modules.get("numpy")
    return Streams(
        python=random.getstate(),
        torch=torch.get_rng_state(),
        numpy=None if numpy is None else numpy.random.get_state(),
        cuda=torch.cuda.get_rng_state() if _uses_cuda() else None,
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
    if streams.cuda is not None:
        torch.cuda.set_rng_state(streams.cuda)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it unannotated
