"""The collectives of many processes over torch.distributed: gloo on a CPU, NCCL on GPUs.

All values of a call travel together: bytes where they are only moved, and one buffer a dtype where they are reduced.
Nothing is pickled.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from lightrft.backends.collectives.buffers import reduce_numbers, reduce_tensors
from lightrft.backends.collectives.exchange import broadcast_bytes, gather_bytes, meet
from lightrft.backends.collectives.packing import (
    number_leaves,
    pack_numbers,
    pack_tensors,
    tensor_leaves,
    unpack_numbers,
    unpack_rows,
    unpack_tensors,
)
from lightrft.backends.collectives.process_group import (
    control_device,
    data_device,
    join_group,
    leave_group,
    rank_of_process,
)
from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.reductions import check_gatherable, check_op, check_reducible
from lightrft.backends.collectives.seeding import forget_seed, seed_everything
from lightrft.backends.collectives.timeouts import timeout_of
from lightrft.backends.collectives.trees import Leaf, map_leaves
from lightrft.backends.launch import device_of_process, local_rank_of_launch
from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import (
    AllGather,
    AllReduce,
    Barrier,
    Broadcast,
    ReduceOp,
    SetupDistributed,
    Teardown,
    TensorTree,
    World,
)

__all__ = ["build_collectives", "build_collectives_of"]

_Tree = TypeVar("_Tree", bound=TensorTree)


def build_collectives(config: StrategyConfig) -> CollectiveFunctions:
    """Return the collectives of the default process group, which they make when it is first needed.

    Args:
        config: `seed` and `timeout` are used; the timeout of a group that is there already stays.
    """
    join = _build_join(config)
    return CollectiveFunctions(
        setup_distributed=_build_setup(config),
        teardown=_build_teardown(config),
        all_reduce=_build_all_reduce(join),
        all_gather=_build_all_gather(join),
        broadcast=_build_broadcast(join),
        barrier=_build_barrier(join),
        get_rank=rank_of_process,
        is_rank_0=_is_rank_0,
        print=_print,
    )


def build_collectives_of(group: dist.ProcessGroup, world: World) -> CollectiveFunctions:
    """Return the collectives of a process group that holds all ranks of the default one; it stays as it is.

    Args:
        group: the process group.
        world: this process's place.
    """

    def join() -> dist.ProcessGroup:
        return group

    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        del timeout  # the group has its own
        return world

    def teardown() -> None:
        return

    return CollectiveFunctions(
        setup_distributed=setup_distributed,
        teardown=teardown,
        all_reduce=_build_all_reduce(join),
        all_gather=_build_all_gather(join),
        broadcast=_build_broadcast(join),
        barrier=_build_barrier(join),
        get_rank=rank_of_process,
        is_rank_0=_is_rank_0,
        print=_print,
    )


def _build_setup(config: StrategyConfig) -> SetupDistributed:
    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        join_group(timeout_of(timeout, default=config.timeout))
        seed_everything(config.seed, rank=dist.get_rank())
        return World(
            rank=dist.get_rank(),
            local_rank=local_rank_of_launch(),
            world_size=dist.get_world_size(),
            device=device_of_process(),
        )

    return setup_distributed


def _build_join(config: StrategyConfig) -> Callable[[], dist.ProcessGroup]:
    setup_distributed = _build_setup(config)

    def join() -> dist.ProcessGroup:
        if not dist.is_initialized():  # once there is a group, a set-up might seed streams anew that are in use
            setup_distributed()
        return cast("dist.ProcessGroup", dist.group.WORLD)

    return join


def _build_teardown(config: StrategyConfig) -> Teardown:
    def teardown() -> None:
        if dist.is_initialized():
            forget_seed(config.seed, rank=dist.get_rank())
        leave_group()

    return teardown


def _build_all_reduce(join: Callable[[], dist.ProcessGroup]) -> AllReduce:
    def all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
        group = join()
        numbers = number_leaves(data)
        packed = pack_numbers(numbers, control_device(group))
        meeting = meet(group, "all_reduce", data, options={"op": op}, num_bytes=packed.numel())
        # checked after the ranks have met: what all of them agree on is refused on all of them
        checked = check_op(op)

        def check(leaf: Leaf, path: str) -> Leaf:
            check_reducible(leaf, path, checked)
            return leaf

        map_leaves(check, data)
        found = reduce_tensors(meeting, tensor_leaves(data), checked)
        everyone = [unpack_numbers(part) for part in gather_bytes(meeting, packed)]
        found.update(zip(numbers, reduce_numbers(everyone, checked), strict=True))
        return _replaced(data, found)

    return all_reduce


def _build_all_gather(join: Callable[[], dist.ProcessGroup]) -> AllGather:
    def all_gather(data: _Tree) -> _Tree:
        group = join()
        tensors = tensor_leaves(data)
        packed = pack_tensors(tensors, data_device(group), has_sizes=True)
        meeting = meet(group, "all_gather", data, is_dim_0_free=True, num_bytes=packed.numel())
        map_leaves(check_gatherable, data)
        ranks = [unpack_rows(part, tensors) for part in gather_bytes(meeting, packed)]
        return _replaced(data, {path: torch.cat([rows[path] for rows in ranks]) for path in tensors})

    return all_gather


def _build_broadcast(join: Callable[[], dist.ProcessGroup]) -> Broadcast:
    def broadcast(data: _Tree, src: int = 0) -> _Tree:
        group = join()
        tensors, numbers = tensor_leaves(data), number_leaves(data)
        device = data_device(group)
        written = pack_numbers(numbers, device)
        packed = torch.cat([written, pack_tensors(tensors, device)])
        meeting = meet(group, "broadcast", data, options={"src": src}, num_bytes=packed.numel())
        if src not in range(len(meeting.sizes)):
            last = len(meeting.sizes) - 1
            raise ConfigError(f"src={src!r} is no rank of a world of {last + 1}; use a number from 0 to {last}.")
        map_leaves(_unchanged, data)
        received = broadcast_bytes(meeting, packed, src)
        # numbers take as many bytes as they are long; what is left is tensors, of sizes that all ranks share
        middle = received.numel() - (packed.numel() - written.numel())
        found = unpack_tensors(received[middle:], tensors)
        found.update(zip(numbers, unpack_numbers(received[:middle]), strict=True))
        return _replaced(data, found)

    return broadcast


def _build_barrier(join: Callable[[], dist.ProcessGroup]) -> Barrier:
    def barrier() -> None:
        meet(join(), "barrier", {})

    return barrier


def _replaced(data: _Tree, found: Mapping[str, Leaf]) -> _Tree:
    def replace(leaf: Leaf, path: str) -> Leaf:
        del leaf
        return found[path]

    return map_leaves(replace, data)


def _unchanged(leaf: Leaf, path: str) -> Leaf:
    del path
    return leaf


def _is_rank_0() -> bool:
    return rank_of_process() == 0


def _print(*values: object) -> None:
    if _is_rank_0():
        builtins.print(*values, flush=True)  # noqa: T201 (printing is what it is for)
