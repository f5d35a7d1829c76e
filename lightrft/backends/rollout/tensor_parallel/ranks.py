"""The ranks that run one engine together, and how each hears what the others say."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import cast

import attrs
import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineCrashError

__all__ = ["RankGroup", "hear_all", "join_ranks", "leave_ranks"]


@attrs.define(kw_only=True, eq=False)
class RankGroup:
    """Some ranks of the world; a handle.

    Attributes:
        ranks: their numbers in the world, in order.
        place: which of them this process is, from 0.
        process_group: gloo's, of these ranks alone; None once this process has left.
    """

    ranks: tuple[int, ...]
    place: int
    process_group: dist.ProcessGroup | None


def join_ranks(size: int, *, timeout: float) -> RankGroup:
    """Return the group of neighbouring ranks that this process belongs to; all ranks of the world call it.

    Args:
        size: number of ranks in a group.
        timeout: seconds that a rank waits for the others.

    Raises:
        ConfigError: the ranks of the world do not make whole groups.
        EngineCrashError: not all ranks came.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size % size:
        raise ConfigError(
            f"tensor_parallel_size={size!r} does not divide the number of ranks, {world_size}; set it to a divisor, or "
            f"start {size * (world_size // size + 1)} ranks."
        )
    found: list[RankGroup] = []
    for first in range(0, world_size, size):
        ranks = tuple(range(first, first + size))
        try:
            made = dist.new_group(
                ranks, timeout=timedelta(seconds=timeout), backend="gloo", group_desc="lightrft engine"
            )
        except RuntimeError as error:  # gloo and the store raise no narrower type
            raise EngineCrashError(_absent(ranks, error)) from error
        if dist.get_rank() in ranks:
            group = cast("dist.ProcessGroup", made)
            found.append(RankGroup(ranks=ranks, place=dist.get_rank() - first, process_group=group))
    return found[0]


def hear_all(group: RankGroup, mine: bytes) -> list[bytes]:
    """Return what each rank of the group says, in their order.

    Args:
        group: ranks that all make this call.
        mine: what this rank says.

    Raises:
        EngineCrashError: a rank has ended, or did not come within the timeout.
    """
    try:
        sizes = _gather(group, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        parts = _gather(group, padded)
    except RuntimeError as error:
        raise EngineCrashError(_absent(group.ranks, error)) from error
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def leave_ranks(group: RankGroup) -> None:
    """Leave the group; a rank that waits for this one is told so at once.

    Args:
        group: a group, also one that was left or has lost a rank.
    """
    left, group.process_group = group.process_group, None
    if left is not None and dist.is_initialized():  # else it went with the default group
        with suppress(RuntimeError):  # what is broken need not be taken apart in good order
            dist.destroy_process_group(left)


def _gather(group: RankGroup, mine: torch.Tensor) -> list[torch.Tensor]:
    if group.process_group is None:
        raise RuntimeError("this rank has left them")
    parts = [torch.empty_like(mine) for _ in group.ranks]
    dist.all_gather(parts, mine, group=group.process_group)
    return parts


def _absent(ranks: tuple[int, ...], error: Exception) -> str:
    said = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    listed = ", ".join(map(str, ranks))
    return (
        f"ranks {listed} run one engine, and one of them has ended or did not come within engine.timeout_seconds "
        f"({said}); start the ranks again."
    )
