"""The default process group: made from what the launcher says, or taken as it is found.

What has to be remembered is remembered by the group itself, so that no strategy holds it: its description says who made
it, and its store counts the calls of every rank.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from lightrft.backends.collectives.probe import probe_reductions
from lightrft.backends.collectives.rendezvous import meet_at_store, reason_of
from lightrft.backends.launch import device_of_process, rank_of_launch, world_size_of_launch
from lightrft.errors import CollectiveError

__all__ = ["control_device", "data_device", "join_group", "leave_group", "rank_of_process"]

_OURS = "lightrft"
"""Description of a group that `join_group` made."""

_PATIENCE_SECONDS = 10.0


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
    """Destroy the default process group if `join_group` made it, also one that lost a rank.

    A backend may wait for operations that will never end. It is not waited for longer than ten seconds.
    """
    if not dist.is_initialized() or cast("dist.ProcessGroup", dist.group.WORLD).group_desc != _OURS:
        return
    ending = threading.Thread(target=_destroy, daemon=True)
    ending.start()
    ending.join(_PATIENCE_SECONDS)
    if ending.is_alive():
        warnings.warn(
            f"the process group did not end within {_PATIENCE_SECONDS:g} seconds and is left alone; end the process.",
            stacklevel=2,
        )


def _destroy() -> None:
    with suppress(RuntimeError):  # what is broken need not be taken apart in good order
        dist.destroy_process_group()


def rank_of_process() -> int:
    """Return the rank in the default process group, or, before there is one, what the launcher says."""
    return dist.get_rank() if dist.is_initialized() else rank_of_launch()


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


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}


def _make_group(timeout: timedelta) -> None:
    device = device_of_process()
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    store = meet_at_store(timeout)
    rank, world_size = rank_of_launch(), world_size_of_launch()
    try:
        dist.init_process_group(
            backend="gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
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
    if world_size > 1:
        probe_reductions(data_device(group))
