"""Collectives for a second thread of every rank, which do not meet those of the first."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from lightrft.backends.collectives import single
from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.torch_dist import build_collectives_of
from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import World

__all__ = ["collectives_apart"]


@contextmanager
def collectives_apart(world: World) -> Generator[CollectiveFunctions]:
    """Yield collectives of the same ranks over a process group of their own, which is destroyed at the end.

    It is gloo's, whatever the default one is, and has its timeout. All ranks enter together.

    Args:
        world: this process's place.

    Raises:
        ConfigError: the ranks are not those of torch.distributed.
    """
    if world.world_size == 1:
        yield single.build_collectives(StrategyConfig(strategy="single"))
        return
    if not dist.is_initialized() or dist.get_world_size() != world.world_size:
        raise ConfigError(
            f"apart=None, and the {world.world_size} ranks are not those of torch.distributed; pass collectives for a "
            "second thread of each rank."
        )
    group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_timeout(), group_desc="lightrft apart"))
    try:
        yield build_collectives_of(group, world)
    finally:
        if dist.is_initialized():  # else `teardown` came before, and took it along
            dist.destroy_process_group(group)


def _timeout() -> timedelta:
    default = cast("dist.ProcessGroup", dist.group.WORLD)
    # no public way tells it
    options = default._get_backend(default._device_types[0]).options  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return options._timeout  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
