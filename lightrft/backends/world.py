"""The place of this process among all of them, asked for in the middle of a run."""

from __future__ import annotations

from lightrft.backends.streams import capture_streams, restore_streams
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["world_of"]


def world_of(collectives: Collectives) -> World:
    """Return this process's place in the world, its random streams as they were.

    The first set-up of a process seeds them, and so does one after the user's own `torch.manual_seed`: it must stand.

    Args:
        collectives: what the ranks do together.
    """
    streams = capture_streams()
    world = collectives.setup_distributed()
    restore_streams(streams)
    return world
