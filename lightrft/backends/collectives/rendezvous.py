"""Where the processes of a launch meet: a store of the launcher's, or one that rank 0 holds."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from lightrft.backends.launch import address_of_launch, rank_of_launch, world_size_of_launch
from lightrft.errors import CollectiveError, ConfigError

__all__ = ["board_of", "find_board", "host_store", "meet_at_store", "reason_of"]

_OURS = "lightrft"


def meet_at_store(timeout: timedelta) -> Store:
    """Return a store that all processes of the launch share, empty at first.

    Args:
        timeout: how long the others are waited for.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict one another, or the port is in use.
        CollectiveError: not all processes came.
    """
    rank, world_size = rank_of_launch(), world_size_of_launch()
    if world_size == 1:
        return HashStore()
    host, port = address_of_launch()
    url = f"tcp://{_in_url(host)}:{port}?rank={rank}&world_size={world_size}"
    try:
        store: Store = next(rendezvous(url, timeout=timeout))[0]
        mine = PrefixStore(_name_of_launch(), store)
        # a launcher's store outlives the group, and a second group must not find the addresses of the first
        generation = mine.add(f"generation/{rank}", 1)
        return PrefixStore(f"{generation}", mine)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port} is in use on {host} by another program; set it to a free port on all ranks."
            ) from error
        raise CollectiveError(
            f"setup_distributed: rank {rank} of {world_size} met no process group within {timeout.total_seconds():g} "
            f"seconds at {host}:{port} ({reason_of(error)}); start all ranks, with the same MASTER_ADDR and "
            "MASTER_PORT."
        ) from error


def host_store() -> TCPStore:
    """Return a new store for processes of this machine; the system chooses its port, so that it is free."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def board_of(store: Store) -> Store:
    """Return the part of a launch's store in which processes leave word of how they ended.

    Args:
        store: shared by all processes of the launch.
    """
    return PrefixStore(f"{_name_of_launch()}/board", store)


def find_board(timeout: timedelta) -> Store | None:
    """Return the part of this launch's store in which processes leave word of how they ended; None if none answers.

    Nobody is waited for: neither for other processes, nor for rank 0 where the store is its own.

    Args:
        timeout: how long the store may take to answer.
    """
    try:
        if world_size_of_launch() == 1:
            return None
        host, port = address_of_launch()
        # asked plainly first, because a store's client knocks again and again, and writes so to stderr
        with socket.create_connection((host, port), timeout=timeout.total_seconds()):
            pass
        return board_of(TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
    except (ConfigError, OSError, dist.DistError):
        return None


def reason_of(error: Exception) -> str:
    """Return the first sentence of what torch says, without the place in its sources.

    Args:
        error: what it raised.
    """
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]


def _name_of_launch() -> str:
    # two jobs may come to the same port, and torchrun's store outlives a restart of its workers
    job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return f"{_OURS}/{job}/{restart}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
