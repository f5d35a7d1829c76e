"""What the launcher says about this process, as torchrun writes it into the environment."""

from __future__ import annotations

import os

from lightrft.errors import ConfigError, UnsupportedError

__all__ = ["device_of_process", "local_rank_of_launch", "require_one_process", "world_size_of_launch"]


def world_size_of_launch() -> int:
    """Return how many processes the launcher started: `WORLD_SIZE`, or 1 without a launcher.

    Raises:
        ConfigError: it is no positive integer.
    """
    return _integer("WORLD_SIZE", default=1, low=1)


def local_rank_of_launch() -> int:
    """Return the number of this process among those of its machine: `LOCAL_RANK`, or 0 without a launcher.

    Raises:
        ConfigError: it is no integer from 0 up.
    """
    return _integer("LOCAL_RANK", default=0, low=0)


def device_of_process() -> str:
    """Return what this process computes on: its own CUDA device where there is one, else the CPU."""
    import torch  # whoever only asks for the world size need not wait for it

    return f"cuda:{local_rank_of_launch()}" if torch.cuda.is_available() else "cpu"


def require_one_process(strategy: str) -> None:
    """Refuse a launch of several processes, each of which would train a model of its own.

    Args:
        strategy: registry key of the strategy that works in one process.

    Raises:
        UnsupportedError: the launcher started several processes.
    """
    world_size = world_size_of_launch()
    if world_size > 1:
        raise UnsupportedError(
            f"WORLD_SIZE={world_size} is more than strategy={strategy!r} supports, which is one process (each of "
            f"{world_size} would train alone); start it without torchrun, or with --nproc-per-node=1."
        )


def _integer(name: str, *, default: int, low: int) -> int:
    written = os.environ.get(name, str(default))
    if not written.isascii() or not written.isdigit() or int(written) < low:
        raise ConfigError(f"{name}={written!r} is not an integer from {low} up; unset it, or start with torchrun.")
    return int(written)
