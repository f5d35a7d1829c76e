"""One process: every collective is a copy, under the same checks that many ranks have."""

from __future__ import annotations

import builtins
from datetime import timedelta
from typing import TypeVar

import torch

from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.reductions import check_gatherable, check_op, check_reducible
from lightrft.backends.collectives.seeding import forget_seed, seed_everything
from lightrft.backends.collectives.timeouts import timeout_of
from lightrft.backends.collectives.trees import Leaf, map_leaves
from lightrft.backends.launch import device_of_process, local_rank_of_launch, require_one_process
from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import ReduceOp, SetupDistributed, Teardown, TensorTree, World

__all__ = ["build_collectives"]

_Tree = TypeVar("_Tree", bound=TensorTree)


def build_collectives(config: StrategyConfig) -> CollectiveFunctions:
    """Return the collectives of one process.

    Args:
        config: `seed` is used.

    Raises:
        UnsupportedError: the launcher started several processes.
    """
    require_one_process("single")
    return CollectiveFunctions(
        setup_distributed=_build_setup(config),
        teardown=_build_teardown(config),
        all_reduce=_all_reduce,
        all_gather=_all_gather,
        broadcast=_broadcast,
        barrier=_barrier,
        get_rank=_get_rank,
        is_rank_0=_is_rank_0,
        print=_print,
    )


def _build_setup(config: StrategyConfig) -> SetupDistributed:
    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        require_one_process("single")
        timeout_of(timeout, default=config.timeout)  # nothing here waits, but what is wrong elsewhere is wrong here
        seed_everything(config.seed, rank=0)
        return World(rank=0, local_rank=local_rank_of_launch(), world_size=1, device=device_of_process())

    return setup_distributed


def _build_teardown(config: StrategyConfig) -> Teardown:
    def teardown() -> None:
        forget_seed(config.seed, rank=0)  # so that a second run in this process begins as the first one did

    return teardown


def _copied(leaf: Leaf) -> Leaf:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
    checked = check_op(op)

    def reduce(leaf: Leaf, path: str) -> Leaf:
        check_reducible(leaf, path, checked)
        return _copied(leaf)

    return map_leaves(reduce, data)


def _all_gather(data: _Tree) -> _Tree:
    def gather(leaf: Leaf, path: str) -> Leaf:
        tensor = check_gatherable(leaf, path)
        return _copied(tensor.reshape(1) if tensor.dim() == 0 else tensor)

    return map_leaves(gather, data)


def _broadcast(data: _Tree, src: int = 0) -> _Tree:
    if src != 0:
        raise ConfigError(f"src={src!r} is no rank of a world of 1; use 0.")

    def copy(leaf: Leaf, path: str) -> Leaf:
        del path
        return _copied(leaf)

    return map_leaves(copy, data)


def _barrier() -> None:
    return


def _get_rank() -> int:
    return 0


def _is_rank_0() -> bool:
    return True


def _print(*values: object) -> None:
    builtins.print(*values, flush=True)  # noqa: T201 (printing is what it is for)
