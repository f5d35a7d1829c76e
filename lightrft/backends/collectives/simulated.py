"""The collectives of n ranks in one process, for tests: exact, deterministic, and strict about what ranks agree on."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import NoReturn, TypeVar, cast

import torch

from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.reductions import check_gatherable, check_op, check_reducible
from lightrft.backends.collectives.seeding import forget_seed, seed_everything
from lightrft.backends.collectives.simulated_world import current_rank, exchange, meeting_apart, run_simulated
from lightrft.backends.collectives.timeouts import timeout_of
from lightrft.backends.collectives.trees import Leaf, map_leaves
from lightrft.backends.launch import device_of_process
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import ReduceOp, SetupDistributed, Teardown, TensorTree, World

__all__ = ["apart_of_simulated", "build_collectives", "run_simulated"]

_Tree = TypeVar("_Tree", bound=TensorTree)
_COMBINE: Mapping[ReduceOp, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"mean": torch.add, "sum": torch.add, "max": torch.maximum, "min": torch.minimum}
)


def build_collectives(config: StrategyConfig) -> CollectiveFunctions:
    """Return the collectives of the ranks of `run_simulated`; elsewhere they raise `UnsupportedError` when called.

    Args:
        config: `seed` is used.
    """
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


def apart_of_simulated() -> CollectiveFunctions | None:
    """Return collectives for a second thread of each simulated rank; None where no rank is simulated.

    Such a thread may gather and broadcast. A rank that waits for its own must have let the others begin theirs, since
    it holds the baton: after a collective, say.
    """
    meet = meeting_apart()
    if meet is None:
        return None

    def all_gather(data: _Tree) -> _Tree:
        return _concatenated(data, meet(data))

    def broadcast(data: _Tree, src: int = 0) -> _Tree:
        return _of_rank(data, meet(data), src)

    def refuse(*values: object, **options: object) -> NoReturn:
        del values, options
        raise UnsupportedError("a second thread of a simulated rank gathers and broadcasts alone; use all_gather.")

    return CollectiveFunctions(
        setup_distributed=refuse,
        teardown=refuse,
        all_reduce=refuse,
        all_gather=all_gather,
        broadcast=broadcast,
        barrier=refuse,
        get_rank=refuse,
        is_rank_0=refuse,
        print=refuse,
    )


def _build_setup(config: StrategyConfig) -> SetupDistributed:
    def setup_distributed(timeout: timedelta | float | None = None) -> World:
        rank = current_rank()
        timeout_of(timeout, default=config.timeout)  # nothing here waits, but what is wrong elsewhere is wrong here
        seed_everything(config.seed, rank=rank.number)
        return World(
            rank=rank.number,
            local_rank=rank.number,
            world_size=len(rank.world.ranks),
            device=device_of_process(),  # where the training functions of this process put their models
        )

    return setup_distributed


def _build_teardown(config: StrategyConfig) -> Teardown:
    def teardown() -> None:
        forget_seed(config.seed, rank=current_rank().number)

    return teardown


def _all_reduce(data: _Tree, op: ReduceOp = "mean") -> _Tree:
    gathered = exchange("all_reduce", data, options={"op": op})
    # checked after the exchange, as everything else is: what all ranks agree on is refused on all of them
    checked = check_op(op)

    def reduce(leaf: Leaf, path: str) -> Leaf:
        check_reducible(leaf, path, checked)
        return _reduced([cast("Leaf", leaves[path]) for leaves in gathered], checked)

    return map_leaves(reduce, data)


def _reduced(values: list[Leaf], op: ReduceOp) -> Leaf:
    if isinstance(values[0], torch.Tensor):
        return _reduced_tensors(cast("list[torch.Tensor]", values), op)
    if isinstance(values[0], bool):
        return any(values) if op == "max" else all(values)
    if isinstance(values[0], int):
        whole = cast("list[int]", values)  # of any size, so they stay Python's
        return sum(whole) if op == "sum" else max(whole) if op == "max" else min(whole)
    reduced = _reduced_tensors([torch.tensor(value, dtype=torch.float64) for value in values], op)
    return float(reduced.item())


def _reduced_tensors(values: list[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    dtype = values[0].dtype
    is_narrow = dtype.is_floating_point and dtype.itemsize < 4  # these are added in float32 and rounded once
    total = values[0].float() if is_narrow else values[0]
    for value in values[1:]:
        total = _COMBINE[op](total, value)
    return (total / len(values) if op == "mean" else total).to(dtype)


def _all_gather(data: _Tree) -> _Tree:
    return _concatenated(data, exchange("all_gather", data, is_dim_0_free=True))


def _concatenated(data: _Tree, gathered: Sequence[Mapping[str, object]]) -> _Tree:
    def gather(leaf: Leaf, path: str) -> Leaf:
        check_gatherable(leaf, path)
        parts = [cast("torch.Tensor", leaves[path]) for leaves in gathered]
        return torch.cat([part.reshape(1) if part.dim() == 0 else part for part in parts])

    return map_leaves(gather, data)


def _broadcast(data: _Tree, src: int = 0) -> _Tree:
    return _of_rank(data, exchange("broadcast", data, options={"src": src}), src)


def _of_rank(data: _Tree, gathered: Sequence[Mapping[str, object]], src: int) -> _Tree:
    if src not in range(len(gathered)):
        raise ConfigError(
            f"src={src!r} is no rank of a world of {len(gathered)}; use a number from 0 to {len(gathered) - 1}."
        )

    def copy(leaf: Leaf, path: str) -> Leaf:
        del leaf
        value = cast("Leaf", gathered[src][path])
        return value.clone() if isinstance(value, torch.Tensor) else value

    return map_leaves(copy, data)


def _barrier() -> None:
    exchange("barrier", {})


def _get_rank() -> int:
    return current_rank().number


def _is_rank_0() -> bool:
    return current_rank().number == 0


def _print(*values: object) -> None:
    if _is_rank_0():
        builtins.print(*values, flush=True)  # noqa: T201 (printing is what it is for)
