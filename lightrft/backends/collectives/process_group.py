"""The default process group: made from what the launcher says, or taken as it is found.

What has to be remembered is remembered by the group itself, so that no strategy holds it: its description says who made
it, and its store counts the calls of every rank.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lightrft.backends.launch import device_of_process, local_rank_of_launch, world_size_of_launch
from lightrft.errors import CollectiveError, ConfigError

__all__ = ["control_device", "data_device", "join_group", "leave_group", "rank_of_process", "reason_of"]

_OURS = "lightrft"
"""Description of a group that `join_group` made."""


def join_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return the default process group; without one, make it from the launcher's variables.

    Without a launcher the world has one rank. A group that was found keeps its own timeout.

    Args:
        timeout: how long a collective of a new group waits for a missing rank.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict one another.
        CollectiveError: not all ranks came.
    """
    if not dist.is_initialized():
        _make_group(timeout)
    return cast("dist.ProcessGroup", dist.group.WORLD)


def leave_group() -> None:
    """Destroy the default process group if `join_group` made it."""
    if dist.is_initialized() and cast("dist.ProcessGroup", dist.group.WORLD).group_desc == _OURS:
        dist.destroy_process_group()


def rank_of_process() -> int:
    """Return the rank in the default process group, or, before there is one, what the launcher says."""
    return dist.get_rank() if dist.is_initialized() else _rank_of_launch()


def control_device(group: dist.ProcessGroup) -> torch.device:
    """Return where numbers and descriptions travel: on the CPU if the group can, which spares the GPU a wait.

    Args:
        group: the process group.
    """
    return torch.device("cpu") if "cpu" in _backends(group) else torch.device(device_of_process())


def data_device(group: dist.ProcessGroup) -> torch.device:
    """Return where tensors travel, the same kind of device on every rank, wherever the tensors themselves are.

    Args:
        group: the process group.
    """
    return torch.device(device_of_process() if _backends(group).get("cuda") == "nccl" else "cpu")


def reason_of(error: Exception) -> str:
    """Return the first sentence of what torch says, without the place in its sources.

    Args:
        error: what it raised.
    """
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}


def _make_group(timeout: timedelta) -> None:
    if device_of_process() != "cpu":
        torch.cuda.set_device(local_rank_of_launch())
    rank, world_size = _rank_of_launch(), world_size_of_launch()
    try:
        dist.init_process_group(
            backend="gloo" if device_of_process() == "cpu" else "cpu:gloo,cuda:nccl",
            store=_new_store(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise CollectiveError(
            f"setup_distributed: rank {rank} of {world_size} met no process group within {timeout.total_seconds():g} "
            f"seconds ({reason_of(error)}); start all ranks, with the same MASTER_ADDR and MASTER_PORT."
        ) from error
    group = cast("dist.ProcessGroup", dist.group.WORLD)
    group._set_group_desc(_OURS)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # no public way names the default group


def _new_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    if world_size == 1:
        return HashStore()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set and WORLD_SIZE={world_size}; start with torchrun, or set it.")
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    # a launcher's store outlives the group, and a second group must not find the addresses of the first
    generation = store.add(f"{_OURS}/generation/{rank}", 1)
    return PrefixStore(f"{_OURS}/{generation}", store)


def _rank_of_launch() -> int:
    written, world_size = os.environ.get("RANK", "0"), world_size_of_launch()
    if not written.isascii() or not written.isdigit() or int(written) >= world_size:
        raise ConfigError(
            f"RANK={written!r} is no integer from 0 to WORLD_SIZE - 1 = {world_size - 1}; start with torchrun."
        )
    return int(written)
